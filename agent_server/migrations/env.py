"""Alembic environment of the agent service."""

from agent_server.tables import metadata
from training_common.store.migrations import run
from training_common.store.tables import metadata as common

run([common, metadata])
