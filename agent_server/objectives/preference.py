"""Prefer one answer to another: direct preference optimization against the untrained model."""

# B pairs, T tokens of the longest answer with its prompt.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agent_server.architectures.model import AgentBatch, AgentModel
from agent_server.data.examples import Preferred, Segment, Written
from agent_server.objectives.base import Batch, Loss, Measurement, Objective
from agent_server.objectives.metrics.preferences import preference_accuracy, reward_margin
from agent_server.objectives.texts import EncodedText, cut, encode_texts, first_rows, padded, room, target_logits

# Pairs of an evaluation batch; each is two texts.
_EVALUATION_BATCH = 8
# Tokens whose logits two models are compared by.
_COMPARED_TOKENS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPair:
    """A prompt with each of two answers. reference: the untrained model's log probability of each, or None."""

    chosen: EncodedText
    rejected: EncodedText
    reference: tuple[float, float] | None = None


class PreferenceObjective(Objective[Preferred, EncodedPair]):
    """The loss of a pair is -log sigmoid(beta * ((c - c0) - (r - r0))): c and r are the log probabilities of the
    preferred and the other answer, c0 and r0 those of the untrained model.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """

    score = "preference_accuracy"
    needs_reference = True

    def __init__(self, *, beta: float = 0.1) -> None:
        self.beta = beta

    def encode(self, model: AgentModel, examples: Sequence[Preferred], *, max_tokens: int) -> list[EncodedPair]:
        """Return both texts of each pair, each of at most max_tokens."""
        most = room(model, max_tokens)
        texts = [
            Written((Segment(example.prompt), Segment(answer, trained=True)))
            for example in examples
            for answer in (example.chosen, example.rejected)
        ]
        rows = [cut(row, most) for row in encode_texts(model, texts)]
        return [EncodedPair(chosen, rejected) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]

    def length(self, row: EncodedPair) -> int:
        """Return how many tokens the longer text has."""
        return max(len(row.chosen.tokens), len(row.rejected.tokens))

    def facts(self, rows: Sequence[EncodedPair]) -> dict[str, int]:
        """Return how many pairs there are, and of how many an answer was cut."""
        return {"pairs": len(rows), "pairs_cut": sum(bool(row.chosen.lost or row.rejected.lost) for row in rows)}

    @torch.no_grad()
    def prepare(
        self, reference: AgentModel, rows: Sequence[EncodedPair], *, between: Callable[[], None] = lambda: None
    ) -> list[EncodedPair]:
        """Return the pairs with the untrained model's log probabilities of their answers."""
        prepared = list(rows)
        for taken in self._batches(rows):
            between()
            chosen_B, rejected_B = self._log_p(reference, self._tensors([rows[i] for i in taken]))
            for i, chosen, rejected in zip(taken, chosen_B.tolist(), rejected_B.tolist(), strict=True):
                prepared[i] = replace(rows[i], reference=(chosen, rejected))
        return prepared

    def batch(self, rows: Sequence[EncodedPair]) -> Batch:
        """Return the preferred texts and the others, padded to one length, and reference_B2.

        Errors: ValueError, for pairs that `prepare` has not seen.
        """
        references = [row.reference for row in rows if row.reference is not None]
        if len(references) != len(rows):
            raise ValueError("a pair has no log probabilities of the untrained model; prepare the rows first")
        return {**self._tensors(rows), "reference_B2": torch.tensor(references, dtype=torch.float32)}

    def _tensors(self, rows: Sequence[EncodedPair]) -> dict[str, Tensor]:
        parts = padded([row.chosen for row in rows] + [row.rejected for row in rows])
        own = {name: part[: len(rows)] for name, part in parts.items()}
        return own | {f"rejected_{name}": part[len(rows) :] for name, part in parts.items()}

    def units(self, batch: Batch) -> float:
        """Return the number of pairs."""
        return float(len(batch["tokens_BT"]))

    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        """Return the mean loss, and how many pairs are preferred rightly."""
        margins_B = self._margins(model, batch)
        right = float((margins_B.detach() > 0).sum() + 0.5 * (margins_B.detach() == 0).sum())
        return Loss(mean=-F.logsigmoid(margins_B).mean(), counts={"correct": right})

    def rates(self, counts: Mapping[str, float], units: float) -> dict[str, float]:
        """Return the share of training pairs that were preferred rightly."""
        return {"train_preference_accuracy": counts["correct"] / units} if units else {}

    @torch.no_grad()
    def measure(
        self, model: AgentModel, rows: Sequence[EncodedPair], *, between: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Return the loss, and accuracy and mean margin of the implied rewards; without the untrained model's log
        probabilities, only how often the preferred answer is the likelier one."""
        margins, likelier = list[float](), list[float]()
        prepared = all(row.reference is not None for row in rows)
        for taken in self._batches(rows):
            between()
            own = [rows[i] for i in taken]
            chosen_B, rejected_B = self._log_p(model, self._tensors(own))
            likelier += (chosen_B - rejected_B).tolist()
            if prepared:
                reference_B2 = torch.tensor([row.reference for row in own])
                margins += self._implied(chosen_B, rejected_B, reference_B2).tolist()
        found = {"likelihood_accuracy": preference_accuracy(likelier)}
        if margins:
            losses = -F.logsigmoid(torch.tensor(margins, dtype=torch.float64))
            found |= {
                "preference_accuracy": preference_accuracy(margins),
                "reward_margin": reward_margin(margins),
                "loss": float(losses.mean()),
            }
        return [Measurement(metric=name, value=value, rows=len(rows)) for name, value in found.items()]

    def _margins(self, model: AgentModel, batch: Batch) -> Tensor:
        chosen_B, rejected_B = self._log_p(model, batch)
        return self._implied(chosen_B, rejected_B, batch["reference_B2"])

    def _implied(self, chosen_B: Tensor, rejected_B: Tensor, reference_B2: Tensor) -> Tensor:
        """Return the margin of the implied rewards of each pair."""
        return self.beta * ((chosen_B - reference_B2[:, 0]) - (rejected_B - reference_B2[:, 1]))

    @staticmethod
    def _log_p(model: AgentModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the log probabilities of both answers of each pair, in one pass over both."""
        tokens, valid, targets, weights = (
            torch.cat((batch[name], batch[f"rejected_{name}"]))
            for name in ("tokens_BT", "valid_BT", "targets_BT", "weights_BT")
        )
        chosen = weights > 0
        logits_NV = target_logits(model, AgentBatch(tokens_BT=tokens, valid_BT=valid), chosen)
        losses_N = F.cross_entropy(logits_NV, targets[chosen], reduction="none")
        losses = torch.zeros(chosen.shape, device=losses_N.device).masked_scatter(chosen, losses_N)
        chosen_B, rejected_B = (-losses.sum(-1)).chunk(2)
        return chosen_B, rejected_B

    def comparable(self, model: AgentModel, batch: Batch) -> Tensor:
        """Return the logits of the first preferred texts, which are compared at each of their tokens."""
        return super().comparable(model, first_rows(batch, _COMPARED_TOKENS))

    def _batches(self, rows: Sequence[EncodedPair]) -> list[list[int]]:
        order = sorted(range(len(rows)), key=lambda i: self.length(rows[i]))
        return [order[start : start + _EVALUATION_BATCH] for start in range(0, len(order), _EVALUATION_BATCH)]
