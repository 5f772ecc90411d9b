"""One attempt as each of the processes that train together sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from training_common.attempt import Attempt, CheckpointRef, Json, PartDone, StopKind
from training_common.team import ALONE, Team


class TeamAttempt:
    """The first process's attempt, shared with the others: they hear what it finds, and write nothing.

    attempt: on the first process. Every process has to make the same calls in the same order.
    """

    def __init__(self, team: Team, attempt: Attempt | None, *, job: str, workdir: Path) -> None:
        self._team = team
        self._attempt = attempt
        self._job = job
        self._workdir = workdir

    @property
    def job(self) -> str:
        return self._job

    @property
    def workdir(self) -> Path:
        return self._workdir

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        if self._attempt is not None:
            self._attempt.progress(step=step, total_steps=total_steps, metrics=metrics)

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        if self._attempt is not None:
            self._attempt.event(kind, payload)

    def trained(self) -> None:
        """As `Attempt.trained`. Errors: PartDone, on all processes but the first."""
        if self._attempt is None:
            raise PartDone
        self._team = ALONE  # the others end
        self._attempt.trained()

    def stop_requested(self) -> StopKind | None:
        """As `Attempt.stop_requested`, and the same on all processes."""
        kind = self._team.agree(lambda: None if self._attempt is None else self._attempt.stop_requested())
        return None if kind is None else StopKind(kind)

    @property
    def saves_in_background(self) -> bool:
        return self._attempt is not None and self._attempt.saves_in_background

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef] | None:
        """As `Attempt.save_checkpoint`; None on all processes but the first."""
        return None if self._attempt is None else self._attempt.save_checkpoint(step=step, write=write, score=score)

    def latest_checkpoint(self) -> CheckpointRef | None:
        """As `Attempt.latest_checkpoint`, and the same on all processes: they share the folder."""

        def find() -> tuple[int, str] | None:
            found = None if self._attempt is None else self._attempt.latest_checkpoint()
            return None if found is None else (found.step, str(found.path))

        found = self._team.agree(find)
        return None if found is None else CheckpointRef(step=found[0], path=Path(found[1]))
