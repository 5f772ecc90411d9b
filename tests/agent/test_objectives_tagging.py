"""Slots: spans become tags of tokens and come back, whatever the tokens' borders are."""

from __future__ import annotations

import pytest
import torch

from agent_server.data.examples import Span, Tagged
from agent_server.objectives.tagging import TaggingObjective, decode_tags, encode_tags
from tests.agent._language import BigramModel
from tests.data_fixtures import real_data

SLOTS = {"city": 0, "day": 1}
LABELS = tuple(SLOTS)
TEXT = "fly to New York on Monday"
SPANS = (Span(7, 15, "city"), Span(19, 25, "day"))


def model(*texts: str) -> BigramModel:
    return BigramModel(texts or (TEXT,), labels=LABELS)


def test_spans_become_tags_and_come_back() -> None:
    """Tokens carry the space before their word; a span does not."""
    (row,) = TaggingObjective().encode(model(), [Tagged(TEXT, SPANS)], max_tokens=32)
    assert [0, 0, 1, 2, 0, 3] == row.tags
    assert (row.stretched, row.lost) == (0, 0)
    assert list(SPANS) == decode_tags(row.tags, row.places, LABELS)


def test_a_border_within_a_token_is_moved_outward() -> None:
    """The span has all of the token, is counted, and what comes back is the longer one: no match."""
    spans = (Span(11, 14, "city"),)  # "Yor"
    (row,) = TaggingObjective().encode(model(), [Tagged(TEXT, spans)], max_tokens=32)
    assert [0, 0, 0, 1, 0, 0] == row.tags
    assert (row.stretched, row.lost) == (1, 0)
    assert [Span(11, 15, "city")] == decode_tags(row.tags, row.places, LABELS)
    assert row.spans == spans


def test_a_token_of_two_spans_belongs_to_the_first() -> None:
    """The other one has what is left, or is lost and counted."""
    example = Tagged("ab cd", (Span(0, 1, "city"), Span(1, 2, "day"), Span(3, 5, "day")))
    row = encode_tags([7, 8], [(0, 2), (2, 5)], example, SLOTS)
    assert [1, 3] == row.tags
    assert (row.stretched, row.lost) == (1, 1)


def test_a_slot_that_the_model_does_not_know_is_missed() -> None:
    """It stays among what there is to find: another set may have slots of its own."""
    row = encode_tags([7], [(0, 2)], Tagged("ab", (Span(0, 2, "hour"),)), SLOTS)
    assert ([0], 1, 1) == (row.tags, row.lost, len(row.spans))


def test_tokens_of_space_alone_never_begin_or_end_a_span() -> None:
    """They are inside of one when it goes on behind them."""
    example = Tagged("a b c", (Span(0, 3, "city"),))
    offsets = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    row = encode_tags([1, 2, 3, 4, 5], offsets, example, SLOTS)
    assert [1, 2, 2, 0, 0] == row.tags
    assert [Span(0, 3, "city")] == decode_tags([1, 2, 2, 2, 0], row.places, LABELS)
    assert [] == decode_tags([0, 1, 0, 0, 0], row.places, LABELS)


@pytest.mark.parametrize(("most", "lost", "tags"), [(6, 0, [0, 0, 1, 2, 0, 3]), (3, 1, [0, 0, 1]), (2, 2, [0, 0])])
def test_spans_behind_the_cut_count_as_missed(most: int, lost: int, tags: list[int]) -> None:
    """A span that is cut in two keeps its first tokens; one behind the cut is lost. Neither can be found."""
    (row,) = TaggingObjective().encode(model(), [Tagged(TEXT, SPANS)], max_tokens=most)
    assert tags == row.tags
    assert row.lost == lost
    assert row.spans == SPANS
    assert TaggingObjective().facts([row])["spans_lost"] == lost


def test_a_perfect_tagger_has_an_f1_of_one_and_a_blind_one_none() -> None:
    """Precision, recall and F1 of whole spans, over rows of unequal length."""
    agent, objective = model(), TaggingObjective()
    rows = objective.encode(agent, [Tagged(TEXT, SPANS), Tagged("to Monday", (Span(3, 9, "day"),))], max_tokens=32)
    blind = {m.metric: m.value for m in objective.measure(agent, rows)}
    assert blind["slot_f1"] == blind["slot_recall"] == 0.0
    with torch.no_grad():
        for row in rows:
            for token, tag in zip(row.tokens, row.tags, strict=True):
                agent.table_VX[token, tag] = 9.0
    found = {m.metric: (m.value, m.rows) for m in objective.measure(agent, rows)}
    assert found["slot_precision"] == found["slot_recall"] == found["slot_f1"] == (1.0, 2)
    assert found["loss"][0] < 0.01


def test_the_loss_is_the_mean_over_tokens() -> None:
    """Padding has no part in it."""
    agent, objective = model(), TaggingObjective()
    with torch.no_grad():
        agent.table_VX.normal_(generator=torch.Generator().manual_seed(1))
    rows = objective.encode(agent, [Tagged(TEXT, SPANS), Tagged("to New", ())], max_tokens=32)
    log_p = agent.table_VX.detach().log_softmax(-1)
    pairs = [pair for row in rows for pair in zip(row.tokens, row.tags, strict=True)]
    batch = objective.batch(rows)
    assert objective.units(batch) == len(pairs) == 8
    expected = -sum(float(log_p[token, tag]) for token, tag in pairs) / 8
    assert float(objective.loss(agent, batch).mean) == pytest.approx(expected)
    assert {m.metric: m.value for m in objective.measure(agent, rows)}["loss"] == pytest.approx(expected)


def test_a_batch_of_empty_texts_has_a_loss_of_zero() -> None:
    """It still reaches the parameters."""
    agent, objective = model(), TaggingObjective()
    batch = objective.batch(objective.encode(agent, [Tagged("", ())], max_tokens=8))
    loss = objective.loss(agent, batch).mean
    loss.backward()  # type: ignore[no-untyped-call]
    assert (objective.units(batch), float(loss)) == (0, 0.0)
    assert agent.table_VX.grad is not None


def test_real_slots_survive_the_way_through_tags() -> None:
    """Of the real dialogues' slots all come back as they were: words have no slot's border within."""
    import json

    folder = real_data() / "agent" / "sgd"
    examples = []
    with (folder / "dev_sample.jsonl").open(encoding="utf-8") as file:
        for line in file:
            for turn in json.loads(line)["turns"]:
                spans = {
                    Span(slot["start"], slot["exclusive_end"], slot["slot"])
                    for frame in turn["frames"]
                    for slot in frame["slots"]
                }
                if spans:
                    examples.append(Tagged(turn["utterance"], tuple(sorted(spans, key=lambda span: span.start))))
    labels = tuple(sorted({span.label for example in examples for span in example.spans}))
    agent = BigramModel([example.text for example in examples], labels=labels)
    rows = TaggingObjective().encode(agent, examples, max_tokens=256)
    whole = [row for row in rows if not row.stretched and not row.lost]
    assert len(whole) > 0.98 * len(rows)
    for row in whole:
        assert list(row.spans) == decode_tags(row.tags, row.places, labels)
