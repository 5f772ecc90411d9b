"""Saving beside training: one checkpoint at a time, in order, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from training_common.attempt import CheckpointRef
from training_common.checkpoints import CheckpointFolder


class CheckpointWriter:
    """Hands checkpoints to their folder, at once or in the background.

    An error of the background is raised once in the trainer's thread, as it came.
    """

    def __init__(self, folder: CheckpointFolder, *, background: bool) -> None:
        self.background = background
        self._folder = folder
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointRef] | None = None

    def save(self, *, step: int, write: Callable[[Path], None], score: float | None) -> Future[CheckpointRef]:
        """Save a checkpoint, after the one before is durable. Errors: those of the one before, or of this one."""
        self.settle()
        self._pending = self._executor.submit(self._folder.save, step=step, write=write, score=score)
        saved = self._pending
        if not self.background:
            self.settle()
        return saved

    def check(self) -> None:
        """Raise what ended the save in the background, if it has ended by now and failed."""
        if self._pending is not None and self._pending.done():
            self.settle()

    def settle(self) -> None:
        """Wait until what was saved is durable. Errors: those of the save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until nothing is being written any more, whatever comes of it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait([pending])
        self._executor.shutdown()
