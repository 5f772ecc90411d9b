"""Looking for versions: what is written down of each for that, and the one query that reads a page of them.

Results and sources stand in the manifest. Two tables repeat them so that an index finds them; a result there is the
newest of its metric on its set. A result that is no finite number takes the older one's place and is found by nothing:
no order and no bound says anything about it.

A page is read off the narrowest way to it. Each restriction that has an index is a way; the one with few rows leads,
or, where all have many, the one whose index has the list's order. The others are looked up for each row on that way.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from training_common.store import tables as t

if TYPE_CHECKING:
    from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow

# A way with fewer rows is read and sorted whole, in well under a millisecond. One with more meets a page's rows soon.
_FEW = 1000
# Versions whose results and sources are written down in one transaction.
_ADOPTED = 500


class OrderBy(enum.StrEnum):
    """What a list is ordered by. What is equal in it is in the order of publication."""

    PUBLICATION = "PUBLICATION"
    SIZE = "SIZE"
    RESULT = "RESULT"


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a list. metric, dataset: of OrderBy.RESULT."""

    by: OrderBy = OrderBy.PUBLICATION
    ascending: bool = False
    metric: str = ""
    dataset: str = ""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A restriction that has an index: rows with an artifact's `key` for which `where` holds.

    ordered: the index has those rows in the order of the key.
    """

    key: sa.ColumnElement[int]
    where: tuple[sa.ColumnElement[bool], ...]
    ordered: bool = False


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound on a measured result. dataset: empty for any."""

    metric: str
    dataset: str = ""
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, results: Any) -> tuple[sa.ColumnElement[bool], ...]:
        """Return the bound's conditions on a table of results."""
        found: list[sa.ColumnElement[bool]] = [results.c.metric == self.metric]
        if self.dataset:
            found.append(results.c.dataset == self.dataset)
        if self.at_least is not None:
            found.append(results.c.value >= self.at_least)
        if self.at_most is not None:
            found.append(results.c.value <= self.at_most)
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which versions, and in what order. from_us, before_us: of their publication. ways: what else restricts them."""

    states: Sequence[str] = ()
    from_us: int | None = None
    before_us: int | None = None
    bounds: Sequence[Bound] = ()
    ways: Sequence[Way] = ()
    order: Order = Order()


@dataclass(frozen=True)
class Place:
    """A version's place in a list: its id, and its value in the order, where that has one."""

    id: int
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some versions in order. end: the last one's place; None, when no more follow."""

    rows: tuple[ArtifactRow, ...]
    end: Place | None


# --- what is written down


def record(connection: sa.Connection, row: ArtifactRow) -> None:
    """Write down what a version is looked for by, in the transaction that publishes it."""
    _record(connection, [row])


def adopt(
    registry: ArtifactRegistry, beside: Callable[[sa.Connection, Sequence[ArtifactRow]], None] | None = None
) -> int:
    """Write that down for versions that were published without it, by an earlier release; return how many.

    beside: writes what is known of such versions beside their manifests, in the same transaction.
    """
    adopted, after = 0, 0
    known = [sa.exists().where(table.c.artifact_id == t.artifacts.c.id) for table in (t.results, t.sources)]
    missing = sa.select(t.artifacts).where(*(~one for one in known)).order_by(t.artifacts.c.id).limit(_ADOPTED)
    while True:
        with registry.database.read() as connection:
            rows = registry.rows(connection, missing.where(t.artifacts.c.id > after))
        if not rows:
            return adopted
        with registry.database.write() as connection:
            _record(connection, rows)
            if beside is not None:
                beside(connection, rows)
        adopted, after = adopted + len(rows), rows[-1].id


def keep_results(connection: sa.Connection, key: int, measured: Iterable[Mapping[str, Any]]) -> None:
    """Put results of one version in the place of older ones, in the caller's transaction.

    measured: metric, dataset, value and rows of each; of several with one name the last counts.
    """
    newest = {(one["metric"][:64], one["dataset"][:128]): one for one in measured}
    # In one order everywhere: two that measure at once wait for each other, and not in a circle.
    for (metric, dataset), one in sorted(newest.items(), key=lambda item: item[0]):
        place = {"artifact_id": key, "metric": metric, "dataset": dataset}
        if not math.isfinite(one["value"]):
            connection.execute(sa.delete(t.results).filter_by(**place))
            continue
        values = {"value": one["value"], "rows": one["rows"]}
        put = _insert(connection, t.results).values(**place, **values)
        connection.execute(put.on_conflict_do_update(index_elements=list(place), set_=values))


def _record(connection: sa.Connection, rows: Iterable[ArtifactRow]) -> None:
    for row in rows:
        named = {(source["name"][:64], source["digest"][:71]) for source in row.body.get("data", ())}
        if named:
            values = [{"artifact_id": row.id, "name": name, "digest": digest} for name, digest in sorted(named)]
            # Two servers that start at once adopt the same versions.
            connection.execute(_insert(connection, t.sources).on_conflict_do_nothing(), values)
        keep_results(connection, row.id, results_of(row))


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    return (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(table)


def results_of(row: ArtifactRow) -> Sequence[Mapping[str, Any]]:
    """Return what a version's manifest says that was measured: results of a model, evaluations of an agent."""
    found: Sequence[Mapping[str, Any]] = row.body.get("results") or row.body.get("evaluations") or ()
    return found


# --- what is asked


def of_family(family: str) -> Way:
    """Return the way to the versions of a family."""
    kin = t.artifacts.alias("kin")
    return Way(key=kin.c.id, where=(kin.c.family == family,), ordered=True)


def trained_on(*, name: str = "", digest: str = "") -> Way:
    """Return the way to versions that were trained on a set of this name, or on data of this digest."""
    source = t.sources.alias("named" if name else "exact")
    where = source.c.name == name if name else source.c.digest == digest
    return Way(key=source.c.artifact_id, where=(where,), ordered=True)


def kept_in(tiers: Sequence[str]) -> Way:
    """Return the way to versions in one of these tiers."""
    kept = t.artifacts.alias("kept")
    return Way(key=kept.c.id, where=(kept.c.tier.in_(sorted(set(tiers))),), ordered=len(set(tiers)) == 1)


# Literals, not parameters, in these two: only so is SQLite sure that an index of just such rows has all of them.


def pinned() -> Way:
    """Return the way to versions that are held for good."""
    held = t.artifacts.alias("held")
    return Way(key=held.c.id, where=(held.c.pinned.is_(sa.true()),), ordered=True)


def damaged() -> Way:
    """Return the way to versions whose stored bytes were found damaged."""
    broken = t.artifacts.alias("broken")
    return Way(key=broken.c.id, where=(broken.c.damage != sa.literal_column("''"),), ordered=True)


# --- what is found


def page(registry: ArtifactRegistry, wanted: Asked, *, limit: int, after: Place | None = None) -> Page:
    """Return up to `limit` versions that the wish fits, in its order, behind `after`."""
    with registry.database.read() as connection:
        found = _places(connection, wanted, limit + 1, after)
        here = found[:limit]
        rows = registry.rows(connection, sa.select(t.artifacts).where(t.artifacts.c.id.in_([one.id for one in here])))
    by_id = {row.id: row for row in rows}
    return Page(rows=tuple(by_id[one.id] for one in here), end=here[-1] if len(found) > limit else None)


def _places(connection: sa.Connection, wanted: Asked, limit: int, after: Place | None) -> list[Place]:
    ways = [*wanted.ways, *_bound_ways(wanted)]
    narrow = _narrowest(connection, [*ways, *_window_way(wanted)])
    by_id = wanted.order.by is OrderBy.PUBLICATION
    leader = next((way for way in ways if way.ordered), None) if narrow is None and by_id else None
    ends = _ends(connection, wanted) if narrow is None else None

    def span(key: sa.ColumnElement[int]) -> list[sa.ColumnElement[bool]]:
        """Return where the ids lie. It is said of every table: PostgreSQL does not conclude it from equal ids."""
        found: list[sa.ColumnElement[bool]] = [] if ends is None else [key.between(*ends)]
        if by_id and after is not None:
            found.append(key > after.id if wanted.order.ascending else key < after.id)
        return found

    if leader is None:
        query, key, value = _in_order(wanted)
        query = query.where(*_fits(wanted))
    else:
        key, value, own = leader.key, None, t.artifacts.c.id
        fits = sa.exists().where(own == key, *_fits(wanted), *span(own)).correlate(key.table)
        # A version may have several sources of one name.
        query = _select(key, None).where(*leader.where, fits).distinct()
    if narrow is not None:
        query = query.where(key.in_(narrow))
    query = query.where(*span(key))
    for way in ways:
        if way is not leader:
            reaches = sa.exists().where(way.key == key, *way.where, *span(way.key)).correlate(key.table)
            query = query.where(reaches)
    columns = [key] if value is None else [value, key]
    if after is not None and value is not None:
        here, there = sa.tuple_(value, key), sa.tuple_(sa.literal(after.value), sa.literal(after.id))
        query = query.where(here > there if wanted.order.ascending else here < there)
    query = query.order_by(*(one if wanted.order.ascending else one.desc() for one in columns)).limit(limit)
    return [Place(*row) for row in connection.execute(query)]


def _fits(wanted: Asked) -> list[sa.ColumnElement[bool]]:
    """Return what is read off the version's own row."""
    own = t.artifacts.c
    states = [own.state.in_(sorted(wanted.states))] if wanted.states else []
    # A sum has no index: the ids have led near these moments already.
    moments = [condition(own.create_us + 0) for condition in _window(wanted)]
    return [*states, own.collect_us.is_(None), *moments]


def _in_order(wanted: Asked) -> tuple[sa.Select[Any], sa.ColumnElement[int], sa.ColumnElement[Any] | None]:
    """Return a query of id and value, by the index that has the order, and its two columns."""
    order = wanted.order
    key: sa.ColumnElement[int] = t.artifacts.c.id
    if order.by is OrderBy.PUBLICATION:
        return _select(key, None), key, None
    if order.by is OrderBy.SIZE:
        return _select(key, t.artifacts.c.size_bytes), key, t.artifacts.c.size_bytes
    key = t.results.c.artifact_id
    query = _select(key, t.results.c.value).join(t.artifacts)
    query = query.where(t.results.c.metric == order.metric, t.results.c.dataset == order.dataset)
    for bound in wanted.bounds:
        if (bound.metric, bound.dataset) == (order.metric, order.dataset):  # where the list begins, not what it skips
            query = query.where(*bound.holds(t.results))
    return query, key, t.results.c.value


def _select(key: sa.ColumnElement[int], value: sa.ColumnElement[Any] | None) -> sa.Select[Any]:
    return sa.select(key, sa.null() if value is None else value)


def _bound_ways(wanted: Asked) -> list[Way]:
    found = []
    for number, bound in enumerate(wanted.bounds):
        results = t.results.alias(f"bound_{number}")
        found.append(Way(key=results.c.artifact_id, where=bound.holds(results)))
    return found


def _window_way(wanted: Asked) -> list[Way]:
    own = t.artifacts.c
    window = _window(wanted)
    return [Way(key=own.id, where=tuple(condition(own.create_us) for condition in window))] if window else []


def _window(wanted: Asked) -> list[Callable[[sa.ColumnElement[int]], sa.ColumnElement[bool]]]:
    first, before = wanted.from_us, wanted.before_us
    found: list[Callable[[sa.ColumnElement[int]], sa.ColumnElement[bool]]] = []
    if first is not None:
        found.append(lambda moment: moment >= first)
    if before is not None:
        found.append(lambda moment: moment < before)
    return found


def _ends(connection: sa.Connection, wanted: Asked) -> tuple[int, int] | None:
    """Return the first and the last id between the wish's moments: ids grow with time, but for clocks set back."""
    window = _window(wanted)
    if not window:
        return None
    own = t.artifacts.c
    # Sums, so that the moments' index is read and not all ids from the first or the last one on.
    query = sa.select(sa.func.min(own.id + 0), sa.func.max(own.id + 0)).where(*(one(own.create_us) for one in window))
    first, last = connection.execute(query).one()
    return first, last


def _narrowest(connection: sa.Connection, ways: Sequence[Way]) -> list[int] | None:
    """Return the ids on the way that has the fewest rows, None where each has many."""
    best, fewest = None, _FEW
    for way in ways:
        some = sa.select(way.key).where(*way.where).limit(fewest).subquery()
        count = connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
        if count < fewest:
            best, fewest = way, count
    if best is None:
        return None
    return list(connection.execute(sa.select(best.key).where(*best.where)).scalars())
