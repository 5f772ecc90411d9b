"""F1 of whole spans, and runs of tags, against cases worked out by hand."""

from __future__ import annotations

import pytest

from agent_server.data.examples import Span
from agent_server.objectives.metrics.spans import SpanScore, runs_of_tags, score_spans

# Slots 0 and 1: B 1 and 3, I 2 and 4.
B0, I0, B1, I1 = 1, 2, 3, 4


def test_a_span_is_right_or_wrong_as_a_whole() -> None:
    """Borders and label have to be right; counts are added up over texts before they are divided."""
    there = [(Span(0, 4, "city"), Span(10, 14, "day")), (Span(0, 3, "city"),), ()]
    found = [(Span(0, 4, "city"), Span(10, 13, "day")), (Span(0, 3, "day"),), (Span(1, 2, "city"),)]
    score = score_spans(list(zip(there, found, strict=True)))
    assert score == SpanScore(right=1, found=4, there=3)
    assert (score.precision, score.recall) == (1 / 4, 1 / 3)
    assert score.f1 == pytest.approx(2 / 7)


def test_a_quotient_of_nothing_is_zero() -> None:
    """No spans at all are no success."""
    score = score_spans([((), ())])
    assert (score.precision, score.recall, score.f1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("tags", "runs"),
    [
        ([0, B0, I0, 0, B1], [(1, 3, 0), (4, 5, 1)]),
        ([B0, B0, I0], [(0, 1, 0), (1, 3, 0)]),  # a beginning ends what goes on
        ([I1, I1, 0, I0], [(0, 2, 1), (3, 4, 0)]),  # an inside without a beginning begins one
        ([B0, I1, I1], [(0, 1, 0), (1, 3, 1)]),  # of another slot too
        ([0, 0], []),
    ],
)
def test_tags_are_read_as_conlleval_does(tags: list[int], runs: list[tuple[int, int, int]]) -> None:
    """Every run of tags of one slot is a span."""
    assert runs == runs_of_tags(tags)
