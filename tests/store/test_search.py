"""Looking for versions: every filter and order against a plain reading of all of them, on both stores."""

import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import cognate_server.migrations
from training_common.artifacts import search
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.search import Asked, Bound, Order, OrderBy, Place, Way
from training_common.store import tables as t
from training_common.store.database import Database

DIGESTS = {name: f"sha256:{letter * 64}" for name, letter in (("gsm8k", "1"), ("hotpotqa", "2"), ("forge", "3"))}
MATCH, LOSS = ("exact_match", "gsm8k/validation"), ("loss", "all/validation")


@pytest.fixture
def registry(tmp_path: Path, store_url: str) -> Iterator[ArtifactRegistry]:
    registry = ArtifactRegistry(Database(store_url), BlobStore(tmp_path / "artifacts"))
    registry.database.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield registry
    registry.database.close()


def result(named: tuple[str, str], value: float) -> dict[str, Any]:
    return {"metric": named[0], "dataset": named[1], "value": value, "rows": 8}


def publish(
    registry: ArtifactRegistry,
    *,
    family: str = "cognate-25m",
    state: str = "READY",
    data: tuple[str, ...] = (),
    results: tuple[dict[str, Any], ...] = (),
) -> ArtifactRow:
    body = {"data": [{"name": name, "digest": DIGESTS[name]} for name in data], "results": list(results)}
    with registry.database.write() as connection:
        return registry.publish(connection, family=family, state=state, job="jobs/x", files=[], body=body)


def keep(registry: ArtifactRegistry, row: ArtifactRow, **how: Any) -> None:
    """Change how a version is kept, or what no publication would make so."""
    with registry.database.write() as connection:
        connection.execute(sa.update(t.artifacts).filter_by(id=row.id).values(**how))


def all_pages(registry: ArtifactRegistry, wanted: Asked, *, size: int) -> list[str]:
    found: list[str] = []
    after: Place | None = None
    while True:
        page = search.page(registry, wanted, limit=size, after=after)
        assert len(page.rows) <= size
        found += [row.name for row in page.rows]
        if page.end is None:
            return found
        after = page.end


def stored_results(registry: ArtifactRegistry) -> list[tuple[Any, ...]]:
    with registry.database.read() as connection:
        columns = (t.results.c.artifact_id, t.results.c.metric, t.results.c.value, t.results.c.rows)
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(*columns))]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A version as the plain reading knows it."""

    row: ArtifactRow
    data: tuple[str, ...]
    results: dict[tuple[str, str], float]


@pytest.fixture
def known(registry: ArtifactRegistry) -> list[Known]:
    """Publish sixty versions of everything there is, with many that are equal in what they are ordered by."""
    chance = random.Random(7)  # noqa: S311 - of tests
    found = []
    for number in range(60):
        data = tuple(name for name in DIGESTS if chance.random() < 0.5)
        results = {MATCH: chance.choice([0.0, 0.0, 0.25, 0.5]), LOSS: chance.choice([1.5, 2.5])}
        results = {named: value for named, value in results.items() if chance.random() < 0.7}
        row = publish(
            registry,
            family=chance.choice(["a", "b", "b"]),
            state=chance.choice(["READY", "EXPERIMENTAL"]),
            data=data,
            results=tuple(result(named, value) for named, value in results.items()),
        )
        how: dict[str, Any] = {
            # A clock that is set back now and then.
            "create_us": 1_000_000 * (number - 3 * (number % 5 == 0)),
            "size_bytes": chance.choice([10, 20, 30]),
            "tier": chance.choice(["STANDARD", "STANDARD", "ARCHIVE"]),
            "pinned": chance.random() < 0.2,
            "damage": chance.choice(["", "", "", "weights.bin is short"]),
            "collect_us": chance.choice([None, None, None, 5]),
        }
        keep(registry, row, **how)
        found.append(Known(row=replace(row, **how), data=data, results=results))
    return found


def plainly(known: list[Known], wanted: dict[str, Any], order: Order) -> list[str]:
    """Return the names that a wish fits, by looking at each version."""

    def fits(one: Known) -> bool:
        row = one.row
        return (
            row.collect_us is None
            and wanted.get("family", row.family) == row.family
            and row.state in wanted.get("states", [row.state])
            and ("data" not in wanted or wanted["data"] in one.data)
            and ("digest" not in wanted or wanted["digest"] in one.data)
            and wanted.get("from_us", -(10**12)) <= row.create_us < wanted.get("before_us", 10**12)
            and row.tier in wanted.get("tiers", [row.tier])
            and (not wanted.get("pinned") or row.pinned)
            and (not wanted.get("damaged") or bool(row.damage))
            and all(holds(one, bound) for bound in wanted.get("bounds", []))
            and (order.by is not OrderBy.RESULT or (order.metric, order.dataset) in one.results)
        )

    def holds(one: Known, bound: Bound) -> bool:
        low = -math.inf if bound.at_least is None else bound.at_least
        high = math.inf if bound.at_most is None else bound.at_most
        values = [v for (m, d), v in one.results.items() if m == bound.metric and bound.dataset in ("", d)]
        return any(low <= value <= high for value in values)

    def key(one: Known) -> tuple[float, int]:
        if order.by is OrderBy.RESULT:
            return one.results[order.metric, order.dataset], one.row.id
        return (one.row.size_bytes if order.by is OrderBy.SIZE else 0), one.row.id

    return [one.row.name for one in sorted(filter(fits, known), key=key, reverse=not order.ascending)]


def asked(wanted: dict[str, Any], order: Order) -> Asked:
    ways: list[Way] = []
    if "family" in wanted:
        ways.append(search.of_family(wanted["family"]))
    if "data" in wanted:
        ways.append(search.trained_on(name=wanted["data"]))
    if "digest" in wanted:
        ways.append(search.trained_on(digest=DIGESTS[wanted["digest"]]))
    if "tiers" in wanted:
        ways.append(search.kept_in(wanted["tiers"]))
    ways += [search.pinned()] if wanted.get("pinned") else []
    ways += [search.damaged()] if wanted.get("damaged") else []
    return Asked(
        states=wanted.get("states", ()),
        from_us=wanted.get("from_us"),
        before_us=wanted.get("before_us"),
        bounds=wanted.get("bounds", ()),
        ways=ways,
        order=order,
    )


SOME: dict[str, Any] = {
    "family": "b",
    "states": ["READY"],
    "data": "gsm8k",
    "digest": "forge",
    "from_us": 12_000_000,
    "before_us": 45_000_000,
    "tiers": ["STANDARD"],
    "pinned": True,
    "damaged": True,
    "bounds": [Bound(metric="exact_match", dataset="gsm8k/validation", at_least=0.0, at_most=0.25)],
}
BOUNDS = [
    [Bound(metric="exact_match", at_least=0.25)],
    [Bound(metric="loss", dataset="other/validation", at_most=9.0)],
    [Bound(metric="exact_match", at_most=0.25), Bound(metric="loss", dataset="all/validation", at_least=2.0)],
]


@pytest.mark.parametrize("few", [0, 6, search._FEW])
def test_every_filter_and_order_finds_what_a_plain_reading_finds(
    registry: ArtifactRegistry, known: list[Known], monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Alone and several at once, whichever way leads, in pages that neither lose nor repeat a version."""
    monkeypatch.setattr(search, "_FEW", few)
    chance = random.Random(few)  # noqa: S311 - of tests
    wishes = [{}, *({name: value} for name, value in SOME.items()), *({"bounds": bounds} for bounds in BOUNDS)]
    wishes += [dict(chance.sample(sorted(SOME.items(), key=str), count)) for count in (2, 2, 2, 2, 3, 3, 4)]
    wishes += [{"tiers": ["ARCHIVE", "STANDARD"]}, {"data": "nothing"}, {"from_us": 10**12}]
    orders = [Order(by=by, ascending=up) for by in (OrderBy.PUBLICATION, OrderBy.SIZE) for up in (False, True)]
    for metric, dataset in (MATCH, LOSS):
        orders += [Order(by=OrderBy.RESULT, metric=metric, dataset=dataset, ascending=up) for up in (False, True)]
    found = 0
    for wanted in wishes:
        for order in orders:
            expected = plainly(known, wanted, order)
            assert expected == all_pages(registry, asked(wanted, order), size=4), (wanted, order)
            found += len(expected)
    assert found > 1000


def test_a_result_that_is_no_number_is_found_by_nothing(registry: ArtifactRegistry) -> None:
    """It takes the place of an older one: no order and no bound says anything about it."""
    row = publish(registry, results=(result(LOSS, 2.0), result(MATCH, 0.5)))
    assert [(row.id, "exact_match", 0.5, 8), (row.id, "loss", 2.0, 8)] == stored_results(registry)
    for value in (math.nan, math.inf):
        with registry.database.write() as connection:
            search.keep_results(connection, row.id, [result(LOSS, value)])
        assert [(row.id, "exact_match", 0.5, 8)] == stored_results(registry)
    by_loss = Asked(order=Order(by=OrderBy.RESULT, metric=LOSS[0], dataset=LOSS[1]))
    assert () == search.page(registry, by_loss, limit=9).rows
    with registry.database.write() as connection:
        search.keep_results(connection, row.id, [result(LOSS, 9.0), result(LOSS, 1.0)])
    assert [(row.id, "exact_match", 0.5, 8), (row.id, "loss", 1.0, 8)] == stored_results(registry)


def test_a_page_goes_on_behind_its_last_place_whatever_is_published(registry: ArtifactRegistry) -> None:
    """New versions come before a list's newest: what was not seen yet is seen once."""
    first = [publish(registry).name for _ in range(4)]
    page = search.page(registry, Asked(), limit=2)
    publish(registry)
    rest = search.page(registry, Asked(), limit=9, after=page.end)
    assert list(reversed(first)) == [row.name for row in (*page.rows, *rest.rows)]


def test_versions_of_before_are_written_down_once(registry: ArtifactRegistry) -> None:
    """What an earlier release published is found after a start, with what is known beside the manifest."""
    rows = [publish(registry, data=("gsm8k", "gsm8k"), results=(result(MATCH, 0.25),)) for _ in range(3)]
    rows.append(publish(registry))
    with registry.database.write() as connection:
        connection.execute(sa.delete(t.sources))
        connection.execute(sa.delete(t.results))
    beside: list[str] = []

    def note(connection: sa.Connection, adopted: Any) -> None:
        beside.extend(row.name for row in adopted)
        search.keep_results(connection, rows[1].id, [result(MATCH, 0.75)])

    assert 4 == search.adopt(registry, note)
    assert [row.name for row in rows] == beside
    values = [(rows[0].id, 0.25), (rows[1].id, 0.75), (rows[2].id, 0.25)]
    assert values == [(key, value) for key, _, value, _ in stored_results(registry)]
    on_gsm8k = Asked(ways=[search.trained_on(name="gsm8k")])
    assert [row.name for row in rows[2::-1]] == all_pages(registry, on_gsm8k, size=2)
    # The last one has neither: it costs a look at each start, and changes nothing.
    assert 1 == search.adopt(registry)


def test_servers_that_start_at_once_write_the_same_down_once(
    registry: ArtifactRegistry, tmp_path: Path, store_url: str
) -> None:
    """Neither fails for what the other has just written."""
    for _ in range(20):
        publish(registry, data=("gsm8k", "forge"), results=(result(MATCH, 0.25), result(LOSS, 2.0)))
    with registry.database.write() as connection:
        connection.execute(sa.delete(t.sources))
        connection.execute(sa.delete(t.results))
    others = [ArtifactRegistry(Database(store_url), BlobStore(tmp_path / "artifacts")) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert max(pool.map(search.adopt, others)) <= 20
    for other in others:
        other.database.close()
    assert 40 == len(stored_results(registry))
    assert 20 == len(all_pages(registry, Asked(ways=[search.trained_on(name="forge")]), size=9))
