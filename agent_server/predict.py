"""Use a published agent: `python -m agent_server.predict FOLDER TEXT...` prints one JSON line for each text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.model import AgentModel, collate
from agent_server.tasks import Output
from cognateforge.exceptions import ArtifactCorruptError, ForgeError, IncompatibleError

# Wider batches were not faster on CPU.
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """An answer; `probability` is the model's own, which nobody has calibrated."""

    text: str
    label: str
    probability: float


class Classifier:
    """A published classification agent, loaded from its folder.

    Errors: ArchitectureNotFoundError, ArtifactCorruptError; IncompatibleError, for an agent that is no classifier.
    """

    def __init__(self, folder: Path, *, factory: AgentArchitectureFactory | None = None) -> None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            architecture, self._max_tokens = str(config["architecture"]), int(config["max_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactCorruptError(f"{folder} holds no published agent: {error}") from error
        self.model: AgentModel = (factory or AgentArchitectureFactory()).get(architecture).load(folder).eval()
        if self.model.output is not Output.CLASSES:
            raise IncompatibleError(
                f"{folder} holds no classifier; {folder / 'run.py'} answers for agents of every task"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that it answers with."""
        return self.model.labels

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Return an answer for each text, in order."""
        most = min(self._max_tokens, self.model.context) if self.model.context else self._max_tokens
        rows = [encoding.tokens[:most] for encoding in self.model.encode(texts)]
        predictions: list[Prediction] = []
        for start in range(0, len(rows), _BATCH):
            with torch.inference_mode():
                best = self.model(collate(rows[start : start + _BATCH])).softmax(-1).max(-1)
            answers = zip(texts[start : start + _BATCH], best.indices.tolist(), best.values.tolist(), strict=True)
            predictions += [Prediction(text=text, label=self.labels[i], probability=p) for text, i, p in answers]
        return predictions


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    if len(arguments) < 2:
        print("usage: python -m agent_server.predict FOLDER TEXT...", file=sys.stderr)  # noqa: T201 - a command's output
        return 2
    try:
        predictions = Classifier(Path(arguments[0])).classify(arguments[1:])
    except ForgeError as error:
        print(f"{error.reason_name()}: {error.message}", file=sys.stderr)  # noqa: T201 - a command's output
        return 1
    for prediction in predictions:
        print(json.dumps(asdict(prediction), ensure_ascii=False))  # noqa: T201 - a command's output
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
