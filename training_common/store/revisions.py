"""Revisions of a service's schema, which of them a release can work on, and the mark of an unfinished restore.

Alembic is imported where it is used: a worker, which finds the schema as it should be, starts without it.

A store is upgraded while servers of the release before still use it, and these may have to start again. A migration
therefore only adds what older code need not know, or says `contracts = True`: code older than it cannot work on the
schema from then on. The store itself tells which revisions' code it fits: older code cannot know newer migrations.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from training_common.settings import SettingsError

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

# There only while a backup is being restored into the store. Not among the service's tables: it outlives no restore.
RESTORING = sa.Table("restoring", sa.MetaData(), sa.Column("backup", sa.String(128), nullable=False))

# The newest revisions of the releases whose code can work on the schema as it is.
FITTING = sa.Table("fitting_revisions", sa.MetaData(), sa.Column("revision", sa.String(32), primary_key=True))


def upgrade_to(connection: sa.Connection, migrations: Path, revision: str) -> None:
    """Bring the schema to a revision, or to "head", in the caller's transaction, and write down whose code it fits.

    Errors: alembic's CommandError.
    """
    from alembic import command

    config = _config(migrations)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
    fitting = set(_fitting(migrations, current(connection)))
    FITTING.create(connection, checkfirst=True)
    if fitting != set(connection.execute(sa.select(FITTING.c.revision)).scalars()):
        connection.execute(sa.delete(FITTING))
        connection.execute(sa.insert(FITTING), [{"revision": one} for one in sorted(fitting)])


def fits(connection: sa.Connection, migrations: Path) -> bool:
    """Whether this release's code can work on a schema of a later release, by what that has written down."""
    if not sa.inspect(connection).has_table(FITTING.name):
        return False
    mine = sa.select(FITTING.c.revision).where(FITTING.c.revision == head(migrations))
    return connection.execute(mine).first() is not None


def _fitting(migrations: Path, revision: str | None) -> Iterator[str]:
    """Go back from a revision to the last one before which the schema lost something."""
    if revision is None:
        return
    for script in _scripts(migrations).iterate_revisions(revision, "base"):
        yield script.revision
        if getattr(script.module, "contracts", False):
            return


def head(migrations: Path) -> str:
    """Return the newest revision that this release knows."""
    found = _scripts(migrations).get_current_head()
    if found is None:
        raise AssertionError(f"{migrations} holds no migration")
    return found


def is_known(migrations: Path, revision: str) -> bool:
    """Whether this release knows a revision."""
    from alembic.util import CommandError

    try:
        return _scripts(migrations).get_revision(revision) is not None
    except CommandError:
        return False


def current(connection: sa.Connection) -> str | None:
    """Return the schema's revision, None for a database that is no store."""
    from alembic.runtime.migration import MigrationContext

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


def _scripts(migrations: Path) -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config(migrations))


def _config(migrations: Path) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations))
    return config
