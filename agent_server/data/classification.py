"""Rows of classification sets: a text and its label.

Forms: `text` with `intent` or `label`, and `split`, `domain` and `features` where the row has them; PubMedQA's, whose
text is the question and the abstract, and whose label is the final decision.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from agent_server.data import pubmedqa
from agent_server.data.examples import MOST_FEATURES, Labelled
from agent_server.data.pipeline import (
    Form,
    LeftOut,
    Made,
    Placed,
    Sound,
    Splits,
    UnfitError,
    known_split,
    require_labels,
    same_text,
    split_of,
)
from agent_server.data.source import SourceRow
from training_common.findings import ProcessingReport, RowRefusedError, quote
from training_common.rows import checked_text, text_field

# The longest text of the real set has 136 characters; longer ones are documents, not utterances.
MAX_TEXT_CHARS = 8_192
MAX_LABEL_CHARS = 128
# A head of more classes would outweigh its base model.
MAX_LABELS = 4_096
OUT_OF_SCOPE = "oos"
_LARGEST = 3.4028234663852886e38  # of float32


@dataclass(frozen=True, slots=True)
class Labelling:
    """A text, its label by name, and the numbers beside it."""

    text: str
    label: str
    features: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClassificationForm(Form[Labelling, Labelled]):
    """Which rows make the task, and what becomes of them.

    include_out_of_scope: keep rows of no label, as a label of their own.
    max_rows_per_label: most training rows of each label; 0 for all. The choice follows the texts' hashes.
    domains: keep only these; empty for all. A row without a domain belongs to none.
    labels: the labels of another set, which this one has to keep to and is numbered by; None makes its own.
    to_measure: nothing is trained, so that test rows alone make the labels.
    """

    include_out_of_scope: bool = False
    max_rows_per_label: int = 0
    domains: frozenset[str] = frozenset()
    labels: tuple[str, ...] | None = None
    to_measure: bool = False

    # CLINC150's list of domains stands beside its rows.
    companions = ("domains.json",)

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Labelling] | LeftOut:
        """Return a row as it will be used. Errors: RowRefusedError."""
        row = _abstract(content, found) if pubmedqa.is_pubmedqa(content) else _utterance(content, found)
        domain = content.get("domain")
        domain = "" if domain is None else checked_text(domain, "domain", max_chars=MAX_LABEL_CHARS, blank=True)
        if row.answer == OUT_OF_SCOPE:
            # Rows of no label have no domain either, so the filter is not for them.
            return row if self.include_out_of_scope else LeftOut("out_of_scope")
        if self.domains and domain not in self.domains:
            return LeftOut("other_domain")
        return row

    def make(self, splits: Splits[Labelling], report: ProcessingReport) -> Made[Labelled]:
        """Return numbered examples. A row that is measured needs a label that is trained. Errors: UnfitError."""
        self._bound(splits, report)
        labels = self.labels
        if labels is None and self.to_measure:
            labels = tuple(sorted({row.content.label for rows in splits.values() for row in rows}))
        elif labels is None:
            labels = tuple(sorted({row.content.label for row in splits["train"]}))
            _drop_untrained(splits, frozenset(labels), report)
        else:
            require_labels({row.content.label for rows in splits.values() for row in rows}, labels)
        least = 1 if self.to_measure else 2
        if not least <= len(labels) <= MAX_LABELS:
            raise UnfitError(f"has {len(labels)} labels; {least} to {MAX_LABELS} are needed")
        widths = sorted({len(row.content.features) for rows in splits.values() for row in rows})
        if len(widths) > 1:
            raise UnfitError(f"has rows of {widths[0]} and rows of {widths[-1]} features; all need equally many")
        numbers = {label: number for number, label in enumerate(labels)}
        examples = {
            split: [Labelled(row.content.text, numbers[row.content.label], row.content.features) for row in rows]
            for split, rows in splits.items()
        }
        tested = Counter(example.label for example in examples["test"])
        # What always answering the most frequent label scores: the floor to beat.
        share = max(tested.values(), default=0) / max(1, tested.total())
        return Made(examples=examples, labels=labels, facts={"test_majority_share": share})

    def _bound(self, splits: Splits[Labelling], report: ProcessingReport) -> None:
        if not self.max_rows_per_label:
            return
        by_label: dict[str, list[Placed[Labelling]]] = {}
        for row in splits["train"]:
            by_label.setdefault(row.content.label, []).append(row)
        chosen = {
            id(row)
            for rows in by_label.values()
            for row in sorted(rows, key=lambda row: row.key)[: self.max_rows_per_label]
        }
        report.leave_out("max_rows_per_label", len(splits["train"]) - len(chosen))
        splits["train"][:] = [row for row in splits["train"] if id(row) in chosen]


def _utterance(content: Mapping[str, object], found: SourceRow) -> Sound[Labelling]:
    name = "intent" if "intent" in content else "label"
    label = text_field(content, name, max_chars=MAX_LABEL_CHARS).strip()
    split, given = "", content.get("split")
    if isinstance(given, str) and given.startswith("oos_"):
        split, label = known_split(given.removeprefix("oos_"), "split"), OUT_OF_SCOPE
    else:
        split = split_of(content, found)
    text = text_field(content, "text", max_chars=MAX_TEXT_CHARS).strip()
    features = _features(content.get("features"))
    if not features:
        return _sound(text, label, split, group=text)
    # The same words beside another image are another row.
    key = f"{same_text(text)} {features}"
    return Sound(Labelling(text, label, features), key, key, len(text) + 8 * len(features), split, label)


def _features(value: object) -> tuple[float, ...]:
    """Return the numbers beside a text; none where the row has none. Errors: RowRefusedError."""
    if value is None:
        return ()
    numbers: list[object] = value if isinstance(value, list) and 0 < len(value) <= MOST_FEATURES else [None]
    # Beyond 32 bits, or no number at all: neither is anything to a model.
    features = tuple(float(n) if abs(n) <= _LARGEST else math.inf for n in numbers if _is_number(n))
    if len(features) != len(numbers):
        raise RowRefusedError(
            "wrong_type",
            field="features",
            detail=f"features are no list of 1 to {MOST_FEATURES:,} numbers",
            remedy="give every row a list of equally many numbers, or none of them any",
        )
    if math.inf in features:
        raise RowRefusedError(
            "not_finite",
            field="features",
            detail="a feature is not finite in 32 bits",
            remedy="leave the row out, or correct what made its features",
        )
    return features


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _abstract(content: Mapping[str, object], found: SourceRow) -> Sound[Labelling]:
    question = pubmedqa.question(content)
    label = text_field(content, "final_decision", max_chars=MAX_LABEL_CHARS).strip()
    return _sound(f"{question}\n{pubmedqa.contexts(content)}", label, split_of(content, found), group=question)


def _sound(text: str, label: str, split: str, *, group: str) -> Sound[Labelling]:
    return Sound(Labelling(text, label), same_text(text), same_text(group), len(text), split, label)


def _drop_untrained(splits: Splits[Labelling], labels: frozenset[str], report: ProcessingReport) -> None:
    for rows in splits.values():
        for row in rows:
            if row.content.label not in labels:
                report.refuse(_untrained(row.content.label).at(row.file, row.line))
        rows[:] = [row for row in rows if row.content.label in labels]


def _untrained(label: str) -> RowRefusedError:
    return RowRefusedError(
        "label_without_training_rows",
        field="label",
        detail=f"no training row has the label {quote(label)}",
        remedy="add training rows of this label, or correct it",
    )
