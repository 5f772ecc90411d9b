"""Find the spans of a text that fill slots: cross-entropy of each token's tag, and F1 of whole spans in characters."""

# B rows, T tokens of the longest row, G tags: outside, and beginning and inside of each slot.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agent_server.architectures.model import AgentModel, collate
from agent_server.data.examples import Span, Tagged
from agent_server.objectives.base import Batch, Loss, Measurement, Objective
from agent_server.objectives.metrics.spans import runs_of_tags, score_spans

# No gradient is kept, so that wide batches cost little memory; wider ones were not faster on CPU.
_EVALUATION_BATCH = 64
OUTSIDE = 0


@dataclass(frozen=True, slots=True)
class EncodedTags:
    """Tokens, their tags and their places in the text, in characters without outer space.

    spans: those of the text, also where tokens cannot express them.
    stretched: spans that do not end at tokens' borders and have the tags of all tokens that they touch.
    lost: spans that no token was left for, that were cut off, or whose slot the model does not know.
    """

    tokens: Sequence[int]
    tags: Sequence[int]
    places: Sequence[tuple[int, int]]
    spans: tuple[Span, ...]
    stretched: int = 0
    lost: int = 0


class TaggingObjective(Objective[Tagged, EncodedTags]):
    """Cross-entropy over the tags, in nats for each token. The slots are the model's labels."""

    score = "slot_f1"

    def encode(self, model: AgentModel, examples: Sequence[Tagged], *, max_tokens: int) -> list[EncodedTags]:
        """Return tokens and tags of each text, cut off after max_tokens. Spans behind the cut count as missed."""
        slots = {label: i for i, label in enumerate(model.labels)}
        most = min(max_tokens, model.context) if model.context else max_tokens
        encodings = model.encode([example.text for example in examples])
        return [
            encode_tags(encoding.tokens[:most], encoding.offsets[:most], example, slots)
            for encoding, example in zip(encodings, examples, strict=True)
        ]

    def length(self, row: EncodedTags) -> int:
        """Return how many tokens a row has."""
        return len(row.tokens)

    def facts(self, rows: Sequence[EncodedTags]) -> dict[str, int]:
        """Return how many texts and spans there are, and how many spans tokens cannot express as they are."""
        return {
            "texts": len(rows),
            "spans": sum(len(row.spans) for row in rows),
            "spans_stretched": sum(row.stretched for row in rows),
            "spans_lost": sum(row.lost for row in rows),
        }

    def batch(self, rows: Sequence[EncodedTags]) -> Batch:
        """Return tokens_BT, valid_BT and tags_BT."""
        inputs = collate([row.tokens for row in rows])
        tags_BT = torch.zeros_like(inputs.tokens_BT)
        for i, row in enumerate(rows):
            tags_BT[i, : len(row.tags)] = torch.tensor(row.tags, dtype=torch.int64)
        return {"tokens_BT": inputs.tokens_BT, "valid_BT": inputs.valid_BT, "tags_BT": tags_BT}

    def units(self, batch: Batch) -> float:
        """Return the number of tokens."""
        return float(batch["valid_BT"].sum())

    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        """Return the mean cross-entropy, and of how many tokens the right tag was the likeliest."""
        logits_BTG = model(self.inputs(batch))
        valid_BT = batch["valid_BT"]
        if not bool(valid_BT.any()):
            return Loss(mean=logits_BTG.sum() * 0.0, counts={"correct": 0.0})
        logits_NG, tags_N = logits_BTG[valid_BT], batch["tags_BT"][valid_BT]
        correct = float((logits_NG.detach().argmax(-1) == tags_N).sum())
        return Loss(mean=F.cross_entropy(logits_NG.float(), tags_N), counts={"correct": correct})

    def rates(self, counts: Mapping[str, float], units: float) -> dict[str, float]:
        """Return the share of tokens whose right tag was the likeliest."""
        return {"train_token_accuracy": counts["correct"] / units} if units else {}

    @torch.no_grad()
    def measure(
        self, model: AgentModel, rows: Sequence[EncodedTags], *, between: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Return the loss for each token, and precision, recall and F1 of whole spans in characters."""
        order = sorted(rows, key=self.length)
        texts: list[tuple[tuple[Span, ...], list[Span]]] = []
        total, tokens = 0.0, 0
        for start in range(0, len(order), _EVALUATION_BATCH):
            between()
            taken = order[start : start + _EVALUATION_BATCH]
            batch = self.batch(taken)
            logits_BTG: Tensor = model(self.inputs(batch)).float()
            valid_BT = batch["valid_BT"]
            losses_N = F.cross_entropy(logits_BTG[valid_BT], batch["tags_BT"][valid_BT], reduction="none")
            total, tokens = total + float(losses_N.double().sum()), tokens + len(losses_N)
            for row, tags in zip(taken, logits_BTG.argmax(-1).tolist(), strict=True):
                texts.append((row.spans, decode_tags(tags[: len(row.tokens)], row.places, model.labels)))
        found = score_spans(texts)
        values = {"slot_precision": found.precision, "slot_recall": found.recall, "slot_f1": found.f1}
        measured = [Measurement(metric=name, value=value, rows=len(rows)) for name, value in values.items()]
        return measured + ([Measurement(metric="loss", value=total / tokens, rows=len(rows))] if tokens else [])


def encode_tags(
    tokens: Sequence[int], offsets: Sequence[tuple[int, int]], example: Tagged, slots: Mapping[str, int]
) -> EncodedTags:
    """Return the tags of a text's tokens.

    A span has every token that it touches, so it is aligned outward where its borders lie within tokens. A token that
    two spans touch belongs to the first.
    """
    places = [_trim(example.text, *place) for place in offsets]
    tags, stretched, lost = [OUTSIDE] * len(tokens), 0, 0
    for span in example.spans:
        touched = [i for i, place in enumerate(places) if _touches(place, span)]
        free = [i for i in touched if tags[i] == OUTSIDE]
        seen_end = max((place[1] for place in places), default=0)
        slot = slots.get(span.label)
        if slot is None or not any(_width(places[i]) for i in free) or span.start >= seen_end:
            lost += 1
            continue
        for i in free:
            tags[i] = 2 + 2 * slot
        tags[free[0]] = 1 + 2 * slot
        stretched += (places[free[0]][0], places[free[-1]][1]) != (span.start, span.end)
    return EncodedTags(tokens=tokens, tags=tags, places=places, spans=example.spans, stretched=stretched, lost=lost)


def decode_tags(tags: Sequence[int], places: Sequence[tuple[int, int]], labels: Sequence[str]) -> list[Span]:
    """Return the spans of tags, in characters. A run of tokens that are nothing but space is none."""
    spans: list[Span] = []
    for first, end, slot in runs_of_tags(tags):
        inner = [place for place in places[first:end] if _width(place)]
        if inner:
            spans.append(Span(inner[0][0], inner[-1][1], labels[slot]))
    return spans


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a token's place without the space around it: byte-level tokens carry the space before their word."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _touches(place: tuple[int, int], span: Span) -> bool:
    """Return whether a token lies in a span or over its border. One of nothing but space has to lie within."""
    start, end = place
    return start < span.end and end > span.start if end > start else span.start < start < span.end


def _width(place: tuple[int, int]) -> int:
    return place[1] - place[0]
