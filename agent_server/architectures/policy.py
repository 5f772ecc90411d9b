"""The `policy` architecture: what it is, without torch. `policy_model` builds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.architectures.factory import ArchitectureDefaults, BaseKind, BuildRequest, Setting, SettingValue
from agent_server.tasks import ACTING
from cognateforge.exceptions import IncompatibleError

if TYPE_CHECKING:
    from agent_server.architectures.policy_model import PolicyModel
    from agent_server.rl.spaces import AgentSpaces

SETTINGS: Mapping[str, Setting] = {
    "hidden_size": Setting(description="Width of each hidden layer.", default=64, minimum=4, maximum=4096),
    "layers": Setting(description="Hidden layers of actor and critic.", default=2, minimum=1, maximum=16),
    "activation": Setting(
        description="Between the layers.", default="tanh", words=("tanh", "relu", "gelu", "silu", "elu")
    ),
    "normalize_observations": Setting(
        description="Give each observation the mean 0 and the deviation 1 that were seen so far.", default=False
    ),
    "normalize_rewards": Setting(
        description="Divide rewards by the deviation of the discounted return that was seen so far.", default=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class PolicyRequest:
    """What a policy is built of. Equal requests give equal parameters.

    coordination: independent, shared_parameters or centralized_critic; of one agent all of them are the same.
    settings: those of `SETTINGS` that differ from their defaults.
    """

    agents: Sequence[AgentSpaces]
    coordination: str
    seed: int
    settings: Mapping[str, SettingValue] = field(default_factory=dict)


class PolicyArchitecture(ArchitectureDefaults):
    """Perceptrons that act: an actor and a critic for one agent or for several."""

    name = "policy"
    tasks: Sequence[str] = ACTING
    description = "Multilayer perceptrons, an actor and a critic, from an environment's observations to its actions."
    bases: Sequence[BaseKind] = (BaseKind.SCRATCH,)
    adaptations: Sequence[str] = ("full",)
    settings: Mapping[str, Setting] = SETTINGS

    def build_policy(self, request: PolicyRequest) -> PolicyModel:
        """Return an untrained policy. Errors: IncompatibleError, when agents that differ are to share parameters."""
        from agent_server.architectures import policy_model

        return policy_model.PolicyModel(request)

    def build(self, request: BuildRequest) -> PolicyModel:
        """Refuse: a policy is built of an environment's spaces, by `build_policy`. Errors: IncompatibleError."""
        raise IncompatibleError(
            f"the architecture policy acts in environments, it does not read rows of {request.task}; "
            "choose an architecture that serves this task"
        )

    def load(self, folder: Path) -> PolicyModel:
        """Return a policy that was published."""
        from agent_server.architectures import policy_model

        return policy_model.load(folder)
