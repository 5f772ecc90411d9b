"""Environments that break their form, each in one way: of Gymnasium's form, `Hostile-KIND-v0`, and of PettingZoo's.

Importing this module registers the first ones. What the second one does is set in `WAYS`.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.agent import acting, meeting_v0

# What is given for an observation, after the first step or (begin_...) at an episode's beginning.
_SHOWN: dict[str, Any] = {
    "nan": np.array([np.nan, 0, 0]),
    "infinite": [1e300, 0, 0],  # beyond 32 bits
    "short": np.zeros(1),  # NumPy would spread it over all places
    "words": ["a", "b", "c"],
    "nothing": None,
    "begin_nan": np.array([0, np.nan, 0]),
    "begin_short": np.zeros(1),
}
KINDS = (*_SHOWN, "raises", "exits", "begin_raises", "made_raises", "unpaid", "paid_twice", "four", "endless", "flat")
WAYS: set[str] = set()


class Hostile(acting.Signal):
    """`Signal`, but for one thing."""

    def __init__(self, kind: str) -> None:
        if kind == "made_raises":
            raise RuntimeError("no display")
        self._kind = kind

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        observation, info = super().reset(seed=seed)
        if self._kind == "begin_raises":
            raise KeyError("level")
        return _SHOWN.get(self._kind, observation) if self._kind.startswith("begin_") else observation, info

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self._kind == "raises":
            raise ValueError("a \x1b[31mwall")
        if self._kind == "exits":
            sys.exit("bye")
        if self._kind == "four":
            return observation, reward, truncated, info
        paid = {"unpaid": None, "paid_twice": np.zeros(2), "flat": 1.0}.get(self._kind, reward)
        return _SHOWN.get(self._kind, observation), paid, terminated, truncated and self._kind != "endless", info


for _kind in KINDS:
    if f"Hostile-{_kind}-v0" not in gymnasium.registry:
        gymnasium.register(
            id=f"Hostile-{_kind}-v0",
            entry_point=f"{__name__}:Hostile",
            kwargs={"kind": _kind},
            disable_env_checker=True,
        )


class Troubled(meeting_v0.Meeting):
    """`Meeting`, but for what `WAYS` says: "leaves" (agent_1 after 3 steps), "blind" (agent_1 is shown nothing)."""

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return super().observation_space(agent)

    def step(self, actions: dict[str, int]) -> Any:
        observations, rewards, ended, cut, info = super().step(
            {agent: actions.get(agent, 0) for agent in self.possible_agents}
        )
        if "leaves" in WAYS and self._steps >= 3 and "agent_1" in self.agents:
            self.agents = [agent for agent in self.agents if agent != "agent_1"]
            ended["agent_1"] = True
        if "blind" in WAYS:
            del observations["agent_1"]
        if "raises" in WAYS:
            raise ZeroDivisionError("no team")
        return observations, rewards, ended, cut, info


parallel_env = Troubled
