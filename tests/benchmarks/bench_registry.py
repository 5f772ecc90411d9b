# ruff: noqa: S608 - nobody else's words are in its queries
"""Milliseconds of a page of 50 among 100,000 published versions: lists, filters, orders and deep pages.

Ours is the search that ListModels and ListAgents ask, which chooses its way to a page by itself; the yardstick is one
query written by hand for the very page, over the same indices, the rows read alike. Both run in turn, each time for
another place in the list. Beside them stand ListModels over a connection, and what a start costs that finds everything
written down. On SQLite and, where it is installed, PostgreSQL.
Usage: python tests/benchmarks/bench_registry.py [versions] [runs]
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from cognate_server import migrations
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.client import AsyncCognateClient
from cognateforge.exchange.v1 import model_pb2
from tests.benchmarks.common import median_ratio
from tests.support import postgres
from tests.support.servers import running_cognate
from training_common.artifacts import search
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.search import Asked, Bound, Order, OrderBy, Place
from training_common.digests import canonical_json
from training_common.store import tables as t
from training_common.store.database import Database

PAGE = 50
METRIC, DATASET = "gsm8k_exact_match", "gsm8k/validation"
BY_RESULT = Order(by=OrderBy.RESULT, metric=METRIC, dataset=DATASET)
DIGEST = f"sha256:{'d' * 64}"
# About what a manifest of Cognate has beside its name, results and sources.
FILLING = {"checks": [{"name": f"check_{n}", "value": n / 7, "detail": "must be > the threshold"} for n in range(40)]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A page: what it asks for, where it starts, and the query that one would write for it by hand."""

    wanted: Asked
    by_hand: str
    after: Callable[[random.Random], Place | None] = lambda chance: None


def fill(database: Database, versions: int) -> None:
    """Write versions as publications would. A tenth is of a second family; a few are pinned; results are in steps."""
    chance = random.Random(1)  # noqa: S311 - of made-up rows
    for start in range(1, versions + 1, 5000):
        rows, results, sources = [], [], []
        for number in range(start, min(start + 5000, versions + 1)):
            family = "cognate-50m" if number % 10 == 0 else "cognate-25m"
            named = (
                ["gsm8k"] + (["hotpotqa"] if number % 2 else []) + (["rare"] if number % (versions // 10) == 3 else [])
            )
            value = round(chance.random(), 2)  # a hundred values: most versions are equal to many others
            measured = [{"metric": METRIC, "dataset": DATASET, "value": value, "rows": 8}]
            body = {
                **FILLING,
                "architecture": {"name": "cognate_v1", "parameter_count": 24_998_668},
                "tokenizer_digest": DIGEST,
                "data": [{"name": name, "kind": "folder", "rows": 9, "digest": DIGEST} for name in named],
                "results": measured,
                "checks": [],
                "files": [],
                "training": {"steps": 1, "tokens": 512},
            }
            manifest = canonical_json({**body, "filling": FILLING, "name": f"{family}@{number}"})
            rows.append(
                {
                    "id": number,
                    "family": family,
                    "version": number,
                    "state": "EXPERIMENTAL" if number % 3 else "READY",
                    "digest": DIGEST,
                    "manifest": manifest,
                    "size_bytes": 100_000_000 + chance.randrange(1000),
                    "job": "jobs/x",
                    "create_us": number * 1_000_000,
                    "pinned": number % (versions // 20) == 7,
                }
            )
            results += [{"artifact_id": number, **one} for one in measured]
            sources += [{"artifact_id": number, "name": name, "digest": DIGEST} for name in named]
        with database.write() as connection:
            for table, values in ((t.artifacts, rows), (t.results, results), (t.sources, sources)):
                connection.execute(sa.insert(table), values)
    with database.engine.connect() as connection, connection.execution_options(isolation_level="AUTOCOMMIT"):
        if database.engine.dialect.name == "postgresql":  # its own housekeeping would do so within a minute
            connection.execute(sa.text("VACUUM ANALYZE"))


def cases(versions: int) -> dict[str, Case]:
    """Return every page that is measured."""
    plain = "SELECT a.* FROM artifacts a WHERE a.collect_us IS NULL"
    sourced = "SELECT a.* FROM sources s JOIN artifacts a ON a.id = s.artifact_id WHERE a.collect_us IS NULL"
    ranked = (
        "SELECT a.* FROM results r JOIN artifacts a ON a.id = r.artifact_id WHERE a.collect_us IS NULL "
        f"AND r.metric = '{METRIC}' AND r.dataset = '{DATASET}'"
    )
    window = versions // 3 * 1_000_000, versions // 3 * 1_000_000 + versions * 10_000
    newest, best = f"ORDER BY a.id DESC LIMIT {PAGE + 1}", f"ORDER BY r.value DESC, r.artifact_id DESC LIMIT {PAGE + 1}"

    def somewhere(chance: random.Random) -> Place:
        return Place(chance.randrange(versions // 10, versions))

    def ranked_place(chance: random.Random) -> Place:
        return Place(chance.randrange(1, versions), chance.randrange(20, 100) / 100)

    def sized_place(chance: random.Random) -> Place:
        return Place(chance.randrange(1, versions), 100_000_000 + chance.randrange(100, 1000))

    good = Bound(metric=METRIC, dataset=DATASET, at_least=0.5)
    return {
        "newest": Case(wanted=Asked(), by_hand=f"{plain} {newest}"),
        "newest, deep": Case(wanted=Asked(), by_hand=f"{plain} AND a.id < :id {newest}", after=somewhere),
        "family, deep": Case(
            wanted=Asked(ways=[search.of_family("cognate-50m")]),
            by_hand=f"{plain} AND a.family = 'cognate-50m' AND a.id < :id {newest}",
            after=somewhere,
        ),
        "data of half, deep": Case(
            wanted=Asked(ways=[search.trained_on(name="hotpotqa")]),
            by_hand=f"{sourced} AND s.name = 'hotpotqa' AND s.artifact_id < :id "
            f"ORDER BY s.artifact_id DESC LIMIT {PAGE + 1}",
            after=somewhere,
        ),
        "data of ten": Case(
            wanted=Asked(ways=[search.trained_on(name="rare")]),
            by_hand=f"{sourced} AND s.name = 'rare' ORDER BY s.artifact_id DESC LIMIT {PAGE + 1}",
        ),
        "result of half, deep": Case(
            wanted=Asked(bounds=[good]),
            by_hand=f"{plain} AND a.id < :id AND EXISTS (SELECT 1 FROM results r WHERE r.artifact_id = a.id "
            f"AND r.metric = '{METRIC}' AND r.dataset = '{DATASET}' AND r.value >= 0.5) {newest}",
            after=somewhere,
        ),
        "result of a hundredth": Case(
            wanted=Asked(bounds=[Bound(metric=METRIC, dataset=DATASET, at_least=0.999)]),
            by_hand=f"{ranked} AND r.value >= 0.999 {newest}",
        ),
        "by result": Case(wanted=Asked(order=BY_RESULT), by_hand=f"{ranked} {best}"),
        "by result, deep": Case(
            wanted=Asked(order=BY_RESULT),
            by_hand=f"{ranked} AND (r.value, r.artifact_id) < (:value, :id) {best}",
            after=ranked_place,
        ),
        "data of half by result, deep": Case(
            wanted=Asked(ways=[search.trained_on(name="hotpotqa")], order=BY_RESULT),
            by_hand=f"{ranked} AND (r.value, r.artifact_id) < (:value, :id) AND EXISTS (SELECT 1 FROM sources s "
            f"WHERE s.artifact_id = a.id AND s.name = 'hotpotqa') {best}",
            after=ranked_place,
        ),
        "by size, deep": Case(
            wanted=Asked(order=Order(by=OrderBy.SIZE)),
            by_hand=f"{plain} AND (a.size_bytes, a.id) < (:value, :id) "
            f"ORDER BY a.size_bytes DESC, a.id DESC LIMIT {PAGE + 1}",
            after=sized_place,
        ),
        "an old hundredth in time": Case(
            wanted=Asked(from_us=window[0], before_us=window[1]),
            by_hand=f"{plain} AND a.create_us >= {window[0]} AND a.create_us < {window[1]} "
            f"ORDER BY a.create_us DESC LIMIT {PAGE + 1}",
        ),
        "pinned": Case(
            wanted=Asked(ways=[search.pinned()]),
            by_hand=f"SELECT a.* FROM artifacts a WHERE a.pinned IS TRUE AND a.collect_us IS NULL {newest}",
        ),
    }


def measure(registry: ArtifactRegistry, case: Case, runs: int) -> dict[str, float]:
    """Return milliseconds of ours, and the ratio to the query by hand. Errors: AssertionError, if the two differ."""
    chance = random.Random(2)  # noqa: S311 - of places
    query = sa.text(case.by_hand).columns(*t.artifacts.columns)
    pairs = []
    for run in range(runs + 1):
        after = case.after(chance)
        start_s = time.perf_counter()
        page = search.page(registry, case.wanted, limit=PAGE, after=after)
        middle_s = time.perf_counter()
        with registry.database.read() as connection:
            values = {} if after is None else {"id": after.id, "value": after.value}
            asked = {name: value for name, value in values.items() if f":{name}" in case.by_hand}
            rows = [ArtifactRow(**row) for row in connection.execute(query, asked).mappings()]
        end_s = time.perf_counter()
        if [row.id for row in page.rows] != [row.id for row in rows[:PAGE]]:
            raise AssertionError("the two found different versions")
        if run:
            pairs.append(((middle_s - start_s) * 1e3, (end_s - middle_s) * 1e3))
    ours = sorted(mine for mine, _ in pairs)
    return {
        "p50_ms": round(statistics.median(ours), 3),
        "p95_ms": round(ours[int(0.95 * (len(ours) - 1))], 3),
        "ratio": round(median_ratio(pairs), 2),
    }


async def over_a_connection(folder: Path, runs: int) -> dict[str, float]:
    """Return milliseconds of ListModels with a filter and an order, as a client sees them."""
    request = model_pb2.ListModelsRequest(
        page_size=PAGE,
        filter=artifact_pb2.ArtifactFilter(data="hotpotqa"),
        order=artifact_pb2.ArtifactOrder(key=artifact_pb2.ORDER_KEY_RESULT, metric=METRIC, dataset=DATASET),
    )
    # Made-up rows name no bytes: each would be found damaged meanwhile, and told of in the log.
    unread = {"scrub_interval_hours": 0}
    async with running_cognate(folder, artifacts=unread) as server, AsyncCognateClient(server.address) as client:
        spent = []
        for _ in range(runs + 1):
            start_s = time.perf_counter()
            await client.models.ListModels(request)
            spent.append((time.perf_counter() - start_s) * 1e3)
    ours = sorted(spent[1:])
    return {"p50_ms": round(statistics.median(ours), 3), "p95_ms": round(ours[int(0.95 * (len(ours) - 1))], 3)}


@contextmanager
def stores(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the URL of each kind of store that is to be had."""
    found = {"sqlite": f"sqlite:///{folder / 'store.db'}"}
    if postgres._SPEC is None:
        yield found
        return
    server = postgres.PostgresServer()
    server.start()
    try:
        yield {**found, "postgresql": server.new_database()}
    finally:
        server.stop()


def main(versions: int, runs: int) -> None:
    """Measure, and print one JSON object in the last line."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, stores(Path(scratch)) as urls:
        folder = Path(scratch)
        for kind, url in urls.items():
            database = Database(url)
            database.upgrade(Path(migrations.__file__).parent)
            fill(database, versions)
            registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"))
            start_s = time.perf_counter()
            if search.adopt(registry):
                raise AssertionError("a version was not written down")
            found[kind] = {"start_s": round(time.perf_counter() - start_s, 3)}
            for name, case in cases(versions).items():
                found[kind][name] = measure(registry, case, runs)
            database.close()
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        rpc = asyncio.run(over_a_connection(folder, runs))
    pages = [case for kind in found.values() for case in kind.values() if isinstance(case, dict)]
    result = {
        "name": "registry",
        "value": statistics.median(page["p50_ms"] for page in pages),
        "unit": "ms",
        "yardstick": statistics.median(page["p50_ms"] / page["ratio"] for page in pages),
        "ratio": statistics.median(page["ratio"] for page in pages),
        "runs": runs,
        "slowest_p95_ms": max(page["p95_ms"] for page in pages),
        "versions": versions,
        "list_models": rpc,
        "stores": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, int(sys.argv[2]) if len(sys.argv) > 2 else 40)
