"""Alembic environment of the Cognate service."""

from cognate_server.tables import metadata
from training_common.store.migrations import run
from training_common.store.tables import metadata as common

run([common, metadata])
