"""Cognate's own tables, beside the common ones: leases of its capacity, and what descends from its models."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, String, Table, UniqueConstraint

from training_common.store.tables import KEY
from training_common.store.tables import metadata as common

metadata = MetaData(naming_convention=common.naming_convention)

leases = Table(
    "leases",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("holder", String(255), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    # Grows with every change of any lease; those who watch wait for it.
    Column("revision", BigInteger, nullable=False, index=True),
    Column("create_us", BigInteger, nullable=False),
    Column("expire_us", BigInteger, nullable=False),
    Column("revoke_us", BigInteger),
    Column("end_us", BigInteger),
    Column("end_reason", String(16), nullable=False, default=""),
    Index("ix_leases_state_kind", "state", "kind"),
)

# Slots that are kept for a time. One that was cancelled stays as it was, with the moment.
reservations = Table(
    "reservations",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("caller", String(255), nullable=False),
    Column("purpose", String(200), nullable=False),
    Column("slots", Integer, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("end_us", BigInteger, nullable=False, index=True),
    Column("create_us", BigInteger, nullable=False),
    Column("cancel_us", BigInteger),
)

# One row. Every change of a lease takes its number here first, so changes happen one after the other.
lease_clock = Table(
    "lease_clock",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
)

# What others make of models, as agent services tell: agents, and jobs that make them. What is here is not collected.
dependents = Table(
    "dependents",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("artifact_id", KEY, nullable=False),
    Column("name", String(64), nullable=False),
    # Digest of the agent's manifest. Empty for a job.
    Column("digest", String(71), nullable=False),
    Column("owner", String(255), nullable=False),
    Column("create_us", BigInteger, nullable=False),
    UniqueConstraint("artifact_id", "name", "owner"),
)
