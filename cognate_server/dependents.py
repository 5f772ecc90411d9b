"""What descends from foundation models, as agent services tell: agents, and jobs that make them. It holds the models.

An owner is the caller's name: what one agent service tells, no other one takes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cognate_server import tables as t
from cognate_server.models import find_model
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.store.database import Turn, now_us
from training_common.store.tables import artifacts


@dataclass(frozen=True, kw_only=True)
class Dependent:
    """An agent's version or a job, and the model's version that it descends from. digest: empty for a job."""

    model: str
    name: str
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class DependentRow:
    """A dependent as stored."""

    id: int
    artifact_id: int
    name: str
    digest: str
    owner: str
    create_us: int


def register(
    connection: sa.Connection, registry: ArtifactRegistry, owner: str, dependents: Sequence[Dependent]
) -> None:
    """Write down what descends from models: all of it, or nothing. What is known stays as it is.

    Errors: ModelNotFoundError, for a model that is not there, or was collected.
    """
    # Who collects takes the same turn, so that a model that is found here stays.
    registry.database.in_turn(connection, Turn.PUBLISH)
    models = {name: find_model(registry, name) for name in {one.model for one in dependents}}
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = [
        {
            "artifact_id": models[one.model].id,
            "name": one.name,
            "digest": one.digest,
            "owner": owner,
            "create_us": now_us(),
        }
        for one in dependents
    ]
    connection.execute(insert(t.dependents).on_conflict_do_nothing(), values)


def release(connection: sa.Connection, owner: str, dependents: Sequence[Dependent]) -> None:
    """Take an owner's dependents back. What is not known is passed over."""
    for one in dependents:
        family, _, version = one.model.partition("@")
        model = sa.select(artifacts.c.id).filter_by(family=family, version=int(version)).scalar_subquery()
        gone = sa.delete(t.dependents).filter_by(name=one.name, owner=owner)
        connection.execute(gone.where(t.dependents.c.artifact_id == model))


def page(
    registry: ArtifactRegistry, model: ArtifactRow, *, limit: int, before_id: int | None = None
) -> list[DependentRow]:
    """Return up to `limit` dependents of a model, newest first, that are older than `before_id`."""
    query = sa.select(t.dependents).filter_by(artifact_id=model.id).order_by(t.dependents.c.id.desc()).limit(limit)
    if before_id is not None:
        query = query.where(t.dependents.c.id < before_id)
    with registry.database.read() as connection:
        return [DependentRow(**row) for row in connection.execute(query).mappings()]


def counts_of(registry: ArtifactRegistry, rows: Sequence[ArtifactRow]) -> Mapping[int, int]:
    """Return by id how much descends from models, for those from which anything does."""
    with registry.database.read() as connection:
        return _counts(connection, rows)


def _counts(connection: sa.Connection, rows: Sequence[ArtifactRow]) -> dict[int, int]:
    key = t.dependents.c.artifact_id
    query = sa.select(key, sa.func.count()).where(key.in_([row.id for row in rows])).group_by(key)
    return {int(row[0]): int(row[1]) for row in connection.execute(query)}


class ModelHolds:
    """What depends on foundation models: what descends from them."""

    def reasons(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, str]:
        """Return by id what descends from a model."""
        found = {}
        for key, count in _counts(connection, rows).items():
            query = sa.select(t.dependents).filter_by(artifact_id=key).order_by(t.dependents.c.id.desc()).limit(1)
            newest = DependentRow(**connection.execute(query).mappings().one())
            newest_of = f"{newest.name} of {newest.owner}"
            if count == 1:
                what = f"{newest_of} descends from it"
            else:
                what = f"{count} agents and jobs descend from it, the newest of them {newest_of}"
            found[key] = f"{what}: collect such agents first, and let such jobs end"
        return found

    def counts(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, int]:
        """Return by id how much descends from a model."""
        return _counts(connection, rows)

    def collected(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> None:
        """Nothing follows: no model is collected that anything descends from."""
