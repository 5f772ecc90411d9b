"""Spans of texts, checked: what an extraction set says fills a slot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from agent_server.data.examples import Span
from training_common.findings import RowRefusedError, quote
from training_common.rows import checked_text

MAX_LABEL_CHARS = 128


@dataclass(frozen=True, slots=True)
class RawSpan:
    """A span as a row has it. place: where in the row. text: the words it covers, where the row repeats them."""

    place: str
    start: object
    end: object
    label: object
    text: object = None


def checked_spans(text: str, raw: Sequence[RawSpan], *, end: str, label: str) -> tuple[Span, ...]:
    """Return the spans in order; the same one named twice counts once.

    end, label: what the row calls these fields. Errors: RowRefusedError, also for spans that overlap.
    """
    found = {_checked(text, span, end, label): span.place for span in raw}
    spans = sorted(found, key=lambda span: (span.start, span.end, span.label))
    for before, after in itertools.pairwise(spans):
        if after.start < before.end:
            raise RowRefusedError(
                "overlapping_spans",
                field=found[after],
                detail=f"{quote(after.label)} overlaps {quote(before.label)} at character {after.start}",
                remedy="keep one of the two",
            )
    return tuple(spans)


def _checked(text: str, raw: RawSpan, end_name: str, label_name: str) -> Span:
    start, end = _whole(raw.start, f"{raw.place}.start"), _whole(raw.end, f"{raw.place}.{end_name}")
    label = checked_text(raw.label, f"{raw.place}.{label_name}", max_chars=MAX_LABEL_CHARS)
    if not 0 <= start < end <= len(text):
        raise RowRefusedError(
            "span_out_of_text",
            field=raw.place,
            detail=f"characters {start} to {end} are no part of a text of {len(text)}",
            remedy="count characters, not bytes; the end is exclusive",
        )
    if raw.text is not None and raw.text != text[start:end]:
        raise RowRefusedError(
            "span_of_other_text",
            field=raw.place,
            detail=f"the span says {quote(raw.text)}, and the text {quote(text[start:end])}",
            remedy="count characters, not bytes; the end is exclusive",
        )
    return Span(start, end, label)


def _whole(value: object, field: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RowRefusedError(
        "wrong_type",
        field=field,
        detail=f"expected a whole number, got {quote(value)}",
        remedy="count characters from the text's start",
    )
