"""Which release a service is. Each service is a distribution of its own, with its own version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release_of(service: str) -> str:
    """Return the version of the distribution with a service's code.

    service: "cognate" or "agent". A process of neither has the version of what both share.
    """
    try:
        return version(f"cognateforge-{service}")
    except PackageNotFoundError:
        return version("cognateforge-common")
