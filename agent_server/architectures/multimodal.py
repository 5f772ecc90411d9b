"""The `multimodal` architecture: what it is, without torch. `multimodal_model` builds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.architectures import recurrent
from agent_server.architectures.factory import ArchitectureDefaults, BaseKind, BuildRequest
from agent_server.architectures.sequence_classifier import POOLING
from agent_server.architectures.settings import Setting, SettingValue
from agent_server.data.examples import MOST_FEATURES

if TYPE_CHECKING:
    from agent_server.architectures.model import AgentModel


class MultimodalArchitecture(ArchitectureDefaults):
    """Text beside the features of an image, for instance the output of a vision encoder."""

    name = "multimodal"
    tasks: Sequence[str] = ("classification",)
    description = (
        "Text beside image features, which rows bring as numbers, through a projection. The text is read by a model "
        "folder of transformers, or by a recurrent network from scratch, to which cell, width, layers, bidirectional "
        "and vocabulary_size belong."
    )
    bases: Sequence[BaseKind] = (BaseKind.MODEL_FOLDER, BaseKind.SCRATCH)
    adaptations: Sequence[str] = ("full", "lora", "head", "freezing", "bottleneck")
    settings: Mapping[str, Setting] = {
        "features": Setting(
            description="Numbers in `features` of every row.", default=512, minimum=1, maximum=MOST_FEATURES
        ),
        "projection": Setting(description="Width of the features' projection.", default=128, minimum=1, maximum=4096),
        "pooling": POOLING,
        **recurrent.SETTINGS,
    }

    def learn_tokenizer(self, texts: Iterable[str], settings: Mapping[str, SettingValue]) -> str:
        """Return a byte-level BPE of the texts, as JSON."""
        from agent_server.architectures import recurrent_model

        return recurrent_model.learn_tokenizer(texts, int(settings["vocabulary_size"]))

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent."""
        from agent_server.architectures import multimodal_model

        return multimodal_model.build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published agent, to be trained further."""
        from agent_server.architectures import multimodal_model

        return multimodal_model.build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Return an agent that was published."""
        from agent_server.architectures import multimodal_model

        return multimodal_model.load(folder)
