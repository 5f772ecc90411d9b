"""Published agents: look-up by version or alias, aliases that move, lifecycles, and what was measured later.

A lifecycle is told in the words of cognateforge.agent.v1.Lifecycle, without their prefix.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from agent_server import descents
from agent_server import tables as t
from cognateforge.exceptions import AgentNotFoundError, FieldViolation, IllegalTransitionError, TooManyAliasesError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.search import Way, adopt, keep_results
from training_common.store.database import Database, Turn, now_us
from training_common.store.tables import artifacts

# What the contract lets one agent carry.
MAX_ALIASES = 64
MAX_EVALUATIONS = 64
# Versions that get their row in one transaction.
_ADOPTED = 500


class Lifecycle(enum.StrEnum):
    """How far a version has come."""

    DRAFT = "DRAFT"
    CANDIDATE = "CANDIDATE"
    PRODUCTION = "PRODUCTION"
    RETIRED = "RETIRED"


LEGAL: Mapping[Lifecycle, tuple[Lifecycle, ...]] = {
    Lifecycle.DRAFT: (Lifecycle.CANDIDATE, Lifecycle.RETIRED),
    Lifecycle.CANDIDATE: (Lifecycle.DRAFT, Lifecycle.PRODUCTION, Lifecycle.RETIRED),
    Lifecycle.PRODUCTION: (Lifecycle.CANDIDATE, Lifecycle.RETIRED),
    Lifecycle.RETIRED: (Lifecycle.DRAFT,),
}


# Those of versions that are used, or about to be.
_IN_SERVICE = frozenset({Lifecycle.CANDIDATE, Lifecycle.PRODUCTION})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One result that was measured after the version was published."""

    metric: str
    dataset: str
    value: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What of a version is not in its manifest: it changes, or came later. aliases: sorted. later: oldest first.

    dependents: how many agents and open jobs go on with it.
    """

    aliases: Sequence[str] = ()
    lifecycle: Lifecycle = Lifecycle.DRAFT
    later: Sequence[Measured] = field(default=())
    dependents: int = 0


@dataclass(frozen=True, kw_only=True)
class MoveRow:
    """A move as stored: of an alias, or along the lifecycle where `alias` is None."""

    id: int
    family: str
    version: int
    alias: str | None
    from_version: int | None
    from_lifecycle: str | None
    to_lifecycle: str | None
    caller: str
    request_id: str
    time_us: int


# --- looking up


def find_agent(registry: ArtifactRegistry, name: str) -> ArtifactRow:
    """Return the agent of "family@version", "family@alias" or a family's newest. Errors: AgentNotFoundError."""
    family, _, version = name.partition("@")
    if version and not version.isdigit():
        with registry.database.read() as connection:
            query = sa.select(t.aliases.c.version).filter_by(family=family, alias=version)
            number = connection.execute(query).scalar()
        if number is None:
            raise AgentNotFoundError(f"no alias {name}; get the agent to see which aliases point at it")
    else:
        number = int(version) if version else None
    row = registry.find(family, number)
    if row is None:
        raise AgentNotFoundError(f"no agent {name} is published; list the agents to see what there is")
    return row


def ways_to(*, task: str = "", foundation: str = "", lifecycles: Collection[Lifecycle] = ()) -> list[Way]:
    """Return the ways to agents of this task, made of this foundation model, and in one of these states."""
    found = []
    if foundation:
        made_of = t.agents.alias("made_of")
        found.append(Way(key=made_of.c.artifact_id, where=(made_of.c.foundation == foundation,), ordered=True))
    if task:
        doing = t.agents.alias("doing")
        found.append(Way(key=doing.c.artifact_id, where=(doing.c.task == task,), ordered=True))
    if lifecycles:
        stands = t.agents.alias("stands")
        where = stands.c.lifecycle.in_(sorted(lifecycles))
        found.append(Way(key=stands.c.artifact_id, where=(where,), ordered=len(set(lifecycles)) == 1))
    return found


def standings_of(registry: ArtifactRegistry, rows: Sequence[ArtifactRow]) -> dict[str, Standing]:
    """Return what the store tells of each of the rows beside its manifest, by the row's name."""
    with registry.database.read() as connection:
        return standings_in(connection, rows)


def standings_in(connection: sa.Connection, rows: Sequence[ArtifactRow]) -> dict[str, Standing]:
    """Return what `standings_of` does, as the caller's transaction sees it."""
    names = {row.id: row.name for row in rows}
    aliases: dict[str, list[str]] = {name: [] for name in names.values()}
    query = sa.select(t.aliases).where(t.aliases.c.family.in_({row.family for row in rows})).order_by(t.aliases.c.alias)
    for alias in connection.execute(query).mappings():
        aliases.get(f"{alias['family']}@{alias['version']}", []).append(alias["alias"])
    states = sa.select(t.agents.c.artifact_id, t.agents.c.lifecycle).where(t.agents.c.artifact_id.in_(names))
    lifecycles = {key: Lifecycle(word) for key, word in connection.execute(states)}
    later, counts = _later(connection, names), descents.counts(connection, rows)
    return {
        name: Standing(
            aliases=aliases[name],
            lifecycle=lifecycles.get(key, Lifecycle.DRAFT),
            later=tuple(later.get(key, ())),
            dependents=counts.get(key, 0),
        )
        for key, name in names.items()
    }


def _later(connection: sa.Connection, keys: Iterable[int]) -> dict[int, list[Measured]]:
    """Return each version's newest evaluations, as many as an answer can hold, oldest first."""
    e = t.evaluations.c
    age = sa.func.row_number().over(partition_by=e.artifact_id, order_by=e.id.desc()).label("age")
    ranked = sa.select(t.evaluations, age).where(e.artifact_id.in_(list(keys))).subquery()
    query = sa.select(ranked).where(ranked.c.age <= MAX_EVALUATIONS).order_by(ranked.c.id)
    found: dict[int, list[Measured]] = {}
    for row in connection.execute(query).mappings():
        measured = Measured(metric=row["metric"], dataset=row["dataset"], value=row["value"], rows=row["rows"])
        found.setdefault(row["artifact_id"], []).append(measured)
    return found


# --- publishing


def record_agent(connection: sa.Connection, row: ArtifactRow) -> None:
    """Write down what a version is looked for by, and what it descends from, in the transaction that publishes it.

    It begins as a draft.
    """
    _record(connection, [row])
    descents.hold_parents(connection, [row])


def adopt_agents(registry: ArtifactRegistry) -> int:
    """Write that down for versions that were published without it, by an earlier release; return how many."""
    adopt(registry, _adopt_evaluations)
    adopted = 0
    complete = sa.select(t.agents.c.artifact_id).where(t.agents.c.foundation.is_not(None))
    missing = sa.select(artifacts).where(artifacts.c.id.not_in(complete)).limit(_ADOPTED)
    while True:
        with registry.database.read() as connection:
            rows = registry.rows(connection, missing)
        if not rows:
            return adopted
        with registry.database.write() as connection:
            _record(connection, rows)
        adopted += len(rows)


def _adopt_evaluations(connection: sa.Connection, rows: Sequence[ArtifactRow]) -> None:
    e = t.evaluations.c
    found = sa.select(e.artifact_id, e.metric, e.dataset, e.value, e.rows)
    found = found.where(e.artifact_id.in_([row.id for row in rows])).order_by(e.id)
    for measured in connection.execute(found).mappings():
        keep_results(connection, measured["artifact_id"], [dict(measured)])


def _record(connection: sa.Connection, rows: Iterable[ArtifactRow]) -> None:
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    values = [
        {
            "artifact_id": row.id,
            "task": row.body["task"],
            "foundation": row.body["parent"]["name"],
            "lifecycle": Lifecycle.DRAFT.value,
        }
        for row in rows
    ]
    given = insert(t.agents)
    # Two servers that start at once adopt the same ones. A release of before left out the foundation.
    kept = given.on_conflict_do_update(index_elements=["artifact_id"], set_={"foundation": given.excluded.foundation})
    connection.execute(kept, values)


class AgentHolds:
    """What depends on agents: aliases, a lifecycle that is under way, and the agents and jobs that go on with them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def reasons(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, str]:
        """Return by id what depends on an agent, and what would end that."""
        # Until the transaction's end no alias comes to point at one.
        self._database.in_turn(connection, Turn.ALIASES)
        standings = standings_in(connection, rows)
        found = {}
        for row in rows:
            standing = standings[row.name]
            if count := standing.dependents:
                newest = descents.one_that_holds(connection, row)
                what = f"{newest} goes on with it" if count == 1 else f"{count} go on with it, the newest is {newest}"
                found[row.id] = f"{what}: collect such agents first, and let such jobs end"
            if standing.lifecycle in _IN_SERVICE:
                retire = f"forge agents lifecycle {row.name} retired"
                found[row.id] = f"it is {standing.lifecycle.value}: {retire}"
            if standing.aliases:
                found[row.id] = f"the alias {standing.aliases[0]} points at it: point it elsewhere (forge alias)"
        return found

    def counts(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, int]:
        """Return by id how many agents and open jobs go on with an agent."""
        return descents.counts(connection, rows)

    def collected(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> None:
        """Let go of the foundations, and of the agents, that collected ones descend from."""
        descents.let_go(connection, [row.name for row in rows])


# --- moves: each in the caller's transaction, whose turn is Turn.ALIASES


def require_there(connection: sa.Connection, row: ArtifactRow) -> None:
    """Refuse a version that was collected since it was found. Errors: AgentNotFoundError."""
    if connection.execute(sa.select(artifacts.c.id).filter_by(id=row.id, collect_us=None)).first() is None:
        raise AgentNotFoundError(f"{row.name} was collected; list the agents to see what there is")


def set_alias(connection: sa.Connection, row: ArtifactRow, alias: str, *, caller: str, request_id: str) -> None:
    """Point an alias at a version and keep the move.

    Errors: TooManyAliasesError, when the version has as many as the contract allows; AgentNotFoundError.
    """
    require_there(connection, row)
    key = {"family": row.family, "alias": alias}
    before = connection.execute(sa.select(t.aliases.c.version).filter_by(**key)).scalar()
    if before is None:
        connection.execute(sa.insert(t.aliases).values(**key, version=row.version))
    else:
        connection.execute(sa.update(t.aliases).filter_by(**key).values(version=row.version))
    _keep(connection, row, caller=caller, request_id=request_id, alias=alias, from_version=before)
    counted = sa.select(sa.func.count()).select_from(t.aliases).filter_by(family=row.family, version=row.version)
    if connection.execute(counted).scalar_one() > MAX_ALIASES:
        raise TooManyAliasesError(f"{row.name} has {MAX_ALIASES} aliases already: move one of them elsewhere first")


def set_lifecycle(connection: sa.Connection, row: ArtifactRow, to: Lifecycle, *, caller: str, request_id: str) -> None:
    """Move a version along its lifecycle and keep the move.

    Errors: IllegalTransitionError, naming what is legal; AgentNotFoundError.
    """
    require_there(connection, row)
    _record(connection, [row])
    found = connection.execute(sa.select(t.agents.c.lifecycle).filter_by(artifact_id=row.id).with_for_update())
    before = Lifecycle(found.scalar_one())
    if to not in LEGAL[before]:
        legal = ", ".join(LEGAL[before])
        description = f"{row.name} is {before.value} and cannot become {to.value}; from there it may become {legal}"
        raise IllegalTransitionError(
            description,
            violations=[FieldViolation(field="lifecycle", description=description)],
            metadata={"state": before.value, "allowed": legal},
        )
    connection.execute(sa.update(t.agents).filter_by(artifact_id=row.id).values(lifecycle=to.value))
    _keep(connection, row, caller=caller, request_id=request_id, from_lifecycle=before.value, to_lifecycle=to.value)


def _keep(connection: sa.Connection, row: ArtifactRow, **move: Any) -> None:
    values = {"family": row.family, "version": row.version, "time_us": now_us(), **move}
    connection.execute(sa.insert(t.moves).values(**values))


def page_of_moves(
    registry: ArtifactRegistry, family: str, *, limit: int, before_id: int | None = None
) -> list[MoveRow]:
    """Return up to `limit` moves of a family, newest first, before `before_id`. Errors: AgentNotFoundError."""
    query = sa.select(t.moves).filter_by(family=family).order_by(t.moves.c.id.desc()).limit(limit)
    if before_id is not None:
        query = query.where(t.moves.c.id < before_id)
    with registry.database.read() as connection:
        rows = [MoveRow(**row) for row in connection.execute(query).mappings()]
    if not rows and registry.find(family, None) is None:
        raise AgentNotFoundError(f"no agent {family} is published; list the agents to see what there is")
    return rows


# --- evaluations


def keep_evaluations(
    connection: sa.Connection, row: ArtifactRow, found: Iterable[Measured], *, caller: str, request_id: str
) -> None:
    """Add to what was measured of a version, in the caller's transaction."""
    common = {"artifact_id": row.id, "caller": caller, "request_id": request_id, "time_us": now_us()}
    values = [{"metric": m.metric, "dataset": m.dataset, "value": m.value, "rows": m.rows, **common} for m in found]
    if values:
        connection.execute(sa.insert(t.evaluations), values)
        keep_results(connection, row.id, values)
