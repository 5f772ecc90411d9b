"""A small cooperative game of PettingZoo's form: each agent is shown a key, and all are paid for every right name.

Faults can be set in `FAULTS`: they happen once, to agent_1, after so many steps of all episodes together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

_LENGTH, _KEYS = 8, 3
Floats = NDArray[np.float32]
# Steps until a fault, by its kind: "reward" is once not a number; "sensor" pays for one action alone, for 64 steps.
FAULTS: dict[str, int] = {}


class Meeting(ParallelEnv[str, Floats, int]):  # type: ignore[misc]
    """N agents, each of which sees a key of three. Each right name pays every agent 1 / N."""

    metadata = {"name": "meeting_v0"}  # noqa: RUF012 - as PettingZoo declares it

    def __init__(self, num_agents: int = 2) -> None:
        self.possible_agents = [f"agent_{i}" for i in range(num_agents)]

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Box(-np.inf, np.inf, (_KEYS,), np.float32)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(_KEYS)

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Floats], dict[str, dict[str, Any]]]:
        self._random, self._steps = np.random.default_rng(seed), 0
        self.agents = list(self.possible_agents)
        return self._show(), {agent: {} for agent in self.agents}

    def _show(self) -> dict[str, Floats]:
        self._keys = {agent: int(self._random.integers(_KEYS)) for agent in self.possible_agents}
        return {agent: np.eye(_KEYS, dtype=np.float32)[key] for agent, key in self._keys.items()}

    def step(self, actions: dict[str, int]) -> Any:
        pay = sum(actions[agent] == self._keys[agent] for agent in self.agents) / len(self.agents)
        rewards = dict.fromkeys(self.agents, float(pay))
        self._steps += 1
        observations = self._show()
        if _falls("reward", lasts=1):
            rewards["agent_1"] = float("nan")
        if _falls("sensor", lasts=64):
            rewards["agent_1"] = float(actions["agent_1"] == 0)
        acted, over = self.agents, self._steps == _LENGTH
        if over:
            self.agents = []
        none, all_over = dict.fromkeys(acted, False), dict.fromkeys(acted, over)
        return observations, rewards, none, all_over, {agent: {} for agent in acted}


def _falls(kind: str, *, lasts: int) -> bool:
    if kind not in FAULTS:
        return False
    FAULTS[kind] -= 1
    if FAULTS[kind] < -lasts:
        del FAULTS[kind]
        return False
    return FAULTS[kind] < 0


parallel_env = Meeting
