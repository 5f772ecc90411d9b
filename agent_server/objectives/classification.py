"""Choose one label for a text: cross-entropy, accuracy and macro-F1."""

# B rows, T tokens of the longest row, L labels.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agent_server.architectures.model import AgentModel, collate
from agent_server.data.examples import Labelled
from agent_server.objectives.base import Batch, Loss, Measurement, Objective
from cognateforge.exceptions import DataUnavailableError

# No gradient is kept, so that wide batches cost little memory; wider ones were not faster on CPU.
_EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Tokens, label and features of a row."""

    tokens: Sequence[int]
    label: int
    features: Sequence[float] = ()


class ClassificationObjective(Objective[Labelled, EncodedText]):
    """Cross-entropy over the labels, in nats for each row."""

    score = "accuracy"
    is_share = True

    def encode(self, model: AgentModel, examples: Sequence[Labelled], *, max_tokens: int) -> list[EncodedText]:
        """Return the tokens of each text, cut off after max_tokens or the model's context."""
        most = min(max_tokens, model.context) if model.context else max_tokens
        encodings = model.encode([example.text for example in examples])
        return [
            EncodedText(encoding.tokens[:most], example.label, example.features)
            for encoding, example in zip(encodings, examples, strict=True)
        ]

    def length(self, row: EncodedText) -> int:
        """Return how many tokens a row has."""
        return len(row.tokens)

    def batch(self, rows: Sequence[EncodedText]) -> Batch:
        """Return tokens_BT, valid_BT and labels_B, and features_BF where rows have them."""
        inputs = collate([row.tokens for row in rows])
        labels_B = torch.tensor([row.label for row in rows], dtype=torch.int64)
        batch = {"tokens_BT": inputs.tokens_BT, "valid_BT": inputs.valid_BT, "labels_B": labels_B}
        if any(row.features for row in rows):
            batch["features_BF"] = _features(rows)
        return batch

    def units(self, batch: Batch) -> float:
        """Return the number of rows."""
        return float(len(batch["labels_B"]))

    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        """Return the mean cross-entropy, and how many rows were answered rightly."""
        logits_BL = model(self.inputs(batch))
        labels_B = batch["labels_B"]
        correct = float((logits_BL.detach().argmax(-1) == labels_B).sum())
        return Loss(mean=F.cross_entropy(logits_BL, labels_B), counts={"correct": correct})

    def rates(self, counts: Mapping[str, float], units: float) -> dict[str, float]:
        """Return the share of training rows that were answered rightly."""
        return {"train_accuracy": counts["correct"] / units}

    @torch.no_grad()
    def measure(
        self, model: AgentModel, rows: Sequence[EncodedText], *, between: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Return accuracy, macro-F1, which is the mean over the labels that occur among the rows, and the mean loss."""
        order = sorted(rows, key=self.length)
        pairs: Counter[tuple[int, int]] = Counter()  # (label, answer)
        loss = 0.0
        for start in range(0, len(order), _EVALUATION_BATCH):
            between()
            taken = order[start : start + _EVALUATION_BATCH]
            batch = self.batch(taken)
            logits_BL = model(self.inputs(batch))
            loss += float(F.cross_entropy(logits_BL, batch["labels_B"], reduction="sum"))
            answers = logits_BL.argmax(-1).tolist()
            pairs.update((row.label, answer) for row, answer in zip(taken, answers, strict=True))
        accuracy, macro_f1 = score(pairs)
        return [
            Measurement(metric="accuracy", value=accuracy, rows=len(rows)),
            Measurement(metric="macro_f1", value=macro_f1, rows=len(rows)),
            Measurement(metric="loss", value=loss / len(rows), rows=len(rows)),
        ]

    def floor(self, rows: Sequence[EncodedText]) -> list[Measurement]:
        """Return the share of the most frequent label: what the best constant answer scores."""
        share = max(Counter(row.label for row in rows).values()) / len(rows)
        return [Measurement(metric="majority_share", value=share, rows=len(rows))]


def _features(rows: Sequence[EncodedText]) -> Tensor:
    widths = sorted({len(row.features) for row in rows})
    if len(widths) > 1:
        raise DataUnavailableError(
            f"rows have {widths[0]} and {widths[-1]} features; every row needs equally many, or none of them any"
        )
    return torch.tensor([list(row.features) for row in rows], dtype=torch.float32)


def score(pairs: Counter[tuple[int, int]]) -> tuple[float, float]:
    """Return accuracy and macro-F1 of counted pairs of label and answer.

    F1 of a label is 2 TP / (2 TP + FP + FN). Source: van Rijsbergen 1979; macro: the mean over labels that occur.
    """
    rows = sum(pairs.values())
    labelled: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    for (label, answer), count in pairs.items():
        labelled[label] += count
        answered[answer] += count
    f1 = [2 * pairs[label, label] / (labelled[label] + answered[label]) for label in sorted(labelled)]
    right = sum(pairs[label, label] for label in labelled)
    return right / rows, sum(f1) / len(f1)
