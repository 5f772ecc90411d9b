"""The `sequence_classifier` architecture: what it is, without torch. `sequence_classifier_model` builds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.architectures.factory import ArchitectureDefaults, BaseKind, BuildRequest
from agent_server.architectures.settings import Setting

if TYPE_CHECKING:
    from agent_server.architectures.model import AgentModel

POOLING = Setting(
    description="What stands for a text: its first token, its last, the mean of all, or what suits the base.",
    default="auto",
    words=("auto", "first", "last", "mean"),
)
DROPOUT = Setting(description="Dropout of what the head reads.", default=0.1, minimum=0.0, maximum=0.9)


class SequenceClassifierArchitecture(ArchitectureDefaults):
    """A model folder of `transformers` with a head over its texts or their tokens."""

    name = "sequence_classifier"
    tasks: Sequence[str] = ("classification", "extraction")
    description = "An encoder or decoder of a model folder of transformers, with a linear head for labels or slots."
    bases: Sequence[BaseKind] = (BaseKind.MODEL_FOLDER,)
    adaptations: Sequence[str] = ("full", "lora", "head", "freezing", "bottleneck")
    settings: Mapping[str, Setting] = {"pooling": POOLING, "dropout": DROPOUT}

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent."""
        from agent_server.architectures import sequence_classifier_model

        return sequence_classifier_model.build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published agent, to be trained further."""
        from agent_server.architectures import sequence_classifier_model

        return sequence_classifier_model.build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Return an agent that was published."""
        from agent_server.architectures import sequence_classifier_model

        return sequence_classifier_model.load(folder)
