"""Where rows come from, and what becomes of each of them."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections.abc import Callable, Iterator
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
    Source,
    SourceKind,
    SourceSettings,
    parse_share,
    require_available,
    resolve,
)
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.data_fixtures import figures, real_data
from training_common.findings import MAX_FINDINGS, ProcessingReport
from training_common.rows import MAX_ROW_BYTES, read_rows

GSM8K = DatasetShare(dataset=DatasetId.GSM8K)
HOTPOTQA = DatasetShare(dataset=DatasetId.HOTPOTQA)


def _folder(tmp_path: Path, lines: list[bytes]) -> Path:
    """A data folder whose GSM8K file holds generated rows in disguise, for tests only."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path


def _source(dataset: DatasetId, path: Path) -> Source:
    """Any file as a set's."""
    return Source(
        dataset=dataset, kind=SourceKind.FOLDER, licence="", origin=path.name, open_rows=lambda: read_rows(path)
    )


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


def _hub_gives(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_asked_only_when_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the hub are streamed and hashed, and its failure is told with the remedy."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, split: str, streaming: bool) -> Iterator[dict[str, object]]:
        asked.append((*args, split, streaming))
        return generate_rows("forge-arithmetic", rows=5, seed=1)

    _hub_gives(monkeypatch, load_dataset)
    with pytest.raises(DataUnavailableError):
        resolve([GSM8K], SourceSettings())
    assert asked == []
    (source, _), *_ = resolve([GSM8K], SourceSettings(hub=True))
    report = ProcessingReport()
    assert len(list(CognateDatasetProcessor().documents(source, report))) == 5
    assert (source.kind, source.digest[:7]) == (SourceKind.HUB, "sha256:")
    assert asked == [("openai/gsm8k", "main", "train", True)]

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    _hub_gives(monkeypatch, unreachable)
    with pytest.raises(DataUnavailableError, match=r"put the set into the data folder as gsm8k/train\.jsonl"):
        resolve([GSM8K], SourceSettings(hub=True))
    assert resolve((), SourceSettings(hub=True))[0][0].dataset is DatasetId.FORGE_ARITHMETIC


def test_a_hub_that_breaks_off_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a set is never trained on as if it were the whole."""

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[dict[str, object]]:
        yield from generate_rows("forge-arithmetic", rows=3, seed=1)
        raise ConnectionError("reset")

    _hub_gives(monkeypatch, load_dataset)
    ((source, _),) = resolve([GSM8K], SourceSettings(hub=True))
    with pytest.raises(DataUnavailableError, match=r"broke off openai/gsm8k after 3 rows \(ConnectionError\)"):
        list(CognateDatasetProcessor().documents(source, ProcessingReport()))


def test_rows_stream_through_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` in streaming mode gives the hub's form of both sets; local files stand in for the hub."""
    datasets = pytest.importorskip("datasets")
    whole = datasets.load_dataset
    rows = {"gsm8k": list(generate_rows("forge-arithmetic", rows=40, seed=1))}
    rows["hotpotqa"] = [_hub_form(row) for row in generate_rows("forge-twohop", rows=40, seed=1)]
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")

    def local(path: str, configuration: str, *, split: str, streaming: bool) -> Any:
        name = "gsm8k" if "gsm8k" in path else "hotpotqa"
        files = str(tmp_path / f"{name}.jsonl")
        return whole("json", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", local)
    for source, _ in resolve([GSM8K, HOTPOTQA], SourceSettings(hub=True)):
        report = ProcessingReport()
        documents = list(CognateDatasetProcessor().documents(source, report))
        generated = DatasetId.FORGE_ARITHMETIC if source.dataset.arithmetic else DatasetId.FORGE_TWOHOP
        expected = generate_rows(generated.value, rows=40, seed=1)
        assert [document.answer for document in documents] == [_answer(row) for row in expected]
        assert (report.rows_read, report.rows_kept) == (40, 40)


def _hub_form(row: dict[str, Any]) -> dict[str, Any]:
    context, facts = row["context"], row["supporting_facts"]
    rest = {key: value for key, value in row.items() if key not in ("_id", "context", "supporting_facts")}
    return {
        "id": row["_id"],
        **rest,
        "context": {"title": [title for title, _ in context], "sentences": [page for _, page in context]},
        "supporting_facts": {"title": [title for title, _ in facts], "sent_id": [number for _, number in facts]},
    }


def _answer(row: dict[str, Any]) -> str:
    return str(row["answer"]).rpartition("#### ")[2]


def test_a_row_of_the_same_id_is_left_out(tmp_path: Path) -> None:
    """Whatever it asks; so is another row with the same question. Both are counted."""
    first, second, third = generate_rows("forge-twohop", rows=3, seed=2)
    rows = [first, {**second, "_id": first["_id"]}, {**third, "question": f" {str(first['question']).upper()} "}, third]
    (tmp_path / "hotpotqa").mkdir()
    (tmp_path / "hotpotqa" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = ProcessingReport()
    ((source, _),) = resolve([HOTPOTQA], SourceSettings(folder=tmp_path))
    documents = list(CognateDatasetProcessor().documents(source, report))
    assert len(documents) == 1
    assert dict(report.left_out) == {"duplicate_id": 2, "duplicate_question": 1}
    assert report.balanced


# What a damaged or hostile file may hold, as bytes of one row, and the reason it is refused with.
HOSTILE: dict[bytes, str] = {
    b'{"question": "q", "answer": "x': "not_json",
    b'{"question": "q", "answer": NaN}': "not_json",
    b'{"question": -Infinity}': "not_json",
    b'{"question": 1e999}': "not_json",
    b'{"question": "q", "question": "r"}': "not_json",
    b'{"question": "\xff\xfe"}': "not_utf8",
    b'{"question": "\\ud800", "answer": "#### 1"}': "lone_surrogate",
    b'{"question": ' + b"[" * 50_000 + b"]" * 50_000 + b"}": "too_deep",
    b'{"question": "' + b"x" * MAX_ROW_BYTES + b'"}': "row_too_large",
    b'{"question": "' + b"x" * 20_000 + b'"}': "too_long",
    b'{"question": ["q"], "answer": "#### 1"}': "wrong_type",
    b'{"question": null}': "wrong_type",
    b'{"question": "q", "answer": "' + b"9" * 400 + b'"}': "no_final_answer",
    b"{}": "missing_field",
    b"[1, 2]": "not_an_object",
    b"null": "not_an_object",
    b"\x00": "not_json",
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_no_hostile_row_hides_another(tmp_path: Path, form: str, ending: str) -> None:
    """A good row before and after each is kept; every other one is a finding with file, line and reason."""
    good = _lines(len(HOSTILE) + 1)
    hostile = {data: why for data, why in HOSTILE.items() if form == "lines" or data != next(iter(HOSTILE))}
    rows = [good[0], *(row for pair in zip(hostile, good[1:], strict=False) for row in pair)]
    data = b"\xef\xbb\xbf" + (b"\n".join(rows) if form == "lines" else b"[" + b",".join(rows) + b"]")
    name = {"lines": "train.jsonl", "array": "hotpot_train_v1.1.json"}[form] + ending
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if ending else data)
    report = ProcessingReport()
    source = Source(
        dataset=DatasetId.GSM8K, kind=SourceKind.FOLDER, licence="", origin="", open_rows=lambda: read_rows(path)
    )
    assert len(list(CognateDatasetProcessor().documents(source, report))) == len(hostile) + 1
    assert [(finding.file, finding.line, finding.reason) for finding in report.findings] == [
        (name, 2 * number, why) for number, why in enumerate(hostile.values(), start=1)
    ]
    assert (report.rows_read, report.balanced) == (2 * len(hostile) + 1, True)


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


def test_the_manifest_lists_refusals_with_their_total(tmp_path: Path) -> None:
    """However many rows are refused, the artifact stays small and the counts stay whole."""
    folder = _folder(tmp_path, [*_lines(30), *[b"{"] * (MAX_FINDINGS + 20)])
    plan = DataPlan(seed=0, batch_size=1, sequence_length=64, datasets=(GSM8K,))
    _, manifest = build_stream(plan, SourceSettings(folder=folder))
    found: Any = manifest.to_json()["sources"]
    report = found[0]["report"]
    assert (report["rows_refused"], report["refused"]) == (MAX_FINDINGS + 20, {"not_json": MAX_FINDINGS + 20})
    assert [finding["line"] for finding in report["findings"]] == list(range(31, 31 + MAX_FINDINGS))
    assert {finding["file"] for finding in report["findings"]} == {"train.jsonl"}


@pytest.mark.parametrize("split", ["dev_distractor", "dev_fullwiki"])
def test_no_real_question_is_lost_silently(split: str) -> None:
    """Also of the files that are not trained on: what was read is kept, or refused with file, line and reason."""
    folder = real_data()
    expected = figures(folder)["hotpotqa"][split]
    name = f"{split}.jsonl.gz"
    report = ProcessingReport(max_findings=10_000)
    source = _source(DatasetId.HOTPOTQA, folder / "hotpotqa" / name)
    documents = list(CognateDatasetProcessor().documents(source, report))
    assert report.rows_read == expected["rows"] == len(documents) + report.rows_refused
    assert len(report.findings) == report.rows_refused
    assert {finding.file for finding in report.findings} <= {name}
    assert len({finding.line for finding in report.findings}) == report.rows_refused
    lacking = expected["rows"] - expected["all_gold_titles_in_context"]
    assert report.refused["gold_paragraph_missing"] + report.refused["no_context"] == lacking


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
