"""Rows of requests that are answered with calls of tools, in the form of the Berkeley Function Calling Leaderboard, v4.

    Tools: [{"name":"route.length","parameters":{"type":"dict", ...}}]
    User: How far is it from Graz to Cork by train?
    Agent: [route.length(start="Graz", end="Cork", by="train")]

Source: Patil et al. 2025, "The Berkeley Function Calling Leaderboard (BFCL)", ICML; github.com/ShishirPatil/gorilla.
The descriptions of tools are given as the rows have them, whose types are not JSON Schema's (`dict`, `float`, `any`,
`tuple`, `HashMap`). Where no tool fits (`irrelevance`), the answer is `[]`. A row of several turns (`multi_turn_*`)
names classes of tools, which a file beside the rows describes, and is a text for each turn, after the calls of the
turns before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from agent_server.data import calls
from agent_server.data.examples import Written
from agent_server.data.messages import AGENT, MAX_TURNS, Turn, answered, messages, objects, prompt
from agent_server.data.pipeline import Form, Made, Sound, Splits, same_text, split_of
from agent_server.data.source import SourceRow
from training_common.attempt import Json
from training_common.findings import ProcessingReport, RowRefusedError, quote
from training_common.rows import checked_text, read_rows, text_field

_MAX_TOOLS = 1_024
_MAX_CALLS = 1_024
_MAX_NAME_CHARS = 256
# Classes of tools, by what the file that describes them calls them.
_CLASSES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}

Tool = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Request:
    """The texts of one row, and its category."""

    texts: tuple[Written, ...]
    category: str


@dataclass(frozen=True, kw_only=True)
class ToolCallingForm(Form[Request, Written]):
    """One text for each turn that is to be answered."""

    _classes: dict[str, list[Tool]] = field(default_factory=dict, repr=False)

    companions = ("multi_turn_func_doc.jsonl",)
    reads_companions = True
    contradiction = "contradicting_answer"

    def read_companions(self, files: Mapping[str, Path]) -> None:
        """Read the descriptions of the classes' tools; a broken one is missed by the rows that need it."""
        for path in files.values():
            for row in read_rows(path):
                try:
                    content = row.load()
                except RowRefusedError:
                    continue
                tool = {name: part for name, part in content.items() if name != "api"}
                self._classes.setdefault(str(content.get("api")), []).append(tool)

    def check(self, content: Mapping[str, object], found: SourceRow) -> Sound[Request]:
        """Return a request. Errors: RowRefusedError."""
        split, category = split_of(content, found), _category(content)
        turns = [messages({"question": turn}, "question") for turn in _question(content)]
        several = category.startswith("multi_turn")
        tools = self._tools_of_classes(content) if several else _tools(content)
        answers = list(_demonstrated(content, len(turns)) if several else _accepted(content, category, tools))
        texts, said = [], list[Turn]()
        before = f"Tools: {json.dumps(tools, ensure_ascii=False, separators=(',', ':'))}\n"
        for turn, (wanted, truth) in zip(turns, answers, strict=True):
            said += turn
            answer = calls.written(wanted)
            accepted: Json = {"category": category, "functions": cast("Json", tools), "ground_truth": truth}
            texts.append(Written(answered(prompt(said, before=before), answer), accepted=accepted))
            said.append(Turn(AGENT, answer))
        asked = "\n".join(same_text(message.text) for turn in turns for message in turn)
        size = len(before) + sum(len(segment.text) for text in texts for segment in text.segments)
        # The same words with other tools are another request, which stays in the same split.
        answer = "\n".join(text.segments[1].text for text in texts)
        return Sound(Request(tuple(texts), category), f"{before}{asked}", asked, size, split, answer)

    def make(self, splits: Splits[Request], report: ProcessingReport) -> Made[Written]:
        """Return a text for each turn, and how many rows there are of each category."""
        examples = {split: [text for row in rows for text in row.content.texts] for split, rows in splits.items()}
        counted = Counter(row.content.category for rows in splits.values() for row in rows)
        return Made(examples=examples, facts={"categories": dict(sorted(counted.items())[:_MAX_TOOLS])})

    def _tools_of_classes(self, content: Mapping[str, object]) -> list[Tool]:
        """Return the tools of the classes that a row names, without those that it excludes."""
        names, excluded = content.get("involved_classes"), content.get("excluded_function", [])
        if not isinstance(names, list) or not names:
            raise RowRefusedError(
                "missing_field",
                field="involved_classes",
                detail="the row names no classes of tools",
                remedy="name those that the request can be answered with",
            )
        tools: list[Tool] = []
        for name in names:
            described = self._classes.get(_CLASSES.get(str(name), str(name)))
            if not described:
                raise RowRefusedError(
                    "tools_not_described",
                    field="involved_classes",
                    detail=f"nothing describes the tools of {quote(name)}",
                    remedy=f"put {self.companions[0]} beside the rows",
                )
            tools += described
        left_out = excluded if isinstance(excluded, list) else []
        return [tool for tool in tools if tool.get("name") not in left_out]


def _category(content: Mapping[str, object]) -> str:
    """Return a row's category; the leaderboard's own files have it in the id alone: "parallel_12"."""
    if content.get("category") is None:
        return text_field(content, "id", max_chars=_MAX_NAME_CHARS).rpartition("_")[0]
    return text_field(content, "category", max_chars=_MAX_NAME_CHARS)


def _question(content: Mapping[str, object]) -> list[object]:
    turns = content.get("question")
    if not isinstance(turns, list) or not 1 <= len(turns) <= MAX_TURNS:
        raise RowRefusedError(
            "wrong_type",
            field="question",
            detail=f"expected 1 to {MAX_TURNS} turns, got {quote(turns)}",
            remedy="write a list of turns, each a list of messages with role and content",
        )
    return turns


def _tools(content: Mapping[str, object]) -> list[Tool]:
    tools = []
    for place, tool in objects(content.get("function"), "function", most=_MAX_TOOLS):
        checked_text(tool.get("name"), f"{place}.name", max_chars=_MAX_NAME_CHARS)
        if not isinstance(tool.get("parameters"), Mapping):
            raise RowRefusedError(
                "wrong_type",
                field=f"{place}.parameters",
                detail=f"expected an object, got {quote(tool.get('parameters'))}",
                remedy="describe the parameters as an object with properties and required",
            )
        tools.append(tool)
    return tools


def _accepted(
    content: Mapping[str, object], category: str, tools: Sequence[Tool]
) -> Iterator[tuple[list[calls.Call], Json]]:
    """Yield the calls that are learnt, and what is accepted, for the one turn of a row."""
    truth = content.get("ground_truth")
    if truth is None and "irrelevance" in category:
        yield [], None
        return
    described = {tool["name"]: tool for tool in tools}
    wanted = []
    for place, one in objects(truth, "ground_truth", most=_MAX_CALLS):
        name = next(iter(one), "")
        if len(one) != 1 or name not in described:
            raise RowRefusedError(
                "unknown_function",
                field=place,
                detail=f"{quote(name)} is no tool of this row",
                remedy="write one object for each call: the tool's name, and its parameters with accepted values",
            )
        wanted.append(calls.first_accepted(one, described[name], f"{place}.{name}"))
    yield wanted, cast("Json", truth)


def _demonstrated(content: Mapping[str, object], turns: int) -> Iterator[tuple[list[calls.Call], Json]]:
    """Yield the calls of each turn, which are learnt, and the same as they are demonstrated."""
    truth = content.get("ground_truth")
    if not isinstance(truth, list) or len(truth) != turns:
        raise RowRefusedError(
            "wrong_length",
            field="ground_truth",
            detail=f"expected the calls of {turns} turns, got {quote(truth)}",
            remedy="write a list of calls for each turn of the question",
        )
    for number, one in enumerate(truth):
        if not isinstance(one, list) or len(one) > _MAX_CALLS:
            raise RowRefusedError(
                "wrong_type",
                field=f"ground_truth[{number}]",
                detail=f"expected a list of calls, got {quote(one)}",
                remedy="write each call as text: fn(a=1, b='x')",
            )
        yield [calls.parsed(call, f"ground_truth[{number}][{i}]") for i, call in enumerate(one)], cast("Json", one)
