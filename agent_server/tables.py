"""The agent service's own tables, beside the common ones: agents with their aliases, moves and evaluations."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table

from training_common.store.tables import KEY
from training_common.store.tables import metadata as common

metadata = MetaData(naming_convention=common.naming_convention)

# What of a published version is looked for, and what of it changes. A version without a row here is a draft.
agents = Table(
    "agents",
    metadata,
    Column("artifact_id", KEY, primary_key=True, autoincrement=False),
    Column("task", String(48), nullable=False),
    Column("lifecycle", String(16), nullable=False),
    # A page of one task, or of one state, newest first, is read off an index.
    Index("ix_agents_task", "task", "artifact_id"),
    Index("ix_agents_lifecycle", "lifecycle", "artifact_id"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("family", String(48), primary_key=True),
    Column("alias", String(48), primary_key=True),
    Column("version", Integer, nullable=False),
)

# Moves of aliases, and of versions along their lifecycle: each has either an alias or two states.
moves = Table(
    "moves",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("family", String(48), nullable=False),
    # The version that was moved, or that the alias points at since.
    Column("version", Integer, nullable=False),
    Column("alias", String(48)),
    Column("from_version", Integer),
    Column("from_lifecycle", String(16)),
    Column("to_lifecycle", String(16)),
    Column("caller", String(255), nullable=False),
    Column("request_id", String(36), nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Index("ix_moves_family", "family", "id"),
)

# What was measured of a version after it was published. Rows are added, and never changed.
evaluations = Table(
    "evaluations",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("artifact_id", KEY, nullable=False),
    Column("metric", String(64), nullable=False),
    Column("dataset", String(128), nullable=False),
    Column("value", Float, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("caller", String(255), nullable=False),
    Column("request_id", String(36), nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Index("ix_evaluations_artifact_id", "artifact_id", "id"),
)
