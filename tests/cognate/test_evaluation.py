"""Scores of whole answers: the two sets' rules, and a model that is asked."""

import pytest

from cognate_server.data.processor import Document
from cognate_server.data.tokenizer import VOCABULARY, CognateTokenizer
from cognate_server.evaluation import (
    ReasoningScore,
    evaluate,
    final_answer,
    final_number,
    metrics_of,
    normalize_answer,
    right_share,
    score,
    word_f1,
)
from cognate_server.metrics import METRICS
from tests.cognate.test_model import make_model
from training_common.models.cognate_v1 import CognateV1Config


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 + 1 = 7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.50", "-3.50"),
        ("#### 1,5.0,0.", "15.00."),
        ("#### -", None),
        ("#### $7", None),
        ("####  7", None),
        ("# #### 12 apples", "12"),
        ("#### 7" + "0" * 500, "7" + "0" * 500),
        ("### 7", None),
        ("\x00#### 3\ud800", "3"),
        ("#### 7\n#### 8", "7"),
        ("####7", None),
        ("#### seven", None),
        ("", None),
        ("#### ٣", None),
    ],
)
def test_the_final_number_is_found_as_gsm8k_finds_it(text: str, number: str | None) -> None:
    """The first mark with a space counts, commas do not."""
    assert number == final_number(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x\n#### Los Angeles \nmore", "Los Angeles"),
        ("#### yes #### no", "yes #### no"),
        ("####\nParis", ""),
        ("none", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_rest_of_its_line(text: str, answer: str | None) -> None:
    """No answer, where the mark never came; an empty one, where the line ends behind it."""
    assert answer == final_answer(text)


def test_a_missing_answer_is_wrong_even_where_the_right_one_is_normalized_away() -> None:
    """The band The The leaves nothing after normalization, and saying nothing does not name it."""
    assert score("hotpotqa", ["no mark"], ["The The"]).exact_match == 0.0
    assert score("hotpotqa", ["#### The The"], ["The The"]).exact_match == 1.0


def test_answers_are_normalized_as_hotpotqa_does() -> None:
    """Case, punctuation, articles and spaces say nothing; signs outside ASCII stay."""
    assert "cat sat" == normalize_answer(" The  Cat, sat! ")
    assert "thé café" == normalize_answer("Thé (café)")
    assert "anthem" == normalize_answer("anthem")


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("The Eiffel Tower", "Eiffel Tower", 1.0),
        ("Eiffel", "Eiffel Tower", 2 / 3),
        ("tower tower", "Eiffel Tower", 0.5),
        ("yes", "yes", 1.0),
        ("yes it is", "yes", 0.0),
        ("no", "no way", 0.0),
        ("", "Eiffel Tower", 0.0),
        ("the", "a", 0.0),
        ("noanswer", "no answer", 0.0),
        ("No!", "no", 1.0),
        ("the b c d", "c d e", 2 / 3),
        ("b b b c", "b b d", 4 / 7),
    ],
)
def test_shared_words_are_counted_as_hotpotqa_does(prediction: str, reference: str, f1: float) -> None:
    """Words count as often as both have them; closed answers must be equal."""
    assert f1 == pytest.approx(word_f1(prediction, reference))


def test_right_answers_score_one_and_wrong_ones_nothing() -> None:
    """In both forms, with the floor that one constant answer would reach on the same problems."""
    references = ["1,200", "7", "7", "-2"]
    right = score("gsm8k", [f"so\n#### {reference}" for reference in references], references)
    assert ReasoningScore(source="gsm8k", problems=4, exact_match=1.0, f1=None, floor=0.5) == right
    wrong = score("forge-twohop", ["#### Rome", "nothing"], ["Paris", "Oslo"])
    assert ReasoningScore(source="forge-twohop", problems=2, exact_match=0.0, f1=0.0, floor=0.5) == wrong
    assert {"gsm8k_exact_match": 1.0, "forge_twohop_exact_match": 0.0, "forge_twohop_f1": 0.0} == metrics_of(
        [right, wrong]
    )
    assert METRICS.keys() >= metrics_of([right, wrong]).keys()
    assert (4 / 6, 6) == right_share([right, wrong])
    with pytest.raises(ValueError, match="gsm8k has no held-out problem"):
        score("gsm8k", [], [])


def test_a_real_model_is_asked_with_prompts_longer_than_a_row() -> None:
    """Sources apart, in a fixed order, no more problems than asked for; an untrained model knows nothing."""
    tokenizer = CognateTokenizer.train(["Question: how many? #### 7"])
    config = CognateV1Config(
        vocabulary_size=VOCABULARY, width=16, heads=2, feed_forward_width=16, memory_slots=4, memory_chunk=8
    )
    held_out = [
        Document(source=source, key=bytes([n]), prompt="Question: how many? " * n, completion="", answer="7")
        for n in range(1, 5)
        for source in ("gsm8k", "hotpotqa")
    ]
    model = make_model(config=config)
    scores = evaluate(model, tokenizer, held_out, sequence_length=16, problems=3, max_new_tokens=5)
    assert [("gsm8k", 3), ("hotpotqa", 3)] == [(one.source, one.problems) for one in scores]
    assert [0.0, 0.0] == [one.exact_match for one in scores]
