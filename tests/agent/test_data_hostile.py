"""Whatever stands in a row: it is kept, left out, or refused in its place, and nothing breaks."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_server.data.pipeline import Limits, prepare_rows
from agent_server.data.processor import form_of
from agent_server.data.source import DataPlace, Source, SourceRow, from_file
from agent_server.tasks import WITH_ROWS
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError
from tests.agent.data_support import write_rows
from training_common.findings import ProcessingReport
from training_common.rows import Row

ALL = Limits(max_refused_share=1.0)
TOOL = {"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
SAID = [{"role": "user", "content": "Q@"}, {"role": "assistant", "content": "Action: finish[x]"}]
SOUND: dict[str, list[dict[str, Any]]] = {
    "classification": [
        {"text": "x@", "label": "a", "split": "train", "domain": "d"},
        {"QUESTION": "q@", "CONTEXTS": ["c"], "final_decision": "yes", "official_split": "test"},
    ],
    "extraction": [
        {"text": "Graz @", "spans": [{"start": 0, "end": 4, "label": "city", "text": "Graz"}]},
        {
            "dialogue_id": "@",
            "turns": [
                {
                    "speaker": "USER",
                    "utterance": "Graz @",
                    "frames": [{"slots": [{"slot": "city", "start": 0, "exclusive_end": 4}]}],
                }
            ],
        },
    ],
    "behavioural": [{"messages": SAID, "reward": 1, "success": True}],
    "dialogue": [{"messages": SAID}, {"dialogue_id": "@", "turns": [{"speaker": "SYSTEM", "utterance": "x@"}]}],
    "domain": [{"text": "x@"}, {"CONTEXTS": ["c@"], "LONG_ANSWER": "l"}],
    "question_answering": [{"question": "q@", "answer": ["a"], "context": "c"}],
    "tool_calling": [
        {"category": "parallel", "question": [[SAID[0]]], "function": [TOOL], "ground_truth": [{"f": {"a": [1, ""]}}]},
        {
            "id": "multi_turn_base_1",
            "question": [[SAID[0]]],
            "involved_classes": ["MathAPI"],
            "excluded_function": ["x"],
            "ground_truth": [["f(a=1)"]],
        },
    ],
    "preference": [{"prompt": "p@", "chosen": "c", "rejected": "r"}],
}
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, "", " ", "x", "\ud800", "\u2029", "\x00", [], {}, [[]], [{}], {"a": []}, [None],
    {"": None}, "x" * 100_000, ["x"] * 5_000, [[[[[[]]]]]], "multi_turn_base", "irrelevance", "train", "oos_train",
    "oos", "f(", "f(**{})", "f(a=1)" * 3, "(" * 5_000, -0.0, {"role": "user", "content": {}},
    "Episode finished, reward = 1",
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield from _places(part, (*path, name))


def _spoiled(row: dict[str, Any], rng: random.Random) -> Any:
    """Return a copy in which one place or two hold junk, or are gone."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 2))):
        *way, last = rng.choice([place for place in _places(row) if place] or [("x",)])
        inner: Any = row
        for name in way:
            inner = inner[name]
        if rng.random() < 0.2 and inner:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(rng.choice(JUNK))
    return row


def _rows(task: str, *, seed: int, count: int) -> list[Any]:
    rng = random.Random(seed)  # noqa: S311 - rows, not secrets
    spoiled = [_spoiled(_fresh(rng.choice(SOUND[task]), number), rng) for number in range(count)]
    return [*spoiled, *(_fresh(row, count + number) for number in range(60) for row in SOUND[task])]


def _fresh(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a row that repeats no other."""
    fresh: dict[str, Any] = json.loads(json.dumps(row).replace("@", str(number)))
    return fresh


@pytest.mark.parametrize("task", sorted(WITH_ROWS))
@pytest.mark.parametrize("told", [False, True])
def test_spoiled_rows_are_accounted_for(task: str, told: bool) -> None:
    """As objects that were never text, which is what Parquet and the hub give: each row is in the report."""
    rows = _rows(task, seed=len(task), count=1500)
    wish = pb.BehaviouralTask(successes_only=told, weight_by_reward=told)
    form = form_of(task, wish if task == "behavioural" else getattr(pb.TrainingPlan(), task))

    def found(_each_row: Any) -> Iterator[SourceRow]:
        for line, row in enumerate(rows, start=1):
            yield SourceRow(Row("rows", line, row), ("train", "test", "", "validation")[line % 4] if told else "")

    report = ProcessingReport()
    source = Source(name="rows", kind="folder", companions={}, open_rows=found)
    prepare_rows(source, form, wish={}, limits=ALL, each_row=lambda: None, report=report)
    assert report.balanced
    assert len(rows) == report.rows_read
    assert report.rows_refused > 100
    assert all(finding.reason and finding.remedy and len(finding.detail) < 1000 for finding in report.findings)


@pytest.mark.parametrize("task", sorted(WITH_ROWS))
def test_spoiled_files_are_accounted_for(task: str, tmp_path: Path) -> None:
    """As text: torn, cut, with keys that come twice, nested beyond what Python follows."""
    rng = random.Random(len(task))  # noqa: S311
    lines = []
    for row in _rows(task, seed=len(task), count=100):
        try:
            line = json.dumps(row).encode()
        except ValueError:
            continue
        cut = rng.randrange(len(line) + 1)
        lines.append(rng.choice((line, line[:cut], line[:cut] + b"\xff" + line[cut:], line + line)))
    deep = b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
    lines += [
        deep,
        b'{"text": 1, "text": 2}',
        b"\x00",
        b"[]",
        b"null",
        b'{"text": 1e999}',
        b'{"text": ' + b"9" * 5_000 + b"}",
    ]
    write_rows(tmp_path / "rows.jsonl", lines)
    form = form_of(task, getattr(pb.TrainingPlan(), task))
    source = from_file(DataPlace(folder=tmp_path), "rows.jsonl", companions=form.companions)
    report = ProcessingReport()
    with contextlib.suppress(DataUnavailableError):
        prepare_rows(source, form, wish={}, limits=ALL, each_row=lambda: None, report=report)
    assert report.rows_refused >= 7
