"""Alembic environment of the Cognate service."""

from training_common.store.migrations import run
from training_common.store.tables import metadata

run(metadata)
