"""The outbox over a real connection: compaction, snapshots, and positions that are no longer kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from cognateforge.client import AsyncCognateClient, ModelNews, ModelSnapshot
from cognateforge.exceptions import SequenceOutOfRangeError
from cognateforge.exchange.v1 import model_pb2
from tests.support.outbox import open_database, publish_rows
from tests.support.servers import running_cognate
from tests.support.waiting import until
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.outbox import compact_forever
from training_common.artifacts.registry import ArtifactRegistry
from training_common.rpc.server import RunningServer
from training_common.store.database import Database


@pytest.fixture
def database(cognate_server_up: RunningServer, tmp_path: Path) -> Iterator[Database]:
    """Connections of the test's own, as a worker has them."""
    database = open_database(tmp_path / "cognate")
    yield database
    database.close()


@pytest.fixture
def registry(database: Database, tmp_path: Path) -> ArtifactRegistry:
    """The registry over them."""
    return ArtifactRegistry(database, BlobStore(tmp_path / "cognate" / "artifacts"))


async def read(client: AsyncCognateClient, to: int, after: int = 0) -> list[ModelNews]:
    """Watch until a sequence."""
    seen: list[ModelNews] = []
    async with asyncio.timeout(20), aclosing(client.watch_models(after)) as news:
        async for one in news:
            seen.append(one)
            if (one.last_sequence if isinstance(one, ModelSnapshot) else one.sequence) >= to:
                break
    return seen


async def frames(client: AsyncCognateClient, after: int) -> AsyncIterator[model_pb2.WatchModelsResponse]:
    """Read one stream."""
    async for frame in client.models.WatchModels(model_pb2.WatchModelsRequest(after_sequence=after), timeout=20):
        yield frame


def names(count: int) -> list[str]:
    """Return the names of the first versions."""
    return [f"cognate-25m@{n}" for n in range(1, count + 1)]


async def test_a_compacted_outbox_begins_with_a_snapshot(
    cognate: AsyncCognateClient, database: Database, registry: ArtifactRegistry
) -> None:
    """Pages hold each model once, in order, at one sequence; the events go on after it, and the sequence too."""
    publish_rows(database, 120)
    assert 117 == registry.compact(keep=3, limit=1000)
    assert (118, 120) == (registry.oldest_sequence(), registry.newest_sequence())
    pages = []
    async for frame in frames(cognate, 0):
        pages.append(frame.snapshot)
        if not frame.snapshot.more:
            break
    assert [(50, 120, True), (50, 120, True), (20, 120, False)] == [
        (len(page.models), page.last_sequence, page.more) for page in pages
    ]
    publish_rows(database, 2)
    snapshot, *events = await read(cognate, to=122)
    assert isinstance(snapshot, ModelSnapshot)
    told = [model.name for model in snapshot.models] + [
        event.published.name for event in events if isinstance(event, model_pb2.ModelEvent)
    ]
    assert names(122) == told


async def test_what_is_published_meanwhile_is_told_once(
    cognate: AsyncCognateClient, database: Database, registry: ArtifactRegistry
) -> None:
    """A slow reader of a snapshot gets what is newer as events, whenever it was published."""
    publish_rows(database, 120)
    registry.compact(keep=3, limit=1000)
    told: list[str] = []
    async for frame in frames(cognate, 0):
        told += [model.name for model in frame.snapshot.models]
        if frame.HasField("event"):
            told.append(frame.event.published.name)
        if frame.HasField("snapshot"):
            publish_rows(database, 1)
        if len(told) == 123:
            break
    assert names(123) == told


@pytest.mark.parametrize("keep", [1, 7])
def test_snapshot_pages_are_of_one_sequence(registry: ArtifactRegistry, database: Database, keep: int) -> None:
    """Between two pages models are published and the outbox is compacted: the snapshot stays what it was."""
    publish_rows(database, 10)
    page = registry.snapshot_page(None, 4)
    found = [row.version for row in page.rows]
    while page.more:
        publish_rows(database, 1)
        registry.compact(keep=keep, limit=4)
        page = registry.snapshot_page(page, 4)
        found += [row.version for row in page.rows]
    assert (list(range(1, 11)), 10) == (found, page.sequence)


async def test_a_position_that_is_no_longer_kept_is_refused(
    cognate: AsyncCognateClient, database: Database, registry: ArtifactRegistry
) -> None:
    """The error tells the oldest sequence and the remedy; the position just before it is good."""
    publish_rows(database, 10)
    registry.compact(keep=4, limit=1000)
    with pytest.raises(SequenceOutOfRangeError, match="after_sequence 0, which begins with a snapshot") as caught:
        await read(cognate, to=10, after=5)
    assert {"oldest_sequence": "7"} == caught.value.metadata
    assert [7, 8, 9, 10] == [event.sequence for event in await read(cognate, to=10, after=6)]  # type: ignore[union-attr]
    with pytest.raises(SequenceOutOfRangeError) as beyond:
        await read(cognate, to=12, after=11)
    assert {"last_sequence": "10"} == beyond.value.metadata


async def test_a_watch_that_compaction_overtakes_is_told(
    cognate: AsyncCognateClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gap in the midst of a stream is an error, and never passed over."""
    monkeypatch.setattr("cognate_server.rpc.models._BATCH", 5)
    publish_rows(database, 5)
    seen: list[int] = []
    with pytest.raises(SequenceOutOfRangeError):
        async for frame in frames(cognate, 2):
            seen.append(frame.event.sequence)
            if seen == [3, 4, 5]:
                publish_rows(database, 5, keep=2)
    assert [3, 4, 5] == seen


async def test_the_standing_task_keeps_the_outbox_short(tmp_path: Path) -> None:
    """What is beyond outbox.keep_events goes at the server's start already; 0 keeps all."""
    for keep, oldest in ((0, 1), (3, 8)):
        settings: dict[str, Any] = {"outbox": {"keep_events": keep}}
        async with running_cognate(tmp_path / "cognate", **settings):
            database = open_database(tmp_path / "cognate")
            registry = ArtifactRegistry(database, BlobStore(tmp_path / "cognate" / "artifacts"))
            if not keep:
                publish_rows(database, 10)
            await until(lambda: registry.oldest_sequence() == oldest)  # noqa: B023 - awaited here
            database.close()


async def test_compaction_goes_in_steps_and_survives_a_store_that_is_away(
    registry: ArtifactRegistry, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transaction is long, and an error ends no server."""
    monkeypatch.setattr("training_common.artifacts.outbox._BATCH", 10)
    publish_rows(database, 95)
    steps: list[int] = []
    compact = registry.compact
    done = asyncio.Event()

    def counted(*, keep: int, limit: int) -> int:
        if not steps:
            steps.append(-1)
            raise OSError("the store is away")
        steps.append(compact(keep=keep, limit=limit))
        if not steps[-1]:
            loop.call_soon_threadsafe(done.set)
        return steps[-1]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(registry, "compact", counted)
    task = asyncio.create_task(compact_forever(registry, keep_events=70, interval_s=0.01))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    assert [-1, 10, 10, 5, 0] == steps
    assert (26, 95) == (registry.oldest_sequence(), registry.newest_sequence())
