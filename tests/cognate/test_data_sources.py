"""Where rows come from, and what becomes of each of them."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cognate_server.data import sources
from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.generate import generate_rows
from cognate_server.data.processor import CognateDatasetProcessor
from cognate_server.data.sources import (
    DatasetId,
    DatasetShare,
    SourceKind,
    SourceSettings,
    parse_share,
    require_available,
    resolve,
)
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.data_fixtures import figures, real_data
from training_common.findings import ProcessingReport

GSM8K = DatasetShare(dataset=DatasetId.GSM8K)
HOTPOTQA = DatasetShare(dataset=DatasetId.HOTPOTQA)


def _folder(tmp_path: Path, lines: list[bytes]) -> Path:
    """A data folder whose GSM8K file holds generated rows in disguise, for tests only."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path


def _lines(rows: int) -> list[bytes]:
    return [json.dumps(row).encode() for row in generate_rows("forge-arithmetic", rows=rows, seed=9)]


def test_a_folder_comes_before_the_generator(tmp_path: Path) -> None:
    """Only the set that the folder has comes from it; the other one is generated, under its own name."""
    found = [source for source, _ in resolve((), SourceSettings(folder=_folder(tmp_path, _lines(3))))]
    assert [(source.dataset, source.kind) for source in found] == [
        (DatasetId.GSM8K, SourceKind.FOLDER),
        (DatasetId.FORGE_TWOHOP, SourceKind.GENERATED),
    ]
    assert found[0].files[0].name == "gsm8k/train.jsonl"
    assert "hotpotqa cannot be read" in found[1].note


@pytest.mark.parametrize("share", [GSM8K, HOTPOTQA])
def test_a_named_set_is_never_replaced(share: DatasetShare, tmp_path: Path) -> None:
    """The error tells what to do, before the job is queued and when it starts."""
    for settings in (SourceSettings(), SourceSettings(folder=tmp_path)):
        for check in (resolve, require_available):
            with pytest.raises(DataUnavailableError, match=r"add the file, allow the hub, or name forge-"):
                check([share], settings)


@pytest.mark.parametrize(
    ("name", "dataset"), [("gsm8k", DatasetId.GSM8K), ("DATASET_FORGE_TWOHOP", DatasetId.FORGE_TWOHOP)]
)
def test_names_are_read_as_written_and_as_in_the_contract(name: str, dataset: DatasetId) -> None:
    """Both spellings mean one set."""
    assert parse_share(name, 2.0) == DatasetShare(dataset=dataset, weight=2.0)


@pytest.mark.parametrize(("name", "weight"), [("gsm9k", 1.0), ("", 1.0), ("gsm8k", 0.0), ("gsm8k", float("nan"))])
def test_an_unknown_set_or_weight_names_the_field(name: str, weight: float) -> None:
    """The violation carries the field; an unknown name comes with the known ones."""
    with pytest.raises(InvalidFieldError) as error:
        parse_share(name, weight, field_name="plan.datasets[1]")
    assert error.value.violations[0].field == "plan.datasets[1]"
    assert weight != 1.0 or "gsm8k, hotpotqa, forge-arithmetic, forge-twohop" in error.value.violations[0].description


def test_a_set_named_twice_is_refused() -> None:
    """Weights of one set do not add up by accident."""
    with pytest.raises(InvalidFieldError, match="twice"):
        resolve([GSM8K, GSM8K], SourceSettings())


def test_the_hub_is_asked_only_when_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the hub are hashed, and its failure is told with the remedy."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, object]]:
        asked.append((*args, kwargs["split"]))
        return list(generate_rows("forge-arithmetic", rows=5, seed=1))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (source, _), *_ = resolve([GSM8K], SourceSettings(hub=True))
    report = ProcessingReport()
    assert len(list(CognateDatasetProcessor().documents(source, report))) == 5
    assert (source.kind, source.digest[:7], asked) == (SourceKind.HUB, "sha256:", [("openai/gsm8k", "main", "train")])

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataUnavailableError, match=r"put the set into the data folder as gsm8k/train\.jsonl"):
        resolve([GSM8K], SourceSettings(hub=True))
    assert resolve((), SourceSettings(hub=True))[0][0].dataset is DatasetId.FORGE_ARITHMETIC


def test_hostile_rows_are_refused_one_by_one_and_none_is_lost(tmp_path: Path) -> None:
    """The report names file, line, field, reason and remedy of each, and its counts add up."""
    good = _lines(4)
    hostile = [
        b'{"question": "q',
        b'{"question": "q", "answer": NaN}',
        b'{"question": "\xff"}',
        b'{"question": 1}',
        b"[]",
    ]
    folder = _folder(tmp_path, [good[0], *hostile, good[1], good[1], good[2], b"", good[3]])
    report = ProcessingReport()
    ((source, _),) = resolve([GSM8K], SourceSettings(folder=folder))
    documents = list(CognateDatasetProcessor().documents(source, report))
    assert (len(documents), report.rows_refused, report.left_out["duplicate_question"]) == (4, 5, 1)
    assert report.balanced
    assert [(finding.line, finding.reason) for finding in report.findings] == [
        (2, "not_json"), (3, "not_json"), (4, "not_utf8"), (5, "wrong_type"), (6, "not_an_object"),
    ]  # fmt: skip
    assert {finding.file for finding in report.findings} == {"train.jsonl"}
    assert all(finding.remedy for finding in report.findings)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named set fails; without a name the generated one takes its place, and the manifest says why."""

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "sha256_file", denied)
    settings = SourceSettings(folder=_folder(tmp_path, _lines(1)))
    with pytest.raises(DataUnavailableError, match="Permission denied"):
        resolve([GSM8K], settings)
    assert "Permission denied" in resolve((), settings)[0][0].note


def test_a_set_without_a_usable_row_fails_with_its_first_finding(tmp_path: Path) -> None:
    """No job trains on nothing."""
    settings = SourceSettings(folder=_folder(tmp_path, [b'{"question": "q", "answer": "#### 1"}'] * 3))
    with pytest.raises(
        DataUnavailableError, match=r"3 refused; the first finding: train.jsonl:1 answer: nothing stands"
    ):
        build_stream(DataPlan(seed=0, batch_size=1, sequence_length=64, datasets=(GSM8K,)), settings)


def test_the_manifest_says_what_was_used(tmp_path: Path) -> None:
    """Sources with digests and counts, the tokenizer, the mix: all of it JSON."""
    settings = SourceSettings(folder=_folder(tmp_path, [*_lines(100), b"{"]), generated_rows=100)
    shares = (DatasetShare(dataset=DatasetId.GSM8K, weight=3), DatasetShare(dataset=DatasetId.FORGE_TWOHOP))
    stream, manifest = build_stream(DataPlan(seed=5, batch_size=2, sequence_length=64, datasets=shares), settings)
    found: Any = json.loads(json.dumps(manifest.to_json()))
    assert [(s["name"], s["kind"], s["share"]) for s in found["sources"]] == [
        ("gsm8k", "folder", 0.75),
        ("forge-twohop", "generated", 0.25),
    ]
    report = found["sources"][0]["report"]
    assert (report["rows_read"], report["rows_kept"], report["rows_refused"]) == (101, 100, 1)
    assert sum(found["sources"][0]["documents"].values()) == 100
    assert found["tokenizer"]["digest"] == stream.tokenizer.digest
    assert all(len(source["digest"]) == len("sha256:") + 64 for source in found["sources"])


def test_real_rows_make_a_stream() -> None:
    """All of GSM8K's and HotpotQA's training rows become documents."""
    folder = real_data()
    expected = figures(folder)
    for (source, _), rows in zip(
        resolve([GSM8K, HOTPOTQA], SourceSettings(folder=folder)),
        (expected["gsm8k"]["train"]["rows"], expected["hotpotqa"]["train_distractor"]["rows"]),
        strict=True,
    ):
        report = ProcessingReport()
        documents = sum(1 for _ in CognateDatasetProcessor().documents(source, report))
        assert (documents, report.rows_read, report.balanced) == (rows, rows, True)
