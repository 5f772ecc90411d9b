"""Rows of Parquet files, a batch at a time, so that memory holds no more than a part of one row group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from training_common.findings import RowRefusedError

if TYPE_CHECKING:
    import pyarrow as pa

# Few enough that a batch of long rows fits into memory, enough that the cost of a batch vanishes beside its rows.
_BATCH_ROWS = 256
# Columns are read through a buffer instead of whole.
_BUFFER_BYTES = 1 << 20
# A page, and a dictionary, is unpacked whole: a row group tells how much that can be. Common writers stay below 300 MB.
MAX_ROW_GROUP_BYTES = 1 << 29


def parquet_rows(path: Path) -> Iterator[Mapping[str, object] | RowRefusedError]:
    """Yield every row. A number that is not finite, and what JSON has no form for, comes out as None.

    A row with text that is not UTF-8 comes out as the reason why it was not read.

    Errors: RowRefusedError, for a file that is torn, is no Parquet file, or needs too much memory; what was read before
    is yielded first.
    """
    # pyarrow takes a while to load, and a server process does without it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for number in range(file.num_row_groups):
                size_bytes = file.metadata.row_group(number).total_byte_size
                if size_bytes > MAX_ROW_GROUP_BYTES:
                    raise RowRefusedError(
                        "row_group_too_large",
                        detail=f"row group {number} takes {size_bytes} bytes, at most {MAX_ROW_GROUP_BYTES} are read",
                        remedy="write the file with smaller row groups",
                    )
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[number]):
                    yield from _rows(batch)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        if isinstance(error, RowRefusedError):
            raise
        raise RowRefusedError(
            "unreadable_file",
            detail=f"the file cannot be read beyond this row: {error}".partition("\n")[0][:300],
            remedy="write the file again as Parquet and compare its digest",
        ) from None


def _rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, object] | RowRefusedError]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # of some row: writers may put any bytes into a column of text
        yield from (_row(batch, number) for number in range(batch.num_rows))
        return
    for row in rows:
        yield {str(name): plain(value) for name, value in row.items()}


def _row(batch: pa.RecordBatch, number: int) -> Mapping[str, object] | RowRefusedError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[str(name)] = plain(column[number].as_py())
        except UnicodeDecodeError as error:
            return RowRefusedError(
                "not_utf8",
                field=str(name),
                detail=f"byte {error.start} of the text is not UTF-8",
                remedy="encode the column as UTF-8",
            )
    return row


def plain(value: object) -> object:
    """Return a value as JSON would have it; None stands for what JSON has no form for."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None
