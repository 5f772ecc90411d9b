"""The agent service's own tables, beside the common ones: aliases that move, and every move they made."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table

from training_common.store.tables import KEY
from training_common.store.tables import metadata as common

metadata = MetaData(naming_convention=common.naming_convention)

aliases = Table(
    "aliases",
    metadata,
    Column("family", String(48), primary_key=True),
    Column("alias", String(48), primary_key=True),
    Column("version", Integer, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("family", String(48), nullable=False),
    Column("alias", String(48), nullable=False),
    Column("from_version", Integer, nullable=True),
    Column("to_version", Integer, nullable=False),
    Column("caller", String(255), nullable=False),
    Column("request_id", String(36), nullable=False),
    Column("time_us", BigInteger, nullable=False),
)
