"""Policy optimization against plain references: advantages, the clipped objective, scaled rewards, episodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agent_server.architectures.policy import PolicyArchitecture, PolicyRequest
from agent_server.architectures.policy_model import PolicyModel
from agent_server.optim import build_optimizer
from agent_server.rl.config import PolicyConfig
from agent_server.rl.measure import Stage
from agent_server.rl.ppo import RewardScale, Rollout, Updater, advantages, collect
from agent_server.rl.registry import make_parallel, make_single
from agent_server.rl.worlds import Episodes, ParallelWorld, SingleWorld, World
from cognateforge.exceptions import TrainingDivergedError
from tests.agent.acting import MEETING, MODULES, SIGNAL, meeting_config, signal_config


def signal_world() -> World:
    return SingleWorld(make_single(SIGNAL, modules=MODULES), SIGNAL)


def meeting_world() -> World:
    return ParallelWorld(make_parallel(MEETING, 3, modules=MODULES), MEETING)


def model_of(world: World, coordination: str = "independent") -> PolicyModel:
    request = PolicyRequest(
        agents=world.agents, coordination=coordination, seed=1, settings={"hidden_size": 8, "layers": 1}
    )
    return PolicyArchitecture().build_policy(request)


def test_advantages_agree_with_their_definition() -> None:
    """The sum of (discount decay)^k delta_{t+k} up to an episode's end, with what was cut off bootstrapped."""
    generator = torch.Generator().manual_seed(0)
    R, E, N, discount, decay = 7, 2, 2, 0.9, 0.8
    reward, value = (torch.randn(R, E, N, generator=generator) for _ in range(2))
    last, future = torch.randn(E, N, generator=generator), torch.zeros(R, E, N)
    done, present = torch.zeros(R, E, N, dtype=torch.bool), torch.ones(R, E, N, dtype=torch.bool)
    done[2, 0] = done[4, 1, 0] = True
    future[2, 0] = 3.0  # cut off by time; the other one ended for good
    present[5:, 1, 0] = False  # and its agent was not there any more
    got = advantages(reward, value, last, done, future, present, discount=discount, decay=decay)
    for e in range(E):
        for n in range(N):
            for t in range(R):
                expected, weight = 0.0, 1.0
                for k in range(t, R):
                    if not present[t, e, n]:
                        break
                    after = float(value[k + 1, e, n]) if k + 1 < R else float(last[e, n])
                    after = float(future[k, e, n]) if done[k, e, n] else after
                    expected += weight * (float(reward[k, e, n]) + discount * after - float(value[k, e, n]))
                    weight *= discount * decay
                    if done[k, e, n]:
                        break
                assert pytest.approx(expected, abs=1e-5) == float(got[t, e, n])


def test_time_that_is_up_is_not_the_end() -> None:
    """The last step of an episode that time cut is worth what the critic expects of what was seen then."""
    config = signal_config(rollout_steps=8, environments=1)
    model = model_of(signal_world())
    with torch.no_grad():
        model.learners[0].critic[-1].bias.fill_(10.0)  # type: ignore[index, union-attr]
    episodes = Episodes(signal_world, 1, seed=0)
    rollout = collect(model, episodes, config, torch.Generator().manual_seed(0), None, between=lambda: None)
    # Rewards are 0 or 1 and values near 10: only with the bootstrap is the last advantage small.
    assert 1 == len(rollout.returns)
    assert abs(float(rollout.advantage_BN[-1, 0])) < 3


def updated(advantage: float, shift: float, clip_range: float = 0.2) -> float:
    """Return how much one gradient step raises the log-probability of an action that was `shift` nats less likely."""
    config = signal_config(
        rollout_steps=1, environments=1, epochs=1, minibatches=1, environment_steps=1, clip_range=clip_range
    )
    world = signal_world()
    model = model_of(world)
    updater = Updater(model, build_optimizer(config.optimization, base=list(model.parameters()), head=[]), config)
    observation, action = torch.eye(3)[:1], torch.zeros(1, 1)
    with torch.no_grad():
        judged = model.judge(observation, action)
    rollout = Rollout(
        observation_BF=observation,
        action_BK=action,
        log_probability_BN=judged.log_probability_BN - shift,
        value_BN=judged.value_BN,
        advantage_BN=torch.full((1, 1), advantage),
        target_BN=judged.value_BN,
        present_BN=torch.ones(1, 1, dtype=torch.bool),
        returns=(),
    )
    updater.update(rollout, torch.Generator().manual_seed(0), lambda _: None, between=lambda: None)
    with torch.no_grad():
        return float(model.judge(observation, action).log_probability_BN - judged.log_probability_BN)


def test_an_action_is_raised_only_within_the_clip() -> None:
    """A good action becomes likelier, a bad one less likely; one that is already 1.2 times as likely stays."""
    assert updated(advantage=1.0, shift=0.0) > 1e-3
    assert updated(advantage=-1.0, shift=0.0) < -1e-3
    assert pytest.approx(0.0, abs=1e-6) == updated(advantage=1.0, shift=0.5)
    assert pytest.approx(0.0, abs=1e-6) == updated(advantage=-1.0, shift=-0.5)
    assert updated(advantage=1.0, shift=0.5, clip_range=0.9) > 1e-3


def test_learners_share_nothing() -> None:
    """One agent's rewards move no other independent agent; agents that share a policy move together."""

    def moved(coordination: str) -> list[bool]:
        config = meeting_config(coordination=coordination, environment_steps=64)
        ends = []
        for factor in (1.0, -3.0):
            model = model_of(meeting_world(), coordination)
            optimizer = build_optimizer(config.optimization, base=list(model.parameters()), head=[])
            episodes = Episodes(meeting_world, config.environments, seed=0)
            rollout = collect(model, episodes, config, torch.Generator().manual_seed(0), None, between=lambda: None)
            rollout.advantage_BN[:, 1] *= factor
            updater = Updater(model, optimizer, config)
            updater.update(rollout, torch.Generator().manual_seed(0), lambda _: None, between=lambda: None)
            with torch.no_grad():
                ends.append(model.judge(rollout.observation_BF, rollout.action_BK).log_probability_BN)
        return [not torch.equal(ends[0][:, i], ends[1][:, i]) for i in range(3)]

    assert [False, True, False] == moved("independent")
    assert [True, True, True] == moved("shared_parameters")


def test_rewards_are_divided_by_the_deviation_of_returns() -> None:
    """Against NumPy's, over all discounted returns so far; what was seen survives `state`."""
    scale, seen, running = RewardScale(1, 1, discount=0.5), list[float](), 0.0
    rewards = [1.0, 4.0, -2.0, 8.0, 0.5]
    for i, reward in enumerate(rewards):
        running = 0.5 * running + reward
        seen.append(running)
        if i == 3:
            other = RewardScale(1, 1, discount=0.5)
            other.restore(scale.state())
            scale = other
        got = scale.scale(torch.tensor([[reward]]), torch.tensor([[i == 1]]))
        running *= i != 1
        if i:
            assert pytest.approx(reward / np.std(seen), rel=1e-4) == float(got)


def test_episodes_are_taken_up_where_they_stood() -> None:
    """The same actions lead to the same observations, in the middle of episodes and after their ends."""
    for make in (signal_world, meeting_world):
        episodes, generator = Episodes(make, 3, seed=4), np.random.default_rng(0)

        def act(episodes: Episodes, generator: np.random.Generator = generator) -> np.ndarray:
            parts = sum(agent.action.parts for agent in episodes.agents)
            return generator.integers(0, 3, (3, parts)).astype(np.float32)

        for _ in range(13):
            episodes.step(act(episodes))
        state = episodes.state()
        again = Episodes(make, 3, seed=4)
        assert again.restore(state)
        for _ in range(5):
            action = act(episodes)
            one, other = episodes.step(action), again.step(action)
            assert one.returns == other.returns
            assert np.array_equal(episodes.observation_EF, again.observation_EF)
            assert np.array_equal(one.reward_EN, other.reward_EN)


def test_episodes_that_do_not_repeat_begin_anew() -> None:
    """Where keys come from elsewhere, taking an episode up is found out."""
    make = lambda: SingleWorld(make_single("tests.agent.acting:Restless-v0", modules=MODULES), "")  # noqa: E731
    episodes = Episodes(make, 4, seed=4)
    for _ in range(5):
        episodes.step(np.zeros((4, 1), dtype=np.float32))
    again = Episodes(make, 4, seed=4)
    assert not again.restore(episodes.state())
    assert all(not len(taken) for taken in again.state().actions)


def test_measured_episodes_are_the_same_ones_each_time() -> None:
    """Two stages of a seed play the same; a policy that names every key right earns all, and owes it to its eyes."""
    world = meeting_world()
    model = model_of(world)
    stages = [Stage(meeting_world, episodes=9, seed=5) for _ in range(2)]
    first, second = (stage.policy(model) for stage in stages)
    assert first.returns == second.returns
    played = stages[0].play(lambda _numbers, _step, seen: seen.reshape(len(seen), 3, 3).argmax(-1).astype(np.float32))
    assert (8.0,) * 9 == played.returns
    lost = stages[0].coordination(played)
    assert lost is not None
    # Another episode's key is the right one by chance, in one of three cases.
    assert 8 * 2 / 3 == pytest.approx(lost, abs=1.5)
    blind = stages[0].play(lambda _numbers, _step, seen: np.zeros((len(seen), 3), dtype=np.float32))
    assert 0.0 == stages[0].coordination(blind)


def test_coordination_is_absent_where_it_was_not_measured() -> None:
    """Of one agent alone, or of too few episodes to give each agent another one."""
    alone = Stage(signal_world, episodes=9, seed=5)
    assert alone.coordination(alone.random_play()) is None
    few = Stage(meeting_world, episodes=3, seed=5)
    assert few.coordination(few.random_play()) is None


def test_rewards_that_are_no_numbers_end_a_measurement() -> None:
    """A return that is not finite is no figure to publish."""
    stage = Stage(
        lambda: SingleWorld(make_single("tests.agent.acting:Poisoned-v0", modules=MODULES), ""), episodes=2, seed=0
    )
    with pytest.raises(TrainingDivergedError, match="a measured return is not finite"):
        stage.random_play()


def test_the_configuration_counts_its_steps() -> None:
    """The last rollout is whole; steps are gradient steps."""
    config = PolicyConfig(
        agent="a", environment="CartPole-v1", environment_steps=1000, rollout_steps=32, environments=8, epochs=20
    )
    assert (4, 80, 320) == (config.updates, config.steps_of_update, config.total_steps)
