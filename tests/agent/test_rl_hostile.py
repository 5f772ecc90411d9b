"""Environments that break their form: the job ends with an error that names them, and publishes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from agent_server.architectures.factory import SettingValue
from agent_server.rl import measure
from agent_server.rl.config import PolicyConfig
from agent_server.rl.spaces import Space
from cognateforge.exceptions import ForgeError, IncompatibleError, TrainingDivergedError
from tests.agent import hostile_v0
from tests.agent._support import measured
from tests.agent.acting import ActingAttempt, meeting_config, signal_config
from tests.agent.test_rl_trainer import run

MODULES = ("tests.agent.hostile_v0", "tests.agent")


@pytest.fixture(autouse=True)
def ways() -> Iterator[set[str]]:
    """What the environment of several agents does."""
    yield hostile_v0.WAYS
    hostile_v0.WAYS.clear()


def config(kind: str) -> PolicyConfig:
    environment = f"tests.agent.hostile_v0:Hostile-{kind}-v0"
    return signal_config(environment=environment, modules=MODULES, environment_steps=128, evaluation_episodes=2)


@pytest.mark.parametrize(
    ("kind", "error", "told"),
    [
        ("nan", TrainingDivergedError, "observation that is not finite"),
        ("begin_nan", TrainingDivergedError, "observation that is not finite"),
        ("infinite", TrainingDivergedError, "observation that is not finite"),
        ("short", IncompatibleError, r"was acted in: .*has the shape \(1,\), and its space says \(3,\)"),
        ("begin_short", IncompatibleError, "began an episode: .* its space says"),
        ("words", IncompatibleError, "the observation of agent is none of its space"),
        ("nothing", IncompatibleError, "the observation of agent is none of its space"),
        ("raises", IncompatibleError, r"Hostile-raises-v0 failed when it was acted in: ValueError: a  \[31mwall"),
        ("exits", IncompatibleError, "failed when it was acted in: SystemExit: bye"),
        ("begin_raises", IncompatibleError, "failed when it began an episode: KeyError: 'level'"),
        ("made_raises", IncompatibleError, "failed when it was made: RuntimeError: no display"),
        ("unpaid", IncompatibleError, "the reward of agent is no number, but a NoneType"),
        ("paid_twice", IncompatibleError, "the reward of agent is no number, but a ndarray"),
        ("four", IncompatibleError, "failed when it was acted in: ValueError"),
    ],
)
def test_an_environment_that_breaks_its_form_is_named(
    tmp_path: Path, kind: str, error: type[ForgeError], told: str
) -> None:
    """Whatever it raises or gives, and wherever: what would be learned from it would be worth nothing."""
    with pytest.raises(error, match=told):
        run(ActingAttempt(tmp_path), config(kind))
    assert not (tmp_path / "agent").exists()


def test_an_episode_that_does_not_end_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured episode is played to its end, so that one without an end is told of with the remedy."""
    monkeypatch.setattr(measure, "_MOST_STEPS", 50)
    with pytest.raises(IncompatibleError, match="not ended after 50 steps: register the environment with max_episode"):
        run(ActingAttempt(tmp_path), config("endless"))


def test_rewards_that_never_vary_teach_nothing_and_break_nothing(tmp_path: Path) -> None:
    """Advantages of no deviation leave the weights finite, and an agent that learned nothing is not called ready."""
    settings: dict[str, SettingValue] = {"hidden_size": 16, "layers": 1, "normalize_rewards": True}
    got = measured(run(ActingAttempt(tmp_path), dataclasses.replace(config("flat"), settings=settings)))
    assert 8.0 == got["return_before"] == got["return_after"] == got["return_random"]
    assert 0.0 == got["deployment_readiness"]


@pytest.mark.parametrize("coordination", ["independent", "shared_parameters", "centralized_critic"])
def test_an_agent_may_leave_early(tmp_path: Path, ways: set[str], coordination: str) -> None:
    """The others play on, and all are measured."""
    ways.add("leaves")
    team = meeting_config(
        environment="tests.agent/hostile_v0", modules=MODULES, coordination=coordination, environment_steps=128
    )
    got = measured(run(ActingAttempt(tmp_path), team))
    assert 0 <= got["return_before"] <= 8


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("blind", "agent_1 is to act and was given no observation"),
        ("raises", "hostile_v0 failed when it was acted in: ZeroDivisionError: no team"),
    ],
)
def test_a_team_that_breaks_its_form_is_named(tmp_path: Path, ways: set[str], way: str, told: str) -> None:
    """An agent that is there and sees nothing would act on zeros."""
    ways.add(way)
    with pytest.raises(IncompatibleError, match=told):
        run(ActingAttempt(tmp_path), meeting_config(environment="tests.agent/hostile_v0", modules=MODULES))


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3, start=1), 0),
        (spaces.MultiDiscrete([2, 3]), [2, 0]),
        (spaces.MultiDiscrete([2, 3]), [1]),
        (spaces.MultiBinary(2), [1, 0, 1]),
        (spaces.Box(0, 1, (2, 2), np.float32), [1, 0, 1]),
    ],
)
def test_a_value_of_another_space_is_no_observation(space: spaces.Space[object], value: object) -> None:
    """A discrete value beyond its part would have been read as one of the next part."""
    with pytest.raises(ValueError, match=r"space"):
        Space.of(space, where="here").flatten(value)
