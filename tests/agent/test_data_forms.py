"""Rows of every form that tasks read: what becomes of them, and what is refused, by place and reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agent_server.data.examples import Preferred, Segment, Span, Tagged, Written
from cognateforge.exceptions import DataUnavailableError
from tests.agent.data_support import prepare, prepare_rows, reasons, write_rows


def _text(row: Written) -> str:
    """Return a text with its trained pieces in braces."""
    return "".join(f"{{{piece.text}}}" if piece.trained else piece.text for piece in row.segments)


def _said(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def _only(tmp_path: Path, task: str, row: dict[str, Any], **wishes: Any) -> Any:
    """Return the training examples of one row, beside which a test row stands."""
    measured = {**row, "split": "test"}
    # What a row is told apart by, so that the test row does not repeat it.
    measured |= {name: "measured" for name in ("text", "question", "prompt") if isinstance(row.get(name), str)}
    if "spans" in measured:
        measured["spans"] = [{"start": 0, "end": 8, "label": "city"}]
    if "messages" in row:
        measured["messages"] = [{"role": "user", "content": "measured"}, *row["messages"]]
    if isinstance(row.get("question"), list):
        measured["question"] = [[{"role": "user", "content": f"measured {n}"}] for n, _ in enumerate(row["question"])]
    return prepare_rows(tmp_path, task, [{"split": "train", **row}, measured], **wishes).train


def _refused(tmp_path: Path, task: str, sound: dict[str, Any], broken: dict[str, dict[str, Any]]) -> None:
    """Assert that each row is refused for the reason that it is listed under, at the field after the colon.

    A space behind the field tells two of a kind apart.
    """
    good = [{**sound, "split": "train"}]
    _only(tmp_path, task, sound)  # it is sound
    data_rows = [*good, *broken.values()]
    write_rows(tmp_path / "refused.jsonl", data_rows)
    with pytest.raises(DataUnavailableError) as refused:
        prepare(tmp_path, task, "refused.jsonl", max_refused_share=0)
    counts = refused.value.message
    assert f"{len(broken)} of {len(data_rows)} rows are refused" in counts
    for line, told in enumerate(broken, start=2):
        reason, _, field = told.partition(":")
        assert f"{reason} " in counts
        if line <= 10:  # the others are counted
            place = f"refused.jsonl:{line} {field.strip()}:"
            assert any(v.description.startswith(place) for v in refused.value.violations), told


# Extraction

SPANS = {
    "text": "fly to Graz on Monday",
    "spans": [{"start": 15, "end": 21, "label": "day"}, {"start": 7, "end": 11, "label": "city"}],
}


def test_spans_come_in_order_and_count_characters(tmp_path: Path) -> None:
    """One named twice counts once; a character outside the basic plane is one character."""
    spans = [*SPANS["spans"], SPANS["spans"][0]]
    (row,) = _only(tmp_path, "extraction", {**SPANS, "spans": spans})
    assert Tagged(str(SPANS["text"]), (Span(7, 11, "city"), Span(15, 21, "day"))) == row
    flag = {"text": "\U0001f6eb to Graz", "spans": [{"start": 5, "end": 9, "label": "city", "text": "Graz"}]}
    (row,) = _only(tmp_path, "extraction", flag)
    assert (Span(5, 9, "city"),) == row.spans


def test_broken_spans_are_refused(tmp_path: Path) -> None:
    """Each for its own reason: no span is moved or cut silently."""

    def spans(*spans: Any) -> dict[str, Any]:
        return {**SPANS, "spans": list(spans), "split": "train"}

    city = {"start": 7, "end": 11, "label": "city"}
    _refused(
        tmp_path,
        "extraction",
        SPANS,
        {
            "span_out_of_text:spans[0]": spans({**city, "end": 99}),
            "span_out_of_text:spans[0] ": spans({**city, "end": 7}),
            "wrong_type:spans[0].start": spans({**city, "start": True}),
            "wrong_type:spans[0].end": spans({**city, "end": "11"}),
            "overlapping_spans:spans[1]": spans(city, {"start": 9, "end": 14, "label": "day"}),
            "span_of_other_text:spans[0]": spans({**city, "text": "Turin"}),
            "wrong_type:spans": spans(3),
            "blank:spans[0].label": spans({**city, "label": " "}),
            "wrong_type:spans ": {"text": "x", "split": "train"},
            "missing_field:text": {"spans": [], "split": "train"},
        },
    )


# Dialogue

TALK = _said(("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!\nHow are you?"), ("user", "Fine"))


def test_the_agents_turns_alone_are_trained(tmp_path: Path) -> None:
    """Whatever order they come in, and whoever has the last word."""
    (row,) = _only(tmp_path, "dialogue", TALK)
    assert "System: Be kind.\nUser: Hello\nAgent:{ Hi!\nHow are you?}\nUser: Fine\n" == _text(row)
    (row,) = _only(tmp_path, "dialogue", _said(("assistant", "One"), ("assistant", "Two"), ("tool", "3")))
    assert "Agent:{ One}\nAgent:{ Two}\nTool: 3\n" == _text(row)
    assert [False, True, False, True, False] == [piece.trained for piece in row.segments]


def test_dialogues_without_an_agent_or_with_strangers_are_refused(tmp_path: Path) -> None:
    """Roles that nobody knows are not guessed."""
    _refused(
        tmp_path,
        "dialogue",
        TALK,
        {
            "no_agent_turn:messages": _said(("user", "Hello")),
            "unknown_value:messages[0].role": _said(("bot", "Hello")),
            "blank:messages[1].content": _said(("user", "Hello"), ("assistant", " ")),
            "wrong_type:messages[0].content": {"messages": [{"role": "user", "content": None}]},
            "blank:messages": {"messages": []},
            "wrong_type:messages": {"messages": "Hello"},
            "missing_field:messages": {"text": "Hello"},
        },
    )


def _dialogue(name: str, *turns: tuple[str, str], **slots: Any) -> dict[str, Any]:
    frames = [{"service": "S", "slots": [slots]}] if slots else []
    return {
        "dialogue_id": name,
        "turns": [{"speaker": speaker, "utterance": text, "frames": frames} for speaker, text in turns],
    }


@pytest.mark.parametrize("task", ["dialogue", "extraction"])
def test_schema_guided_dialogues_are_told_apart_by_split_and_id(task: str, tmp_path: Path) -> None:
    """The same id in another file is another dialogue, a repeated dialogue is one, and a schema is no row."""
    slot = {"slot": "city", "start": 0, "exclusive_end": 4}
    one, other = (("USER", "Graz"), ("SYSTEM", "When?")), (("USER", "Cork"), ("SYSTEM", "When then?"))
    write_rows(tmp_path / "train.jsonl", [_dialogue("1", *one, **slot), _dialogue("2", *one, **slot)])
    write_rows(tmp_path / "test.jsonl", [_dialogue("1", *other, **slot)])
    write_rows(tmp_path / "schema.json", [{"service_name": "S"}])
    data = prepare(tmp_path.parent, task, tmp_path.name)
    assert (3, 2, {"repeated_text": 1}) == (data.report.rows_read, data.report.rows_kept, data.report.left_out)
    assert {"train": 1, "validation": 0, "test": 1} == data.manifest.rows
    if task == "dialogue":
        assert "User: Graz\nAgent:{ When?}" == _text(data.train[0])
    else:
        assert ("city",) == data.labels
        assert Tagged("Graz", (Span(0, 4, "city"),)) == data.train[0]


def test_broken_schema_guided_dialogues_are_refused(tmp_path: Path) -> None:
    """With the turn and the frame that is wrong."""
    sound = {**_dialogue("1", ("USER", "Graz"), slot="city", start=0, exclusive_end=4)}
    broken = {
        "unknown_value:turns[0].speaker": _dialogue("2", ("BOT", "Graz")),
        "wrong_type:turns[0].utterance": {"dialogue_id": "3", "turns": [{"speaker": "USER"}]},
        "span_out_of_text:turns[0].frames[0].slots[0]": _dialogue(
            "4", ("USER", "Graz"), slot="city", start=0, exclusive_end=5
        ),
        "missing_field:dialogue_id": {"turns": [{"speaker": "USER", "utterance": "Graz"}]},
        "wrong_type:turns[0].frames": {
            "dialogue_id": "5",
            "turns": [{"speaker": "USER", "utterance": "Graz", "frames": 1}],
        },
    }
    write_rows(tmp_path / "rows.jsonl", [*[{**sound, "dialogue_id": str(n)} for n in range(2)], *broken.values()])
    with pytest.raises(DataUnavailableError) as refused:
        prepare(tmp_path, "extraction", "rows.jsonl", max_refused_share=0)
    for line, told in enumerate(broken, start=3):
        place = f"rows.jsonl:{line} {told.partition(':')[2]}:"
        assert any(v.description.startswith(place) for v in refused.value.violations), told


# Behaviour


def _trajectory(question: str, *turns: str, reward: str = "1", **more: Any) -> dict[str, Any]:
    said = [("user", question)]
    for turn in turns:
        said += [("assistant", turn), ("user", "Observation: x")]
    return _said(*said[:-1], ("user", f"Observation: Episode finished, reward = {reward}"), **more)


WALK = _trajectory("Question: Where?", "Thought: look\nAction: search[the  town]", "Thought: so\nAction: finish[Graz]")


def test_each_acting_turn_is_a_text_after_all_that_was_said(tmp_path: Path) -> None:
    """The action that is accepted is the turn's own, with single spaces; other turns are read and not learnt."""
    first, second = _only(tmp_path, "behavioural", WALK)
    before = "User: Question: Where?\nAgent:"
    assert f"{before}{{ Thought: look\nAction: search[the  town]}}" == _text(first)
    assert f"{before} Thought: look\nAction: search[the  town]\nUser: Observation: x\nAgent:" == second.segments[0].text
    assert ("search[the town]", "finish[Graz]", 1.0) == (first.accepted, second.accepted, second.weight)
    said = [("user", "Q"), ("assistant", "Thought: hm"), ("assistant", "Observation: Episode finished, reward = 1")]
    (only,) = _only(tmp_path, "behavioural", _said(*said, ("assistant", "Action: finish[it]")))
    assert "finish[it]" == only.accepted
    assert "Agent: Thought: hm\nAgent: Observation" in only.segments[0].text


@pytest.mark.parametrize(
    ("reward", "kept"), [("1", True), ("True", True), ("False", False), ("0", False), ("0.5", False), ("1.", True)]
)
def test_both_spellings_of_success_are_read(reward: str, kept: bool, tmp_path: Path) -> None:
    """A trajectory reached its goal when its reward is 1 or more."""
    rows = [_trajectory(f"{n}?", "Action: finish[x]", split=split) for n, split in enumerate(("train", "test"))]
    rows.append(_trajectory("asked?", "Action: finish[x]", reward=reward, split="train"))
    data = prepare_rows(tmp_path, "behavioural", rows, successes_only=True)
    assert (1 + kept, {} if kept else {"no_success": 1}) == (len(data.train), dict(data.report.left_out))


def test_rewards_weigh_from_the_lowest_to_the_highest_of_the_set(tmp_path: Path) -> None:
    """A field of the row tells it too, and goes before what the last observation says."""
    rewards: list[dict[str, Any]] = [{"reward": -1.0}, {}, {"reward": 3}, {"reward": 3.0, "split": "test"}]
    rows = [
        {**_trajectory(f"{number}?", "Action: finish[x]", reward="0", split="train"), **told}
        for number, told in enumerate(rewards)
    ]
    data = prepare_rows(tmp_path, "behavioural", rows, weight_by_reward=True)
    assert [0.0, 0.25, 1.0] == [row.weight for row in data.train]
    assert {"-1": 1, "0": 1, "3": 2} == data.manifest.facts["rewards"]
    same = prepare_rows(tmp_path, "behavioural", [rows[2], rows[3]], weight_by_reward=True)
    assert [1.0] == [row.weight for row in same.train]


def test_trajectories_of_one_question_stay_in_one_split(tmp_path: Path) -> None:
    """With and without the word in front, and also where splits are named; an exact repeat is left out."""
    rows = []
    for n in range(60):
        rows += [_trajectory(f"Question: {n}?", f"Action: search[{k}]") for k in range(3)]
        rows.append(_trajectory(f"{n}", "Action: finish[y]"))
    data = prepare_rows(tmp_path, "behavioural", [*rows, rows[0]])
    assert {"repeated_text": 1} == data.report.left_out
    asked = [
        {re.sub(r"\D", "", row.segments[0].text.partition("\n")[0]) for row in part}
        for part in (data.train, data.validation, data.test)
    ]
    assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert 60 == len(set().union(*asked))
    named = [{**rows[0], "split": "train"}, {**rows[1], "split": "test"}, {**rows[4], "split": "train"}]
    assert {"related_to_measured": 1} == prepare_rows(tmp_path, "behavioural", named).report.left_out


def test_trajectories_without_actions_or_rewards_are_refused_where_they_are_needed(tmp_path: Path) -> None:
    """A plan that does not ask for rewards does without."""
    untold = _said(("user", "Q"), ("assistant", "Action: finish[x]"))
    rows = [{**WALK, "split": "train"}, {**_trajectory("T", "Action: finish[x]"), "split": "test"}, untold]
    rows.append(_said(("user", "R"), ("assistant", "nothing to do")))
    rows.append(_trajectory("U", "Action: finish[x]", reward="2"))
    rows[-1]["reward"] = "much"
    data = prepare_rows(tmp_path, "behavioural", rows, max_refused_share=1)
    assert {4: "no_action", 5: "wrong_type"} == reasons(data)
    for wish in ("successes_only", "weight_by_reward"):
        data = prepare_rows(tmp_path, "behavioural", rows, max_refused_share=1, **{wish: True})
        assert {3: "missing_field", 4: "missing_field", 5: "wrong_type"} == reasons(data)


# Documents, questions, preferences


def test_documents_are_trained_whole(tmp_path: Path) -> None:
    """An abstract is its parts and its conclusion; the question is no part of it."""
    (row,) = _only(tmp_path, "domain", {"text": " one\ntwo "})
    assert (Segment("one\ntwo", trained=True),) == row.segments
    abstract = {"QUESTION": "Q?", "CONTEXTS": ["one", "two "], "LONG_ANSWER": "three", "official_split": "train_dev"}
    rows = [abstract, {**abstract, "LONG_ANSWER": "four", "official_split": "test"}]
    data = prepare_rows(tmp_path, "domain", rows)
    assert {"one\ntwo\nthree"} == {_text(row)[1:-1] for row in (*data.train, *data.validation)}
    _refused(
        tmp_path,
        "domain",
        {"text": "x"},
        {
            "wrong_type:CONTEXTS": {"CONTEXTS": "one", "LONG_ANSWER": "three"},
            "wrong_type:CONTEXTS[1]": {"CONTEXTS": ["one", 2], "LONG_ANSWER": "three"},
            "missing_field:LONG_ANSWER": {"CONTEXTS": ["one"]},
            "missing_field:text": {"document": "x"},
            "blank:text": {"text": "\u2029"},
        },
    )


def test_questions_have_one_prompt_and_all_their_answers(tmp_path: Path) -> None:
    """The first answer is learnt, each is accepted, and a context stands before the question."""
    (row,) = _only(tmp_path, "question_answering", {"question": "Where?", "answer": ["Graz", "in Graz"]})
    assert ("Question: Where?\nAnswer:{ Graz}", ["Graz", "in Graz"]) == (_text(row), row.accepted)
    (row,) = _only(tmp_path, "question_answering", {"question": "Where?", "answer": "Graz", "context": "It is Graz."})
    assert ("Context: It is Graz.\nQuestion: Where?\nAnswer:{ Graz}", ["Graz"]) == (_text(row), row.accepted)
    sound: dict[str, Any] = {"question": "Where?", "answer": "Graz"}
    broken = {
        "wrong_type:answer": {**sound, "answer": []},
        "blank:answer[1]": {**sound, "answer": ["x", " "]},
        "wrong_type:answer ": {**sound, "answer": 3},
        "missing_field:answer": {"question": "Where?"},
        "wrong_type:context": {**sound, "context": ["x"]},
    }
    _refused(tmp_path, "question_answering", sound, broken)
    contradicting = [{**sound, "split": "test"}, {**sound, "answer": "Turin", "split": "train"}]
    contradicting += [{**sound, "question": "When?", "split": "train"}]
    data = prepare_rows(tmp_path, "question_answering", contradicting)
    assert {"contradicting_answer": 1} == data.report.left_out


def test_pairs_that_prefer_nothing_are_refused(tmp_path: Path) -> None:
    """An equal pair says nothing, and of two that contradict each other the first one counts."""
    pair = {"prompt": "Hello", "chosen": "Hi!", "rejected": "What?"}
    (row,) = _only(tmp_path, "preference", pair)
    assert Preferred("User: Hello\nAgent:", " Hi!", " What?") == row
    _refused(
        tmp_path,
        "preference",
        pair,
        {"equal_pair:rejected": {**pair, "rejected": "Hi! "}, "missing_field:chosen": {"prompt": "x", "rejected": "y"}},
    )
    swapped = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "split": "train"}
    rows = [{**pair, "split": "train"}, swapped, {**pair, "prompt": "Bye", "split": "test"}]
    assert {"contradicting_preference": 1} == prepare_rows(tmp_path, "preference", rows).report.left_out


# Calls of tools

TOOL = {
    "name": "trip.book",
    "description": "Books.",
    "parameters": {
        "type": "dict",
        "properties": {"to": {"type": "string"}, "from": {"type": "any"}, "days": {"type": "tuple"}},
        "required": ["to"],
    },
}


def _request(truth: Any, category: str = "parallel", **more: Any) -> dict[str, Any]:
    turn = [{"role": "user", "content": "Book it"}]
    return {"category": category, "question": [turn], "function": [TOOL], "ground_truth": truth, **more}


def test_calls_are_written_in_one_form(tmp_path: Path) -> None:
    """The first accepted value of each parameter; what may be left out is left out, in the entries of objects too."""
    nested = {"a": [True], "b": ["", 1], "c": [[{"d": ["e"]}]]}
    truth: Any = [
        {"trip.book": {"to": ['"Graz"\n', "x"], "from": [None], "days": [[1, 2.5]]}},
        {"trip.book": {"to": ["", "Cork"], "from": ["", 3], "days": [nested]}},
    ]
    (row,) = _only(tmp_path, "tool_calling", _request(truth))
    answer = row.segments[1].text
    first = r'trip.book(to="\"Graz\"\n", from=None, days=[1, 2.5])'
    assert f' [{first}, trip.book(to="Cork", days={{"a": True, "c": [{{"d": "e"}}]}})]' == answer
    assert {"category": "parallel", "functions": [TOOL], "ground_truth": truth} == row.accepted
    tools = '[{"name":"trip.book","description":"Books.","parameters":{"type":"dict","properties":'
    assert row.segments[0].text.startswith(f"Tools: {tools}")
    assert row.segments[0].text.endswith("\nUser: Book it\nAgent:")
    (row,) = _only(tmp_path, "tool_calling", _request(None, "irrelevance"))
    assert (" []", None) == (row.segments[1].text, row.accepted["ground_truth"])


def test_the_category_may_be_in_the_id(tmp_path: Path) -> None:
    """As in the leaderboard's own files."""
    row = {**_request([{"trip.book": {"to": ["Graz"]}}]), "id": "simple_python_7"}
    del row["category"]
    (text,) = _only(tmp_path, "tool_calling", row)
    assert ("simple_python", ' [trip.book(to="Graz")]') == (text.accepted["category"], text.segments[1].text)


def test_each_turn_of_several_follows_the_calls_before(tmp_path: Path) -> None:
    """Tools come from the file beside the rows, without those that a row excludes."""
    docs = [{"api": "math_api", "name": name, "parameters": {"type": "dict"}} for name in ("add", "mul")]
    write_rows(tmp_path / "multi_turn_func_doc.jsonl", [*docs, b"broken"])
    row: dict[str, Any] = {
        "category": "multi_turn_base",
        "question": [[{"role": "user", "content": text}] for text in ("Add", "Again")],
        "involved_classes": ["MathAPI"],
        "excluded_function": ["mul"],
        "ground_truth": [["add(1, b='x')", "add(-2)"], []],
    }
    first, second = _only(tmp_path, "tool_calling", row)
    tools = 'Tools: [{"name":"add","parameters":{"type":"dict"}}]\n'
    assert f'{tools}User: Add\nAgent:{{ [add(1, b="x"), add(-2)]}}' == _text(first)
    assert f'{tools}User: Add\nAgent: [add(1, b="x"), add(-2)]\nUser: Again\nAgent:{{ []}}' == _text(second)
    assert [["add(1, b='x')", "add(-2)"], []] == [text.accepted["ground_truth"] for text in (first, second)]
    broken = {
        "no_call:ground_truth[0][0]": {**row, "ground_truth": [["__import__('os').system('true') or 1"], []]},
        "no_call:ground_truth[1][0]": {**row, "ground_truth": [[], ["add(x)"]]},
        "no_call:ground_truth[1][0] ": {**row, "ground_truth": [[], ["add(**{})"]]},
        "wrong_length:ground_truth": {**row, "ground_truth": [[]]},
        "tools_not_described:involved_classes": {**row, "involved_classes": ["TradingBot"]},
        "missing_field:involved_classes": {**row, "involved_classes": []},
    }
    _refused(tmp_path, "tool_calling", row, broken)
    data = prepare(tmp_path.parent, "tool_calling", tmp_path.name, max_refused_share=1)
    assert ["multi_turn_func_doc.jsonl", "refused.jsonl", "rows.jsonl"] == [
        file["name"] for file in data.manifest.files
    ]


def test_broken_requests_are_refused(tmp_path: Path) -> None:
    """What nobody could answer teaches nothing."""
    sound = _request([{"trip.book": {"to": ["Graz"]}}])
    _refused(
        tmp_path,
        "tool_calling",
        sound,
        {
            "wrong_type:ground_truth": _request(None),
            "unknown_function:ground_truth[0]": _request([{"trip.cancel": {}}]),
            "unknown_function:ground_truth[0] ": _request([{"trip.book": {}, "x": {}}]),
            "wrong_type:ground_truth[0].trip.book.to": _request([{"trip.book": {"to": "Graz"}}]),
            "wrong_type:ground_truth[0].trip.book": _request([{"trip.book": 3}]),
            "wrong_type:function": _request([], function=3),
            "wrong_type:function[0].parameters": _request([], function=[{"name": "x"}]),
            "wrong_type:question": _request([], question="Book it"),
            "missing_field:id": {"question": sound["question"]},
        },
    )


def test_the_same_request_with_other_tools_is_another_row_of_the_same_split(tmp_path: Path) -> None:
    """Otherwise a request that is measured would have been trained on."""
    rows = []
    for n in range(40):
        for name in ("one", "two"):
            tool = {**TOOL, "name": name}
            question = [[{"role": "user", "content": f"Book {n}"}]]
            rows.append({**_request([{name: {"to": ["x"]}}]), "function": [tool], "question": question})
    data = prepare_rows(tmp_path, "tool_calling", rows)
    assert 80 == data.report.rows_kept
    asked = [{row.segments[0].text.rpartition("User: ")[2] for row in part} for part in (data.train, data.test)]
    assert not asked[0] & asked[1]
