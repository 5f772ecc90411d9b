"""A verification's replay, over the agents' trainer: every file of the later checkpoint comes out the same."""

from pathlib import Path
from typing import Any, cast

import pytest

from agent_server.data.examples import texts_of
from agent_server.trainer import train_agent
from tests.agent._support import MemoryAttempt, factory, write_foundation
from tests.agent.test_trainer import CONFIG, DATA
from training_common.attempt import AttemptStopped
from training_common.replay import ReplayAttempt, digests_under


@pytest.mark.parametrize("pause_at", [None, 16])
def test_a_replay_saves_what_the_job_saved(tmp_path: Path, pause_at: int | None) -> None:
    """The plan's last checkpoints, and one that a pause made in between. Validation on the way asks for stops, too."""
    foundation = write_foundation(tmp_path / "foundation", list(texts_of(DATA.train)))
    job = MemoryAttempt(tmp_path / "job", stop_at=pause_at)
    try:
        train_agent(CONFIG, foundation, DATA, job, factory=factory())
    except AttemptStopped:
        assert pause_at is not None
    start, target = job.checkpoints[-2:]
    assert (pause_at or CONFIG.total_steps) == target.step
    attempt = ReplayAttempt(
        cast("Any", None), workdir=tmp_path / "scratch", start=start, to_step=target.step, given_up=lambda: False
    )
    while not attempt.reached:
        before = attempt.newest.step
        with pytest.raises(AttemptStopped):
            train_agent(CONFIG, foundation, DATA, attempt, factory=factory())
        assert before < attempt.newest.step
    assert digests_under(target.path) == digests_under(attempt.newest.path)
