"""What both services' Alembic environments do."""

from __future__ import annotations

from collections.abc import Sequence

from alembic import context
from sqlalchemy import MetaData

from training_common.store.revisions import FITTING


def run(metadata: MetaData | Sequence[MetaData]) -> None:
    """Run migrations on the connection that `Database.upgrade` hands over."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        # SQLite cannot alter most things in place: tables are rebuilt there.
        render_as_batch=True,
        compare_type=True,
        # Of the store itself, not of a service's tables.
        include_name=lambda name, kind, _parents: kind != "table" or name != FITTING.name,
    )
    with context.begin_transaction():
        context.run_migrations()
