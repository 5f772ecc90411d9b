"""What the tests of acting agents share: small environments of Gymnasium's form, and an attempt that keeps its events.

Importing this module registers them, as a plan's "tests.agent.acting:Signal-v0" does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from agent_server.optim import Optimization, OptimizerKind, Schedule
from agent_server.rl.config import PolicyConfig
from tests.agent._support import ToldAttempt
from training_common.attempt import StopKind

MODULES = ("tests.agent.acting", "tests.agent")
SIGNAL = "tests.agent.acting:Signal-v0"
MEETING = "tests.agent/meeting_v0"
_LENGTH, _KEYS = 8, 3
Floats = NDArray[np.float32]


def shown(key: int) -> Floats:
    """Return a key as it is seen."""
    one_hot: Floats = np.eye(_KEYS, dtype=np.float32)[key]
    return one_hot


class Signal(gymnasium.Env[Floats, int]):
    """Shows one of three keys; naming it is worth 1. Time cuts an episode after 8 steps."""

    observation_space = spaces.Box(0.0, 1.0, (_KEYS,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(_KEYS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._show(), {}

    def _show(self) -> Floats:
        self._key = int(self.np_random.integers(_KEYS))
        return shown(self._key)

    def step(self, action: Any) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        reward = float(action == self._key)
        self._steps += 1
        return self._show(), reward, False, self._steps == _LENGTH, {}


class Restless(Signal):
    """The same with keys that no seed decides."""

    def _show(self) -> Floats:
        self._key = random.randrange(_KEYS)  # noqa: S311 - on purpose out of reach
        return shown(self._key)


class Aim(Signal):
    """Shows a number from -1 to 1 in the first place; the nearer the action to it, the better."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _show(self) -> Floats:
        self._aim = float(self.np_random.uniform(-1, 1))
        return np.array([self._aim, 0, 0], dtype=np.float32)

    def step(self, action: Any) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        reward = -((float(action[0]) - self._aim) ** 2)
        self._steps += 1
        return self._show(), reward, False, self._steps == _LENGTH, {}


class Poisoned(Signal):
    """Rewards that are not numbers."""

    def step(self, action: Any) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("nan"), terminated, truncated, info


for _name in ("Signal", "Restless", "Aim", "Poisoned"):
    if f"{_name}-v0" not in gymnasium.registry:
        gymnasium.register(id=f"{_name}-v0", entry_point=f"{__name__}:{_name}", disable_env_checker=True)


@dataclass
class ActingAttempt(ToldAttempt):
    """`stop_after` asks for a stop at that many looks, wherever they fall."""

    stop_after: int | None = None
    looks: int = 0

    def stop_requested(self) -> StopKind | None:
        self.looks += 1
        if self.stop_after is not None and self.looks > self.stop_after:
            return self.stop_kind
        return super().stop_requested()


def signal_config(**changes: Any) -> PolicyConfig:
    """Return a run of a second or less that learns `Signal`."""
    values: dict[str, Any] = {
        "agent": "signal-reader",
        "environment": SIGNAL,
        "modules": MODULES,
        "rollout_steps": 16,
        "environments": 4,
        "epochs": 4,
        "minibatches": 2,
        "environment_steps": 64 * 12,
        "evaluation_episodes": 8,
        "optimization": Optimization(optimizer=OptimizerKind.ADAM, lr=1e-2, schedule=Schedule.LINEAR, warmup_steps=0),
        "settings": {"hidden_size": 16, "layers": 1},
        "checkpoint_interval_steps": 24,
        "seed": 3,
        **changes,
    }
    return PolicyConfig(**values)


def meeting_config(**changes: Any) -> PolicyConfig:
    """Return a run of a second or so in which three agents learn `Meeting`."""
    task = {"task": "multi_agent", "environment": MEETING, "agents": 3, "agent": "meeters"}
    return signal_config(**{**task, "environment_steps": 64 * 16, **changes})
