"""Precision, recall and F1 of slots: a span counts when its borders and its label are right, all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from agent_server.data.examples import Span


@dataclass(frozen=True, kw_only=True)
class SpanScore:
    """Spans that are right, that were found and that there are; what follows from them.

    With TP right spans: precision = TP / found, recall = TP / there, F1 = 2 TP / (found + there). A quotient of nothing
    is 0. Source: Tjong Kim Sang & De Meulder 2003, arXiv:cs/0306050, section 2.3 (CoNLL's `conlleval`).
    """

    right: int = 0
    found: int = 0
    there: int = 0

    @property
    def precision(self) -> float:
        """Return the share of the found spans that are right."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Return the share of the spans that were found."""
        return self.right / self.there if self.there else 0.0

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        return 2 * self.right / (self.found + self.there) if self.found + self.there else 0.0


def score_spans(texts: Sequence[tuple[Collection[Span], Collection[Span]]]) -> SpanScore:
    """Return the counts over all texts (micro-averaged), out of the spans of each that are there and were found."""
    return SpanScore(
        right=sum(len(set(there) & set(found)) for there, found in texts),
        found=sum(len(set(found)) for _, found in texts),
        there=sum(len(set(there)) for there, _ in texts),
    )


def runs_of_tags(tags: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, end, slot) of each run of tags that makes one span; `end` is exclusive.

    Tags: 0 outside, 1 + 2 s beginning of slot s, 2 + 2 s inside of it. An inside that follows nothing, or another slot,
    begins a span of its own, as `conlleval` reads it.
    """
    runs: list[tuple[int, int, int]] = []
    for i, tag in enumerate(tags):
        if tag == 0:
            continue
        slot, inside = divmod(tag - 1, 2)
        goes_on = inside and runs and runs[-1][1:] == (i, slot)
        if goes_on:
            runs[-1] = (runs[-1][0], i + 1, slot)
        else:
            runs.append((i, i + 1, slot))
    return runs
