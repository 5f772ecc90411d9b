"""Hides secrets in texts that are kept or sent: known values, and passwords in URLs.

A secret is replaced by as many asterisks as it has bytes, so that whatever stands behind it keeps its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from training_common.settings import ServiceSettings

# scheme://user:PASSWORD@host
_IN_URL = re.compile(rb"(?<=://)([^\s:/@]*:)([^\s/@]+)(?=@)")
_NAMED_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
# A shorter value would hide words of every text.
_SHORTEST_CHARS = 8
# A secret that lies across the border of two parts is found by this much of overlap; no longer one is looked for.
LONGEST_BYTES = 1024


class Mask:
    """Replaces secrets by asterisks."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """values: secrets as they are; those that are too short or too long to be told from other text are left."""
        known = {
            value.encode() for value in values if len(value) >= _SHORTEST_CHARS and len(value.encode()) <= LONGEST_BYTES
        }
        # The longest first: one may be a part of another.
        ordered = sorted(known, key=lambda value: (-len(value), value))
        self._known = re.compile(b"|".join(map(re.escape, ordered))) if ordered else None

    def data(self, text: bytes) -> bytes:
        """Return the bytes with every secret hidden; their number stays."""
        if self._known is not None:
            text = self._known.sub(lambda found: b"*" * len(found[0]), text)
        return _IN_URL.sub(lambda found: found[1] + b"*" * len(found[2]), text)

    def text(self, text: str) -> str:
        """Return the text with every secret hidden."""
        return self.data(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def secrets_of_environment(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of the variables whose names speak of secrets."""
    variables = os.environ if environment is None else environment
    return [value for name, value in variables.items() if _NAMED_SECRET.search(name)]


def secrets_of(settings: ServiceSettings) -> list[str]:
    """Return the secrets that the settings hold."""
    password = sa.make_url(settings.database_url).password
    options = settings.artifacts.options.items()
    of_artifacts = [value for name, value in options if _NAMED_SECRET.search(name)]
    return [str(secret) for secret in (password, settings.consul.token, *of_artifacts) if secret]
