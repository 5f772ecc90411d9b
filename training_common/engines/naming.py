"""Names of workers on clusters, which are their handles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath


def name_of(log_name: str, arguments: Sequence[str]) -> str:
    """Return a DNS label for one worker: of a job's attempt, or of a try at a verification.

    A worker is launched once, so a name that is taken was taken by a call whose answer was lost.
    """
    log, number = PurePosixPath(log_name), arguments[arguments.index("--attempt") + 1]
    what, _, of = log.stem.partition("-")
    return f"forge-{log.parts[0]}-{number}" if what == "attempt" else f"forge-{what}-{of}-{number}"
