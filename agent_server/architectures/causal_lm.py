"""The `causal_lm` architecture: what it is, without torch. `causal_lm_model` builds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.architectures.factory import ArchitectureDefaults, BaseKind, BuildRequest
from agent_server.tasks import WRITING

if TYPE_CHECKING:
    from agent_server.architectures.model import AgentModel


class CausalLmArchitecture(ArchitectureDefaults):
    """A model folder of `transformers` as a language model. It has no head of its own to train alone."""

    name = "causal_lm"
    tasks: Sequence[str] = WRITING
    description = "A causal language model of a model folder of transformers; it writes with its key-value cache."
    bases: Sequence[BaseKind] = (BaseKind.MODEL_FOLDER,)
    adaptations: Sequence[str] = ("full", "lora", "freezing", "bottleneck")

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent."""
        from agent_server.architectures import causal_lm_model

        return causal_lm_model.build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published agent, to be trained further."""
        from agent_server.architectures import causal_lm_model

        return causal_lm_model.build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Return an agent that was published."""
        from agent_server.architectures import causal_lm_model

        return causal_lm_model.load(folder)
