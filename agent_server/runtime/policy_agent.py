"""Policies: the likeliest action of one agent, or of several, for what they observe."""

# B rows, n agents of a learner, F numbers of a joint observation, W of one agent's, P numbers of a distribution.

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "elu": nn.ELU,
}  # fmt: skip
_FARTHEST = 10.0
_LEAST_VARIANCE = 1e-8


class Space:
    """What an agent sees or does: a box, discrete, multi_discrete or multi_binary, in Gymnasium's words."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.kind: str = told["kind"]
        self.shape: list[int] = told["shape"]
        self.counts: list[int] = told.get("counts", [])
        self.starts: list[int] = told.get("starts", [])
        self.low: list[float | None] = told.get("low", [])
        self.high: list[float | None] = told.get("high", [])
        self.whole = "int" in told.get("dtype", "float32")

    @property
    def width(self) -> int:
        """How many numbers a flattened value has."""
        return math.prod(self.shape) if self.kind in ("box", "multi_binary") else sum(self.counts)

    @property
    def outputs(self) -> int:
        """How many numbers a policy gives for an action."""
        return math.prod(self.shape) if self.kind == "box" else sum(self.counts)

    def flatten(self, value: Any) -> Tensor:
        """Return a value as numbers; discrete parts are one-hot. Errors: ValueError, for a value of another space."""
        parts = torch.as_tensor(value).reshape(-1)
        discrete = self.kind not in ("box", "multi_binary")
        expected = len(self.counts) if discrete else self.width
        if len(parts) != expected:
            raise ValueError(f"an observation has {len(parts)} numbers, and the agent reads {expected}")
        if not discrete:
            return parts.float()
        flat = torch.zeros(self.width)
        flat[torch.tensor([0, *itertools.accumulate(self.counts[:-1])]) + parts.long() - torch.tensor(self.starts)] = 1
        return flat

    def action(self, given_P: Tensor) -> Any:
        """Return the likeliest action, as JSON has it."""
        if self.kind == "box":
            low = torch.tensor([-math.inf if bound is None else bound for bound in self.low])
            high = torch.tensor([math.inf if bound is None else bound for bound in self.high])
            clipped = given_P.clamp(low, high).reshape(self.shape)
            return (clipped.long() if self.whole else clipped).tolist()
        parts = [int(part.argmax()) for part in torch.split(given_P, self.counts)]
        values = [part + start for part, start in zip(parts, self.starts, strict=True)]
        return values[0] if self.kind == "discrete" else torch.tensor(values).reshape(self.shape).tolist()


class Moments(nn.Module):
    """Mean and variance of what was seen in training."""

    mean_F: Tensor
    variance_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("variance_F", torch.ones(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, seen: Tensor) -> Tensor:
        """Return what is seen with mean 0 and deviation 1."""
        scale = (self.variance_F + _LEAST_VARIANCE).rsqrt()
        return ((seen - self.mean_F) * scale).clamp(-_FARTHEST, _FARTHEST).float()


class Actor(nn.Module):
    """The actor of n agents of equal spaces, whose critic stays behind."""

    def __init__(self, members: Sequence[int], seen: int, action: Space, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.members = list(members)
        inputs = seen + (len(members) if len(members) > 1 else 0)
        widths = [inputs, *[int(settings["hidden_size"])] * int(settings["layers"])]
        modules: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            modules += [nn.Linear(ins, outs), _ACTIVATIONS[settings["activation"]]()]
        self.actor = nn.Sequential(*modules, nn.Linear(widths[-1], action.outputs))

    def forward(self, seen_BnW: Tensor) -> Tensor:
        """Return each agent's logits, or the means of its box, [B, n, P]."""
        n = len(self.members)
        if n > 1:
            seen_BnW = torch.cat((seen_BnW, torch.eye(n).expand(len(seen_BnW), n, n)), dim=-1)
        given_BnP: Tensor = self.actor(seen_BnW)
        return given_BnP


class Policy(nn.Module):
    """The policy of all agents. features: numbers of a joint observation."""

    output, labels = "actions", ()
    begin_token = end_token = -1

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = [agent["name"] for agent in config["agents"]]
        self.seen = [Space(agent["observation"]) for agent in config["agents"]]
        self.done = [Space(agent["action"]) for agent in config["agents"]]
        self.widths = [space.width for space in self.seen]
        self.features = sum(self.widths)
        self.moments = Moments(self.features) if config["settings"]["normalize_observations"] else None
        everyone = list(range(len(self.names)))
        alike = all(agent["observation"] == config["agents"][0]["observation"] for agent in config["agents"]) and all(
            agent["action"] == config["agents"][0]["action"] for agent in config["agents"]
        )
        apart = config["coordination"] == "independent" or not alike
        self.learners = nn.ModuleList(
            Actor(group, self.widths[group[0]], self.done[group[0]], config["settings"])
            for group in ([[i] for i in everyone] if apart else [everyone])
        )

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return each agent's logits, or the means of its box, side by side."""
        if features_BF is None:
            raise ValueError("a policy reads observations")
        joint_BF = features_BF if self.moments is None else self.moments(features_BF)
        seen = joint_BF.split(self.widths, dim=-1)
        parts = [joint_BF] * len(self.names)
        for learner in self.learners:
            members: Any = learner.members
            given_BnP = learner(torch.stack([seen[i] for i in members], dim=1))
            for place, i in enumerate(members):
                parts[i] = given_BnP[:, place]
        return torch.cat(parts, dim=-1)

    comparable = forward

    def act(self, observation: Any) -> Any:
        """Return the likeliest action for an observation; of several agents, by name, for those that observe."""
        if len(self.names) == 1:
            observation = {self.names[0]: observation}
        joint = [
            space.flatten(observation[name]) if name in observation else torch.zeros(space.width)
            for name, space in zip(self.names, self.seen, strict=True)
        ]
        empty = torch.zeros(1, 0, dtype=torch.int64)
        given = self(empty, empty.bool(), torch.cat(joint)[None])[0].split([space.outputs for space in self.done])
        actions = {
            name: space.action(part)
            for name, space, part in zip(self.names, self.done, given, strict=True)
            if name in observation
        }
        return actions[self.names[0]] if len(self.names) == 1 else actions

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Refuse: it reads observations."""
        raise NotImplementedError("a policy reads observations, not texts")

    def decode(self, tokens: Sequence[int]) -> str:
        """Refuse: it writes no texts."""
        raise NotImplementedError("a policy writes no texts")


def load(folder: Path, config: Mapping[str, Any], output: str) -> Policy:
    """Return the agent of a package's folder."""
    model = Policy(config)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name: value for name, value in tensors.items() if ".critic." not in name and "log_" not in name}
    )
    return model.eval()
