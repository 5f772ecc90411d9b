"""What the benches of acting agents share: an attempt without a server, whose rows can be read, and which can end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from training_common.attempt import CheckpointRef, Json, StopKind


@dataclass
class BenchAttempt:
    """An attempt that keeps rows and events, saves nothing, and is cancelled once `enough` says so of a row."""

    workdir: Path
    enough: Callable[[Mapping[str, Json]], bool] = lambda _: False
    job: str = "jobs/00000000-0000-4000-8000-000000000000"
    saves_in_background: bool = False
    rows: list[dict[str, Json]] = field(default_factory=list)
    events: list[tuple[str, dict[str, Json]]] = field(default_factory=list)

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        self.rows.append(dict(metrics))

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        self.events.append((kind, dict(payload)))

    def trained(self) -> None:
        """Go on to measure."""

    def stop_requested(self) -> StopKind | None:
        return StopKind.CANCEL if self.rows and self.enough(self.rows[-1]) else None

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        folder = self.workdir / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        saved: Future[CheckpointRef] = Future()
        saved.set_result(CheckpointRef(step=step, path=folder))
        return saved

    def latest_checkpoint(self) -> CheckpointRef | None:
        return None
