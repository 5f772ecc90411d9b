"""Training policies: better than chance, resumable bit for bit from anywhere, agents that are kept in step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from agent_server.metrics import EVALUATIONS, METRICS
from agent_server.optim import Optimization
from agent_server.rl.config import PolicyConfig
from agent_server.rl.recovery import TeamLimits, TeamRecoveryManager
from agent_server.rl.trainer import train_policy
from agent_server.trainer import AgentResult
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError, InvalidFieldError, TrainingDivergedError
from tests.agent import meeting_v0
from tests.agent._support import measured, weights
from tests.agent.acting import ActingAttempt, meeting_config, signal_config
from tests.agent.policies import policies
from training_common.attempt import AttemptStopped, StopKind
from training_common.replay import ReplayAttempt, digests_under


def run(attempt: ActingAttempt, config: PolicyConfig, **options: Any) -> AgentResult:
    return train_policy(config, attempt, factory=policies(), **options)


def differing(one: AgentResult, other: AgentResult) -> list[str]:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


# --- learning


@pytest.mark.parametrize(
    "settings", [{}, {"normalize_observations": True, "normalize_rewards": True, "activation": "relu", "layers": 2}]
)
def test_a_policy_learns_what_pays(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Naming the key that is shown is worth 8 an episode, and a third of that by chance."""
    attempt = ActingAttempt(tmp_path)
    got = measured(run(attempt, signal_config(settings={"hidden_size": 16, "layers": 1, **settings})))
    assert got["return_random"] < 5
    assert got["return_after"] > 7.5
    assert {"return_before", "return_random", "return_after", "deployment_readiness"} == set(got)
    assert 1.0 == got["deployment_readiness"]
    assert attempt.rows[-1][1]["return"] > attempt.rows[0][1]["return"]  # type: ignore[operator]


def test_a_policy_learns_numbers(tmp_path: Path) -> None:
    """Actions of a box: the squared distance to a shown number falls far below that of chance."""
    config = signal_config(environment="tests.agent.acting:Aim-v0", environment_steps=64 * 30)
    got = measured(run(ActingAttempt(tmp_path), config))
    assert got["return_after"] > got["return_random"] / 4


@pytest.mark.parametrize("coordination", ["independent", "shared_parameters", "centralized_critic"])
def test_agents_learn_to_act_together(tmp_path: Path, coordination: str) -> None:
    """The shared return rises over random play, and rests on what each of them sees."""
    result = run(ActingAttempt(tmp_path), meeting_config(coordination=coordination))
    got = measured(result)
    assert got["return_random"] < 4
    assert got["return_after"] > 7
    assert 3 < got["coordination"] <= got["return_after"]
    assert {e.dataset for e in result.evaluations} == {"tests.agent/meeting_v0"}
    assert coordination == json.loads((result.folder / "config.json").read_text())["coordination"]


def test_progress_says_what_was_measured(tmp_path: Path) -> None:
    """A row for each update; returns of validations where there was one; names that are defined."""
    attempt = ActingAttempt(tmp_path)
    result = run(attempt, signal_config())
    assert [8 * update for update in range(1, 13)] == [step for step, _ in attempt.rows]
    assert [24, 48, 72] == [step for step, metrics in attempt.rows if "validation_return" in metrics]
    assert {name for _, metrics in attempt.rows for name in metrics} <= METRICS.keys()
    assert {e.metric for e in result.evaluations} <= EVALUATIONS.keys()
    assert [24, 48, 72, 96] == [checkpoint.step for checkpoint in attempt.checkpoints]
    assert 12 == attempt.rows_when_trained
    assert 64 * 12 == attempt.rows[-1][1]["environment_steps"]
    assert all(0 <= metrics["policy_drift"] < 1 for _, metrics in attempt.rows)  # type: ignore[operator]


def test_the_folder_is_complete(tmp_path: Path) -> None:
    """Weights, configuration and a card with the measured figures."""
    result = run(ActingAttempt(tmp_path), meeting_config(environment_steps=64 * 2))
    assert {"model.safetensors", "config.json", "README.md", "run.py"} <= {p.name for p in result.folder.iterdir()}
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    after = measured(result)["return_after"]
    assert f"| mean return | tests.agent/meeting_v0 | {after:.4f} | 8 |" in card
    assert "- agent_2: sees 3 numbers, gives one of 3" in card
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert ("policy", "multi_agent") == (config["architecture"], config["task"])
    assert sum(value.numel() for value in weights(result).values()) == result.total_parameters


# --- stops


NORMALIZED = {"hidden_size": 16, "layers": 1, "normalize_observations": True, "normalize_rewards": True}


@pytest.fixture(scope="module", params=[signal_config, meeting_config])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A configuration, and what comes of it without a stop."""
    config = request.param(settings=NORMALIZED, environment_steps=64 * 11)
    return config, run(ActingAttempt(tmp_path_factory.mktemp("whole")), config)


@pytest.mark.parametrize("stop_after", [3, 20, 55, 100])
def test_a_paused_run_ends_like_an_uninterrupted_one(uninterrupted: Any, tmp_path: Path, stop_after: int) -> None:
    """PAUSE before the first rollout, inside rollouts, inside updates: same bits, same figures."""
    config, whole = uninterrupted
    cut = ActingAttempt(tmp_path / "cut", stop_after=stop_after)
    with pytest.raises(AttemptStopped) as stopped:
        run(cut, config)
    assert StopKind.PAUSE is stopped.value.kind
    assert cut.checkpoints
    torch.rand(7)  # another process has another random state
    resumed = run(dataclasses.replace(cut, stop_after=None), config)
    assert [] == differing(whole, resumed)
    assert whole.evaluations == resumed.evaluations


@pytest.mark.parametrize("pause_at", [None, 40])
def test_a_replay_saves_what_the_job_saved(tmp_path: Path, pause_at: int | None) -> None:
    """A verification, over this trainer: planned checkpoints, and one that a pause made in between."""
    config = meeting_config(environment_steps=64 * 8, validation_interval_steps=16)
    job = ActingAttempt(tmp_path / "job", stop_at=pause_at)
    with contextlib.suppress(AttemptStopped):
        run(job, config)
    start, target = job.checkpoints[-2:]
    assert (24, 40) if pause_at else (48, 64) == (start.step, target.step)
    attempt = ReplayAttempt(
        cast("Any", None), workdir=tmp_path / "scratch", start=start, to_step=target.step, given_up=lambda: False
    )
    while not attempt.reached:
        before = attempt.newest.step
        with pytest.raises(AttemptStopped):
            run(cast("Any", attempt), config)
        assert before < attempt.newest.step
    assert digests_under(target.path) == digests_under(attempt.newest.path)


def test_a_crash_loses_only_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """An attempt that died between two checkpoints is repeated from the older one, to the same bits."""
    whole = run(ActingAttempt(tmp_path / "whole"), signal_config())
    died = ActingAttempt(tmp_path / "died", stop_at=40, stop_kind=StopKind.REVOKED)
    with pytest.raises(AttemptStopped):
        run(died, signal_config())
    assert [24] == [checkpoint.step for checkpoint in died.checkpoints]
    resumed = run(dataclasses.replace(died, stop_at=None, rows=[]), signal_config())
    assert [] == differing(whole, resumed)


@pytest.mark.parametrize("kind", [StopKind.CANCEL, StopKind.REVOKED])
def test_a_cancelled_run_leaves_no_checkpoint(tmp_path: Path, kind: StopKind) -> None:
    """CANCEL and REVOKED end the attempt where it stands."""
    attempt = ActingAttempt(tmp_path, stop_at=8, stop_kind=kind)
    with pytest.raises(AttemptStopped):
        run(attempt, signal_config())
    assert [] == attempt.checkpoints


def test_an_environment_that_does_not_repeat_itself_is_told_of(tmp_path: Path) -> None:
    """A resumed run whose episodes began anew says so, and goes on."""
    config = signal_config(environment="tests.agent.acting:Restless-v0")
    # Inside an episode of 8 steps: rollouts of 12 end there.
    config = dataclasses.replace(config, rollout_steps=12)
    attempt = ActingAttempt(tmp_path, stop_at=24)
    with pytest.raises(AttemptStopped):
        run(attempt, config)
    resumed = dataclasses.replace(attempt, stop_at=None, rows=[])
    run(resumed, config)
    assert ["episodes_renewed"] == [kind for kind, _ in resumed.events]
    assert "does not repeat an episode" in str(resumed.events[0][1]["message"])


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    """A checkpoint goes on only with the configuration that it was made with."""
    attempt = ActingAttempt(tmp_path)
    run(attempt, signal_config())
    with pytest.raises(ArtifactCorruptError, match="another training plan"):
        run(attempt, signal_config(seed=4))


# --- going on from a published policy


def test_a_policy_goes_on_from_a_published_one(tmp_path: Path) -> None:
    """It begins as well as the other one ended; one that does not fit is refused."""
    first = run(ActingAttempt(tmp_path / "first"), signal_config())
    parent = {"parent": "signal-reader@1", "parent_digest": "sha256:" + "0" * 64}
    # It has the settings of the one that it goes on from.
    config = signal_config(environment_steps=64, settings={}, **parent)
    second = run(ActingAttempt(tmp_path / "second"), config, parent_dir=first.folder)
    assert measured(first)["return_after"] == measured(second)["return_before"]
    assert weights(first).keys() == weights(second).keys()
    assert "signal-reader@1 (sha256:0" in (second.folder / "README.md").read_text()
    with pytest.raises(IncompatibleError, match="its spaces or its coordination are others"):
        run(ActingAttempt(tmp_path / "third"), signal_config(environment="CartPole-v1"), parent_dir=first.folder)


# --- trouble


def test_one_agents_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """Rewards that are no numbers would be the end of the weights."""
    config = signal_config(environment="tests.agent.acting:Poisoned-v0")
    config = dataclasses.replace(config, evaluation_episodes=1)
    with pytest.raises(TrainingDivergedError, match="not finite"):
        run(ActingAttempt(tmp_path), config)
    assert not (tmp_path / "agent").exists()


def test_the_environment_must_have_so_many_agents(tmp_path: Path) -> None:
    """An environment that says how many act is believed."""
    config = meeting_config(environment="mpe/simple_speaker_listener_v4", modules=("mpe2",))
    with pytest.raises(InvalidFieldError, match="must be 2 for mpe/simple_speaker_listener_v4, not 3"):
        run(ActingAttempt(tmp_path), config)


# --- agents out of step

LIMITS = TeamLimits()


def test_what_is_in_step_is_left_alone() -> None:
    """Equal versions and a drift that is small, or like the others', are no trouble; one agent has no others."""
    manager = TeamRecoveryManager(("a", "b", "c"), LIMITS)
    assert manager.observe_update(1, (4, 4, 4), (0.02, 0.24, 0.001)) is None
    assert manager.observe_update(2, (5, 5, 5), (0.9, 0.2, 0.3)) is None
    assert TeamRecoveryManager(("a",), LIMITS).observe_update(1, (1,), (9.0,)) is None


@pytest.mark.parametrize(
    ("versions", "drift", "detector", "agent"),
    [
        ((4, 3, 4), (0.01, 0.01, 0.01), "version_skew", "b"),
        ((4, 4, 4), (0.01, 0.02, 0.3), "drift", "c"),
        ((4, 4, 4), (0.01, float("nan"), 0.3), "drift", "b"),
        ((4, 3, 4), (9.0, 0.0, 0.0), "version_skew", "b"),
    ],
)
def test_who_is_out_of_step_is_named(
    versions: tuple[int, ...], drift: tuple[float, ...], detector: str, agent: str
) -> None:
    """The gravest first, with its numbers as JSON can carry them."""
    manager = TeamRecoveryManager(("a", "b", "c"), LIMITS)
    found = manager.observe_update(7, versions, drift)
    assert found is not None
    assert (detector, agent) == (found.detector, found.evidence["agent"])
    json.dumps(found.evidence, allow_nan=False)


MEASURED_FIRST = 2 * 8 * 8  # steps of the untrained policy and of random play


def test_an_agent_that_missed_an_update_brings_all_back(tmp_path: Path) -> None:
    """A reward that is no number, in the fifth rollout: all go back to the newest checkpoint, and learn more slowly."""
    attempt = ActingAttempt(tmp_path)
    config = meeting_config(coordination="independent", validation_interval_steps=10**6)
    meeting_v0.FAULTS.clear()
    meeting_v0.FAULTS["reward"] = MEASURED_FIRST + 4 * 64 + 20
    result = run(attempt, config)
    assert {} == meeting_v0.FAULTS
    assert ["recovery"] == [kind for kind, _ in attempt.events]
    assert ["resynchronize"] == [event.action for event in result.recovery]
    event = attempt.events[0][1]
    assert ("version_skew", "resynchronize") == (event["detector"], event["action"])
    assert (40, 24, "all agents went back to the checkpoint of step 24") == (
        event["step"],
        event["back_to_step"],
        str(event["message"]).rpartition(": ")[2],
    )
    assert {"agent": "agent_1", "version_skew": 1, "limit": 0} == json.loads(str(event["evidence"]))
    assert {"rate_factor": 0.5} == json.loads(str(event["after"]))
    assert [8, 16, 24, 32, 32, 40] == [step for step, _ in attempt.rows][:6]
    first, second = (float(attempt.rows[row][1]["learning_rate"]) for row in (3, 4))  # type: ignore[arg-type]
    assert pytest.approx(first / 2) == second
    assert measured(result)["return_after"] > 6


def test_an_agent_whose_policy_moved_too_far_brings_all_back(tmp_path: Path) -> None:
    """One agent's rewards pay for nonsense once all have learnt: it alone unlearns, and all go back."""
    attempt = ActingAttempt(tmp_path)
    config = meeting_config(
        coordination="independent", epochs=16, checkpoint_interval_steps=96, validation_interval_steps=10**6
    )
    meeting_v0.FAULTS.clear()
    meeting_v0.FAULTS["sensor"] = MEASURED_FIRST + 11 * 64
    result = run(attempt, config, limits=TeamLimits(drift=0.05, drift_multiple=5))
    assert [("drift", 384, 288)] == [(e["detector"], e["step"], e["back_to_step"]) for _, e in attempt.events]
    evidence = json.loads(str(attempt.events[0][1]["evidence"]))
    assert "agent_1" == evidence["agent"]
    assert evidence["drift"] > evidence["limit"] > evidence["of_the_others"]
    assert measured(result)["return_after"] > 7


def test_a_resumed_run_goes_back_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """A pause between the checkpoint that agents go back to and the trouble changes nothing of the end."""
    config = meeting_config(coordination="independent", environment_steps=64 * 8, validation_interval_steps=10**6)
    meeting_v0.FAULTS.clear()
    meeting_v0.FAULTS["reward"] = MEASURED_FIRST + 4 * 64 + 20
    whole = run(ActingAttempt(tmp_path / "whole"), config)
    meeting_v0.FAULTS["reward"] = MEASURED_FIRST + 4 * 64 + 20
    cut = ActingAttempt(tmp_path / "cut", stop_at=32)
    with pytest.raises(AttemptStopped):
        run(cut, config)
    assert [24, 32] == [checkpoint.step for checkpoint in cut.checkpoints]
    meeting_v0.FAULTS["reward"] = 20  # as it stood at the border; the cut rollout is played again from there
    resumed_attempt = dataclasses.replace(cut, stop_at=None, rows=[])
    resumed = run(resumed_attempt, config)  # rollouts end with their episodes, so taking these up plays no step
    assert [24] == [event["back_to_step"] for _, event in resumed_attempt.events]
    assert [] == differing(whole, resumed)


def test_a_team_that_never_keeps_step_fails(tmp_path: Path) -> None:
    """After three resynchronizations the run is another one than was asked for."""
    attempt = ActingAttempt(tmp_path)
    limits = TeamLimits(drift=0.0, drift_multiple=1.0)
    with pytest.raises(TrainingDivergedError, match="3 resynchronizations did not keep the agents in step"):
        run(attempt, meeting_config(coordination="independent"), limits=limits)
    assert [2, 1, 0] == [event["budget_left"] for _, event in attempt.events]
    assert [0.5, 0.25, 0.125] == [json.loads(str(event["after"]))["rate_factor"] for _, event in attempt.events]


# --- the configuration


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rollout_steps": 0}, "rollout_steps"),
        ({"minibatches": 65}, "minibatches"),
        ({"discount": 1.5}, "discount"),
        ({"environment_steps": 10**10}, "environment_steps"),
        ({"optimization": Optimization(lr=2.0)}, "optimization.lr"),
    ],
)
def test_values_outside_their_bounds_are_named(change: dict[str, Any], field: str) -> None:
    """Every field that breaks a rule, with the rule."""
    with pytest.raises(InvalidFieldError) as refused:
        signal_config(**change)
    assert [field] == [violation.field for violation in refused.value.violations]


def test_every_seed_of_a_run_differs() -> None:
    """Episodes of training, measuring and random play never share a seed; nor do neighbouring runs."""
    from agent_server.rl.worlds import seed_of

    places = itertools.product(range(3), range(3), range(4), range(4))
    seeds = [seed_of(*place) for place in places]
    assert len(seeds) == len(set(seeds))
