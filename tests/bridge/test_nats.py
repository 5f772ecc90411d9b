"""The bridge to NATS against a real server and a real Cognate service: nothing is lost or doubled over crashes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import nats
import pytest
import sqlalchemy as sa
from nats.js import JetStreamContext, api
from nats.js.client import JetStreamContext as Context

from cognateforge.bridge.nats import DEFAULT_SOURCE, NatsBridge, Told, connect
from cognateforge.client import AsyncCognateClient
from cognateforge.exceptions import ClientSetupError, UnavailableError
from tests.support.nats_server import NatsServer
from tests.support.outbox import DIGEST, open_database, publish_rows
from tests.support.servers import running_cognate
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry
from training_common.rpc.server import RunningServer
from training_common.store import tables as t
from training_common.store.database import Database

STREAM, SUBJECT = "COGNATE_MODELS", "cognate.models"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server of the test's own."""
    server = NatsServer(tmp_path / "nats")
    yield server
    server.kill()


@pytest.fixture
async def cognate_server_up(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A Cognate service."""
    async with running_cognate(tmp_path / "cognate") as running:
        yield running


@pytest.fixture
def database(cognate_server_up: RunningServer, tmp_path: Path) -> Iterator[Database]:
    """Its store, for publishing as workers do."""
    database = open_database(tmp_path / "cognate")
    yield database
    database.close()


@asynccontextmanager
async def jetstream(server: NatsServer) -> AsyncIterator[JetStreamContext]:
    """Yield a connection of the test's own."""
    client = await nats.connect(server.url)
    try:
        yield client.jetstream()
    finally:
        await client.close()


async def consume(server: NatsServer, count: int, *, of: int = 0) -> list[dict[str, Any]]:
    """Take so many events as a durable consumer does, each acknowledged with an answer.

    of: messages that the stream must hold; 0: those that are taken.
    """
    events: list[dict[str, Any]] = []
    async with jetstream(server) as stream:
        subscription: Context.PullSubscription = await stream.pull_subscribe(SUBJECT, durable="reader", stream=STREAM)
        while len(events) < count:
            for message in await subscription.fetch(min(100, count - len(events)), timeout=10):
                assert "application/cloudevents+json" == (message.headers or {})["Content-Type"]
                events.append(json.loads(message.data))
                await message.ack_sync()
        info = await stream.stream_info(STREAM)
    assert (of or count) == info.state.messages
    return events


async def bridged(
    server: NatsServer, address: str, count: int, *, stream: str = STREAM, give_up_after_s: float = 20.0
) -> list[Told]:
    """Run a bridge until it has published so many events."""
    told: list[Told] = []
    async with asyncio.timeout(60), connect(server.url) as context, AsyncCognateClient(address) as client:
        bridge = NatsBridge(context, stream=stream, subject=SUBJECT, give_up_after_s=give_up_after_s)
        async with aclosing(bridge.run(client)) as published:
            async for one in published:
                told.append(one)
                if len(told) == count:
                    break
    return told


def subjects(events: list[dict[str, Any]]) -> list[str]:
    """Return which models events tell of."""
    return [event["subject"] for event in events]


def names(count: int) -> list[str]:
    """Return the names of the first versions."""
    return [f"cognate-25m@{n}" for n in range(1, count + 1)]


async def test_an_event_is_a_cloud_event(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """CloudEvents 1.0 in structured JSON: every attribute that it must have, and the message as the contract's JSON."""
    publish_rows(database, 1)
    await bridged(server, cognate_server_up.address, 1)
    [event] = await consume(server, 1)
    data = event.pop("data")
    assert datetime.fromisoformat(event.pop("time")).tzinfo is not None
    assert event == {
        "specversion": "1.0",
        "id": "cognate-25m@1/published",
        "source": DEFAULT_SOURCE,
        "type": "cognateforge.exchange.v1.ModelPublished",
        "subject": "cognate-25m@1",
        "datacontenttype": "application/json",
        "sequence": "0000000000000000001",
    }
    assert ("cognate-25m@1", "MODEL_STATE_READY", DIGEST) == (data["name"], data["state"], data["tokenizer_digest"])


async def test_a_bridge_goes_on_where_the_stream_ends(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """It keeps nothing itself. Events carry their sequence, and messages an id for JetStream's deduplication."""
    publish_rows(database, 7)
    for _ in range(3):
        await bridged(server, cognate_server_up.address, 2)
    [last] = await bridged(server, cognate_server_up.address, 1)
    assert (7, "cognate-25m@7", False) == (last.stream_sequence, last.event.subject, last.duplicate)
    events = await consume(server, 7)
    assert (names(7), list(range(1, 8))) == (subjects(events), [int(event["sequence"]) for event in events])
    async with jetstream(server) as stream:
        again = await stream.publish(
            SUBJECT, b"x", headers={api.Header.MSG_ID: f"{DEFAULT_SOURCE}#cognate-25m@7/published"}
        )
    assert (True, 7) == (again.duplicate, again.seq)


async def test_changes_are_told_and_gone_on_behind(
    server: NatsServer, cognate_server_up: RunningServer, database: Database, tmp_path: Path
) -> None:
    """A collected model is told of; a bridge that stopped behind it goes on, also where only a snapshot is left."""
    publish_rows(database, 3)
    registry = ArtifactRegistry(database, BlobStore(tmp_path / "artifacts"))

    def change(version: int, kind: str) -> None:
        with database.write() as connection:
            row = registry.find("cognate-25m", version)
            assert row is not None
            registry.tell(connection, row.id, kind)
            if kind == "collected":
                connection.execute(sa.update(t.artifacts).filter_by(id=row.id).values(collect_us=1))

    change(1, "damaged")
    await bridged(server, cognate_server_up.address, 4)
    [*_, event] = await consume(server, 4)
    assert ("cognateforge.exchange.v1.ModelChanged", "cognate-25m@1/4", "cognate-25m@3") == (
        event["type"],
        event["id"],
        event["newestmodel"],
    )
    assert ("MODEL_CHANGE_DAMAGED", "cognate-25m@1") == (event["data"]["change"], event["data"]["model"]["name"])
    publish_rows(database, 2)
    change(3, "collected")
    registry.compact(keep=1, limit=100)
    await bridged(server, cognate_server_up.address, 2)
    assert ["cognate-25m@4", "cognate-25m@5"] == subjects(await consume(server, 2, of=6))


async def test_two_bridges_tell_each_event_once(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """A publish names the message that it follows, so one of them is always told to look again."""
    publish_rows(database, 60)
    address = cognate_server_up.address
    await bridged(server, address, 1)  # makes the stream
    tasks = [asyncio.create_task(bridged(server, address, 10_000)) for _ in range(2)]
    async with asyncio.timeout(30):
        events = await consume(server, 60)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert names(60) == subjects(events)


async def test_a_snapshot_stands_in_for_events_that_are_gone(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """Each model once, also when the bridge ends in the midst of the snapshot; then events with their sequence."""
    publish_rows(database, 60, keep=3)
    address = cognate_server_up.address
    await bridged(server, address, 25)
    await bridged(server, address, 35)
    publish_rows(database, 2)
    await bridged(server, address, 2)
    events = await consume(server, 62)
    assert names(62) == subjects(events)
    assert [0] * 59 + [60, 61, 62] == [int(event.get("sequence", "0")) for event in events]


async def test_a_bridge_that_compaction_overtook_tells_what_it_missed(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """The events are gone and the models are not: what the stream lacks comes out of a snapshot."""
    publish_rows(database, 5)
    await bridged(server, cognate_server_up.address, 5)
    publish_rows(database, 20, keep=2)
    await bridged(server, cognate_server_up.address, 20)
    assert names(25) == subjects(await consume(server, 25))


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"subjects": [SUBJECT, "other"]}, "it must have cognate.models and no other"),
        ({"subjects": [SUBJECT], "retention": api.RetentionPolicy.WORK_QUEUE}, "forgets messages"),
        ({"subjects": [SUBJECT], "max_age": 60}, "forgets messages"),
    ],
)
async def test_a_stream_that_cannot_be_a_memory_is_refused(
    server: NatsServer, cognate_server_up: RunningServer, config: dict[str, Any], refusal: str
) -> None:
    """Nothing is published to it, and the error says what it must be."""
    async with jetstream(server) as stream:
        await stream.add_stream(name=STREAM, **config)
    with pytest.raises(ClientSetupError, match=refusal):
        await bridged(server, cognate_server_up.address, 1)


async def test_a_stream_of_something_else_is_refused(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """A last message that is no event of this source, of a model that Cognate lacks, or that was purged."""
    publish_rows(database, 3, keep=1)
    async with jetstream(server) as stream:
        await stream.add_stream(name=STREAM, subjects=[SUBJECT])
        await stream.publish(SUBJECT, b"hello")
        with pytest.raises(ClientSetupError, match="the last message is no"):
            await bridged(server, cognate_server_up.address, 1)
        event = {
            "type": "cognateforge.exchange.v1.ModelPublished",
            "source": DEFAULT_SOURCE,
            "subject": "cognate-25m@9",
        }
        await stream.publish(SUBJECT, json.dumps(event).encode())
        with pytest.raises(ClientSetupError, match="is it another one"):
            await bridged(server, cognate_server_up.address, 1)
        await stream.purge_stream(STREAM)
        with pytest.raises(ClientSetupError, match="was emptied"):
            await bridged(server, cognate_server_up.address, 1)


async def test_a_server_that_stays_away_is_told(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """From the beginning, or in the midst: the patience is bounded. Plaintext goes to this machine only."""
    publish_rows(database, 2)
    async with connect(server.url) as context, AsyncCognateClient(cognate_server_up.address) as client:
        bridge = NatsBridge(context, stream=STREAM, subject=SUBJECT, give_up_after_s=0.5)
        published = bridge.run(client)
        await anext(published)
        server.kill()
        with pytest.raises(UnavailableError, match="NATS does not answer"):
            await anext(published)
    with pytest.raises(UnavailableError, match="no NATS server answers"):
        async with connect(server.url, give_up_after_s=0.5):
            pass
    with pytest.raises(ClientSetupError, match=r"plaintext to 10\.0\.0\.1 is refused"):
        async with connect("nats://10.0.0.1:4222"):
            pass


class BridgeProcess:
    """`forge models bridge` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, server: NatsServer, address: str) -> BridgeProcess:
        """Start it."""
        options = ["--nats", server.url, "--stream", STREAM, "--subject", SUBJECT, "--json"]
        command = ["-m", "cognateforge.cli", "models", "bridge", *options]
        environment = {**os.environ, "FORGE_COGNATE": address}
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, *command, stdout=asyncio.subprocess.PIPE, env=environment
            )
        )

    async def tell(self, count: int) -> list[dict[str, Any]]:
        """Return the next lines."""
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return [json.loads(await self._process.stdout.readline()) for _ in range(count)]

    async def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        await self._process.wait()


@pytest.mark.slow
async def test_nothing_is_lost_or_doubled_over_kills_of_both(
    server: NatsServer, cognate_server_up: RunningServer, database: Database
) -> None:
    """kill -9 of the bridge and of the NATS server, in turn, while models are published and a consumer reads."""
    pick = random.Random(5)  # noqa: S311
    total = 0
    for turn in range(6):
        publish_rows(database, 60)
        total += 60
        bridge = await BridgeProcess.start(server, cognate_server_up.address)
        await bridge.tell(pick.randint(1, 40))
        if turn % 2:
            server.kill()
            server.start()
            await bridge.tell(1)
        await bridge.kill()
    bridge = await BridgeProcess.start(server, cognate_server_up.address)
    async with jetstream(server) as stream:
        while (await stream.stream_info(STREAM)).state.messages < total:
            await bridge.tell(1)
    await bridge.kill()
    events = await consume(server, total // 2, of=total)
    server.kill()
    server.start()
    # The server writes acknowledgements down a moment later, so the last ones before a crash come again: with their id.
    known = {event["id"] for event in events}
    while len(known) < total:
        again = await consume(server, min(20, total - len(known)), of=total)
        events += [event for event in again if event["id"] not in known]
        known |= {event["id"] for event in again}
    assert (names(total), list(range(1, total + 1))) == (
        subjects(events),
        [int(event["sequence"]) for event in events],
    )
