"""The `recurrent` architecture: what it is, without torch. `recurrent_model` builds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_server.architectures.factory import ArchitectureDefaults, BaseKind, BuildRequest
from agent_server.architectures.settings import Setting, SettingValue
from agent_server.tasks import WRITING
from cognateforge.exceptions import FieldViolation

if TYPE_CHECKING:
    from agent_server.architectures.model import AgentModel

SETTINGS: Mapping[str, Setting] = {
    "cell": Setting(description="Kind of cell.", default="gru", words=("gru", "lstm")),
    "width": Setting(
        description="Width of embeddings, and of each direction of a layer.", default=256, minimum=8, maximum=4096
    ),
    "layers": Setting(description="Layers.", default=1, minimum=1, maximum=16),
    "dropout": Setting(description="Dropout before every layer and the head.", default=0.2, minimum=0.0, maximum=0.9),
    "bidirectional": Setting(description="Read texts from both sides. Not for tasks that write texts.", default=False),
    "vocabulary_size": Setting(
        description="Most tokens of the tokenizer, which is learned from the training rows.",
        default=8192,
        minimum=257,
        maximum=65_536,
    ),
}


class RecurrentArchitecture(ArchitectureDefaults):
    """GRU or LSTM layers from random values, with a tokenizer of the training rows' own."""

    name = "recurrent"
    tasks: Sequence[str] = ("classification", "extraction", *WRITING)
    description = "A recurrent network (GRU or LSTM) from scratch, which learns its tokenizer from the training rows."
    bases: Sequence[BaseKind] = (BaseKind.SCRATCH,)
    adaptations: Sequence[str] = ("full", "head", "freezing", "bottleneck")
    settings: Mapping[str, Setting] = SETTINGS

    def violations(self, task: str, settings: Mapping[str, SettingValue]) -> Sequence[FieldViolation]:
        """Refuse to predict what comes next where it was read."""
        if task in WRITING and settings["bidirectional"]:
            text = f"the task {task} predicts what comes next, which a bidirectional network has read; set it to false"
            return [FieldViolation(field="bidirectional", description=text)]
        return ()

    def learn_tokenizer(self, texts: Iterable[str], settings: Mapping[str, SettingValue]) -> str:
        """Return a byte-level BPE of the texts, as JSON."""
        from agent_server.architectures import recurrent_model

        return recurrent_model.learn_tokenizer(texts, int(settings["vocabulary_size"]))

    def build(self, request: BuildRequest) -> AgentModel:
        """Return an untrained agent."""
        from agent_server.architectures import recurrent_model

        return recurrent_model.build(request)

    def build_on(self, folder: Path, request: BuildRequest) -> AgentModel:
        """Return a published agent, to be trained further."""
        from agent_server.architectures import recurrent_model

        return recurrent_model.build_on(folder, request)

    def load(self, folder: Path) -> AgentModel:
        """Return an agent that was published."""
        from agent_server.architectures import recurrent_model

        return recurrent_model.load(folder)
