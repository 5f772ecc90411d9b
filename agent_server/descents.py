"""What of this service descends from what: agents and open jobs, from foundation models and from other agents.

Rows are written in the transaction of what they tell. Those about foundation models are then told to Cognate, which
keeps a model for as long as anything descends from it; those about agents hold agents of this service.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from agent_server import tables as t
from agent_server.foundation import Descent
from cognateforge.exceptions import AgentNotFoundError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.jobs.states import FINAL
from training_common.store.database import Database, Turn
from training_common.store.tables import artifacts, jobs

# Before the name of an agent from which something descends: agents and models may have the same names.
_AGENT = "agent:"
_EXACT = re.compile(r".+@[1-9][0-9]*")
# Rows of one look: as many as a request to Cognate may name.
BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Untold:
    """What Cognate has yet to be told: that something descends from a model, or does no longer."""

    id: int
    descent: Descent
    holds: bool


def is_exact(name: str) -> bool:
    """Return whether a name is that of one version."""
    return _EXACT.fullmatch(name) is not None


# --- writing down, in the caller's transaction


def hold_model(connection: sa.Connection, model: str, name: str, *, digest: str = "") -> None:
    """Write down that an agent or a job descends from a foundation model."""
    _hold(connection, [{"model": model, "name": name, "digest": digest, "holds": True, "told": False}])


def hold_agent(connection: sa.Connection, registry: ArtifactRegistry, row: ArtifactRow, name: str) -> None:
    """Write down that a job goes on with an agent. Errors: AgentNotFoundError, for one that was collected."""
    # Who collects takes the same turn, so that an agent that is found here stays.
    registry.database.in_turn(connection, Turn.PUBLISH)
    if connection.execute(sa.select(artifacts.c.id).filter_by(id=row.id, collect_us=None)).first() is None:
        raise AgentNotFoundError(f"{row.name} was collected; list the agents to see what there is")
    _hold(connection, [_of_agent(row.name, name)])


def hold_parents(connection: sa.Connection, rows: Iterable[ArtifactRow]) -> None:
    """Write down from what published agents descend: their foundation, and the agent that they go on with."""
    values = []
    for row in rows:
        if foundation := row.body["parent"]["name"]:
            values.append({"model": foundation, "name": row.name, "digest": row.digest, "holds": True, "told": False})
        made_of = row.body.get("made_of", {})  # unknown to releases of before
        if made_of.get("kind") == "agent_version":
            values.append(_of_agent(made_of["name"], row.name))
    _hold(connection, values)


def _of_agent(agent: str, name: str) -> dict[str, object]:
    # Nobody is told: it is this service's own.
    return {"model": f"{_AGENT}{agent}", "name": name, "digest": "", "holds": True, "told": True}


def _hold(connection: sa.Connection, values: Sequence[Mapping[str, object]]) -> None:
    if not values:
        return
    given = (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(t.descents)
    d = t.descents.c
    # What holds already stays as it is. What was let go is told anew.
    again = given.on_conflict_do_update(
        index_elements=["model", "name"],
        set_={"holds": True, "told": given.excluded.told, "digest": given.excluded.digest},
        where=d.holds.is_(False),
    )
    connection.execute(again, list(values))


def let_go(connection: sa.Connection, names: Sequence[str]) -> None:
    """Write down that agents or jobs hold nothing any more."""
    mine = t.descents.c.name.in_(names)
    connection.execute(sa.delete(t.descents).where(mine, t.descents.c.model.startswith(_AGENT)))
    connection.execute(sa.update(t.descents).where(mine, t.descents.c.holds).values(holds=False, told=False))


def let_go_of_ended_jobs(database: Database) -> int:
    """Let go what ended jobs have held, and return how many jobs those are. What they have published holds itself."""
    ended = sa.select(t.descents.c.name).join(jobs, jobs.c.name == t.descents.c.name)
    ended = ended.where(t.descents.c.holds, jobs.c.state.in_([state.value for state in FINAL])).distinct().limit(BATCH)
    with database.read() as connection:
        names = list(connection.execute(ended).scalars())
    if names:
        with database.write() as connection:
            let_go(connection, names)
    return len(names)


def adopt_descents(registry: ArtifactRegistry) -> None:
    """Write down from what the agents of earlier releases descend, once: such a store has no agent among its rows."""
    agents = sa.select(t.descents.c.id).where(~t.descents.c.name.startswith("jobs/")).limit(1)
    with registry.database.read() as connection:
        if connection.execute(agents).first() is not None:
            return
        newest = connection.execute(sa.select(sa.func.max(artifacts.c.id))).scalar() or 0
    for first in range(0, newest, BATCH):
        query = sa.select(artifacts).filter_by(collect_us=None)
        query = query.where(artifacts.c.id > first, artifacts.c.id <= first + BATCH)
        with registry.database.write() as connection:
            hold_parents(connection, [ArtifactRow(**row) for row in connection.execute(query).mappings()])


# --- what agents of this service are held by


def counts(connection: sa.Connection, rows: Sequence[ArtifactRow]) -> dict[int, int]:
    """Return by id how many agents and open jobs descend from an agent, for those from which any do."""
    keys = {f"{_AGENT}{row.name}": row.id for row in rows}
    d = t.descents.c
    query = sa.select(d.model, sa.func.count()).where(d.model.in_(keys), d.holds).group_by(d.model)
    return {keys[row[0]]: int(row[1]) for row in connection.execute(query)}


def one_that_holds(connection: sa.Connection, row: ArtifactRow) -> str:
    """Return the newest agent or job that descends from an agent."""
    d = t.descents.c
    query = sa.select(d.name).where(d.model == f"{_AGENT}{row.name}", d.holds).order_by(d.id.desc()).limit(1)
    return str(connection.execute(query).scalar_one())


# --- telling Cognate


def untold(database: Database, *, holds: bool) -> list[Untold]:
    """Return some of what Cognate has yet to be told, oldest first."""
    query = sa.select(t.descents).filter_by(told=False, holds=holds).order_by(t.descents.c.id).limit(BATCH)
    with database.read() as connection:
        return [
            Untold(
                id=row["id"],
                descent=Descent(model=row["model"], name=row["name"], digest=row["digest"]),
                holds=row["holds"],
            )
            for row in connection.execute(query).mappings()
        ]


def tell_again(database: Database) -> int:
    """Write down that Cognate may know nothing of all that holds its models, and return how much that is."""
    mine = t.descents.c.holds & t.descents.c.told & ~t.descents.c.model.startswith(_AGENT)
    with database.write() as connection:
        return connection.execute(sa.update(t.descents).where(mine).values(told=False)).rowcount


def set_told(database: Database, rows: Sequence[Untold]) -> None:
    """Write down that Cognate knows, unless something has changed since. What is let go of is then forgotten."""
    with database.write() as connection:
        for row in rows:
            same = (t.descents.c.id == row.id) & (t.descents.c.holds == row.holds)
            if row.holds:
                connection.execute(sa.update(t.descents).where(same).values(told=True))
            else:
                connection.execute(sa.delete(t.descents).where(same))
