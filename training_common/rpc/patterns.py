"""The contract's patterns in words: a refusal says what is asked for and what to do, and quotes no expression."""

from __future__ import annotations

from collections.abc import Mapping

_VERSION = "a family and its version, for instance `intent-router@3`"
_NAME = "1 to 48 lower-case letters, digits and dashes, a letter first, for instance `intent-router`"
_WORD = "1 to 48 lower-case letters, digits and underscores, a letter first"
_LATEST = "leave the version out for the newest"
_PATH = (
    "a path relative to the server's folder: names of letters, digits, `.`, `_` and `-` that do not begin with `.` or "
    "`-`, with single slashes between them; rename what is called otherwise, and move what lies elsewhere"
)


def _of(kind: str) -> str:
    return f"the name of one, as the server gave it: `{kind}/` and 36 characters"


WORDS: Mapping[str, str] = {
    "^([a-z][a-z0-9-]{0,47}@[1-9][0-9]{0,8}|jobs/[0-9a-f-]{36})$": f"{_VERSION}, or a job's name",
    "^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$": "a set of the hub, as `OWNER/NAME`",
    "^[A-Za-z0-9_.:/-]+$": "a registered name of letters, digits, `_`, `.`, `:`, `/` and `-`, for instance "
    "`CartPole-v1`",
    "^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$": _PATH,
    "^[a-z][a-z0-9-]{0,47}$": _NAME,
    "^[a-z][a-z0-9-]{0,47}(@([1-9][0-9]{0,8}|[a-z][a-z0-9-]{0,47}))?$": f"{_VERSION}, or an alias after the `@`; "
    f"{_LATEST}",
    "^[a-z][a-z0-9-]{0,47}(@[1-9][0-9]{0,8})?$": f"{_VERSION}; {_LATEST}",
    "^[a-z][a-z0-9-]{0,47}@[1-9][0-9]{0,8}$": _VERSION,
    "^[a-z][a-z0-9_]{0,47}$": _WORD,
    "^([A-Za-z0-9][A-Za-z0-9._-]{0,127})?$": "a configuration of the set: up to 128 letters, digits, `.`, `_` and `-`",
    "^([a-z][a-z0-9-]{0,47}(@[1-9][0-9]{0,8})?)?$": f"empty, or {_VERSION}; {_LATEST}",
    "^([a-z][a-z0-9-]{0,47})?$": f"empty, or {_NAME}",
    "^([a-z][a-z0-9-]{0,47}@[1-9][0-9]{0,8})?$": f"empty, or {_VERSION}",
    "^([a-z][a-z0-9_]{0,47})?$": f"empty, or {_WORD}",
    "^(reservations/[0-9a-f-]{36})?$": f"empty, or {_of('reservations')}",
    "^(sha256:[0-9a-f]{64})?$": "empty, or `sha256:` and 64 lower-case hexadecimal digits",
    "^([0-9a-f]{32})?$": "empty, or a trace of 32 lower-case hexadecimal digits",
    "^[0-9a-f]{40}$": "a commit of 40 lower-case hexadecimal digits: a branch or a tag may be another set tomorrow",
    "^sha256:[0-9a-f]{64}$": "`sha256:` and 64 lower-case hexadecimal digits",
    **{f"^{kind}/[0-9a-f-]{{36}}$": _of(kind) for kind in ("jobs", "leases", "reservations", "verifications")},
}


def in_words(pattern: str) -> str:
    """Return "must be ..." for a pattern, and the pattern itself where there are no words for it."""
    words = WORDS.get(pattern)
    return f"must be {words}" if words else f"must match the pattern `{pattern}`"
