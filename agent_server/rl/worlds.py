"""Environments seen alike: one agent of Gymnasium's or several of PettingZoo's, with joint vectors in and out.

    joint observation   the flattened observations of all agents, in their order: [F], F the sum of their widths
    joint action        the parts of all agents' actions, in their order: [K]

An agent that has left has zeros for an observation and is not `present`.

An environment is a stranger's code: what it raises, and what it gives that its own spaces do not allow, becomes an
IncompatibleError that names it; numbers that are not finite become a TrainingDivergedError.
"""

# E episodes side by side, N agents, F numbers of a joint observation, K parts of a joint action.

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_server.rl.registry import make_parallel, make_single
from agent_server.rl.spaces import AgentSpaces, Floats, Space
from cognateforge.exceptions import FieldViolation, ForgeError, IncompatibleError, TrainingDivergedError
from training_common import faults

Bools = NDArray[np.bool_]
TRAINING, EVALUATION, RANDOM_PLAY = range(3)  # streams of random numbers that never meet
# Of what an environment raised, so much is told.
_TOLD_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an action led to.

    observation_F: afterwards. reward_N: 0 for who was not there. terminated_N, truncated_N: whose part ended in this
    step, for good or because time was up. present_N: who acts next. over: whether the episode has ended.
    """

    observation_F: Floats
    reward_N: Floats
    terminated_N: Bools
    truncated_N: Bools
    present_N: Bools
    over: bool


class World(abc.ABC):
    """An environment with N agents."""

    agents: tuple[AgentSpaces, ...]

    @abc.abstractmethod
    def reset(self, seed: int) -> tuple[Floats, Bools]:
        """Begin an episode that the seed decides; return the joint observation and who is present."""

    @abc.abstractmethod
    def step(self, action_K: Floats) -> Step:
        """Act."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the environment holds."""

    def random_action(self, generator: np.random.Generator) -> Floats:
        """Return a joint action that knows nothing: [K]."""
        return np.concatenate([agent.action.random(generator) for agent in self.agents])


@contextlib.contextmanager
def blamed(name: str, doing: str) -> Iterator[None]:
    """Name an environment where it raises in the body, SystemExit included.

    Errors: IncompatibleError; what is the machine's fault stays as it is.
    """
    try:
        yield
    except ForgeError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and faults.of_machine(error)):
            raise
        first = "".join(c if c.isprintable() else " " for c in str(error).strip().partition("\n")[0])[:_TOLD_CHARS]
        description = f"{name} failed when it {doing}: {type(error).__name__}: {first}; correct it, or choose another"
        raise IncompatibleError(
            f"the environment {description}",
            violations=[FieldViolation(field="environment", description=f"the environment {description}")],
        ) from error


def _seen(agent: AgentSpaces, observation: Any) -> Floats:
    """Return an observation as [F] numbers. Errors: ValueError, for one of another form; TrainingDivergedError."""
    try:
        flat = agent.observation.flatten(observation)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the observation of {agent.name} is none of its space: {error}") from error
    if not np.isfinite(flat).all():
        raise TrainingDivergedError("the environment gave an observation that is not finite; bound it in a wrapper")
    return flat


def _paid(name: str, reward: Any) -> float:
    """Return a reward. Errors: ValueError."""
    try:
        return float(reward)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reward of {name} is no number, but a {type(reward).__name__}") from error


class SingleWorld(World):
    """A Gymnasium environment: one agent, called "agent". name: what errors call it."""

    def __init__(self, environment: Any, name: str) -> None:
        self._environment, self._name = environment, name
        observation = Space.of(environment.observation_space, where="the environment's observation")
        action = Space.of(environment.action_space, where="the environment's action")
        self.agents = (AgentSpaces(name="agent", observation=observation, action=action),)

    def reset(self, seed: int) -> tuple[Floats, Bools]:
        with blamed(self._name, "began an episode"):
            observation, _ = self._environment.reset(seed=seed)
            return _seen(self.agents[0], observation), np.array([True])

    def step(self, action_K: Floats) -> Step:
        agent = self.agents[0]
        with blamed(self._name, "was acted in"):
            observation, reward, terminated, truncated, _ = self._environment.step(agent.action.action(action_K))
            over = bool(terminated or truncated)
            return Step(
                observation_F=_seen(agent, observation),
                reward_N=np.array([_paid(agent.name, reward)], dtype=np.float32),
                terminated_N=np.array([bool(terminated)]),
                truncated_N=np.array([bool(truncated and not terminated)]),
                present_N=np.array([not over]),
                over=over,
            )

    def close(self) -> None:
        with contextlib.suppress(Exception, SystemExit):  # nothing is read from it any more
            self._environment.close()


class ParallelWorld(World):
    """A parallel environment of PettingZoo's form. name: what errors call it."""

    def __init__(self, environment: Any, name: str) -> None:
        self._environment, self._name = environment, name
        self.agents = tuple(
            AgentSpaces(
                name=str(name),
                observation=Space.of(environment.observation_space(name), where=f"the observation of {name}"),
                action=Space.of(environment.action_space(name), where=f"the action of {name}"),
            )
            for name in environment.possible_agents
        )
        self._names = tuple(environment.possible_agents)
        self._splits = np.cumsum([agent.action.parts for agent in self.agents])[:-1]
        self._present = np.zeros(len(self.agents), dtype=np.bool_)

    def reset(self, seed: int) -> tuple[Floats, Bools]:
        with blamed(self._name, "began an episode"):
            observations, _ = self._environment.reset(seed=seed)
            self._look()
            return self._joint(observations), self._present

    def step(self, action_K: Floats) -> Step:
        before = self._present
        with blamed(self._name, "was acted in"):
            actions = {
                name: agent.action.action(parts)
                for name, agent, parts, present in zip(
                    self._names, self.agents, np.split(action_K, self._splits), before, strict=True
                )
                if present
            }
            observations, rewards, terminations, truncations, _ = self._environment.step(actions)
            self._look()
            left = before & ~self._present
            # Who is gone without a word has no future either.
            truncated = left & np.array([bool(truncations.get(name)) for name in self._names])
            truncated &= ~np.array([bool(terminations.get(name)) for name in self._names])
            paid = [_paid(str(name), rewards.get(name, 0.0)) if there else 0.0 for name, there in self._among(before)]
            return Step(
                observation_F=self._joint(observations),
                reward_N=np.array(paid, dtype=np.float32),
                terminated_N=left & ~truncated,
                truncated_N=truncated,
                present_N=self._present,
                over=not self._present.any(),
            )

    def _look(self) -> None:
        there = set(self._environment.agents)
        self._present = np.array([name in there for name in self._names])

    def _among(self, present_N: Bools) -> Iterator[tuple[Any, bool]]:
        return zip(self._names, map(bool, present_N), strict=True)

    def _joint(self, observations: dict[Any, Any]) -> Floats:
        """Return what all see. Errors: ValueError, where who acts next sees nothing."""
        seen = []
        for agent, (name, present) in zip(self.agents, self._among(self._present), strict=True):
            if name in observations:
                seen.append(_seen(agent, observations[name]))
            elif present:
                raise ValueError(f"{name} is to act and was given no observation")
            else:
                seen.append(np.zeros(agent.observation.width, dtype=np.float32))
        return np.concatenate(seen)

    def close(self) -> None:
        with contextlib.suppress(Exception, SystemExit):  # nothing is read from it any more
            self._environment.close()


def world_maker(task: str, name: str, agents: int, *, modules: Sequence[str]) -> Callable[[], World]:
    """Return what makes a plan's environment. Errors of what it returns: InvalidFieldError, IncompatibleError."""

    def make() -> World:
        with blamed(name, "was made"):
            if task == "reinforcement":
                return SingleWorld(make_single(name, modules=modules), name)
            return ParallelWorld(make_parallel(name, agents, modules=modules), name)

    return make


def seed_of(seed: int, stream: int, *place: int) -> int:
    """Return a seed of its own for each place in a stream of a run."""
    return int(np.random.SeedSequence((seed, stream, *place)).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """What E joint actions led to. final_EF: observations after the step, those of episodes that it ended too."""

    reward_EN: Floats
    terminated_EN: Bools
    truncated_EN: Bools
    final_EF: Floats
    returns: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EpisodesState:
    """Where E episodes stand: the number and the actions of each, and what is seen."""

    numbers: tuple[int, ...]
    actions: tuple[Floats, ...]
    observation_EF: Floats


class Episodes:
    """E episodes side by side, for training. Each that ends is followed by the next one at once.

    An episode is decided by its seed and its actions: both are kept, and taking it up again plays them through. That
    works for environments whose inner state cannot be saved, and it shows where the same actions do not lead to the
    same observation.
    """

    def __init__(self, make: Callable[[], World], count: int, seed: int) -> None:
        self._seed = seed
        self._worlds = [make() for _ in range(count)]
        self.agents = self._worlds[0].agents
        self._numbers = [0] * count
        self._actions: list[list[Floats]] = [[] for _ in range(count)]
        self._returns = [0.0] * count
        begun = [self._begin(i) for i in range(count)]
        self.observation_EF = np.stack([observation for observation, _ in begun])
        self.present_EN = np.stack([present for _, present in begun])

    def _begin(self, i: int) -> tuple[Floats, Bools]:
        self._actions[i], self._returns[i] = [], 0.0
        return self._worlds[i].reset(seed_of(self._seed, TRAINING, i, self._numbers[i]))

    def step(self, action_EK: Floats) -> Transitions:
        """Act in every episode. Errors: those of the environment (`blamed`)."""
        returns = []
        count, agents = self.present_EN.shape
        reward_EN = np.zeros((count, agents), dtype=np.float32)
        terminated_EN, truncated_EN = np.zeros_like(self.present_EN), np.zeros_like(self.present_EN)
        final_EF = np.empty_like(self.observation_EF)
        observation_EF, present_EN = self.observation_EF.copy(), self.present_EN.copy()
        for i, world in enumerate(self._worlds):
            step = self._act(i, world, action_EK[i])
            reward_EN[i], terminated_EN[i], truncated_EN[i] = step.reward_N, step.terminated_N, step.truncated_N
            final_EF[i] = observation_EF[i] = step.observation_F
            present_EN[i] = step.present_N
            if step.over:
                returns.append(self._returns[i])
                self._numbers[i] += 1
                observation_EF[i], present_EN[i] = self._begin(i)
        self.observation_EF, self.present_EN = observation_EF, present_EN
        return Transitions(
            reward_EN=reward_EN,
            terminated_EN=terminated_EN,
            truncated_EN=truncated_EN,
            final_EF=final_EF,
            returns=tuple(returns),
        )

    def _act(self, i: int, world: World, action_K: Floats) -> Step:
        self._actions[i].append(action_K.copy())
        step = world.step(action_K)
        self._returns[i] += float(step.reward_N.mean())
        return step

    def state(self) -> EpisodesState:
        """Return where the episodes stand."""
        parts = sum(agent.action.parts for agent in self.agents)
        return EpisodesState(
            numbers=tuple(self._numbers),
            actions=tuple(np.array(taken, dtype=np.float32).reshape(-1, parts) for taken in self._actions),
            observation_EF=self.observation_EF.copy(),
        )

    def restore(self, state: EpisodesState) -> bool:
        """Play every episode through to where it stood. False: it led elsewhere, and all episodes begin anew."""
        self._numbers = list(state.numbers)
        same = True
        for i, taken in enumerate(state.actions):
            observation, present = self._begin(i)
            for action_K in taken:
                step = self._act(i, self._worlds[i], action_K)
                observation, present = step.observation_F, step.present_N
                if step.over:
                    same = False
                    break
            self.observation_EF[i], self.present_EN[i] = observation, present
        same = same and np.array_equal(self.observation_EF, state.observation_EF)
        if not same:
            for i in range(len(self._worlds)):
                self._numbers[i] += 1
                self.observation_EF[i], self.present_EN[i] = self._begin(i)
        return same

    def close(self) -> None:
        """Close every environment."""
        for world in self._worlds:
            world.close()
