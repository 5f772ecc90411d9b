"""The agent service as its backups know it."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from agent_server import migrations
from agent_server.settings import load_settings
from agent_server.tables import descents, metadata
from training_common.backup.service import StoredService
from training_common.store.tables import metadata as common


def _tell_again(connection: sa.Connection) -> None:
    """Let Cognate be told of all descents anew: which it was told of since the backup, nobody knows."""
    connection.execute(sa.update(descents).values(told=False))


SERVICE = StoredService(
    name="agent",
    load_settings=load_settings,
    migrations=Path(migrations.__file__).parent,
    tables=frozenset({*common.tables, *metadata.tables}),
    after_restore=_tell_again,
)
