"""One row by the driver alone: the same as SQLAlchemy's own way gives, of every type, and the same errors."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import cognate_server.migrations
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database
from training_common.store.one_row import OneRow


@pytest.fixture
def database(store_url: str) -> Database:
    database = Database(store_url)
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    return database


def test_a_row_is_as_sqlalchemy_reads_it(database: Database) -> None:
    statement = sa.select(t.jobs).where(t.jobs.c.name == sa.bindparam("name"))
    with database.write() as connection:
        job = JobStore(database).submit(connection, plan=b"\x00plan", total_steps=9, caller="test")
        connection.execute(sa.update(t.jobs).values(facts={"a": "b"}, observed=False))
    with database.read() as connection:
        usual: dict[str, Any] = dict(connection.execute(statement, {"name": job.name}).mappings().one())
        row = OneRow(statement).read(connection, name=job.name)
        assert usual == row
        assert ({"a": "b"}, False, b"\x00plan") == (usual["facts"], usual["observed"], usual["plan"])
        assert list(map(type, usual.values())) == list(map(type, (row or {}).values()))
        assert OneRow(statement).read(connection, name="jobs/none") is None
    database.close()


def test_a_store_that_cannot_be_read_is_told_as_usual(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with database.read() as connection, pytest.raises(sa.exc.OperationalError, match="no such table"):
        OneRow(sa.select(t.jobs).where(t.jobs.c.name == sa.bindparam("name"))).read(connection, name="jobs/none")
    database.close()
