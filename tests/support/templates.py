"""Migrated SQLite stores to copy: to migrate an empty one takes longer than most tests."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from training_common.store.database import Database


@contextmanager
def copied_stores(folder: Path) -> Iterator[None]:
    """Let `Database.upgrade` begin with a copy, in `folder`, of what the same migrations have made of an empty store.

    The upgrade itself runs all the same, and finds nothing to do.
    """
    upgrade = Database.upgrade

    def upgrade_copy(database: Database, migrations: Path) -> None:
        path = Path(database.engine.url.database or "")
        if database.engine.dialect.name == "sqlite" and path.name and not path.exists():
            template = folder / f"{migrations.parent.name}.db"
            if not template.exists():
                made = Database(f"sqlite:///{template}")
                upgrade(made, migrations)
                made.close()
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(template, path)
        upgrade(database, migrations)

    with mock.patch.object(Database, "upgrade", upgrade_copy):
        yield
