"""The agents' data: labels, splits that do not mix, and findings for every row that is not used."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agent_server.data.classification import (
    AgentDataProcessor,
    ClassificationData,
    ClassificationSource,
)
from agent_server.data.intents import generate_intents
from agent_server.trainer import LabelledData
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.data_fixtures import figures, real_data
from training_common.attempt import AttemptStopped, StopKind

CLINC = "agent/clinc150/data_full.jsonl"


def _process(tmp_path: Path, rows: list[Any], **wishes: Any) -> ClassificationData:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    return AgentDataProcessor(folder=tmp_path).process(ClassificationSource(path="rows.jsonl", **wishes))


def _row(text: str, label: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"text": text, "label": label, "split": split, **more}


BASE = [_row("red one", "a"), _row("blue one", "b"), _row("red two", "a", "test"), _row("blue two", "b", "test")]


def test_generated_intents_are_the_same_for_a_seed() -> None:
    """Another seed gives other rows."""
    assert list(generate_intents(seed=1)) == list(generate_intents(seed=1))
    assert list(generate_intents(seed=1)) != list(generate_intents(seed=2))


def test_generated_splits_share_no_text_and_test_new_wordings() -> None:
    """A count of words learns much of it, and not all: accuracy means something."""
    data = AgentDataProcessor().process(ClassificationSource())
    labelled: LabelledData = data
    texts = [{text for text, _ in rows} for rows in (labelled.train, labelled.validation, labelled.test)]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert (len(data.labels), data.name, data.manifest.kind) == (12, "forge-intents", "generated")
    assert data.test_majority_share < 0.15
    assert 0.6 < _naive_bayes_accuracy(data) < 1.0


def _naive_bayes_accuracy(data: ClassificationData) -> float:
    words = {label: Counter[str]() for label in range(len(data.labels))}
    for text, label in data.train:
        words[label].update(text.split())
    vocabulary = len(set().union(*words.values()))

    def score(text: str, label: int) -> float:
        total = words[label].total() + vocabulary
        return sum(math.log((words[label][word] + 1) / total) for word in text.split())

    right = sum(max(words, key=lambda label: score(text, label)) == expected for text, expected in data.test)
    return right / len(data.test)


def test_hostile_rows_are_refused_one_by_one_and_none_is_lost(tmp_path: Path) -> None:
    """Each finding has a place and a remedy, and the counts add up."""
    hostile = [
        b'{"text": "x", "label": ', b'{"text": "x", "label": NaN}', b'{"text": "\xff", "label": "a"}', b"[1]",
        {"text": 5, "label": "a"}, {"label": "a"}, {"text": "x"}, {"text": " ", "label": "a"},
        {"text": "x", "label": "a", "split": "dev2"}, {"text": "x", "label": "a", "split": ["train"]},
        {"text": "x" * 9000, "label": "a"}, {"text": "x", "label": "a", "domain": 3},
        _row("green two", "c", "test"),
    ]  # fmt: skip
    data = _process(tmp_path, [*BASE, *hostile])
    assert data.report.rows_refused == len(hostile)
    assert data.report.balanced
    reasons = {finding.line: finding.reason for finding in data.report.findings}
    assert [reasons[line] for line in range(5, 5 + len(hostile))] == [
        "not_json", "not_json", "not_utf8", "not_an_object", "wrong_type", "missing_field", "missing_field", "blank",
        "unknown_value", "unknown_value", "too_long", "wrong_type", "label_without_training_rows",
    ]  # fmt: skip
    assert all(finding.file == "rows.jsonl" and finding.remedy for finding in data.report.findings)


def test_a_text_stays_in_the_split_that_measures(tmp_path: Path) -> None:
    """Case and punctuation do not hide a repeat, and a contradicting label is told apart."""
    repeats = [_row("Red two!", "a"), _row("blue two", "a"), _row("red one", "a")]
    data = _process(tmp_path, [*repeats, *BASE])
    assert data.test == (("red two", 0), ("blue two", 1))
    assert data.train == (("red one", 0), ("blue one", 1))
    assert data.report.left_out == {"repeated_text": 2, "contradicting_label": 1}
    assert data.report.balanced


def test_a_file_without_splits_is_split_by_text(tmp_path: Path) -> None:
    """The same text lands in the same split wherever it stands in the file."""
    rows = [{"text": f"{word} {n}", "intent": word} for n in range(200) for word in ("one", "two")]
    data, again = _process(tmp_path, rows), _process(tmp_path, rows[::-1])
    assert {split: sorted(getattr(data, split)) for split in ("train", "validation", "test")} == {
        split: sorted(getattr(again, split)) for split in ("train", "validation", "test")
    }
    assert 0.05 < len(data.test) / 400 < 0.15
    assert 0.05 < len(data.validation) / 400 < 0.15


def test_filters_leave_out_and_count(tmp_path: Path) -> None:
    """Labels, domains, rows of no label, and a bound on training rows."""
    more = [_row(f"red {n}", "a", domain="x") for n in range(9)] + [
        _row(f"blue {n}", "b", domain="y") for n in range(9)
    ]
    rows = [*BASE, *more, _row("what", "oos", "oos_train"), _row("else", "oos", "oos_test"), _row("c", "c")]
    limited = _process(tmp_path, rows, max_rows_per_label=2, labels=("a", "b"))
    assert Counter(label for _, label in limited.train) == {0: 2, 1: 2}
    assert limited.report.left_out == {"out_of_scope": 2, "other_label": 1, "max_rows_per_label": 16}
    assert limited.report.balanced
    with_oos = _process(tmp_path, rows, include_out_of_scope=True)
    assert with_oos.labels == ("a", "b", "c", "oos")
    with pytest.raises(DataUnavailableError, match="1 labels"):
        _process(tmp_path, rows, domains=("x",))


@pytest.mark.parametrize(
    "path", ["../secret.jsonl", "a/../../secret.jsonl", "/etc/passwd", "link.jsonl", "a\0b", "inner"]
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    """Links are followed before they are judged."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "inner").mkdir()
    (folder / "inner" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InvalidFieldError, match="out of the data folder"):
        AgentDataProcessor(folder=folder).process(ClassificationSource(path=path))


@pytest.mark.parametrize("bound", ["MAX_ROWS", "MAX_CHARS"])
def test_a_set_that_memory_cannot_hold_is_refused(bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before memory runs out, with the row at which it is known and what to do; rows left out do not count."""
    most = {"MAX_ROWS": 4, "MAX_CHARS": sum(len(row["text"]) for row in BASE)}[bound]
    monkeypatch.setattr(f"agent_server.data.classification.{bound}", most)
    assert 2 == len(_process(tmp_path, [*BASE, _row("alien", "oos")]).train)
    with pytest.raises(DataUnavailableError, match=r"at rows\.jsonl, row 5\): choose fewer labels"):
        _process(tmp_path, [*BASE, _row("one too many", "a")])


def test_reading_can_be_ended_at_every_row(tmp_path: Path) -> None:
    """A job that is cancelled need not read its data to the end: unusable rows are rows too."""
    (tmp_path / "rows.jsonl").write_bytes(b"broken\n" * 100)
    seen: list[None] = []

    def each_row() -> None:
        seen.append(None)
        if len(seen) == 3:
            raise AttemptStopped(StopKind.CANCEL)

    with pytest.raises(AttemptStopped):
        AgentDataProcessor(folder=tmp_path).process(ClassificationSource(path="rows.jsonl"), each_row=each_row)
    assert 3 == len(seen)


@pytest.mark.parametrize("folder", [None, "empty"])
def test_a_missing_file_is_told_before_the_job_is_queued(tmp_path: Path, folder: str | None) -> None:
    """The error names the remedy."""
    processor = AgentDataProcessor(folder=None if folder is None else tmp_path)
    with pytest.raises(DataUnavailableError, match="generated rows"):
        processor.require_available(ClassificationSource(path="rows.jsonl"))
    processor.require_available(ClassificationSource())


def test_a_folder_of_files_is_one_set(tmp_path: Path) -> None:
    """Every file is in the manifest with its digest."""
    for number, rows in enumerate((BASE[:2], BASE[2:])):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = AgentDataProcessor(folder=tmp_path.parent).process(ClassificationSource(path=tmp_path.name))
    found: Any = json.loads(json.dumps(data.manifest.to_json()))
    assert [file["name"] for file in found["files"]] == ["0.jsonl", "1.jsonl"]
    assert found["rows"] == {"train": 2, "validation": 0, "test": 2}
    assert found["test_majority_share"] == 0.5


def test_real_clinc_rows_have_the_measured_figures() -> None:
    """Every row of the three splits is used but for texts that occur more than once."""
    folder = real_data()
    expected = figures(folder)["agent"]["clinc150"]
    data = AgentDataProcessor(folder=folder).process(ClassificationSource(path=CLINC))
    assert (data.report.rows_read, data.report.rows_refused, data.report.balanced) == (expected["rows"], 0, True)
    assert len(data.labels) == expected["intents"] - 1
    oos = sum(expected[name] for name in ("oos_train", "oos_val", "oos_test"))
    repeats = data.report.left_out["repeated_text"] + data.report.left_out["contradicting_label"]
    assert data.report.left_out["out_of_scope"] == oos
    assert data.report.rows_kept == expected["rows"] - oos - repeats
    assert 60 <= repeats <= 70
    keys = [{text for text, _ in rows} for rows in (data.train, data.validation, data.test)]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


def test_real_clinc_rows_with_out_of_scope_have_one_label_more() -> None:
    """`oos` is a label of its own, and all ten domains are there."""
    folder = real_data()
    expected = figures(folder)["agent"]["clinc150"]
    source = ClassificationSource(path=CLINC, include_out_of_scope=True, max_rows_per_label=5)
    data = AgentDataProcessor(folder=folder).process(source)
    assert len(data.labels) == expected["intents"]
    assert max(Counter(label for _, label in data.train).values()) == 5
