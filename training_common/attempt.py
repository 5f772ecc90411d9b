"""What a trainer sees of the job it works for: the `Attempt` protocol and the reasons to stop.

The worker process gives the trainer an implementation whose every write is conditional on the attempt's fencing
token (`training_common.worker`). A trainer knows nothing of databases, servers or gRPC, so it can be tested with a
plain in-memory attempt.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# What an event or a progress row may carry: JSON, with finite numbers.
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class StopKind(enum.StrEnum):
    """Why an attempt is asked to end before its work is done."""

    PAUSE = "pause"
    CANCEL = "cancel"
    # What it runs on is wanted back: it goes on elsewhere.
    YIELD = "yield"
    # The job has not ended by its deadline.
    DEADLINE = "deadline"
    # The job is no longer this attempt's.
    REVOKED = "revoked"

    @property
    def saves(self) -> bool:
        """Whether the attempt saves a checkpoint first."""
        return self in (StopKind.PAUSE, StopKind.YIELD, StopKind.DEADLINE)


class AttemptStopped(Exception):  # noqa: N818 - an instruction, not an error
    """The attempt must end now; the trainer has saved a checkpoint before it raises this, if the kind `saves`."""

    def __init__(self, kind: StopKind) -> None:
        super().__init__(kind.value)
        self.kind = kind


class AttemptWaits(Exception):  # noqa: N818 - an instruction, not an error
    """What the attempt needs is away: the job goes back to the queue, and its slot to another job meanwhile.

    what: name of what is waited for, as people know it.
    message: what went wrong, in the words of the error that told of it.
    give_up_after_s: seconds without progress after which the job has failed; 0 waits for as long as it takes.
    progressed: whether this attempt came further than the one before it, so that the patience is whole again.
    """

    def __init__(self, what: str, *, message: str, give_up_after_s: float = 0.0, progressed: bool = False) -> None:
        super().__init__(f"{what}: {message}")
        self.what = what
        self.message = message
        self.give_up_after_s = give_up_after_s
        self.progressed = progressed


class TeamBrokenError(RuntimeError):
    """Another process of the job is gone or silent: this one cannot go on, and the job has no part in it."""


class PartDone(Exception):  # noqa: N818 - an instruction, not an error
    """Training is over, and this process only helped with it: it is to end."""


class FencedOutError(RuntimeError):
    """The attempt's fencing token is no longer current: another attempt owns the job, nothing was written."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRef:
    """A checkpoint whose files matched their digests when it was handed out."""

    step: int
    path: Path


class Attempt(Protocol):
    """One attempt at a job, as its trainer sees it."""

    @property
    def job(self) -> str:
        """The job's name, `jobs/<uuid>`."""

    @property
    def workdir(self) -> Path:
        """A folder of this job alone, kept between attempts."""

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        """Record one progress event. `step` counts finished optimizer steps. Metrics not measured are left out."""

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        """Record one event of another kind, for instance `recovery`."""

    def trained(self) -> None:
        """Wait until the last step is saved, and tell that the rest measures. Errors: AttemptStopped; the save's."""

    def stop_requested(self) -> StopKind | None:
        """Return what the job's owner asked for, if anything. Cheap enough to call once a step."""

    @property
    def saves_in_background(self) -> bool:
        """Whether `save_checkpoint` returns before `write` has run: what `write` reads must then be a copy."""

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef] | None:
        """Let `write` fill an empty folder, then digest it, make it durable and record it, all or nothing.

        The save before it is waited for. score: the newest validation, where there was one. Returns None where another
        process of the job writes it.
        Errors: those of the save before, which any other call may raise as well.
        """

    def latest_checkpoint(self) -> CheckpointRef | None:
        """Return the newest checkpoint whose digests hold, or None. Torn ones are skipped and reported."""
