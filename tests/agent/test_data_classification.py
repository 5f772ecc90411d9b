"""The agents' data: labels, splits that do not mix, and findings for every row that is not used."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agent_server.data.examples import Labelled, PreparedData
from agent_server.data.intents import generate_intents
from agent_server.data.processor import AgentDataProcessor, ready_event
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.agent.data_support import generated, plan_for, prepare, prepare_rows, reasons, write_rows
from tests.data_fixtures import figures, real_data
from training_common.attempt import AttemptStopped, StopKind
from training_common.settings import DataSettings

CLINC = "agent/clinc150/data_full.jsonl"


def _process(tmp_path: Path, rows: list[Any], **wishes: Any) -> PreparedData[Labelled]:
    return prepare_rows(tmp_path, "classification", rows, **wishes)


def _row(text: str, label: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"text": text, "label": label, "split": split, **more}


BASE = [_row("red one", "a"), _row("blue one", "b"), _row("red two", "a", "test"), _row("blue two", "b", "test")]


def test_generated_intents_are_the_same_for_a_seed() -> None:
    """Another seed gives other rows."""
    assert list(generate_intents(seed=1)) == list(generate_intents(seed=1))
    assert list(generate_intents(seed=1)) != list(generate_intents(seed=2))
    assert generated(1).manifest.digest == generated(1).manifest.digest
    assert generated(1).manifest.digest != generated(2).manifest.digest


def test_generated_splits_share_no_text_and_test_new_wordings() -> None:
    """A count of words learns much of it, and not all: accuracy means something."""
    data = generated()
    texts = [{row.text for row in rows} for rows in (data.train, data.validation, data.test)]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert (len(data.labels), data.name, data.manifest.kind) == (12, "forge-intents", "generated")
    share: Any = data.manifest.facts["test_majority_share"]
    assert share < 0.15
    assert 0.6 < _naive_bayes_accuracy(data) < 1.0


def _naive_bayes_accuracy(data: PreparedData[Labelled]) -> float:
    words = {label: Counter[str]() for label in range(len(data.labels))}
    for row in data.train:
        words[row.label].update(row.text.split())
    vocabulary = len(set().union(*words.values()))

    def score(text: str, label: int) -> float:
        total = words[label].total() + vocabulary
        return sum(math.log((words[label][word] + 1) / total) for word in text.split())

    right = sum(max(words, key=lambda label: score(row.text, label)) == row.label for row in data.test)
    return right / len(data.test)


def test_hostile_rows_are_refused_one_by_one_and_none_is_lost(tmp_path: Path) -> None:
    """Each finding has a place and a remedy, and the counts add up."""
    hostile = [
        b'{"text": "x", "label": ', b'{"text": "x", "label": NaN}', b'{"text": "\xff", "label": "a"}', b"[1]",
        {"text": 5, "label": "a"}, {"label": "a"}, {"text": "x"}, {"text": " ", "label": "a"},
        {"text": "x", "label": "a", "split": "dev2"}, {"text": "x", "label": "a", "split": ["train"]},
        {"text": "x" * 9000, "label": "a"}, {"text": "x", "label": "a", "domain": 3},
        {"text": "x", "label": "a", "split": "oos_oos_train"}, _row("green two", "c", "test"),
    ]  # fmt: skip
    data = _process(tmp_path, [*BASE, *hostile], max_refused_share=1)
    assert data.report.rows_refused == len(hostile)
    assert data.report.balanced
    assert [reasons(data)[line] for line in range(5, 5 + len(hostile))] == [
        "not_json", "not_json", "not_utf8", "not_an_object", "wrong_type", "missing_field", "missing_field", "blank",
        "unknown_value", "unknown_value", "too_long", "wrong_type", "unknown_value", "label_without_training_rows",
    ]  # fmt: skip
    assert all(finding.file == "rows.jsonl" and finding.remedy for finding in data.report.findings)


def test_a_text_stays_in_the_split_that_measures(tmp_path: Path) -> None:
    """Case and punctuation do not hide a repeat, and a contradicting label is told apart."""
    repeats = [_row("Red two!", "a"), _row("blue two", "a"), _row("red one", "a")]
    data = _process(tmp_path, [*repeats, *BASE])
    assert data.test == (Labelled("red two", 0), Labelled("blue two", 1))
    assert data.train == (Labelled("red one", 0), Labelled("blue one", 1))
    assert data.report.left_out == {"repeated_text": 2, "contradicting_label": 1}
    assert data.report.balanced


def test_a_file_without_splits_is_split_by_text(tmp_path: Path) -> None:
    """The same text lands in the same split wherever it stands in the file."""
    rows = [{"text": f"{word} {n}", "intent": word} for n in range(200) for word in ("one", "two")]
    data, again = _process(tmp_path, rows), _process(tmp_path, rows[::-1])
    for split in ("train", "validation", "test"):
        assert set(getattr(data, split)) == set(getattr(again, split))
    assert 0.05 < len(data.test) / 400 < 0.15
    assert 0.05 < len(data.validation) / 400 < 0.15
    assert data.manifest.facts["test_rows"] == "hashed"


@pytest.mark.parametrize("named", [("train",), ("train", "val"), ("train_dev",)])
def test_a_set_that_names_no_test_rows_is_measured_on_rows_that_are_not_trained(
    named: tuple[str, ...], tmp_path: Path
) -> None:
    """Half of its validation rows, where it has some; otherwise rows that the hash of their text chooses."""
    rows = [
        {"text": f"{word} {split} {n}", "intent": word, "split": split}
        for split in named
        for n in range(300)
        for word in ("one", "two")
    ]
    data = _process(tmp_path, rows)
    assert data.report.rows_kept == len(rows)
    assert data.manifest.facts["test_rows"] == ("hashed" if named == ("train",) else "halved_validation")
    if named == ("train", "val"):
        assert 600 == len(data.train)
        assert 240 < len(data.test) < 360
    else:
        assert 0.03 < len(data.test) / len(rows) < 0.15


def test_filters_leave_out_and_count(tmp_path: Path) -> None:
    """Domains, rows of no label, and a bound on training rows."""
    more = [_row(f"red {n}", "a", domain="x") for n in range(9)]
    more += [_row(f"blue {n}", "b", domain="y") for n in range(9)]
    rows = [*BASE, *more, _row("what", "oos", "oos_train"), _row("else", "oos", "oos_test"), _row("c", "c")]
    limited = _process(tmp_path, rows, max_rows_per_label=2)
    assert Counter(row.label for row in limited.train) == {0: 2, 1: 2, 2: 1}
    assert limited.report.left_out == {"out_of_scope": 2, "max_rows_per_label": 16}
    assert limited.report.balanced
    with_oos = _process(tmp_path, rows, include_out_of_scope=True)
    assert with_oos.labels == ("a", "b", "c", "oos")
    with pytest.raises(DataUnavailableError, match=r"has 1 labels; .* other_domain 14, out_of_scope 2"):
        _process(tmp_path, rows, domains=("x",))


@pytest.mark.parametrize(
    "path", ["../secret.jsonl", "a/../../secret.jsonl", "/etc/passwd", "link.jsonl", "a\0b", "inner"]
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    """Links are followed before they are judged, and the error names the field."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "inner").mkdir()
    (folder / "inner" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InvalidFieldError, match="out of the data folder") as refused:
        prepare(folder, "classification", path)
    assert ["plan.classification.file.path"] == [v.field for v in refused.value.violations]


@pytest.mark.parametrize("bound", ["MAX_ROWS", "MAX_CHARS"])
def test_a_set_that_memory_cannot_hold_is_refused(bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before memory runs out, with the row at which it is known and what to do; rows left out do not count."""
    most = {"MAX_ROWS": 4, "MAX_CHARS": sum(len(row["text"]) for row in BASE)}[bound]
    monkeypatch.setattr(f"agent_server.data.pipeline.{bound}", most)
    assert 2 == len(_process(tmp_path, [*BASE, _row("alien", "oos")]).train)
    with pytest.raises(DataUnavailableError, match=r"at rows\.jsonl, row 5\): choose fewer labels"):
        _process(tmp_path, [*BASE, _row("one too many", "a")])


def test_reading_can_be_ended_at_every_row(tmp_path: Path) -> None:
    """A job that is cancelled need not read its data to the end: unusable rows are rows too."""
    write_rows(tmp_path / "rows.jsonl", [b"broken"] * 100)
    seen: list[None] = []

    def each_row() -> None:
        seen.append(None)
        if len(seen) == 3:
            raise AttemptStopped(StopKind.CANCEL)

    with pytest.raises(AttemptStopped):
        prepare(tmp_path, "classification", "rows.jsonl", each_row=each_row)
    assert 3 == len(seen)


@pytest.mark.parametrize("folder", [None, "empty"])
def test_a_missing_file_is_told_before_the_job_is_queued(tmp_path: Path, folder: str | None) -> None:
    """The error names the field and the remedy."""
    processor = AgentDataProcessor(DataSettings(folder=None if folder is None else tmp_path))
    with pytest.raises(DataUnavailableError, match="generated rows") as missing:
        processor.require_available(plan_for("classification", "rows.jsonl"))
    assert ["plan.classification.file.path"] == [v.field for v in missing.value.violations]
    processor.require_available(
        pb.TrainingPlan(classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=1)))
    )


def test_a_folder_of_files_is_one_set(tmp_path: Path) -> None:
    """Every file is in the manifest with its digest, and says by its name which split its rows are of."""
    write_rows(tmp_path / "test-00000-of-00001.jsonl", [{**row, "split": None} for row in BASE[2:]])
    write_rows(tmp_path / "training.jsonl", [{**row, "split": None} for row in BASE[:2]])
    write_rows(tmp_path / "domains.json", [{"no": "row"}])
    data = prepare(tmp_path.parent, "classification", tmp_path.name)
    found: Any = json.loads(json.dumps(data.manifest.to_json()))
    assert [file["name"] for file in found["files"]] == ["test-00000-of-00001.jsonl", "training.jsonl"]
    assert found["rows"] == found["examples"] == {"train": 2, "validation": 0, "test": 2}
    assert found["test_majority_share"] == 0.5
    assert found["source"] == {"file": {"path": tmp_path.name}}
    assert data.manifest.digest not in {file["sha256"] for file in found["files"]}


def test_too_many_refused_rows_end_the_job_with_counts_and_remedies(tmp_path: Path) -> None:
    """At most a tenth may be refused; a plan may allow more, and what is wrong is told row by row."""
    rows = [*BASE, *(_row(f"more {n}", "a") for n in range(14)), {"text": "x"}, b"{"]
    assert 2 == _process(tmp_path, rows).report.rows_refused
    with pytest.raises(
        DataUnavailableError, match=r"3 of 21 rows are refused \(14\.3%, at most 10\.0% may\)"
    ) as refused:
        _process(tmp_path, [*rows, {"text": " ", "label": "a"}])
    assert "rows.jsonl:21 text: the text is blank; fill it in or remove the row" in refused.value.message
    assert "refused: blank 1, missing_field 1, not_json 1" in refused.value.message
    assert {"plan.classification.file"} == {v.field for v in refused.value.violations}
    assert 4 == len(refused.value.violations)
    assert 3 == _process(tmp_path, [*rows, {"text": " ", "label": "a"}], max_refused_share=0.15).report.rows_refused
    with pytest.raises(DataUnavailableError, match=r"at most 0\.0% may"):
        _process(tmp_path, rows, max_refused_share=0)


def test_a_job_tells_before_training_what_became_of_its_rows(tmp_path: Path) -> None:
    """In its event, with the first row that was refused and what to do about it."""
    data = _process(tmp_path, [*BASE, _row("red one", "a"), {"text": "x"}], max_refused_share=1)
    told = ready_event(data)
    assert (
        "rows (folder): 2 to train on, 2 to test on, 2 labels; 1 of 6 rows refused, the first: rows.jsonl:6 label: "
        "the field is missing; add it as text" == told["message"]
    )
    assert (6, 4, "missing_field 1", "repeated_text 1") == tuple(
        told[name] for name in ("rows_read", "rows_kept", "refused", "left_out")
    )
    clean: Any = ready_event(_process(tmp_path, BASE))["message"]
    assert "refused" not in clean


def test_an_earlier_set_has_to_have_the_plans_labels(tmp_path: Path) -> None:
    """Its numbers are those of the plan's labels, and a label that the plan lacks is refused with the field's name."""
    more = [_row("green one", "c"), _row("green two", "c", "test")]
    write_rows(tmp_path / "rows.jsonl", [*BASE, *more])
    write_rows(tmp_path / "earlier.jsonl", [_row("c", "c"), _row("b", "b"), _row("b two", "b", "test")])
    processor = AgentDataProcessor(DataSettings(folder=tmp_path))
    plan = plan_for("classification", "rows.jsonl", domains=(), max_rows_per_label=1)
    data = processor.prepare(plan)
    assert processor.prepare_rehearsal(plan, data.labels) is None
    plan.rehearsal.file.path = "earlier.jsonl"
    earlier = processor.prepare_rehearsal(plan, data.labels)
    assert earlier is not None
    assert (("a", "b", "c"), (Labelled("c", 2), Labelled("b", 1))) == (earlier.labels, earlier.train)
    with pytest.raises(DataUnavailableError, match=r"has 1 labels that the set it goes with lacks \('c'\)") as refused:
        processor.prepare_rehearsal(plan, ("a", "b"))
    assert ["plan.rehearsal.file"] == [v.field for v in refused.value.violations]
    plan.rehearsal.file.path = "missing.jsonl"
    with pytest.raises(DataUnavailableError) as missing:
        processor.require_available(plan)
    assert ["plan.rehearsal.file.path"] == [v.field for v in missing.value.violations]


def test_a_set_that_is_only_measured_on_needs_no_training_rows(tmp_path: Path) -> None:
    """Nor labels that it trains: what an agent does not know of them is its own."""
    write_rows(tmp_path / "test.jsonl", [_row("red two", "a", "test"), _row("green two", "c", "test")])
    processor = AgentDataProcessor(DataSettings(folder=tmp_path))
    plan = plan_for("classification", "test.jsonl")
    measured = processor.prepare_set("classification", plan.classification, to_measure=True, place="classification.")
    assert (("a", "c"), 2, ()) == (measured.labels, len(measured.test), measured.train)
    with pytest.raises(DataUnavailableError, match="has 0 labels"):
        processor.prepare(plan)
    texts = plan_for("domain", "test.jsonl").domain
    assert 2 == len(processor.prepare_set("domain", texts, to_measure=True).test)
    write_rows(tmp_path / "test.jsonl", [_row("red", "a")])
    with pytest.raises(DataUnavailableError, match="has no test rows") as refused:
        processor.prepare_set("classification", plan.classification, to_measure=True, place="classification.")
    assert ["classification.file"] == [v.field for v in refused.value.violations]


def test_numbers_beside_a_text_are_finite_and_equally_many(tmp_path: Path) -> None:
    """The same words beside other numbers are another row."""
    rows = [{**row, "features": [n, 0.5]} for n, row in enumerate(BASE)]
    again = {**rows[0], "features": [7, 0.5]}
    wrong = [{**rows[0], "features": value} for value in ([1e39], ["1"], [], [True], 3)]
    data = _process(tmp_path, [*rows, again, *wrong], max_refused_share=1)
    assert [(0, 0.5), (1, 0.5), (7, 0.5)] == [row.features for row in data.train]
    assert ["not_finite", *["wrong_type"] * 4] == list(reasons(data).values())
    with pytest.raises(DataUnavailableError, match="has rows of 1 and rows of 2 features"):
        _process(tmp_path, [*rows, {**again, "features": [7]}])


def test_real_clinc_rows_have_the_measured_figures() -> None:
    """Every row of the three splits is used but for texts that occur more than once."""
    folder = real_data()
    expected = figures(folder)["agent"]["clinc150"]
    data = prepare(folder, "classification", CLINC)
    assert (data.report.rows_read, data.report.rows_refused, data.report.balanced) == (expected["rows"], 0, True)
    assert len(data.labels) == expected["intents"] - 1
    oos = sum(expected[name] for name in ("oos_train", "oos_val", "oos_test"))
    repeats = data.report.left_out["repeated_text"] + data.report.left_out["contradicting_label"]
    assert data.report.left_out["out_of_scope"] == oos
    assert data.report.rows_kept == expected["rows"] - oos - repeats
    assert 60 <= repeats <= 70
    keys = [{row.text for row in rows} for rows in (data.train, data.validation, data.test)]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


def test_real_clinc_rows_with_out_of_scope_have_one_label_more() -> None:
    """`oos` is a label of its own; named by its folder, the set is the same, for the list of domains is no row."""
    folder = real_data()
    expected = figures(folder)["agent"]["clinc150"]
    data = prepare(folder, "classification", "agent/clinc150", include_out_of_scope=True, max_rows_per_label=5)
    assert len(data.labels) == expected["intents"]
    assert max(Counter(row.label for row in data.train).values()) == 5
    assert (data.report.rows_read, data.report.rows_refused) == (expected["rows"], 0)


def test_real_pubmedqa_rows_are_labelled_by_the_final_decision() -> None:
    """The official test rows stay the test rows, and validation rows come out of the others."""
    folder = real_data()
    expected = figures(folder)["agent"]["pubmedqa"]
    data = prepare(folder, "classification", "agent/pubmedqa/ori_pqal.jsonl")
    assert (expected["rows"], expected["rows"], 0) == (
        data.report.rows_read, data.report.rows_kept, data.report.rows_refused,
    )  # fmt: skip
    assert ("maybe", "no", "yes") == data.labels
    counted = Counter(data.labels[row.label] for row in (*data.train, *data.validation, *data.test))
    assert {name: expected[name] for name in data.labels} == counted
    assert expected["official_test"] == len(data.test)
    assert 0.05 < len(data.validation) / expected["official_train_dev"] < 0.15
