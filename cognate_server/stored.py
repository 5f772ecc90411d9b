"""The Cognate service as its backups know it."""

from __future__ import annotations

from pathlib import Path

from cognate_server import migrations
from cognate_server.settings import load_settings
from cognate_server.tables import metadata
from training_common.backup.service import StoredService
from training_common.store.tables import metadata as common

SERVICE = StoredService(
    name="cognate",
    load_settings=load_settings,
    migrations=Path(migrations.__file__).parent,
    tables=frozenset({*common.tables, *metadata.tables}),
)
