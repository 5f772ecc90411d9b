"""A verification's replay, over the trainer: every file of the later checkpoint comes out the same."""

from pathlib import Path
from typing import Any, cast

import pytest

from cognate_server.trainer import pretrain
from tests.cognate._support import CONFIG, CountingStream, MemoryAttempt
from training_common.attempt import AttemptStopped, CheckpointRef, StopKind
from training_common.replay import ReplayAttempt, digests_under


def replayed(scratch: Path, start: CheckpointRef, to_step: int) -> ReplayAttempt:
    attempt = ReplayAttempt(cast("Any", None), workdir=scratch, start=start, to_step=to_step, given_up=lambda: False)
    with pytest.raises(AttemptStopped):
        pretrain(CONFIG, CountingStream(packed=True, carried=True), attempt)
    return attempt


@pytest.mark.parametrize("pause_at", [None, 8])
def test_a_replay_saves_what_the_job_saved(tmp_path: Path, pause_at: int | None) -> None:
    """The plan's last checkpoints, and one that a pause made in between; optimizer, GrokFast's EMA and all."""
    stop = None if pause_at is None else (pause_at + 1, StopKind.PAUSE)
    job = MemoryAttempt(tmp_path / "job", stop=stop)
    try:
        pretrain(CONFIG, CountingStream(packed=True, carried=True), job)
    except AttemptStopped:
        assert pause_at is not None
    start, target = (
        CheckpointRef(step=step, path=tmp_path / "job" / f"checkpoint-{step:06d}") for step in job.saved[-2:]
    )
    assert (pause_at or CONFIG.total_steps) == target.step
    before = digests_under(tmp_path / "job")
    attempt = replayed(tmp_path / "scratch", start, target.step)
    assert attempt.reached
    assert digests_under(target.path) == digests_under(attempt.newest.path)
    assert before == digests_under(tmp_path / "job")
