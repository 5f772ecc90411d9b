"""Rows of extraction sets: a text and the spans of it that fill slots.

Forms: `text` with `spans` of `start`, `end` (exclusive, in characters) and `label`; the Schema-Guided Dialogue's, each
of whose utterances is a text of its own and whose dialogues stay whole in one split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent_server.data import sgd
from agent_server.data.examples import Tagged
from agent_server.data.messages import objects
from agent_server.data.pipeline import Form, Made, Sound, Splits, UnfitError, require_labels, same_text, split_of
from agent_server.data.source import SourceRow
from agent_server.data.spans import RawSpan, checked_spans
from training_common.attempt import Json
from training_common.findings import ProcessingReport
from training_common.rows import text_field

MAX_TEXT_CHARS = 8_192
# Tokens have one tag for outside and two for each slot.
MAX_SLOTS = 1_024
_MAX_SPANS = 1_024


@dataclass(frozen=True, kw_only=True)
class ExtractionForm(Form[tuple[Tagged, ...], Tagged]):
    """labels: the slots of another set, which this one has to keep to; None makes its own."""

    labels: tuple[str, ...] | None = None

    companions = sgd.COMPANIONS

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[tuple[Tagged, ...]]:
        """Return a row's texts with their spans. Errors: RowRefusedError."""
        split = split_of(content, found)
        if sgd.is_dialogue(content):
            turns = sgd.utterances(content)
            tagged = tuple(Tagged(turn.turn.text, turn.spans) for turn in turns)
            group = sgd.identity(content, found)
        else:
            text = text_field(content, "text", max_chars=MAX_TEXT_CHARS)
            raw = [
                RawSpan(place, span.get("start"), span.get("end"), span.get("label"), span.get("text"))
                for place, span in objects(content.get("spans"), "spans", most=_MAX_SPANS, empty=True)
            ]
            tagged = (Tagged(text, checked_spans(text, raw, end="end", label="label")),)
            group = same_text(text)
        texts = [row.text for row in tagged]
        spans = "\n".join(
            f"{n} {span.start} {span.end} {span.label}" for n, row in enumerate(tagged) for span in row.spans
        )
        return Sound(tagged, "\n".join(map(same_text, texts)), group, sum(map(len, texts)), split, spans)

    def make(self, splits: Splits[tuple[Tagged, ...]], report: ProcessingReport) -> Made[Tagged]:
        """Return the texts. Slots that only measured rows have are labels too: a slot never found counts as missed."""
        examples = {split: [text for row in rows for text in row.content] for split, rows in splits.items()}
        slots = {split: {span.label for text in texts for span in text.spans} for split, texts in examples.items()}
        found = set().union(*slots.values())
        if self.labels is not None:
            require_labels(found, self.labels)
        labels = tuple(sorted(found)) if self.labels is None else self.labels
        if not 1 <= len(labels) <= MAX_SLOTS:
            raise UnfitError(f"has {len(labels)} slots; 1 to {MAX_SLOTS} are needed")
        spans: Json = {split: sum(len(text.spans) for text in texts) for split, texts in examples.items()}
        untrained: Json = [*sorted(found - slots["train"])]
        return Made(examples=examples, labels=labels, facts={"spans": spans, "slots_without_training": untrained})
