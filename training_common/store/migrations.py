"""What both services' Alembic environments do."""

from __future__ import annotations

from collections.abc import Sequence

from alembic import context
from sqlalchemy import MetaData


def run(metadata: MetaData | Sequence[MetaData]) -> None:
    """Run migrations on the connection that `Database.upgrade` hands over."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        # SQLite cannot alter most things in place: tables are rebuilt there.
        render_as_batch=True,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
