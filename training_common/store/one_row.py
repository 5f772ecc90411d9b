"""A statement that reads one row by its key, which on SQLite the driver runs alone.

SQLAlchemy's way from a statement to a row costs several times what SQLite takes for the row itself (docs/log.md has the
figures), and a server asks for one with every call.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite


class OneRow:
    """Built once for a statement that finds at most one row."""

    def __init__(self, statement: sa.Select[Any]) -> None:
        self._statement = statement
        dialect: Any = sqlite.dialect()
        compiled = statement.compile(dialect=dialect)
        self._sql = str(compiled)
        self._order = tuple(compiled.positiontup or ())
        self._keys = tuple(str(column.key) for column in statement.selected_columns)
        found = [
            column.type.dialect_impl(dialect).result_processor(dialect, None) for column in statement.selected_columns
        ]
        self._processors = tuple((key, process) for key, process in zip(self._keys, found, strict=True) if process)

    def read(self, connection: sa.Connection, **values: Any) -> dict[str, Any] | None:
        """Return the row by column names, or None. Errors: sqlalchemy.exc.OperationalError."""
        if connection.dialect.name != "sqlite":
            found = connection.execute(self._statement, values).mappings().one_or_none()
            return None if found is None else dict(found)
        driver: Any = connection.connection.driver_connection
        try:
            # All rows: a statement that is not read to its end keeps its view of the database.
            rows = driver.execute(self._sql, [values[name] for name in self._order]).fetchall()
        except sqlite3.OperationalError as error:
            raise sa.exc.OperationalError(self._sql, values, error) from error
        if not rows:
            return None
        row = dict(zip(self._keys, rows[0], strict=True))
        for key, process in self._processors:
            row[key] = process(row[key])
        return row
