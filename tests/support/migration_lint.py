"""What a migration does that code of the release before it may trip over.

The migration is run, on an empty store, and what it asks of the database is written down: so loops, helpers and batches
are seen as they come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.operations import ops
from alembic.operations.base import AbstractOperations
from alembic.operations.batch import BatchOperationsImpl
from alembic.script import ScriptDirectory


def complaints(migrations: Path, *, after: str) -> Mapping[str, list[str]]:
    """Return what is wrong with each migration after a revision, by its revision; those that contract may do all.

    A migration may create tables, create indexes that are not unique on tables that were there, and add columns that
    may be null or have a default on the server.
    """
    config = Config()
    config.set_main_option("script_location", str(migrations))
    scripts = list(ScriptDirectory.from_config(config).iterate_revisions("head", after))[::-1]
    found: dict[str, list[str]] = {}
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, after)
        for script in scripts:
            watched = _Watched(connection)
            with watched.watching():
                command.upgrade(config, script.revision)
            if not getattr(script.module, "contracts", False):
                found[script.revision] = watched.wrong
    engine.dispose()
    return {revision: wrong for revision, wrong in found.items() if wrong}


class _Watched:
    """Judges each operation of one migration."""

    def __init__(self, connection: sa.Connection) -> None:
        self.wrong: list[str] = []
        self._connection = connection
        self._created: set[str] = set()
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        invoke, flush = AbstractOperations.invoke, BatchOperationsImpl.flush

        def judged(operations: AbstractOperations, operation: Any) -> Any:
            self._judge(operation)
            with self._at_work():
                return invoke(operations, operation)

        def flushed(batch: BatchOperationsImpl) -> None:
            with self._at_work():  # what it does was judged when it was asked for
                flush(batch)

        def statement(_: object, __: object, text: str, *___: object) -> None:
            own = "alembic_version" in text or text.lstrip().upper().startswith(("SELECT", "PRAGMA", "BEGIN"))
            if not self._depth and not own:
                self.wrong.append(f"runs a statement of its own: {' '.join(text.split())[:100]}")

        sa.event.listen(self._connection, "before_cursor_execute", statement)
        try:
            with (
                mock.patch.object(AbstractOperations, "invoke", judged),
                mock.patch.object(BatchOperationsImpl, "flush", flushed),
            ):
                yield
        finally:
            sa.event.remove(self._connection, "before_cursor_execute", statement)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _judge(self, operation: Any) -> None:
        if isinstance(operation, ops.CreateTableOp):
            self._created.add(operation.table_name)
        elif isinstance(operation, ops.AddColumnOp):
            column = operation.column
            if not column.nullable and column.server_default is None and operation.table_name not in self._created:
                self.wrong.append(
                    f"adds {operation.table_name}.{column.name}, which older code leaves out: let it be null, or give "
                    "it a server_default"
                )
        elif isinstance(operation, ops.CreateIndexOp):
            if operation.unique and operation.table_name not in self._created:
                self.wrong.append(f"adds a unique index to {operation.table_name}, whose rows older code writes")
        elif getattr(operation, "table_name", None) not in self._created or isinstance(operation, ops.DropTableOp):
            told = getattr(operation, "table_name", "") or getattr(operation, "sqltext", "")
            self.wrong.append(f"{type(operation).__name__} {told}: goes with `contracts = True`, a release later")
