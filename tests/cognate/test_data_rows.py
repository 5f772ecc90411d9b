"""Reading rows: every row that is in a file comes out, whatever the ones beside it are."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_common import rows as rows_module
from training_common.findings import MAX_FINDINGS, ProcessingReport, RowRefusedError
from training_common.rows import MAX_ROW_BYTES, parse_object, read_rows

GOOD = b'{"a": 1}'
HOSTILE = {
    b'{"a": ': "not_json",
    b'{"a": NaN}': "not_json",
    b'{"a": -Infinity}': "not_json",
    b'{"a": 1e999}': "not_json",
    b'{"a": ' + b"9" * 5000 + b"}": "number_too_long",
    b'{"a": 1, "a": 2}': "not_json",
    b'{"a": "\xff"}': "not_utf8",
    b'["a"]': "not_an_object",
    b"null": "not_an_object",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "too_deep",
    b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}': "row_too_large",
}


def _reasons(path: Path) -> list[str]:
    reasons = []
    for row in read_rows(path):
        try:
            row.load()
            reasons.append("ok")
        except RowRefusedError as error:
            reasons.append(error.reason)
    return reasons


def test_hostile_lines_are_refused_one_by_one(tmp_path: Path) -> None:
    """A good row stands after every hostile one, and all of them are read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" + GOOD + b"\n" for line in HOSTILE))
    assert _reasons(path) == [reason for bad in HOSTILE.values() for reason in (bad, "ok")]


def test_hostile_elements_of_an_array_are_refused_one_by_one(tmp_path: Path) -> None:
    """An array keeps its good elements too."""
    elements = {data: reason for data, reason in HOSTILE.items() if data != b'{"a": '}
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",".join(data + b"," + GOOD for data in elements) + b"]")
    assert _reasons(path) == [reason for bad in elements.values() for reason in (bad, "ok")]


def test_a_hostile_first_line_does_not_make_the_file_an_array(tmp_path: Path) -> None:
    """`.jsonl` means lines."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[1]\n" + GOOD + b"\n" + GOOD)
    assert _reasons(path) == ["not_an_object", "ok", "ok"]


@pytest.mark.parametrize("text", [b'[{"a": 1}, {"a": ', b'[{"a": 1}', b'[{"a": 1}] {"a": 2}', b'[{"a": 1}}, {"a": 2}]'])
def test_a_broken_array_says_so(tmp_path: Path, text: bytes) -> None:
    """What follows a break is not lost without a finding."""
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    assert _reasons(path)[-1] == "not_json"


def test_a_cut_gzip_file_gives_its_rows_and_a_finding(tmp_path: Path) -> None:
    """Rows before the cut are used, and the cut is reported."""
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % n for n in range(50_000)))
    path.write_bytes(whole[: len(whole) // 2])
    reasons = _reasons(path)
    assert reasons[-1] == "unreadable_file"
    assert set(reasons[:-1]) == {"ok"}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_spoiled_gzip_file_gives_its_rows_and_a_finding(tmp_path: Path, name: str) -> None:
    """Bytes that changed in the middle are noticed there or by the checksum; what came before is read."""
    rows = [b'{"a": %d, "b": "%s"}' % (n, hashlib.sha256(b"%d" % n).hexdigest().encode()) for n in range(20_000)]
    text = b"\n".join(rows) if ".jsonl" in name else b"[" + b",".join(rows) + b"]"
    whole = bytearray(gzip.compress(text))
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    path = tmp_path / name
    path.write_bytes(whole)
    reasons = _reasons(path)
    assert set(reasons[:5_000]) == {"ok"}
    assert reasons[-1] in ("unreadable_file", "not_json")


def test_an_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first element comes before the end of the file was looked at."""
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",".join(GOOD for _ in range(100_000)) + b", {broken")
    monkeypatch.setattr(rows_module, "_READ_BYTES", 1024)
    rows = read_rows(path)
    assert next(rows).load() == {"a": 1}
    last = list(rows)[-1]
    assert isinstance(last.content, RowRefusedError)
    assert last.line == 100_001


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    """U+2028, U+2029 and a byte order mark neither split nor spoil a row."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": "x\u2028y\u2029z"}\r\n\n{"a": 2}'.encode())
    assert [(row.line, row.load()) for row in read_rows(path)] == [(1, {"a": "x\u2028y\u2029z"}), (3, {"a": 2})]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=6), size=st.integers(1, 9)
)
def test_an_array_is_split_as_json_splits_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], size: int
) -> None:
    """Wherever the reads happen to cut the file, the elements are those of a JSON parser."""
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_READ_BYTES", size)
        assert [row.load() for row in read_rows(path)] == rows


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No row brings the reader down."""
    try:
        parse_object(data)
    except RowRefusedError as error:
        assert error.reason in {"not_utf8", "not_json", "not_an_object", "too_deep", "number_too_long"}  # noqa: PT017


def test_findings_are_bounded_and_counts_are_not() -> None:
    """A million bad rows fill neither memory nor a manifest."""
    report = ProcessingReport()
    for line in range(3 * MAX_FINDINGS):
        report.read()
        report.refuse(
            RowRefusedError("blank", field="a", detail="the text is blank", remedy="fill it in").at("f", line)
        )
    assert (len(report.findings), report.refused["blank"], report.balanced) == (MAX_FINDINGS, 3 * MAX_FINDINGS, True)
    assert str(report.findings[1]) == "f:1 a: the text is blank; fill it in"
