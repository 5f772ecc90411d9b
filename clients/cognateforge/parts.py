"""The distributions that this project is installed as. Each has a version of its own.

Only the first is always here. The client library imports none of the others: it knows their names, and what they say
of themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution

CLIENT = "cognateforge"
PARTS = (CLIENT, "cognateforge-common", "cognateforge-cognate", "cognateforge-agent")


def installed() -> Iterator[Distribution]:
    """Yield those that are installed here."""
    for name in PARTS:
        try:
            yield distribution(name)
        except PackageNotFoundError:
            continue


def entry_points(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by their names."""
    return {entry.name: entry for part in installed() for entry in part.entry_points.select(group=group)}
