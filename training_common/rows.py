"""Rows of JSONL files and JSON arrays, plain or gzipped, and of Parquet files, read one by one in bounded memory.

A row that cannot be read (too long, not UTF-8, not JSON, a number that is not finite) comes out as a row whose `load`
raises `RowRefusedError`; the rows after it are read all the same.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from training_common.findings import RowRefusedError, quote
from training_common.parquet import parquet_rows

# The longest row of the real sets takes about 60 kB; 1 MiB leaves room and bounds what a hostile file can cost.
MAX_ROW_BYTES = 1024 * 1024
_READ_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"
_ARRAY_TOKEN = re.compile(rb'["\[\]{},]')
_STRING_TOKEN = re.compile(rb'["\\]')


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its place; `content` is raw JSON, an object that was never text, or the reason it was not read."""

    file: str
    line: int
    content: bytes | Mapping[str, object] | RowRefusedError

    def load(self) -> Mapping[str, object]:
        """Return the row's object. Errors: RowRefusedError."""
        if isinstance(self.content, RowRefusedError):
            raise self.content
        return parse_object(self.content) if isinstance(self.content, bytes) else self.content


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a JSONL file, a JSON array or a Parquet file; `.gz` is unpacked on the way.

    `.jsonl` holds lines, whatever the first one is, and `.parquet` is Parquet. Elsewhere the first byte decides.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    line = 0
    try:
        with cast("IO[bytes]", gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.read(64)
            file.seek(0)
            is_array = ".jsonl" not in path.suffixes and head.removeprefix(_BOM).lstrip().startswith(b"[")
            for line, content in _array_elements(file) if is_array else _lines(file):
                yield Row(path.name, line, content)
    except (OSError, EOFError, zlib.error) as error:
        problem = RowRefusedError(
            "unreadable_file",
            detail=f"the file cannot be read beyond this row: {error}"[:300],
            remedy="fetch the file again and compare its digest",
        )
        yield Row(path.name, line + 1, problem)


def _parquet(path: Path) -> Iterator[Row]:
    line = 0
    try:
        for line, content in enumerate(parquet_rows(path), start=1):
            yield Row(path.name, line, content if _size(content) <= MAX_ROW_BYTES else _too_large())
    except RowRefusedError as problem:
        yield Row(path.name, line + 1, problem)


def _size(value: object) -> int:
    """Return about how many bytes a value takes as JSON, from below."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + _size(part) for name, part in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 1


def parse_object(data: bytes) -> Mapping[str, object]:
    """Return the JSON object in `data`. Errors: RowRefusedError for anything that is not one strict JSON object."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowRefusedError(
            "not_utf8", detail=f"byte {error.start} of the row is not UTF-8", remedy="encode the file as UTF-8"
        ) from None
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise RowRefusedError(
            "too_deep", detail="the row is nested too deeply", remedy="flatten or remove the row"
        ) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own words name a remedy that no user has
            raise RowRefusedError(
                "number_too_long",
                detail=f"a number of the row has more than {sys.get_int_max_str_digits():,} digits",
                remedy="write it as text",
            ) from None
        raise RowRefusedError(
            "not_json", detail=f"not strict JSON: {error}"[:300], remedy="write the row as one complete JSON object"
        ) from None
    if not isinstance(value, dict):
        raise RowRefusedError(
            "not_an_object", detail=f"the row is {quote(value)}", remedy="write the row as a JSON object"
        )
    return value


def text_field(row: Mapping[str, object], field: str, *, max_chars: int) -> str:
    """Return a text that is there, not blank, within bounds and encodable. Errors: RowRefusedError."""
    if field not in row:
        raise RowRefusedError("missing_field", field=field, detail="the field is missing", remedy="add it as text")
    return checked_text(row[field], field, max_chars=max_chars)


def checked_text(value: object, field: str, *, max_chars: int, blank: bool = False) -> str:
    """Return `value` if it is text that can be used. Errors: RowRefusedError."""
    if not isinstance(value, str):
        # Parquet's bytes and numbers that are none come out as None.
        found = "null, or what JSON has no form for" if value is None else type(value).__name__
        raise RowRefusedError(
            "wrong_type", field=field, detail=f"expected text, got {found}", remedy="write it as text"
        )
    if len(value) > max_chars:
        raise RowRefusedError(
            "too_long",
            field=field,
            detail=f"{len(value)} characters, at most {max_chars} are read",
            remedy="shorten or split the row",
        )
    if not blank and not value.strip():
        raise RowRefusedError("blank", field=field, detail="the text is blank", remedy="fill it in or remove the row")
    if not value.isascii():
        _require_encodable(value, field)
    return value


def _require_encodable(value: str, field: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefusedError(
            "lone_surrogate",
            field=field,
            detail=f"character {error.start} is half of a surrogate pair",
            remedy="write the character whole",
        ) from None


def _too_large() -> RowRefusedError:
    return RowRefusedError(
        "row_too_large", detail=f"the row is longer than {MAX_ROW_BYTES} bytes", remedy="shorten or split the row"
    )


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | RowRefusedError]]:
    """Yield the lines that are not blank, with their numbers. Only a newline ends a line."""
    number = 0
    while data := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            data = data.removeprefix(_BOM)
        if len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, _too_large()
        elif data.strip():
            yield number, data


def _array_elements(file: IO[bytes]) -> Iterator[tuple[int, bytes | RowRefusedError]]:
    """Yield the elements of one JSON array as raw bytes, so that a broken element does not hide the others."""
    number = 0
    for element, ends in _split_array(file):
        if ends or number or element.strip():
            number += 1
        if ends == b"":
            detail = "the array ends inside this element, or other data follows its end"
            yield number, RowRefusedError("not_json", detail=detail, remedy="write the file as one JSON array")
        elif len(element) > MAX_ROW_BYTES:
            yield number, _too_large()
        elif ends == b"," or number > 1 or element.strip():
            yield number, bytes(element)


def _split_array(file: IO[bytes]) -> Iterator[tuple[bytearray, bytes]]:
    """Yield each element with what ended it: a comma, a bracket, or nothing where the array breaks off.

    An element beyond the bound on rows is cut one byte above it.
    """
    depth, in_string, skip = 0, False, 0
    element = bytearray()
    while chunk := file.read(_READ_BYTES):
        position, start, skip = skip, 0, 0
        while token := (_STRING_TOKEN if in_string else _ARRAY_TOKEN).search(chunk, position):
            sign, position = token[0], token.end()
            if in_string:
                in_string = sign == b"\\"
                position += in_string  # what is escaped ends no string
                skip = max(0, position - len(chunk))
                continue
            in_string = sign == b'"'
            depth += (sign in b"[{") - (sign in b"]}")
            if depth == 1 and sign == b"[":
                start = position  # the array itself opens
            elif (depth == 1 and sign == b",") or depth == 0:
                _extend(element, chunk[start : position - 1])
                yield element, sign
                element, start = bytearray(), position
            if depth == 0:
                if sign != b"]" or chunk[position:].strip() or file.read(_READ_BYTES).strip():
                    yield element, b""
                return
        _extend(element, chunk[start:])
    yield element, b""


def _extend(element: bytearray, data: bytes) -> None:
    element += data[: MAX_ROW_BYTES + 1 - len(element)]


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
