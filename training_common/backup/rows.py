"""Rows as lines of JSON, the same ones from every database, and back.

A row is a list of its columns' values, sorted by the columns' names. NULL is null. Bytes are base64, a number that JSON
lacks is a word, and a column of JSON is the text that is stored, so that NULL and JSON's own null stay apart.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cognateforge.exceptions import ArtifactCorruptError, PreconditionError
from training_common.store.revisions import FITTING

_KINDS: tuple[tuple[type[Any], str], ...] = (
    (sa.JSON, "json"),
    (sa.Boolean, "bool"),
    (sa.LargeBinary, "bytes"),
    (sa.Integer, "int"),
    (sa.Float, "float"),
    (sa.String, "str"),
)
# Rows that are fetched at once: one can hold a manifest of a megabyte.
_FETCHED_ROWS = 200
# Migrations write them again.
_OF_THE_SCHEMA = frozenset({"alembic_version", FITTING.name})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A table's columns, sorted by name, with the kind of each, and where its key is among them."""

    columns: tuple[tuple[str, str], ...]
    key: tuple[int, ...]


def reflect(connection: sa.Connection) -> list[sa.Table]:
    """Return the tables that are there, those that others refer to first, without those of the schema itself."""
    metadata = sa.MetaData()
    metadata.reflect(bind=connection)
    return [table for table in metadata.sorted_tables if table.name not in _OF_THE_SCHEMA]


def shape_of(table: sa.Table) -> Shape:
    """Return a table's shape. Errors: PreconditionError, for a column of a type that no service has."""
    columns = tuple((column.name, _kind(column)) for column in _sorted(table))
    names = [name for name, _ in columns]
    return Shape(columns=columns, key=tuple(names.index(column.name) for column in _key(table)))


def _sorted(table: sa.Table) -> list[sa.Column[Any]]:
    return sorted(table.columns, key=lambda column: column.name)


def _key(table: sa.Table) -> list[sa.Column[Any]]:
    return list(table.primary_key.columns) or _sorted(table)


def _kind(column: sa.Column[Any]) -> str:
    for cls, kind in _KINDS:
        if isinstance(column.type, cls):
            return kind
    raise PreconditionError(
        f"column {column.table.name}.{column.name} has type {column.type}, which no table of a service has: keep other "
        "tables in a database of their own"
    )


def read_rows(connection: sa.Connection, table: sa.Table) -> Iterator[list[Any]]:
    """Yield a table's rows as JSON values, in the order of its key, which is that of bytes for texts."""
    columns, shape = _sorted(table), shape_of(table)
    postgresql = connection.dialect.name == "postgresql"
    # A cast gives JSON as it is stored; other databases' own order of texts depends on how they were set up.
    selected = [sa.cast(c, sa.Text).label(c.name) if isinstance(c.type, sa.JSON) else c for c in columns]
    order = [c.collate("C") if postgresql and isinstance(c.type, sa.String) else c for c in _key(table)]
    encoders = [(at, _encode_bytes if kind == "bytes" else _encode_float) for at, kind in _special(shape)]
    query = sa.select(*selected).order_by(*order).execution_options(yield_per=_FETCHED_ROWS)
    for found in connection.execute(query):
        row = list(found)
        for at, encode in encoders:
            if row[at] is not None:
                row[at] = encode(row[at])
        yield row


def _special(shape: Shape) -> list[tuple[int, str]]:
    return [(at, kind) for at, (_, kind) in enumerate(shape.columns) if kind in ("bytes", "float")]


def _encode_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _encode_float(value: float) -> float | str:
    return value + 0.0 if math.isfinite(value) else str(value)  # -0.0 is 0.0 in SQLite, and equal everywhere


def to_line(row: Sequence[Any]) -> bytes:
    """Return the one line of a row."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"


def decode(row: list[Any], shape: Shape) -> list[Any]:
    """Return a row's values as a database takes them; JSON stays text. Errors: ArtifactCorruptError."""
    if not isinstance(row, list) or len(row) != len(shape.columns):
        raise ArtifactCorruptError(f"{str(row)[:200]} is no row of {len(shape.columns)} columns")
    for at, kind in _special(shape):
        if row[at] is not None:
            try:
                row[at] = base64.b64decode(row[at]) if kind == "bytes" else float(row[at])
            except (ValueError, TypeError) as error:
                raise ArtifactCorruptError(f"{str(row[at])[:200]} is no value of kind {kind}") from error
    return row


class RowWriter:
    """Inserts decoded rows into a table that has the columns of `shape`.

    Errors: PreconditionError, for a value that this database cannot hold.
    """

    def __init__(self, connection: sa.Connection, table: sa.Table, shape: Shape) -> None:
        self._connection = connection
        self._name = table.name
        self._sqlite = connection.dialect.name == "sqlite"
        self._floats = [(at, shape.columns[at][0]) for at, kind in _special(shape) if kind == "float"]
        self._names = [f"v_{name}" for name, _ in shape.columns]
        values = {name: self._value(table.columns[name]) for name, _ in shape.columns}
        self._insert = sa.insert(table).values(values)

    def _value(self, column: sa.Column[Any]) -> Any:
        bound = f"v_{column.name}"
        if not isinstance(column.type, sa.JSON):
            return sa.bindparam(bound, type_=column.type)
        text = sa.bindparam(bound, type_=sa.Text())
        return text if self._sqlite else sa.cast(text, column.type)

    def write(self, rows: Sequence[list[Any]]) -> None:
        """Insert some rows."""
        if not rows:
            return
        try:
            self._connection.execute(self._insert, [self._parameters(row) for row in rows])
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:
            raise PreconditionError(
                f"table {self._name}: a row of the backup does not fit into this database: {error.orig}"
            ) from error
        except (sa.exc.ProgrammingError, sa.exc.InterfaceError, OverflowError) as error:
            raise ArtifactCorruptError(
                f"table {self._name}: a row of the backup has a value of another kind"
            ) from error

    def _parameters(self, row: list[Any]) -> Mapping[str, Any]:
        for at, name in self._floats if self._sqlite else ():
            if row[at] is not None and math.isnan(row[at]):
                raise PreconditionError(
                    f"table {self._name}: column {name} of a row is NaN, which SQLite has no value for: restore into "
                    "PostgreSQL"
                )
        return dict(zip(self._names, row, strict=True))
