"""Policies: spaces as vectors, actors that see their own, critics that see all, files that act as what was saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces

from agent_server.adaptation import Adaptation
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentBatch
from agent_server.architectures.policy import PolicyArchitecture, PolicyRequest
from agent_server.architectures.policy_model import Moments, PolicyModel
from agent_server.rl.spaces import AgentSpaces, Space
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError
from tests.agent.policies import policies

BOX = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
CHOICE = spaces.Discrete(3, start=5)


def agent(name: str = "agent", observation: Any = BOX, action: Any = CHOICE) -> AgentSpaces:
    return AgentSpaces(
        name=name,
        observation=Space.of(observation, where="the observation"),
        action=Space.of(action, where="the action"),
    )


def build(*agents: AgentSpaces, coordination: str = "independent", seed: int = 1, **settings: Any) -> PolicyModel:
    settings = {"hidden_size": 8, **settings}
    return PolicyArchitecture().build_policy(
        PolicyRequest(agents=agents or (agent(),), coordination=coordination, seed=seed, settings=settings)
    )


def joint(model: PolicyModel, rows: int = 6, seed: int = 0) -> torch.Tensor:
    width = sum(each.observation.width for each in model.agents)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# --- spaces


@pytest.mark.parametrize(
    ("space", "width"),
    [
        (BOX, 4),
        (CHOICE, 3),
        (spaces.MultiDiscrete([2, 3], start=[1, 0]), 5),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])), 11),
        (spaces.MultiBinary(3), 3),
    ],
)
def test_values_are_flattened_as_gymnasium_does(space: Any, width: int) -> None:
    """Boxes row by row, discrete parts one-hot; a space survives its JSON."""
    ours = Space.of(space, where="here")
    assert width == ours.width
    space.seed(3)
    for _ in range(5):
        value = space.sample()
        assert np.array_equal(np.asarray(spaces.flatten(space, value), dtype=np.float32), ours.flatten(value))
    assert ours == Space.from_json(json.loads(json.dumps(ours.to_json())))


@pytest.mark.parametrize("space", [BOX, CHOICE, spaces.MultiDiscrete([2, 3], start=[1, 0]), spaces.MultiBinary(3)])
def test_actions_are_the_spaces_own(space: Any) -> None:
    """What a policy chooses, and what chance chooses, is a value of the space."""
    ours, generator = Space.of(space, where="here"), np.random.default_rng(0)
    model = build(agent(action=space))
    drawn = model.draw(joint(model, rows=40), torch.Generator().manual_seed(1))
    for parts in (*drawn.numpy(), *(ours.random(generator) for _ in range(40))):
        assert space.contains(ours.action(parts))


def test_a_box_without_bounds_is_drawn_from_a_normal_distribution() -> None:
    """Chance needs a bound on both sides to be uniform; JSON holds none for what has none."""
    ours = Space.of(spaces.Box(-np.inf, np.inf, (3,)), where="here")
    assert (None, None, None) == ours.low == ours.high
    drawn = np.array([ours.random(np.random.default_rng(seed)) for seed in range(300)])
    assert 0.8 < drawn.std() < 1.2


def test_other_spaces_are_refused_with_a_remedy() -> None:
    """A dictionary has to be flattened by whoever registers the environment."""
    with pytest.raises(IncompatibleError, match=r"the action is a Dict; a policy knows Box, .* flatten it"):
        Space.of(spaces.Dict({"a": CHOICE}), where="the action")


# --- models


@pytest.mark.parametrize("action", [CHOICE, spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,))])
def test_probabilities_are_those_of_torchs_distributions(action: Any) -> None:
    """Log-probability and entropy of what was drawn, against torch's own."""
    model = build(agent(action=action))
    learner: Any = model.learners[0]
    with torch.no_grad():
        learner.actor[-1].weight.mul_(100)
        if action.__class__ is spaces.Box:
            learner.log_deviation_P.fill_(-0.3)
        seen = joint(model)
        taken = model.draw(seen, torch.Generator().manual_seed(2))
        judged = model.judge(seen, taken)
        given = model(batch_of(seen))
    if action.__class__ is spaces.Box:
        normal: Any = torch.distributions.Normal(given, math.exp(-0.3))
        expected, entropy = normal.log_prob(taken).sum(-1), normal.entropy().sum(-1)
    else:
        counts = [3] if action is CHOICE else [2, 3]
        parts: list[Any] = [torch.distributions.Categorical(logits=p) for p in torch.split(given, counts, -1)]
        expected = torch.stack([p.log_prob(taken[:, i]) for i, p in enumerate(parts)]).sum(0)
        entropy = torch.stack([p.entropy() for p in parts]).sum(0)
    torch.testing.assert_close(judged.log_probability_BN[:, 0], expected)
    torch.testing.assert_close(judged.entropy_BN[:, 0], entropy)


def batch_of(seen: torch.Tensor) -> AgentBatch:
    nothing = torch.zeros(len(seen), 0)
    return AgentBatch(tokens_BT=nothing.long(), valid_BT=nothing.bool(), features_BF=seen)


def test_a_new_policy_is_near_uniform() -> None:
    """It begins by trying everything."""
    model = build()
    with torch.no_grad():
        shares = model(batch_of(joint(model))).softmax(-1)
    assert float((shares - 1 / 3).abs().max()) < 0.02


def test_equal_requests_give_equal_parameters() -> None:
    """The seed decides them, and torch's own random state is left alone."""
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, same, other = build().state_dict(), build().state_dict(), build(seed=2).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(before, torch.get_rng_state())


TEAM = tuple(agent(f"agent_{i}") for i in range(3))


@pytest.mark.parametrize(
    ("coordination", "learners"), [("independent", 3), ("shared_parameters", 1), ("centralized_critic", 1)]
)
def test_actors_see_their_own_and_centralized_critics_see_all(coordination: str, learners: int) -> None:
    """Changing what agent_2 sees changes agent_0's action never, and its value with a centralized critic alone."""
    model = build(*TEAM, coordination=coordination)
    assert learners == len(model.groups())
    one, other = joint(model), joint(model)
    other[:, 8:] += 1
    with torch.no_grad():
        assert torch.equal(model(batch_of(one))[:, :3], model(batch_of(other))[:, :3])
        moved = (model.values(one) - model.values(other)).abs().max(0).values > 1e-6
    assert (coordination == "centralized_critic", True) == (bool(moved[0]), bool(moved[2]))


def test_agents_that_share_an_actor_are_told_apart() -> None:
    """The same observation may lead two of them to different actions."""
    model = build(*TEAM, coordination="shared_parameters")
    seen = joint(model)[:, :4].repeat(1, 3)
    with torch.no_grad():
        given = model(batch_of(seen))
    assert not torch.equal(given[:, :3], given[:, 3:6])


def test_agents_that_differ_share_no_parameters() -> None:
    """They are refused with a remedy, or have an actor each beside a critic that sees all."""
    unlike = (agent("sees"), agent("speaks", observation=CHOICE))
    with pytest.raises(IncompatibleError, match=r"cannot share parameters \(sees: 4 to 3; speaks: 3 to 3\); choose"):
        build(*unlike, coordination="shared_parameters")
    model = build(*unlike, coordination="centralized_critic")
    assert 2 == len(model.groups())
    assert (6, 2) == model.values(joint(model)).shape


def test_moments_are_those_of_all_that_was_seen() -> None:
    """Batch by batch as at once; an empty batch changes nothing."""
    seen = torch.randn(50, 3) * 7 + 2
    moments = Moments(3)
    for part in (seen[:10], seen[10:11], seen[:0], seen[11:]):
        moments.add(part)
    torch.testing.assert_close(moments.mean_F.float(), seen.mean(0))
    torch.testing.assert_close(moments.variance_F.float(), seen.var(0, correction=0), rtol=1e-5, atol=1e-5)
    normalized = moments.normalize(seen)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


# --- files


@pytest.mark.parametrize("coordination", ["independent", "shared_parameters", "centralized_critic"])
def test_a_saved_policy_acts_as_before(tmp_path: Path, coordination: str) -> None:
    """Logits bit for bit, and actions by the agents' names."""
    model = build(*TEAM, coordination=coordination, normalize_observations=True).eval()
    assert model.moments is not None
    model.moments.add(joint(model, rows=30))
    model.save(tmp_path, extra={"agent": "team"})
    loaded = policies().get("policy").load(tmp_path)
    assert isinstance(loaded, PolicyModel)
    seen = joint(model)
    with torch.no_grad():
        assert torch.equal(model(batch_of(seen)), loaded(batch_of(seen)))
    observations = {"agent_0": np.ones((2, 2)), "agent_2": np.zeros((2, 2))}
    acted = loaded.act(observations)
    assert ["agent_0", "agent_2"] == list(acted)
    assert all(CHOICE.contains(action) for action in acted.values())


def test_one_agent_acts_on_what_the_environment_shows(tmp_path: Path) -> None:
    """An observation in, the environment's own action out, with the files alone."""
    environment = gymnasium.make("CartPole-v1")
    model = build(agent(observation=environment.observation_space, action=environment.action_space))
    model.save(tmp_path, extra={})
    observation, _ = environment.reset(seed=1)
    action = PolicyArchitecture().load(tmp_path).act(observation)
    assert environment.action_space.contains(action)


@pytest.mark.parametrize("fault", ["no_config", "format", "space", "weights"])
def test_a_folder_that_is_no_policy_is_refused(tmp_path: Path, fault: str) -> None:
    """Whatever is missing or wrong, the error is of one class and names it."""
    build().save(tmp_path, extra={})
    config = json.loads((tmp_path / "config.json").read_text())
    match fault:
        case "no_config":
            (tmp_path / "config.json").unlink()
        case "format":
            (tmp_path / "config.json").write_text(json.dumps({**config, "format": 2}))
        case "space":
            config["agents"][0]["action"]["kind"] = "words"
            (tmp_path / "config.json").write_text(json.dumps(config))
        case "weights":
            state = safetensors.torch.load_file(tmp_path / "model.safetensors")
            safetensors.torch.save_file(
                {name: value[:1] for name, value in state.items()}, tmp_path / "model.safetensors"
            )
    with pytest.raises(ArtifactCorruptError, match="holds no policy that can be read"):
        PolicyArchitecture().load(tmp_path)


def test_the_architecture_is_listed_and_reads_no_rows() -> None:
    """The factory lists it with its settings; a task of rows is refused."""
    architecture = policies().get("policy")
    assert ("reinforcement", "multi_agent") == tuple(architecture.tasks)
    assert {"hidden_size", "layers", "activation"} <= set(architecture.settings)
    with pytest.raises(IncompatibleError, match="it does not read rows of classification"):
        architecture.build(BuildRequest(task="classification", adaptation=Adaptation(), seed=0))
    with pytest.raises(NotImplementedError):
        build().encode(["a text"])
