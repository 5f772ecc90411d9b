"""Policies: actors and critics of one agent or several, on joint observations.

    learner      an actor, a critic, and the agents that act by them
    independent          a learner for each agent; its critic sees what the agent sees
    shared_parameters    one learner for all; its critic sees what the agent sees
    centralized_critic   the same with critics that see all, and a learner for each agent where their spaces differ

Agents that share an actor are told apart by a one-hot number behind their observation (Gupta et al. 2017, "Cooperative
Multi-Agent Control Using Deep Reinforcement Learning"; Terry et al. 2020, arXiv:2005.13625).
"""

# B rows, N agents, n agents of a learner, F numbers of a joint observation, W of one agent's, K parts of a joint
# action, P parameters of one agent's distribution over actions.

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from agent_server.architectures.model import AgentBatch, AgentModel, Encoding
from agent_server.architectures.policy import SETTINGS, PolicyRequest
from agent_server.rl.spaces import AgentSpaces, Space
from agent_server.tasks import Output
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError
from training_common.attempt import Json

COORDINATIONS = ("independent", "shared_parameters", "centralized_critic")
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU,
}  # fmt: skip
# Orthogonal starts, a policy near uniform and a value near 0: Andrychowicz et al. 2021, arXiv:2006.05990, section 3.2.
_HIDDEN_GAIN, _POLICY_GAIN, _VALUE_GAIN = math.sqrt(2), 0.01, 1.0
# Normalized observations are kept within so many deviations, as the references of this method do.
_FARTHEST = 10.0
_LEAST_VARIANCE = 1e-8
_FORMAT = 1


class Moments(nn.Module):
    """Mean and variance of what was seen so far, merged batch by batch (Chan et al. 1979). Float64, in buffers."""

    mean_F: Tensor
    variance_F: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("variance_F", torch.ones(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, seen_BF: Tensor) -> None:
        """Take in a batch. An empty one changes nothing."""
        if not len(seen_BF):
            return
        batch = seen_BF.double()
        mean, variance, rows = batch.mean(0), batch.var(0, correction=0), float(len(batch))
        total = float(self.count) + rows
        delta = mean - self.mean_F
        spread = self.variance_F * self.count + variance * rows + delta.square() * (float(self.count) * rows / total)
        self.mean_F += delta * (rows / total)
        self.variance_F.copy_(spread / total)
        self.count.fill_(total)

    def normalize(self, seen: Tensor) -> Tensor:
        """Return what is seen with mean 0 and deviation 1. Nothing seen before: as it is."""
        scale = (self.variance_F + _LEAST_VARIANCE).rsqrt()
        return ((seen - self.mean_F) * scale).clamp(-_FARTHEST, _FARTHEST).float()


def perceptron(inputs: int, outputs: int, *, gain: float, settings: Mapping[str, Any]) -> nn.Sequential:
    """Return a perceptron with orthogonal weights; `gain` is that of its last layer."""
    widths = [inputs, *[int(settings["hidden_size"])] * int(settings["layers"])]
    activation = _ACTIVATIONS[str(settings["activation"])]
    modules: list[nn.Module] = []
    for ins, outs in itertools.pairwise(widths):
        modules += [_linear(ins, outs, _HIDDEN_GAIN), activation()]
    return nn.Sequential(*modules, _linear(widths[-1], outputs, gain))


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Learner(nn.Module):
    """An actor and a critic for n agents of equal spaces.

    log_deviation_P: of a box's numbers, the same whatever is seen.
    """

    log_deviation_P: Tensor | None

    def __init__(
        self, members: Sequence[int], spaces: AgentSpaces, critic_width: int, settings: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.action = spaces.action
        identity = len(self.members) if len(self.members) > 1 else 0
        self.actor = perceptron(
            spaces.observation.width + identity, self.action.outputs, gain=_POLICY_GAIN, settings=settings
        )
        self.critic = perceptron(critic_width + identity, 1, gain=_VALUE_GAIN, settings=settings)
        is_box = self.action.kind == "box"
        self.log_deviation_P = nn.Parameter(torch.zeros(self.action.outputs)) if is_box else None

    def with_identity(self, seen_BnW: Tensor) -> Tensor:
        """Append to what each agent sees which of the agents it is."""
        n = len(self.members)
        if n == 1:
            return seen_BnW
        return torch.cat((seen_BnW, torch.eye(n).expand(len(seen_BnW), n, n)), dim=-1)

    def choose(self, given_BnP: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return actions, [B, n, K/n]: drawn, or the likeliest ones without a generator."""
        if self.log_deviation_P is not None:
            if generator is None:
                return given_BnP
            noise = torch.randn(given_BnP.shape, generator=generator)
            return given_BnP + self.log_deviation_P.exp() * noise
        chosen = []
        for logits in torch.split(given_BnP, list(self.action.counts), dim=-1):
            if generator is None:
                chosen.append(logits.argmax(-1))
            else:
                flat = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
                chosen.append(flat.view(logits.shape[:2]))
        return torch.stack(chosen, dim=-1).float()

    def judge(self, given_BnP: Tensor, taken_BnK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of taken actions and the entropy, both [B, n], in nats."""
        if self.log_deviation_P is not None:
            scaled = (taken_BnK - given_BnP) * (-self.log_deviation_P).exp()
            log_BnP = -0.5 * scaled.square() - self.log_deviation_P - 0.5 * math.log(2 * math.pi)
            entropy = (self.log_deviation_P + 0.5 * math.log(2 * math.pi * math.e)).sum()
            return log_BnP.sum(-1), entropy.expand(given_BnP.shape[:2])
        taken = taken_BnK.long().unbind(-1)
        logs = [part.log_softmax(-1) for part in torch.split(given_BnP, list(self.action.counts), dim=-1)]
        of_parts = [log.gather(-1, part[..., None]).squeeze(-1) for log, part in zip(logs, taken, strict=True)]
        entropies = [-(log.exp() * log).sum(-1) for log in logs]
        return torch.stack(of_parts).sum(0), torch.stack(entropies).sum(0)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a policy thinks of joint actions that were taken: all [B, N]."""

    log_probability_BN: Tensor
    entropy_BN: Tensor
    value_BN: Tensor


class PolicyModel(AgentModel):
    """Actors and critics. Its rows are joint observations, in `AgentBatch.features_BF`.

    Errors: IncompatibleError, when agents whose spaces differ are to share their parameters.
    """

    output = Output.ACTIONS

    def __init__(self, request: PolicyRequest) -> None:
        super().__init__()
        self.agents = tuple(request.agents)
        self.coordination = request.coordination if len(self.agents) > 1 else "independent"
        self.settings = {name: request.settings.get(name, setting.default) for name, setting in SETTINGS.items()}
        self._widths = [agent.observation.width for agent in self.agents]
        self._parts = [agent.action.parts for agent in self.agents]
        self.moments = Moments(sum(self._widths)) if self.settings["normalize_observations"] else None
        self._sees_all = self.coordination == "centralized_critic"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            self.learners = nn.ModuleList(
                Learner(members, self.agents[members[0]], self._critic_width(members), self.settings)
                for members in self._groups()
            )
        # Where each agent's column of a result stands once the learners' are side by side.
        order = [member for learner in self._learners() for member in learner.members]
        self._order = [order.index(i) for i in range(len(order))]

    def _groups(self) -> list[tuple[int, ...]]:
        everyone = tuple(range(len(self.agents)))
        alike = len({(agent.observation, agent.action) for agent in self.agents}) == 1
        if self.coordination == "shared_parameters" and not alike:
            told = "; ".join(f"{a.name}: {a.observation.width} to {a.action.outputs}" for a in self.agents)
            raise IncompatibleError(
                f"agents with different spaces cannot share parameters ({told}); choose independent learning or a "
                "centralized critic"
            )
        if self.coordination == "independent" or not alike:
            return [(i,) for i in everyone]
        return [everyone]

    def _critic_width(self, members: tuple[int, ...]) -> int:
        own = self._widths[members[0]]
        if not self._sees_all:
            return own
        # What the agent itself sees stands first, as it does for the others: agents that share a critic are told apart.
        return sum(self._widths) + (own if len(members) > 1 else 0)

    def _learners(self) -> list[Learner]:
        return [learner for learner in self.learners if isinstance(learner, Learner)]

    def groups(self) -> list[tuple[tuple[int, ...], list[nn.Parameter]]]:
        """Return each learner's agents and parameters."""
        return [(learner.members, list(learner.parameters())) for learner in self._learners()]

    # What the agents see

    def _seen(self, joint_BF: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        joint_BF = joint_BF if self.moments is None else self.moments.normalize(joint_BF)
        return joint_BF, torch.split(joint_BF, self._widths, dim=-1)

    def _given(self, learner: Learner, seen: Sequence[Tensor]) -> Tensor:
        own_BnW = torch.stack([seen[i] for i in learner.members], dim=1)
        given_BnP: Tensor = learner.actor(learner.with_identity(own_BnW))
        return given_BnP

    def _values(self, learner: Learner, joint_BF: Tensor, seen: Sequence[Tensor]) -> Tensor:
        own = [seen[i] for i in learner.members]
        if self._sees_all:
            own = [torch.cat((mine, joint_BF), -1) for mine in own] if len(own) > 1 else [joint_BF]
        value_Bn1: Tensor = learner.critic(learner.with_identity(torch.stack(own, dim=1)))
        return value_Bn1.squeeze(-1)

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(found), dim=1)[:, self._order]

    # What they do

    @torch.no_grad()
    def draw(self, joint_BF: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return joint actions, [B, K]: drawn, or the likeliest ones without a generator."""
        _, seen = self._seen(joint_BF)
        parts: list[Tensor] = [joint_BF] * len(self.agents)
        for learner in self._learners():
            chosen_BnK = learner.choose(self._given(learner, seen), generator)
            for place, i in enumerate(learner.members):
                parts[i] = chosen_BnK[:, place]
        return torch.cat(parts, dim=-1)

    def values(self, joint_BF: Tensor) -> Tensor:
        """Return what each agent's critic expects, [B, N]."""
        joint_BF, seen = self._seen(joint_BF)
        return self._in_order([self._values(learner, joint_BF, seen) for learner in self._learners()])

    def judge(self, joint_BF: Tensor, action_BK: Tensor) -> Judgement:
        """Return what the policy thinks of joint actions."""
        joint_BF, seen = self._seen(joint_BF)
        taken = torch.split(action_BK, self._parts, dim=-1)
        logs, entropies, values = [], [], []
        for learner in self._learners():
            taken_BnK = torch.stack([taken[i] for i in learner.members], dim=1)
            log_Bn, entropy_Bn = learner.judge(self._given(learner, seen), taken_BnK)
            logs.append(log_Bn)
            entropies.append(entropy_Bn)
            values.append(self._values(learner, joint_BF, seen))
        return Judgement(
            log_probability_BN=self._in_order(logs),
            entropy_BN=self._in_order(entropies),
            value_BN=self._in_order(values),
        )

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return each agent's logits, or the means of its box, side by side in the agents' order."""
        if batch.features_BF is None:
            raise ValueError("a policy reads observations: give them as features_BF")
        _, seen = self._seen(batch.features_BF)
        parts: list[Tensor] = [batch.features_BF] * len(self.agents)
        for learner in self._learners():
            given_BnP = self._given(learner, seen)
            for place, i in enumerate(learner.members):
                parts[i] = given_BnP[:, place]
        return torch.cat(parts, dim=-1)

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """Return the likeliest action for an observation as the environment gives and takes them.

        Of several agents: their observations by name, to their actions by name. Who gives none gets none.
        """
        if len(self.agents) == 1:
            only = self.agents[0]
            flat = torch.from_numpy(only.observation.flatten(observation))
            return only.action.action(self.draw(flat[None])[0].numpy())
        joint = [
            agent.observation.flatten(observation[agent.name])
            if agent.name in observation
            else np.zeros(agent.observation.width, dtype=np.float32)
            for agent in self.agents
        ]
        parts = torch.split(self.draw(torch.from_numpy(np.concatenate(joint))[None])[0], self._parts)
        return {
            agent.name: agent.action.action(part.numpy())
            for agent, part in zip(self.agents, parts, strict=True)
            if agent.name in observation
        }

    # What every agent's model can do

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Refuse: a policy reads observations."""
        raise NotImplementedError("a policy reads observations, not texts")

    def head_parameters(self) -> list[nn.Parameter]:
        """Return nothing: all of a policy starts from random values, and learns at one rate."""
        return []

    def base_model(self) -> nn.Module:
        """Return the policy, which no adaptation applies to."""
        return self

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write model.safetensors and config.json."""
        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config: dict[str, Json] = {
            "architecture": "policy",
            "format": _FORMAT,
            "coordination": self.coordination,
            "settings": dict(self.settings),
            "agents": [
                {"name": agent.name, "observation": agent.observation.to_json(), "action": agent.action.to_json()}
                for agent in self.agents
            ],
            **extra,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> PolicyModel:
    """Return a policy that `save` wrote. Errors: ArtifactCorruptError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] != _FORMAT:
            raise ValueError(f"its format is {config['format']}, and this release reads {_FORMAT}")
        agents = [
            AgentSpaces(
                name=told["name"],
                observation=Space.from_json(told["observation"]),
                action=Space.from_json(told["action"]),
            )
            for told in config["agents"]
        ]
        request = PolicyRequest(agents=agents, coordination=config["coordination"], seed=0, settings=config["settings"])
        model = PolicyModel(request)
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ArtifactCorruptError(f"{folder.name} holds no policy that can be read: {error}") from error
    return model.eval()
