"""Revisions of a service's schema, and the mark of a store that a restore has not finished."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from training_common.settings import SettingsError

# There only while a backup is being restored into the store. Not among the service's tables: it outlives no restore.
RESTORING = sa.Table("restoring", sa.MetaData(), sa.Column("backup", sa.String(128), nullable=False))


def upgrade_to(connection: sa.Connection, migrations: Path, revision: str) -> None:
    """Bring the schema to a revision, or to "head", in the caller's transaction. Errors: alembic's CommandError."""
    config = _config(migrations)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def head(migrations: Path) -> str:
    """Return the newest revision that this release knows."""
    found = ScriptDirectory.from_config(_config(migrations)).get_current_head()
    if found is None:
        raise AssertionError(f"{migrations} holds no migration")
    return found


def is_known(migrations: Path, revision: str) -> bool:
    """Whether this release knows a revision."""
    try:
        return ScriptDirectory.from_config(_config(migrations)).get_revision(revision) is not None
    except CommandError:
        return False


def current(connection: sa.Connection) -> str | None:
    """Return the schema's revision, None for a database that is no store."""
    return MigrationContext.configure(connection).get_current_revision()


def restoring(connection: sa.Connection) -> str:
    """Return the backup whose restore into this store was not finished, "" where there is none."""
    if not sa.inspect(connection).has_table(RESTORING.name):
        return ""
    return connection.execute(sa.select(RESTORING.c.backup)).scalar() or "unknown"


def require_whole(connection: sa.Connection) -> None:
    """Make sure that no restore into the store was left unfinished. Errors: SettingsError."""
    if backup := restoring(connection):
        raise SettingsError(
            f"the store is half restored from backup {backup}: let `forge restore` finish; if it has ended, empty the "
            "database and the artifacts, and restore again"
        )


def _config(migrations: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations))
    return config
