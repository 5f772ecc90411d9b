"""Write texts: cross-entropy of the trained tokens, and what each task makes of the answers that an agent writes."""

# B rows, T tokens of the longest row, V vocabulary, N trained tokens of a batch, K tokens kept of the untrained model.

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agent_server.architectures.model import AgentModel, collate
from agent_server.data.examples import Written
from agent_server.objectives.base import Batch, Loss, Measurement, Objective, sample
from agent_server.objectives.metrics import actions, answers, calls
from agent_server.objectives.texts import (
    EncodedText,
    clip_left,
    cut,
    encode_texts,
    first_rows,
    padded,
    room,
    target_logits,
    windows,
)
from agent_server.runtime.allowed_actions import masked_action
from agent_server.train_config import Constraints

# Tokens of an evaluation batch, padding included: the logits of so many are 250 MB at Cognate's vocabulary.
_EVALUATION_TOKENS = 4096
# exp of it is just below the largest float.
_LARGEST_EXPONENT = 709.0
# Tokens whose logits two models are compared by.
_COMPARED_TOKENS = 1024
# Prompts that are answered side by side.
_GENERATION_BATCH = 16
# The untrained model's likeliest tokens that the KL term tells apart: they carry most of a pretrained model's mass.
_REFERENCE_TOKENS = 16
# Least mass of all other tokens, so that its logarithm stays finite.
_LEAST_REST = 1e-6

Answer = tuple[str, EncodedText]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What sets a task apart.

    rate: metrics out of written answers, or None where none are written. windows: long texts are read in parts, each of
    which repeats so great a share of the one before; 0: one token. None: they are cut.
    """

    score: str
    higher_is_better: bool = True
    rate: Callable[[Sequence[Answer]], dict[str, float]] | None = None
    windows: float | None = None
    turns: bool = False


def _rate_answers(written: Sequence[Answer]) -> dict[str, float]:
    accepted = [(text, [str(one) for one in _list(row.accepted)]) for text, row in written]
    return {
        "exact_match": _mean([answers.exact_match(text, ones) for text, ones in accepted]),
        "token_f1": _mean([answers.token_f1(text, ones) for text, ones in accepted]),
    }


def _rate_calls(written: Sequence[Answer]) -> dict[str, float]:
    found = [calls.ast_match(text, row.accepted) for text, row in written if isinstance(row.accepted, dict)]
    return {"ast_match": _mean(found)}


def _rate_actions(written: Sequence[Answer]) -> dict[str, float]:
    pairs = [(text, str(row.accepted)) for text, row in written]
    return {
        "action_kind_accuracy": _mean([actions.same_kind(*pair) for pair in pairs]),
        "action_exact_match": _mean([actions.same_action(*pair) for pair in pairs]),
    }


_TASKS: Mapping[str, _Task] = {
    "behavioural": _Task(score="action_kind_accuracy", rate=_rate_actions),
    "dialogue": _Task(score="loss", higher_is_better=False, windows=0.5, turns=True),
    "domain": _Task(score="loss", higher_is_better=False, windows=0.0),
    "question_answering": _Task(score="token_f1", rate=_rate_answers),
    "tool_calling": _Task(score="ast_match", rate=_rate_calls),
}


class LanguageObjective(Objective[Written, EncodedText]):
    """Cross-entropy of each trained token, in nats, its mean by the texts' weights.

    task: its field name in TrainingPlan. generated_rows: texts, at most, that answers are written for in a measurement,
    always the same ones; 0 for all. answer_tokens: longest answer.
    constraints: of behavioural agents; None measures no violations.
    kl_weight: how strongly the agent is held to the untrained model: the loss gets as much of the mean KL divergence
    from it at the trained tokens. Over its likeliest tokens and all others as one, so a lower bound of the whole.
    mask_actions: an action that is not allowed is written anew, with the likeliest kind that is.
    Both may be changed between two steps.
    """

    def __init__(
        self,
        task: str,
        *,
        generated_rows: int = 64,
        answer_tokens: int = 128,
        constraints: Constraints | None = None,
        kl_weight: float = 0.0,
        mask_actions: bool = False,
    ) -> None:
        self._task, self._rules = task, _TASKS[task]
        self.score, self.higher_is_better = self._rules.score, self._rules.higher_is_better
        self._generated_rows, self._answer_tokens = generated_rows, answer_tokens
        self._constraints, self._demonstrated = constraints, set[str]()
        self.kl_weight, self.mask_actions = kl_weight, mask_actions
        self.needs_reference = kl_weight > 0 or constraints is not None

    @property
    def allowed_actions(self) -> frozenset[str]:
        """The kinds of actions that are allowed: those that were named, or those that were demonstrated."""
        named = self._constraints.allowed_actions if self._constraints else ()
        return frozenset(named or self._demonstrated)

    # Rows

    def encode(self, model: AgentModel, examples: Sequence[Written], *, max_tokens: int) -> list[EncodedText]:
        """Return texts of at most max_tokens: a long one is cut, or comes in parts where its task reads it so."""
        most, rules = room(model, max_tokens), self._rules
        rows = encode_texts(model, examples)
        if self._task == "behavioural":
            rows = [self._with_action(row) for row in rows]
        if rules.windows is None:
            return [cut(row, most) for row in rows]
        overlap = max(1, int(most * rules.windows))
        return [part for row in rows for part in windows(row, most, overlap=overlap)]

    def _with_action(self, row: EncodedText) -> EncodedText:
        """Remember the kind of a demonstrated action. A turn that does not act is compared with nothing."""
        action = None if row.accepted is None else actions.parse_action(str(row.accepted))
        if action is None:
            return replace(row, accepted=None)
        self._demonstrated.add(action.kind)
        return row

    def length(self, row: EncodedText) -> int:
        """Return how many tokens a row has."""
        return len(row.tokens)

    def facts(self, rows: Sequence[EncodedText]) -> dict[str, int]:
        """Return how many texts or parts there are, were cut, and have nothing to train; and trained tokens cut off."""
        return {
            "texts": len(rows),
            "texts_cut": sum(row.cut for row in rows),
            "texts_untrained": sum(not row.trained for row in rows),
            "trained_tokens_lost": sum(row.lost for row in rows),
        }

    @torch.no_grad()
    def prepare(
        self, reference: AgentModel, rows: Sequence[EncodedText], *, between: Callable[[], None] = lambda: None
    ) -> list[EncodedText]:
        """Return the rows with what the untrained model holds likely, where the loss may need it."""
        if not self.needs_reference:
            return list(rows)
        prepared = list(rows)
        for taken in _batches([len(row.tokens) for row in rows]):
            between()
            own = [rows[i] for i in taken]
            batch = self.batch([replace(row, reference=None) for row in own])
            chosen_BT = batch["weights_BT"] > 0
            log_p_NV = target_logits(reference, self.inputs(batch), chosen_BT).log_softmax(-1)
            best = log_p_NV.topk(min(_REFERENCE_TOKENS, log_p_NV.shape[-1]), -1)
            lengths = chosen_BT.sum(1).tolist()
            tokens, values = (torch.split(part, lengths) for part in (best.indices, best.values))
            for i, tokens_NK, values_NK in zip(taken, tokens, values, strict=True):
                prepared[i] = replace(rows[i], reference=(tokens_NK.to(torch.int32), values_NK.clone()))
        return prepared

    # Steps

    def batch(self, rows: Sequence[EncodedText]) -> Batch:
        """Return tokens_BT, valid_BT, targets_BT with their weights_BT, and what the untrained model says there."""
        batch = padded(rows)
        references = [row.reference for row in rows if row.reference is not None]
        if references and len(references) == len(rows):
            chosen_BT = batch["weights_BT"] > 0
            for part, name in enumerate(("reference_BTK", "reference_log_p_BTK")):
                found_NK = torch.cat([one[part] for one in references])
                batch[name] = found_NK.new_zeros(*chosen_BT.shape, found_NK.shape[-1])
                batch[name][chosen_BT] = found_NK
        return batch

    def units(self, batch: Batch) -> float:
        """Return the sum of the trained tokens' weights."""
        return float(batch["weights_BT"].double().sum())

    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        """Return the weighted mean cross-entropy, and of the trained tokens how many there are and were likeliest."""
        weights_BT = batch["weights_BT"]
        chosen_BT = weights_BT > 0
        logits_NV = target_logits(model, self.inputs(batch), chosen_BT)
        targets_N, weights_N = batch["targets_BT"][chosen_BT], weights_BT[chosen_BT]
        counts = {"correct": float((logits_NV.detach().argmax(-1) == targets_N).sum()), "tokens": float(len(targets_N))}
        share_N = weights_N / weights_N.sum()
        mean = (F.cross_entropy(logits_NV, targets_N, reduction="none") * share_N).sum()
        if "reference_BTK" in batch:
            reference = (batch[name][chosen_BT] for name in ("reference_BTK", "reference_log_p_BTK"))
            kl = (_kl(logits_NV.log_softmax(-1), *reference) * share_N).sum()
            counts["kl"] = float(kl.detach()) * float(weights_N.sum())
            if self.kl_weight:
                mean = mean + self.kl_weight * kl
        return Loss(mean=mean, counts=counts)

    def rates(self, counts: Mapping[str, float], units: float) -> dict[str, float]:
        """Return the share of trained tokens that were the likeliest, and the KL divergence where it was measured."""
        found = {"train_token_accuracy": counts["correct"] / counts["tokens"]} if counts.get("tokens") else {}
        if "kl" in counts and units:
            found["kl_to_base"] = counts["kl"] / units
        return found

    def comparable(self, model: AgentModel, batch: Batch) -> Tensor:
        """Return the logits of the first rows, which are compared at each of their tokens."""
        return super().comparable(model, first_rows(batch, _COMPARED_TOKENS))

    # Measuring

    @torch.no_grad()
    def measure(
        self, model: AgentModel, rows: Sequence[EncodedText], *, between: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Return the loss for each trained token, and the task's metrics of answers that the agent writes."""
        return [*self._losses(model, rows, between), *self._rated(model, rows, between)]

    def _losses(self, model: AgentModel, rows: Sequence[EncodedText], between: Callable[[], None]) -> list[Measurement]:
        trained = [row for row in rows if row.trained]
        if not trained:
            return []
        total, units = 0.0, 0.0
        turns: defaultdict[int, list[float]] = defaultdict(list)
        for taken in _batches([len(row.tokens) for row in trained]):
            between()
            own = [trained[i] for i in taken]
            batch = self.batch(own)
            chosen_BT = batch["weights_BT"] > 0
            logits_NV = target_logits(model, self.inputs(batch), chosen_BT)
            losses_N = F.cross_entropy(logits_NV, batch["targets_BT"][chosen_BT], reduction="none")
            weights_N = batch["weights_BT"][chosen_BT].double()
            total, units = total + float((losses_N.double() * weights_N).sum()), units + float(weights_N.sum())
            if self._rules.turns:
                places = chosen_BT.nonzero().tolist()
                for (row, place), loss in zip(places, losses_N.tolist(), strict=True):
                    turns[own[row].turns[place]].append(loss)
        mean = total / units
        found = [
            Measurement(metric="loss", value=mean, rows=len(trained)),
            Measurement(metric="perplexity", value=math.exp(min(mean, _LARGEST_EXPONENT)), rows=len(trained)),
        ]
        if turns:
            value = _mean([sum(losses) / len(losses) for losses in turns.values()])
            found.append(Measurement(metric="turn_loss", value=value, rows=len(turns)))
        return found

    def _rated(self, model: AgentModel, rows: Sequence[EncodedText], between: Callable[[], None]) -> list[Measurement]:
        asked = self._asked(rows)
        if self._rules.rate is None or not asked:
            return []
        written = self.write(model, asked, between=between)
        rates = self._rules.rate(list(zip(written, asked, strict=True)))
        if self._constraints is not None:
            allowed = self.allowed_actions
            rates["violation_share"] = _mean([actions.violates(text, allowed) for text in written])
        return [Measurement(metric=name, value=value, rows=len(asked)) for name, value in rates.items()]

    def _asked(self, rows: Sequence[EncodedText]) -> Sequence[EncodedText]:
        """Return the rows that answers are written for."""
        return sample([row for row in rows if row.accepted is not None], self._generated_rows, seed=0)

    def floor(self, rows: Sequence[EncodedText]) -> list[Measurement]:
        """Return what a constant answer scores where answers are written: no call, or one kind of action."""
        asked = self._asked(rows)
        if not asked:
            return []
        if self._task == "tool_calling":
            idle = [calls.ast_match("", row.accepted) for row in asked if isinstance(row.accepted, dict)]
            return [Measurement(metric="no_call_share", value=_mean(idle), rows=len(asked))]
        if self._task == "behavioural":
            kinds = Counter(action.kind for row in asked if (action := actions.parse_action(str(row.accepted))))
            share = max(kinds.values(), default=0) / len(asked)
            return [Measurement(metric="majority_share", value=share, rows=len(asked))]
        return []

    @torch.no_grad()
    def write(
        self, model: AgentModel, rows: Sequence[EncodedText], *, between: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Return the answer that an agent writes to each row's prompt, under the mask where one is set."""
        written, writer = [""] * len(rows), ModelWriter(model, max_tokens=self._answer_tokens)
        order = sorted(range(len(rows)), key=lambda i: rows[i].prompt)
        for start in range(0, len(order), _GENERATION_BATCH):
            between()
            taken = order[start : start + _GENERATION_BATCH]
            prompts = [self._prompt(model, rows[i]) for i in taken]
            found = model.generate(prompts, max_tokens=self._answer_tokens)
            for i, prompt, tokens in zip(taken, prompts, found, strict=True):
                written[i] = model.decode(tokens)
                if self.mask_actions:
                    written[i] = masked_action(writer, prompt, written[i], sorted(self.allowed_actions))
        return written

    def _prompt(self, model: AgentModel, row: EncodedText) -> list[int]:
        tokens = row.tokens[: row.prompt]
        return clip_left(tokens, max(1, model.context - self._answer_tokens)) if model.context else list(tokens)


class ModelWriter:
    """A model that writes under a mask. max_tokens: of what it writes."""

    def __init__(self, model: AgentModel, *, max_tokens: int) -> None:
        self._model, self._max_tokens = model, max_tokens

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens."""
        return list(self._model.encode([text])[0].tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._model.decode(tokens)

    def clip(self, tokens: Sequence[int]) -> list[int]:
        """Return the newest tokens that leave room for an answer."""
        context = self._model.context
        return clip_left(tokens, max(1, context - self._max_tokens)) if context else list(tokens)

    def go_on(self, tokens: Sequence[int]) -> list[int]:
        """Return the likeliest continuation."""
        return self._model.generate([list(tokens)], max_tokens=self._max_tokens)[0]

    def next_logits(self, before: Sequence[int], choices: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits of each choice's tokens."""
        logits_BTV: Tensor = self._model(collate([[*before, *choice] for choice in choices]))  # of few rows
        start = len(before) - 1
        return [logits_BTV[i, start : start + len(choice)] for i, choice in enumerate(choices)]


def _kl(log_p_NV: Tensor, reference_NK: Tensor, reference_log_p_NK: Tensor) -> Tensor:
    """Return KL(untrained || model) over the reference's tokens and all others as one: (N,).

    Grouping outcomes never makes a divergence larger (data processing inequality), so this is a lower bound.
    """
    own_NK = log_p_NV.gather(-1, reference_NK.long())
    own_rest_N = (1 - own_NK.exp().sum(-1)).clamp(min=_LEAST_REST).log()
    p_NK = reference_log_p_NK.exp()
    rest_N = (1 - p_NK.sum(-1)).clamp(min=_LEAST_REST)
    return (p_NK * (reference_log_p_NK - own_NK)).sum(-1) + rest_N * (rest_N.log() - own_rest_N)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return rows in batches of like length; only a single row has more tokens than an evaluation takes at once."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= _EVALUATION_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]
