"""Cuts at random steps, also in the middle of a save beside training: no bit of the weights changes."""

import contextlib
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from cognate_server.trainer import pretrain
from tests.cognate._support import CONFIG, CountingStream, MemoryAttempt, weights
from training_common.attempt import AttemptStopped, CheckpointRef, StopKind


class BackgroundAttempt(MemoryAttempt):
    """Writes on another thread, as a worker does, and not before training has gone on by `lag` polls or waits for it.

    cut_at: at this poll the process dies, as far as a test can do that: what is not durable is gone.
    """

    saves_in_background = True

    def __init__(self, workdir: Path, *, cut_at: int | None = None, lag: int = 0) -> None:
        super().__init__(workdir)
        self._cut_at, self._lag, self._seen = cut_at, lag, 0
        self._go: list[tuple[int, threading.Event]] = []
        self._writers: list[threading.Thread] = []
        self._dead = threading.Event()
        self.lost = 0

    def stop_requested(self) -> StopKind | None:
        self._seen += 1
        if self._seen == self._cut_at:
            self._dead.set()
            self._release(sys.maxsize)
            raise AttemptStopped(StopKind.REVOKED)
        self._release(self._seen)
        return None

    def _release(self, seen: int) -> None:
        for poll, event in self._go:
            if poll <= seen:
                event.set()

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        go = threading.Event()
        saved = Lazy(go)
        self._go.append((self._seen + self._lag, go))

        def run() -> None:
            go.wait()
            if self._dead.is_set():
                self.lost += 1
                return
            saved.set_result(MemoryAttempt.save_checkpoint(self, step=step, write=write).result())

        self._writers.append(threading.Thread(target=run))
        self._writers[-1].start()
        return saved

    def close(self) -> None:
        """Lose what is not written yet, as the end of the process would."""
        self._dead.set()
        self._release(sys.maxsize)
        for writer in self._writers:
            writer.join()


class Lazy(Future[CheckpointRef]):
    """A result whose writer starts at the latest when somebody waits for it."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self._go = go

    def result(self, timeout: float | None = None) -> CheckpointRef:
        self._go.set()
        return super().result(timeout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return weights(pretrain(CONFIG, CountingStream(packed=True, carried=True), MemoryAttempt(folder)))


@pytest.mark.parametrize("seed", range(50))
def test_a_run_cut_at_random_ends_with_the_same_bits(seed: int, whole: bytes, tmp_path: Path) -> None:
    """Two cuts each, at any step; saves lag behind training by up to six steps, so that many cuts are within one."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, guards nothing
    for _ in range(2):
        with contextlib.closing(
            BackgroundAttempt(tmp_path, cut_at=chance.randint(1, 12), lag=chance.randint(0, 6))
        ) as cut:
            try:
                pretrain(CONFIG, CountingStream(packed=True, carried=True), cut)
            except AttemptStopped:
                continue
    with contextlib.closing(BackgroundAttempt(tmp_path, lag=chance.randint(0, 6))) as last:
        result = pretrain(CONFIG, CountingStream(packed=True, carried=True), last)
    assert weights(result) == whole
