"""Where the agents' rows come from: Parquet in bounded memory, the hub at a commit, and what is wrong with either."""

from __future__ import annotations

import gzip
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agent_server.data.hub import HubSet
from agent_server.data.processor import AgentDataProcessor
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError, InvalidFieldError
from tests.agent.data_support import prepare, reasons, write_rows
from training_common.attempt import AttemptStopped, StopKind
from training_common.rows import MAX_ROW_BYTES, read_rows
from training_common.settings import DataSettings

REVISION = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("one", "two")]


def _parquet(path: Path, rows: list[dict[str, Any]], *, row_group_size: int = 16) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


# Parquet


def test_parquet_gives_the_rows_that_jsonl_does(tmp_path: Path) -> None:
    """Row by row over row groups, with places, and the same splits."""
    _parquet(tmp_path / "rows.parquet", ROWS)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    packed, plain = (prepare(tmp_path, "classification", f"rows.{ending}") for ending in ("parquet", "jsonl"))
    assert (packed.train, packed.test, packed.name) == (plain.train, plain.test, plain.name)
    assert [1, 2, 3] == [row.line for row in read_rows(tmp_path / "rows.parquet")][:3]


def test_parquet_of_nested_rows_is_read(tmp_path: Path) -> None:
    """Lists of structures become lists of objects, as messages need them."""
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{"messages": [*said, {"role": "user", "content": str(n)}]} for n in range(60)]
    _parquet(tmp_path / "rows.parquet", rows)
    data = prepare(tmp_path, "dialogue", "rows.parquet")
    assert 60 == data.report.rows_kept
    assert ("User: Hello\nAgent:", " Hi") == tuple(piece.text for piece in data.train[0].segments[:2])


def test_parquet_of_another_schema_is_told_by_its_first_rows(tmp_path: Path) -> None:
    """With the field that is missing and the remedy."""
    _parquet(tmp_path / "rows.parquet", [{"sentence": row["text"], "label": row["label"]} for row in ROWS])
    with pytest.raises(
        DataUnavailableError, match=r"80 of 80 rows are refused .*rows\.parquet:1 text: the field is missing"
    ):
        prepare(tmp_path, "classification", "rows.parquet")


def test_numbers_that_are_not_finite_and_bytes_have_no_form_as_json(tmp_path: Path) -> None:
    """They are nothing, so that a field that needs them is refused and another one is not read."""
    table = pa.table(
        {
            "text": pa.array(["one", None, "three"]),
            "label": ["a", "b", "c"],
            "score": [math.nan, math.inf, 0.5],
            "picture": pa.array([b"\xff", b"", None], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    found = [dict(row.load()) for row in read_rows(tmp_path / "rows.parquet")]
    assert [None, None, 0.5] == [row["score"] for row in found]
    assert [None, None, None] == [row["picture"] for row in found]


@pytest.mark.parametrize("task", ["classification", "dialogue"])
def test_an_empty_file_is_told_as_one(task: str, tmp_path: Path) -> None:
    """Not by the labels or the test rows that it lacks."""
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataUnavailableError, match=r"rows is empty; write its rows, .* \(0 rows read"):
        prepare(tmp_path, task, "rows.jsonl")


@pytest.mark.parametrize("row", [{"text": "to Oslo"}, {"text": "to Oslo", "spans": None}])
def test_missing_spans_are_told_as_missing(row: dict[str, object], tmp_path: Path) -> None:
    """Not as a list of the wrong type; a row without slots says so by an empty one."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataUnavailableError, match=r"missing_field 1.*spans: the field is missing, or null; add it as"):
        prepare(tmp_path, "extraction", "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV"])
def test_a_table_of_text_is_told_as_one(name: str, tmp_path: Path) -> None:
    """Not a finding for each of its lines: what to write instead, for the field of the path."""
    (tmp_path / name).write_text("text,label\none,a\n", encoding="utf-8")
    with pytest.raises(DataUnavailableError, match=r"is a table of text, .* write its rows as JSONL") as caught:
        prepare(tmp_path, "classification", name)
    assert [violation.field for violation in caught.value.violations] == ["plan.classification.file.path"]


def test_parquet_with_bytes_that_are_no_text_loses_those_rows_alone(tmp_path: Path) -> None:
    """Each is a finding with its line and field, and so is a cell of bytes; the file goes on being read."""
    texts = [row["text"].encode() for row in ROWS]
    texts[3] = b"caf\xe9"
    table = pa.table({"text": pa.array(texts).view(pa.string()), "label": [row["label"] for row in ROWS]})
    pq.write_table(table, tmp_path / "rows.parquet")
    data = prepare(tmp_path, "classification", "rows.parquet")
    assert {4: "not_utf8"} == reasons(data)
    assert len(ROWS) - 1 == data.report.rows_kept
    [finding] = data.report.findings
    assert ("text", "byte 3 of the text is not UTF-8") == (finding.field, finding.detail)
    pq.write_table(table.set_column(0, "text", pa.array(texts)), tmp_path / "bytes.parquet")
    with pytest.raises(DataUnavailableError, match=r"bytes\.parquet:1 text: expected text, got null, or what JSON has"):
        prepare(tmp_path, "classification", "bytes.parquet")


@pytest.mark.parametrize("damage", ["torn", "no parquet", "empty", "page"])
def test_a_torn_parquet_file_is_a_finding(damage: str, tmp_path: Path) -> None:
    """Not a crash; what was read before the damage is counted."""
    path = _parquet(tmp_path / "rows.parquet", ROWS * 20, row_group_size=400)
    whole = bytearray(path.read_bytes())
    if damage == "page":  # of the last row group; the footer is sound
        place = pq.ParquetFile(path).metadata.row_group(3).column(0).dictionary_page_offset
        whole[place : place + 64] = b"\xff" * 64
    damaged = {"torn": bytes(whole[:-40]), "no parquet": b"PAR1 not", "empty": b"", "page": bytes(whole)}
    path.write_bytes(damaged[damage])
    rows = list(read_rows(path))
    assert (1201 if damage == "page" else 1) == len(rows)
    with pytest.raises(DataUnavailableError, match=r"rows\.parquet:1.*the file cannot be read beyond this row"):
        prepare(tmp_path, "classification", "rows.parquet", max_refused_share=0)


def test_rows_and_row_groups_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are unpacked, where the file tells their size; the rows before them are used."""
    large = {"text": "x" * (MAX_ROW_BYTES + 1), "label": "one"}
    _parquet(tmp_path / "rows.parquet", [*ROWS, large])
    data = prepare(tmp_path, "classification", "rows.parquet")
    assert {81: "row_too_large"} == reasons(data)
    monkeypatch.setattr("training_common.parquet.MAX_ROW_GROUP_BYTES", MAX_ROW_BYTES)
    data = prepare(tmp_path, "classification", "rows.parquet")
    assert {81: "row_group_too_large"} == reasons(data)
    assert 80 == data.report.rows_kept


def test_a_row_group_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    """One of 24 MB never takes as much."""
    _parquet(tmp_path / "rows.parquet", [{"text": f"{n} " + "x" * 2_000} for n in range(12_000)], row_group_size=12_000)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in read_rows(tmp_path / "rows.parquet"))
    assert most - before < 12_000_000


def test_a_folder_may_mix_forms_of_files(tmp_path: Path) -> None:
    """As a set of the hub that was downloaded does: a file for each split, and others that are no rows."""
    _parquet(tmp_path / "train-00000-of-00001.parquet", ROWS)
    with gzip.open(tmp_path / "test.jsonl.gz", "wb") as file:
        file.write(b'{"text": "one", "label": "one"}\n')
    (tmp_path / "README.md").write_text("no rows")
    data = prepare(tmp_path.parent, "classification", tmp_path.name)
    assert {"train": 80, "validation": 0, "test": 1} == data.manifest.rows
    assert ["test.jsonl.gz", "train-00000-of-00001.parquet"] == [file["name"] for file in data.manifest.files]


# The hub

WORDS = ("one", "two")


class _Streamed:
    """Rows as `datasets` streams them, whose labels are numbers."""

    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.features = {"text": object(), "label": types.SimpleNamespace(int2str=WORDS.__getitem__)}
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._rows()


class _Hub:
    """A hub in place of `datasets`: it counts how often it is asked."""

    def __init__(self, splits: Mapping[str, Callable[[], Iterator[dict[str, Any]]]], files: list[str]) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self._splits = splits
        self._files = files

    def load_dataset_builder(self, path: str, name: str | None, *, revision: str) -> Any:
        self.asked.append((path, name, revision))
        return types.SimpleNamespace(
            config=types.SimpleNamespace(data_files={"train": self._files}),
            as_streaming_dataset=lambda: {name: _Streamed(rows) for name, rows in self._splits.items()},
        )


def _hub(monkeypatch: pytest.MonkeyPatch, *, files: list[str] | None = None, **splits: Any) -> _Hub:
    own = [f"hf://datasets/owner/intents@{REVISION}/train.parquet"]
    hub = _Hub(splits, files or own)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    # The package is there, whatever stands for it.
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    return hub


def _numbered(count: int) -> Iterator[dict[str, Any]]:
    for n in range(count):
        yield {"text": f"{n}", "label": n % 2}


def _plan(dataset: str = "owner/intents", config: str = "") -> pb.TrainingPlan:
    hub = pb.HubSource(dataset=dataset, config=config, revision=REVISION)
    return pb.TrainingPlan(classification=pb.ClassificationTask(hub=hub))


def test_a_set_of_the_hub_is_read_at_its_commit_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its splits, words for numbers; the second reading needs no network, and both have the same digest."""
    unlabelled, half = {"text": "none", "label": -1}, {"text": "\ud800", "label": 1}
    hub = _hub(
        monkeypatch,
        train_sft=lambda: _numbered(20),
        test=lambda: iter([{"text": "x", "label": 0}, unlabelled, half]),
    )
    kept = AgentDataProcessor(DataSettings(hub=True), hub_dir=tmp_path / "hub")
    plan = _plan(config="small")
    plan.data_limits.max_refused_share = 0.2
    data = kept.prepare(plan)
    assert [("hf://datasets/owner/intents", "small", REVISION)] == hub.asked
    assert ("owner/intents/small", "hub", WORDS) == (data.name, data.manifest.kind, data.labels)
    assert {"train": 20, "validation": 0, "test": 1} == data.manifest.rows
    assert {22: "wrong_type", 23: "lone_surrogate"} == reasons(data)
    assert data.manifest.digest == kept.prepare(plan).manifest.digest
    assert 1 == len(hub.asked)
    unkept = AgentDataProcessor(DataSettings(hub=True)).prepare(plan)
    assert (unkept.manifest.digest, unkept.train) == (data.manifest.digest, data.train)
    assert 2 == len(hub.asked)
    assert 1 == len(list((tmp_path / "hub").iterdir()))


def test_a_hub_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a set is no set; nor is one that a stop ended."""

    def broken() -> Iterator[dict[str, Any]]:
        yield from _numbered(3)
        raise ConnectionError("gone")

    _hub(monkeypatch, train=broken)
    processor = AgentDataProcessor(DataSettings(hub=True), hub_dir=tmp_path)
    with pytest.raises(DataUnavailableError, match=r"broke off owner/intents/train after 3 rows .*data folder"):
        processor.prepare(_plan())

    def stop() -> None:
        raise AttemptStopped(StopKind.CANCEL)

    with pytest.raises(AttemptStopped):
        processor.prepare(_plan(), each_row=stop)
    assert [] == list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not allowed, not installed, not there: each names the field."""
    with pytest.raises(DataUnavailableError, match="hub is not allowed on this server") as refused:
        AgentDataProcessor(DataSettings()).require_available(_plan())
    assert ["plan.classification.hub"] == [v.field for v in refused.value.violations]
    hub = _hub(monkeypatch)

    def away(*_args: Any, **_kwargs: Any) -> Any:
        raise ConnectionError("no network")

    hub.load_dataset_builder = away  # type: ignore[method-assign]
    processor = AgentDataProcessor(DataSettings(hub=True))
    processor.require_available(_plan())
    with pytest.raises(
        DataUnavailableError, match=r"\(ConnectionError: no network\); put the set into the data folder"
    ):
        processor.prepare(_plan())
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(DataUnavailableError, match="package `datasets` is not installed"):
        processor.require_available(_plan())


def test_the_real_library_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself, in its offline mode: no folder of this machine stands in for the hub's set."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "intents").mkdir(parents=True)
    write_rows(tmp_path / "owner" / "intents" / "train.jsonl", ROWS)
    with pytest.raises(DataUnavailableError, match="the hub did not give owner/intents at 0123"):
        list(HubSet(dataset="owner/intents", config="", revision=REVISION).rows(None, lambda: None))


def test_a_set_that_points_at_other_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's own nor another commit's: a card may name anything."""
    for file in ("/etc/passwd", f"hf://datasets/owner/other@{REVISION}/train.parquet", "https://example.org/x.jsonl"):
        _hub(monkeypatch, files=[file], train=lambda: _numbered(3))
        with pytest.raises(DataUnavailableError, match="is no file of its own commit"):
            AgentDataProcessor(DataSettings(hub=True)).prepare(_plan())


def test_a_set_without_an_owner_is_refused() -> None:
    """`datasets` would take such a name for one of its readers, over the working folder."""
    with pytest.raises(InvalidFieldError, match="has no owner") as refused:
        AgentDataProcessor(DataSettings(hub=True)).require_available(_plan("json"))
    assert ["plan.classification.hub.dataset"] == [v.field for v in refused.value.violations]


def test_a_set_that_is_too_large_to_keep_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the disk is full, and nothing of it stays."""
    _hub(monkeypatch, train=lambda: _numbered(1000))
    monkeypatch.setattr("agent_server.data.hub.MAX_HUB_BYTES", 10_000)
    with pytest.raises(DataUnavailableError, match="has more than 10000 bytes of rows"):
        AgentDataProcessor(DataSettings(hub=True), hub_dir=tmp_path).prepare(_plan())
    assert [] == list(tmp_path.iterdir())
