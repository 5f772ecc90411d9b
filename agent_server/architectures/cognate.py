"""The `cognate` architecture: what it is, without torch. `cognate_model` builds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.adaptation import BaseSizes, ParameterCount
from agent_server.architectures.factory import ArchitectureDefaults, BuildRequest, FoundationRequirement
from agent_server.tasks import WITH_ROWS
from training_common.models.fingerprints import (
    COGNATE_V1_25M,
    COGNATE_V1_25M_ADAPTIVE,
    COGNATE_V1_25M_BLOCKS,
    COGNATE_V1_25M_HEAD,
    COGNATE_V1_25M_LINEAR_INPUTS,
    COGNATE_V1_25M_LINEAR_OUTPUTS,
    COGNATE_V1_25M_PARAMETERS,
    COGNATE_V1_25M_WIDTH,
)

if TYPE_CHECKING:
    from agent_server.adaptation import Adaptation
    from agent_server.architectures.model import AgentModel

# The forward pass's and its adaptive rules' version, as cognate_v1 has them.
COGNATE_25M = FoundationRequirement(name="cognate_v1", fingerprint=COGNATE_V1_25M, act_version=1, ltm_version=1)
_SIZES = BaseSizes(
    total=COGNATE_V1_25M_PARAMETERS,
    unused=COGNATE_V1_25M_HEAD,
    adaptive=COGNATE_V1_25M_ADAPTIVE,
    linear_inputs=COGNATE_V1_25M_LINEAR_INPUTS,
    linear_outputs=COGNATE_V1_25M_LINEAR_OUTPUTS,
    blocks=COGNATE_V1_25M_BLOCKS,
    features=COGNATE_V1_25M_WIDTH,
)


class CognateArchitecture(ArchitectureDefaults):
    """Cognate with a head for labels or tags, or with its own for texts.

    `requirement` is for tests with models of other sizes.
    """

    name = "cognate"
    adaptations: Sequence[str] = ("full", "lora", "head", "freezing", "bottleneck")
    tasks: Sequence[str] = WITH_ROWS
    description = (
        "Cognate, with a linear head for labels and tags, with its own for texts; ACT and LTM frozen unless asked."
    )

    def __init__(self, requirement: FoundationRequirement = COGNATE_25M) -> None:
        self.required_architecture: FoundationRequirement | None = requirement

    def parameters(self, adaptation: Adaptation) -> ParameterCount:
        """Return the parameters of a classifier's base and adapters, without its head."""
        return _SIZES.adapted(adaptation)

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent on top of a fetched Cognate."""
        from agent_server.architectures import cognate_model

        return cognate_model.build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published classifier, to be trained further."""
        from agent_server.architectures import cognate_model

        return cognate_model.build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Return a classifier that was published."""
        from agent_server.architectures import cognate_model

        return cognate_model.load(folder)
