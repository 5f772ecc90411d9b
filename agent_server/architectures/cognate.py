"""The `cognate` architecture: what it is, without torch. `cognate_model` builds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.adaptation import ParameterCount
from agent_server.architectures.factory import FoundationRequirement
from training_common.models.fingerprints import (
    COGNATE_V1_25M,
    COGNATE_V1_25M_ADAPTIVE,
    COGNATE_V1_25M_HEAD,
    COGNATE_V1_25M_LINEAR_ENDS,
    COGNATE_V1_25M_PARAMETERS,
)

if TYPE_CHECKING:
    from agent_server.adaptation import Adaptation
    from agent_server.architectures.model import AgentModel

# The forward pass's and its adaptive rules' version, as cognate_v1 has them.
COGNATE_25M = FoundationRequirement(name="cognate_v1", fingerprint=COGNATE_V1_25M, act_version=1, ltm_version=1)


class CognateArchitecture:
    """Cognate with a classification head.

    `requirement` is for tests with models of other sizes.
    """

    name = "cognate"
    tasks: Sequence[str] = ("classification",)
    description = "Cognate with a linear head on mean hidden states and embeddings; ACT and LTM frozen unless asked."

    def __init__(self, requirement: FoundationRequirement = COGNATE_25M) -> None:
        self.required_architecture: FoundationRequirement | None = requirement

    def parameters(self, adaptation: Adaptation) -> ParameterCount:
        """Return the parameters of a classifier's base and adapters, without its head."""
        adaptive = COGNATE_V1_25M_ADAPTIVE if adaptation.unfreeze_act_ltm else 0
        if adaptation.lora is not None:
            adapters = adaptation.lora.rank * COGNATE_V1_25M_LINEAR_ENDS
            return ParameterCount(trainable=adapters + adaptive, total=COGNATE_V1_25M_PARAMETERS + adapters)
        frozen = COGNATE_V1_25M_HEAD + COGNATE_V1_25M_ADAPTIVE
        trainable = COGNATE_V1_25M_PARAMETERS - frozen + adaptive
        return ParameterCount(trainable=trainable, total=COGNATE_V1_25M_PARAMETERS)

    def build(
        self, *, foundation_dir: Path, task: str, labels: Sequence[str], adaptation: Adaptation, seed: int
    ) -> AgentModel:
        """Return an untrained classifier on top of a fetched Cognate."""
        from agent_server.architectures import cognate_model

        return cognate_model.build(foundation_dir, task=task, labels=labels, adaptation=adaptation, seed=seed)

    def load(self, folder: Path) -> AgentModel:
        """Return a classifier that was published."""
        from agent_server.architectures import cognate_model

        return cognate_model.load(folder)
