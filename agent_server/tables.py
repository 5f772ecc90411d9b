"""The agent service's own tables, beside the common ones: agents with their aliases, moves and evaluations."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, UniqueConstraint

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
    # The model that it was made of, empty for none. Null: written by a release that did not know of it.
    Column("foundation", String(64)),
    # A page of one of them, newest first, is read off an index.
    Index("ix_agents_task", "task", "artifact_id"),
    Index("ix_agents_lifecycle", "lifecycle", "artifact_id"),
    Index("ix_agents_foundation", "foundation", "artifact_id"),
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

# What of this service descends from a foundation model, and whether Cognate has been told. A job that makes an agent
# descends from it while it is open, the agent from then on.
descents = Table(
    "descents",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("model", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    # Digest of the agent's manifest. Empty for a job.
    Column("digest", String(71), nullable=False),
    # Whether it still does. What does not, and of which Cognate was told so, is removed.
    Column("holds", Boolean, nullable=False),
    Column("told", Boolean, nullable=False),
    UniqueConstraint("model", "name"),
    Index("ix_descents_told", "told", "id"),
)
