"""Answers, actions, preferences and what is forgotten, against cases worked out by hand."""

from __future__ import annotations

import pytest

from agent_server.objectives.metrics.actions import (
    Action,
    before_action,
    parse_action,
    same_action,
    same_kind,
    violates,
)
from agent_server.objectives.metrics.answers import exact_match, normalize, token_f1
from agent_server.objectives.metrics.continual import backward_transfer, forgetting
from agent_server.objectives.metrics.preferences import preference_accuracy, reward_margin


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an Apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("another theory", "another theory"),  # articles are words, not parts of words
        ("the", ""),
    ],
)
def test_answers_are_compared_as_squad_does(text: str, normalized: str) -> None:
    """Case, punctuation, articles and space do not count."""
    assert normalized == normalize(text)


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "f1"),
    [
        ("The Eiffel Tower", ["eiffel tower"], 1.0, 1.0),
        ("tower", ["Eiffel Tower"], 0.0, 2 / 3),  # P 1, R 1/2
        ("in Paris, France", ["Paris", "Paris France"], 0.0, 0.8),  # the second: P 2/3, R 1
        ("rome rome", ["rome"], 0.0, 2 / 3),  # words are a bag: one of the two is right
        ("", ["yes"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
        ("no", ["yes"], 0.0, 0.0),
    ],
)
def test_the_best_accepted_answer_counts(answer: str, accepted: list[str], exact: float, f1: float) -> None:
    """Exact match and token F1 are the best over the accepted answers."""
    assert exact == exact_match(answer, accepted)
    assert f1 == pytest.approx(token_f1(answer, accepted))


def test_without_an_accepted_answer_there_is_no_score() -> None:
    """No number stands for what cannot be measured."""
    with pytest.raises(ValueError, match="no accepted answer"):
        exact_match("yes", [])


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Thought: I need it.\nAction: search[Eiffel  Tower]", Action("search", "Eiffel Tower")),
        ("Action 2: finish[a [b] c]", Action("finish", "a [b] c")),
        ("search[x]", Action("search", "x")),
        (" finish[] ", Action("finish", "")),
        ("Action: search[one]\nAction: finish[two]", Action("search", "one")),
        ("Thought: Action is needed", None),
        ("Action: search", None),
        ("I search[x] now", None),
        ("", None),
    ],
)
def test_actions_are_read_from_turns(text: str, action: Action | None) -> None:
    """A line `Action: kind[argument]`, or an action that stands alone."""
    assert action == parse_action(text)


def test_turns_are_compared_by_their_actions() -> None:
    """Thoughts do not count; the kind alone, or kind and argument."""
    demonstrated = "Thought: a\nAction: search[Paris]"
    assert same_kind("Action: search[Rome]", demonstrated)
    assert not same_action("Action: search[Rome]", demonstrated)
    assert same_action("Thought: b\nAction: search[ Paris ]", demonstrated)
    assert not same_kind("nothing", demonstrated)
    assert not same_kind("nothing", "nothing")
    assert not same_action("nothing", "nothing")


def test_a_violation_is_an_action_that_is_not_allowed() -> None:
    """What cannot be read as an action is none that is allowed."""
    allowed = ("search", "finish")
    assert not violates("Action: search[x]", allowed)
    assert violates("Action: buy[x]", allowed)
    assert violates("Thought: hm", allowed)


def test_a_turn_is_cut_where_its_action_begins() -> None:
    """The kind comes next."""
    assert before_action("Thought: a\nAction: search[x]") == "Thought: a\nAction: "
    assert before_action("Thought: a") is None


def test_ties_are_half_right() -> None:
    """The untrained model prefers nothing to itself."""
    assert preference_accuracy([0.0, 0.0]) == 0.5
    assert preference_accuracy([1.0, -1.0, 0.5, 0.0]) == (1 + 0 + 1 + 0.5) / 4
    assert reward_margin([1.0, -2.0, 4.0]) == 1.0


def test_forgetting_is_what_became_worse() -> None:
    """Of an accuracy that fell and of a loss that rose alike."""
    assert forgetting(0.9, 0.6) == pytest.approx(0.3)
    assert forgetting(1.0, 1.5, higher_is_better=False) == 0.5
    assert forgetting(0.5, 0.75) == -0.25


def test_backward_transfer_follows_its_formula() -> None:
    """Three sets: ((0.6 - 0.9) + (0.7 - 0.8)) / 2; with two sets it is the negative of what was forgotten."""
    results = [[0.9, 0.1, 0.1], [0.8, 0.8, 0.2], [0.6, 0.7, 0.9]]
    assert backward_transfer(results) == pytest.approx(-0.2)
    assert backward_transfer([[0.9, 0.0], [0.6, 0.8]]) == pytest.approx(-forgetting(0.9, 0.6))
    with pytest.raises(ValueError, match="two sets"):
        backward_transfer([[0.9]])
