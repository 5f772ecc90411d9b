"""The secrets of a service's settings. How they are hidden is the client library's matter too."""

from __future__ import annotations

import sqlalchemy as sa

from cognateforge.masking import LONGEST_BYTES, Mask, is_secret_name, secrets_of_environment
from training_common.settings import ServiceSettings

__all__ = ["LONGEST_BYTES", "Mask", "secrets_of", "secrets_of_environment"]


def secrets_of(settings: ServiceSettings) -> list[str]:
    """Return the secrets that the settings hold."""
    password = sa.make_url(settings.database_url).password
    options = settings.artifacts.options.items()
    of_artifacts = [value for name, value in options if is_secret_name(name)]
    of_exporters = [
        value for one in settings.exporters.options.values() for name, value in one.items() if is_secret_name(name)
    ]
    return [str(secret) for secret in (password, settings.consul.token, *of_artifacts, *of_exporters) if secret]
