"""Migrated stores to copy: to migrate an empty one takes longer than most tests."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import sqlalchemy as sa

from training_common.store.database import Database

Upgrade = Callable[[Database, Path], None]


@contextmanager
def copied_stores(folder: Path) -> Iterator[None]:
    """Let `Database.upgrade` begin with a copy of what the same migrations have made of an empty store.

    SQLite's are kept in `folder`, PostgreSQL's in the same server. The upgrade itself runs all the same, and finds
    nothing to do.
    """
    upgrade = Database.upgrade

    def upgrade_copy(database: Database, migrations: Path) -> None:
        copy = _copy_postgres if database.engine.dialect.name == "postgresql" else _copy_sqlite
        copy(database, migrations, folder, upgrade)
        upgrade(database, migrations)

    with mock.patch.object(Database, "upgrade", upgrade_copy):
        yield


def _copy_sqlite(database: Database, migrations: Path, folder: Path, upgrade: Upgrade) -> None:
    path = Path(database.engine.url.database or "")
    if not path.name or path.exists():
        return
    template = folder / f"{migrations.parent.name}.db"
    if not template.exists():
        made = Database(f"sqlite:///{template}")
        upgrade(made, migrations)
        made.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, path)


def _copy_postgres(database: Database, migrations: Path, folder: Path, upgrade: Upgrade) -> None:
    if sa.inspect(database.engine).get_table_names():
        return
    url, template = database.engine.url, f"template_{migrations.parent.name}"
    database.engine.dispose()  # a database that somebody is connected to cannot be replaced
    admin = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        found = connection.execute(sa.text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": template})
        if found.first() is None:
            connection.execute(sa.text(f"CREATE DATABASE {template}"))
            made = Database(url.set(database=template).render_as_string(hide_password=False))
            upgrade(made, migrations)
            made.close()
        connection.execute(sa.text(f"DROP DATABASE {url.database}"))
        connection.execute(sa.text(f"CREATE DATABASE {url.database} TEMPLATE {template}"))
