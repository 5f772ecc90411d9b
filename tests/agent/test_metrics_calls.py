"""Calls are compared as syntax trees by the rules of the leaderboard, and never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_server.objectives.metrics.calls import Call, ast_match, parse_calls, parse_turns
from tests.data_fixtures import figures, real_data


def function(name: str, required: list[str], **properties: Any) -> dict[str, Any]:
    declared = {p: kind if isinstance(kind, dict) else {"type": kind} for p, kind in properties.items()}
    return {"name": name, "parameters": {"type": "dict", "properties": declared, "required": required}}


def accepts(category: str, functions: list[dict[str, Any]], *truth: dict[str, Any]) -> dict[str, Any]:
    return {"category": category, "functions": functions, "ground_truth": list(truth)}


AREA = accepts(
    "simple_python",
    [function("geo.area", ["base"], base="integer", height="float", unit="string", whole="boolean")],
    {"geo.area": {"base": [10], "height": [5.0, 5.5], "unit": ["square units", ""], "whole": ["", True]}},
)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [
        ("[geo.area(base=10, height=5.5)]", True),
        ("geo.area(height=5, base=10)", True),  # without brackets, in any order, an integer for a float
        ("[geo.area(base=10, height=5.0, unit='Square-Units')]", True),  # texts without case, space and hyphens
        ("[geo.area(base=10, height=5.0, whole=True)]", True),
        ("[geo.area(base=10, height=5.0, whole=False)]", False),
        ("[geo.area(base=10, height=5.0, whole=1)]", False),  # 1 is no boolean
        ("[geo.area(base=10.0, height=5.0)]", False),  # a float is no integer
        ("[geo.area(base='10', height=5.0)]", False),
        ("[geo.area(height=5.0)]", False),  # a required parameter is missing
        ("[geo.area(base=10)]", False),  # height may not be left out
        ("[geo.area(base=10, height=5.0, depth=1)]", False),  # not declared
        ("[area(base=10, height=5.0)]", False),
        ("[geo.area(10, 5.0)]", False),  # only named arguments count
        ("[geo.area(base=10, height=5.0), geo.area(base=10, height=5.0)]", False),
        ("I would call geo.area(base=10, height=5.0)", False),
        ("", False),
    ],
)
def test_a_call_matches_by_name_parameters_and_accepted_values(answer: str, matches: bool) -> None:
    """Names, required and optional parameters, types and values."""
    assert matches == ast_match(answer, AREA)


NESTED = accepts(
    "multiple",
    [
        function(
            "plan",
            ["stops", "who"],
            stops={"type": "array", "items": {"type": "string"}},
            who="dict",
            place={"type": "tuple", "items": {"type": "float"}},
            legs={"type": "array", "items": {"type": "dict"}},
            data={"type": "array", "items": {"type": "integer"}},
        )
    ],
    {
        "plan": {
            "stops": [["New York", "Rome"], ["Rome"]],
            "who": [{"name": ["Ann", "Anna"], "age": [3, ""]}],
            "place": [[1.5, -2.0], ""],
            "legs": [[{"from": ["A"], "to": ["B"]}], ""],
            "data": ["sales['q1']", ""],
        }
    },
)


@pytest.mark.parametrize(
    ("arguments", "matches"),
    [
        ("stops=['new york', 'ROME'], who={'name': 'anna'}", True),
        ("stops=['Rome'], who={'name': 'Ann', 'age': 3}", True),
        ("stops=['Rome', 'New York'], who={'name': 'Ann'}", False),  # a list has an order
        ("stops=['Rome', 1], who={'name': 'Ann'}", False),
        ("stops='Rome', who={'name': 'Ann'}", False),
        ("stops=['Rome'], who={'name': 'Bob'}", False),
        ("stops=['Rome'], who={'age': 3}", False),  # a key is missing
        ("stops=['Rome'], who={'name': 'Ann', 'job': 1}", False),
        ("stops=['Rome'], who={'name': 'Ann'}, place=(1.5, -2.0)", True),
        ("stops=['Rome'], who={'name': 'Ann'}, place=[1.5, -2.0]", True),
        ("stops=['Rome'], who={'name': 'Ann'}, place=(1.5, 2.0)", False),
        ("stops=['Rome'], who={'name': 'Ann'}, legs=[{'to': 'b', 'from': 'a'}]", True),
        ("stops=['Rome'], who={'name': 'Ann'}, legs=[{'to': 'b'}]", False),
        ("stops=['Rome'], who={'name': 'Ann'}, data=sales['q1']", True),  # a variable in a value's place
        ("stops=['Rome'], who={'name': 'Ann'}, data=sales['q2']", False),
    ],
)
def test_nested_values_match_part_by_part(arguments: str, matches: bool) -> None:
    """Lists, tuples, dictionaries and lists of them; a variable is compared as text."""
    assert matches == ast_match(f"[plan({arguments})]", NESTED)


def test_parallel_calls_may_come_in_any_order() -> None:
    """As many calls as answers, each for one, also where the first that fits would be the wrong one."""
    play = [function("play", ["artist"], artist="string", minutes="integer")]
    wanted = accepts(
        "parallel",
        play,
        {"play": {"artist": ["Ann", "Bob"], "minutes": [1]}},
        {"play": {"artist": ["Ann"], "minutes": [1]}},
    )
    assert ast_match("[play(artist='Ann', minutes=1), play(artist='Bob', minutes=1)]", wanted)
    assert ast_match("[play(artist='Bob', minutes=1), play(artist='Ann', minutes=1)]", wanted)
    assert ast_match("play(artist='Bob', minutes=1)\nplay(artist='Ann', minutes=1)", wanted)
    assert not ast_match("[play(artist='Bob', minutes=1), play(artist='Bob', minutes=1)]", wanted)
    assert not ast_match("[play(artist='Ann', minutes=1)]", wanted)


@pytest.mark.parametrize(
    ("answer", "matches"),
    [("None of the tools fits.", True), ("", True), ("[]", True), ("[area(base=1)]", False), ("area()", False)],
)
def test_where_no_tool_fits_none_is_called(answer: str, matches: bool) -> None:
    """Anything but a call will do."""
    wanted = {"category": "irrelevance", "functions": [function("area", [])], "ground_truth": None}
    assert matches == ast_match(answer, wanted)


def test_other_languages_write_values_as_texts() -> None:
    """They are read by their declared types; Python literals will do too, and its reserved words are names."""
    java = accepts(
        "simple_java",
        [function("q", ["from", "on"], **{"from": "integer"}, on="boolean", map="HashMap", ids="ArrayList", at="any")],
        {"q": {"from": [30], "on": [True], "map": [{"k": [1]}, ""], "ids": [[1, 2], ""], "at": [20.5, ""]}},
    )
    assert ast_match("[q(from='30L', on='true', map='{\"k\": 1}', ids='[1, 2]', at='20.5')]", java)
    assert ast_match("[q(from=30, on=True, ids=[1, 2])]", java)
    assert not ast_match("[q(from='31', on='true')]", java)
    assert not ast_match("[q(from='30', on='yes')]", java)
    python = accepts("simple_python", java["functions"], {"q": {"from": [30], "on": [True]}})
    assert not ast_match("[q(from='30', on='true')]", python)


def test_turns_are_compared_as_trees_in_their_order() -> None:
    """Quotes and spaces do not count; turns, calls, names and values do."""
    wanted = {
        "category": "multi_turn_base",
        "functions": None,
        "ground_truth": [["cd(folder='a')", "ls()"], ["mv('x', target=\"y\")"]],
    }
    assert ast_match("[cd(folder=\"a\"), ls()]\n[mv('x', target='y')]", wanted)
    assert not ast_match("[ls(), cd(folder='a')]\n[mv('x', target='y')]", wanted)
    assert not ast_match("[cd(folder='a'), ls(), mv('x', target='y')]", wanted)
    assert not ast_match("[cd(folder='a'), ls()]\n[mv(source='x', target='y')]", wanted)
    one_turn = {"category": "multi_turn_base", "ground_truth": ["ls()", "cd('a')"]}
    assert ast_match("[ls(), cd('a')]", one_turn)
    assert ast_match("ls()\ncd('a')", one_turn)


@pytest.mark.parametrize(
    "text",
    [
        "f(*a)", "f(**a)", "f(a=1, a=2)", "f(a=1", "lambda: 1", "1", "f", "[f(1), 2]", "x = f(1)", "(" * 5000,
        "f(" * 300, "f(a='" + "x" * 30_000 + "')", "f(a=1)\nand so on", "\0", "g()(1)",
    ],
)  # fmt: skip
def test_what_is_no_call_is_none(text: str) -> None:
    """Neither is it an error, however it is malformed."""
    assert parse_calls(text) is None


def test_nothing_in_an_answer_is_run(tmp_path: Path) -> None:
    """An expression among the arguments stays its text."""
    file = tmp_path / "made"
    calls = parse_calls(f"f(a=open({str(file)!r}, 'w'), b=x.y, c=-1.5, d={{'k': (1, None)}}, e=1 + 1)")
    assert not file.exists()
    named = {"a": f"open({str(file)!r}, 'w')", "b": "x.y", "c": -1.5, "d": {"k": (1, None)}, "e": "1 + 1"}
    assert calls == [Call("f", (), named)]


def test_each_line_is_a_turn() -> None:
    """Empty lines are none; an answer over several lines that is one expression is one turn."""
    assert [["f"], ["g", "h"]] == [[c.name for c in turn] for turn in parse_turns("f()\n\n[g(), h()]") or ()]
    assert [["f", "g"]] == [[c.name for c in turn] for turn in parse_turns("[f(),\n g()]") or ()]


def _written(value: Any) -> str:
    """Return an accepted value as a call spells it: of lists of choices the first that is not empty."""
    if isinstance(value, dict):
        kept = {key: [one for one in choices if one != ""] for key, choices in value.items()}
        return "{" + ", ".join(f"{key!r}: {_written(ones[0])}" for key, ones in kept.items() if ones) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value)


def _answer(row: dict[str, Any]) -> str:
    truth = row["ground_truth"]
    if truth is None:
        return "None of the tools fits."
    if row["category"] == "multi_turn_base":
        return "\n".join("[" + ", ".join(turn) + "]" for turn in truth)
    calls = []
    for one in truth:
        ((name, values),) = one.items()
        kept = {parameter: [a for a in accepted if a != ""] for parameter, accepted in values.items()}
        calls.append(f"{name}({', '.join(f'{p}={_written(a[0])}' for p, a in kept.items() if a)})")
    return f"[{', '.join(calls)}]"


def test_real_ground_truth_matches_itself_and_no_other_row() -> None:
    """Each real row's own answer matches; two ground truths name parameters that their functions do not declare."""
    folder = real_data()
    with (folder / "agent" / "bfcl" / "single_and_multi_turn.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    accepted = [
        {"category": row["category"], "functions": row.get("function"), "ground_truth": row["ground_truth"]}
        for row in rows
    ]
    answers = [_answer(row) for row in rows]
    failed = {row["id"] for row, a, ok in zip(rows, answers, accepted, strict=True) if not ast_match(a, ok)}
    assert failed == {"parallel_multiple_12", "parallel_multiple_26"}
    assert len(rows) == figures(folder)["agent"]["bfcl"]["rows"]
    called = [i for i, row in enumerate(rows) if row["ground_truth"] is not None]
    crossed = sum(ast_match(answers[i], accepted[j]) for i, j in zip(called, called[1:] + called[:1], strict=True))
    assert crossed == 0
