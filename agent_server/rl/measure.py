"""What agents score over whole episodes, and how much of it rests on their own observations.

    return          sum of an episode's rewards, undiscounted; of several agents the mean over them (the shared return)
    coordination    mean shared return - mean shared return when each agent acts on another episode's observations

For the second figure every agent i of episode k acts at each step on what agent i saw at that step of the episode
(k + 1 + i) mod K, so that no two agents act on the same one. That is the permutation importance (Breiman 2001, "Random
Forests", section 10; Fisher et al. 2019, arXiv:1801.01489) of the observations for the return, with agents permuted
apart from each other. It is in the unit of the return: 0 where acting together is nothing but habit. What agents owe to
seeing each other and what they owe to seeing the world are not told apart.
"""

# E episodes side by side, K episodes in all, T steps of an episode; A parts of a joint action.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agent_server.architectures.policy_model import PolicyModel
from agent_server.rl.spaces import Floats
from agent_server.rl.worlds import EVALUATION, RANDOM_PLAY, World, seed_of
from cognateforge.exceptions import FieldViolation, IncompatibleError, TrainingDivergedError

# Worlds that are played at once: enough that the policy's share of the time is small, few enough to be held.
_MOST_AT_ONCE = 64
# Steps of a measured episode: several times those of the longest in wide use, Atari's 27,000. Without a bound a policy
# that keeps such an episode alive would be measured forever.
_MOST_STEPS = 100_000
# A joint action for each live episode: (numbers of the episodes, step, their observations) -> actions.
Chooser = Callable[[Sequence[int], int, Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class Played:
    """Whole episodes. returns: mean over the agents. actions: [T, A] of each."""

    returns: tuple[float, ...]
    actions: tuple[Floats, ...]

    @property
    def mean_return(self) -> float:
        """The mean over the episodes."""
        return float(np.mean(self.returns))

    @property
    def standard_error(self) -> float | None:
        """That of the mean; None of a single episode."""
        count = len(self.returns)
        return None if count < 2 else float(np.std(self.returns, ddof=1) / np.sqrt(count))


class Stage:
    """Worlds to measure in, kept between measurements. An episode's seed is the same in each of them."""

    def __init__(self, make: Callable[[], World], *, episodes: int, seed: int) -> None:
        self._worlds = [make() for _ in range(min(episodes, _MOST_AT_ONCE))]
        self._count, self._seed = episodes, seed
        self.agents = self._worlds[0].agents

    def play(self, choose: Chooser, *, between: Callable[[], None] = lambda: None) -> Played:
        """Play every episode to its end. `between` runs before each step and may raise.

        Errors: IncompatibleError, for an episode that does not end; TrainingDivergedError; those of the environment.
        """
        returns, actions = [0.0] * self._count, [list[Floats]() for _ in range(self._count)]
        for first in range(0, self._count, len(self._worlds)):
            numbers = range(first, min(first + len(self._worlds), self._count))
            live = {k: self._worlds[k - first].reset(seed_of(self._seed, EVALUATION, k))[0] for k in numbers}
            step = 0
            while live:
                between()
                if step >= _MOST_STEPS:
                    description = (
                        f"an episode had not ended after {_MOST_STEPS:,} steps: register the environment with "
                        "max_episode_steps, or let it truncate by itself"
                    )
                    raise IncompatibleError(
                        description, violations=[FieldViolation(field="environment", description=description)]
                    )
                playing = list(live)
                chosen = choose(playing, step, np.stack([live[k] for k in playing]))
                for k, action in zip(playing, chosen, strict=True):
                    led_to = self._worlds[k - first].step(action)
                    actions[k].append(action)
                    returns[k] += float(led_to.reward_N.mean())
                    live[k] = led_to.observation_F
                    if led_to.over:
                        del live[k]
                step += 1
        if not np.isfinite(returns).all():
            raise TrainingDivergedError("a measured return is not finite; the environment's rewards have to be")
        return Played(returns=tuple(returns), actions=tuple(np.stack(taken) for taken in actions))

    def policy(self, model: PolicyModel, *, between: Callable[[], None] = lambda: None) -> Played:
        """Play the likeliest actions."""

        @torch.no_grad()
        def choose(_numbers: Sequence[int], _step: int, observation_EF: Floats) -> Floats:
            drawn: Floats = model.draw(torch.from_numpy(observation_EF)).numpy()
            return drawn

        return self.play(choose, between=between)

    def random_play(self, *, between: Callable[[], None] = lambda: None) -> Played:
        """Play actions that know nothing, each agent by itself."""
        generators = [np.random.default_rng(seed_of(self._seed, RANDOM_PLAY, k)) for k in range(self._count)]
        world = self._worlds[0]

        def choose(numbers: Sequence[int], _step: int, _observation: Floats) -> Floats:
            return np.stack([world.random_action(generators[k]) for k in numbers])

        return self.play(choose, between=between)

    def coordination(self, played: Played, *, between: Callable[[], None] = lambda: None) -> float | None:
        """Return the coordination of what `policy` has played; None of one agent, or of fewer episodes than agents + 1.

        The likeliest action is a function of the observation, so acting on another episode's is repeating the actions
        of that episode. Where it was shorter, its last ones are repeated.
        """
        agents, episodes = len(self.agents), len(played.returns)
        if agents < 2 or episodes < agents + 1:
            return None
        ends = np.cumsum([agent.action.parts for agent in self.agents])
        places = [slice(int(end) - agent.action.parts, int(end)) for agent, end in zip(self.agents, ends, strict=True)]

        def choose(numbers: Sequence[int], step: int, _observation: Floats) -> Floats:
            chosen = []
            for k in numbers:
                others = [played.actions[(k + 1 + i) % episodes] for i in range(agents)]
                taken = [other[min(step, len(other) - 1)][place] for other, place in zip(others, places, strict=True)]
                chosen.append(np.concatenate(taken))
            return np.stack(chosen)

        return played.mean_return - self.play(choose, between=between).mean_return

    def close(self) -> None:
        """Close every world."""
        for world in self._worlds:
            world.close()
