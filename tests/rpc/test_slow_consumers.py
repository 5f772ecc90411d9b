"""A watcher that does not read costs the server a bounded amount, however much there is to tell, and loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2
from tests.support.outbox import job_with_events, open_database, publish_rows
from tests.support.servers import running_cognate

WATCHERS = 10
EVENTS = 20_000
# What gRPC lets a sender have on the way to one reader that does not read: its windows grow to about this.
WINDOW_BYTES = 6 << 20
# Batches and buffers of one stream, and noise of the process.
STREAM_BYTES, NOISE_BYTES = 2 << 20, 64 << 20


@dataclass
class Sent:
    """Counts the frames that the server makes, and tells when it makes no more."""

    moved: asyncio.Event = field(default_factory=asyncio.Event)
    frames: int = 0
    size_bytes: int = 0

    def counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return `make` with its results counted."""

        def counting(*args: Any) -> Any:
            frame = make(*args)
            self.frames += 1
            self.size_bytes += frame.ByteSize()
            self.moved.set()
            return frame

        return counting

    async def quiet(self) -> None:
        """Wait until nothing was made for a second."""
        while True:
            self.moved.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self.moved.wait()
            except TimeoutError:
                return


async def models(client: AsyncCognateClient, _job: str) -> AsyncIterator[int]:
    """Yield sequences of one stream of WatchModels."""
    async for frame in client.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=120):
        yield frame.event.sequence


async def job_events(client: AsyncCognateClient, job: str) -> AsyncIterator[int]:
    """Yield sequences of one stream of WatchJob."""
    async for answer in client.pretraining.WatchJob(pretraining_pb2.WatchJobRequest(name=job), timeout=120):
        yield answer.frame.event.sequence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("watch", "made_by"),
    [(models, "cognate_server.rpc.convert.event_frame"), (job_events, "training_common.rpc.convert.event")],
)
async def test_watchers_that_do_not_read_are_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Callable[[AsyncCognateClient, str], AsyncIterator[int]],
    made_by: str,
) -> None:
    """Ten of them: the server stops making frames early, its memory stays, and one that reads on gets every event."""
    sent = Sent()
    module, _, name = made_by.rpartition(".")
    monkeypatch.setattr(made_by, sent.counted(getattr(__import__(module, fromlist=[name]), name)))
    async with running_cognate(tmp_path) as server, AsyncExitStack() as stack:
        database = open_database(tmp_path)
        stack.callback(database.close)
        publish_rows(database, EVENTS, detail="x" * 480)
        job = job_with_events(database, EVENTS - 1, message="x" * 1900, end=False)
        before_bytes = psutil.Process().memory_info().rss
        streams = []
        for _ in range(WATCHERS):
            client = await stack.enter_async_context(AsyncCognateClient(server.address))
            streams.append(watch(client, job))
            assert 1 == await anext(streams[-1])
        await sent.quiet()
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
        all_bytes = WATCHERS * EVENTS * (sent.size_bytes // sent.frames)
        print(f"{sent.frames} frames, {sent.size_bytes >> 20} of {all_bytes >> 20} MiB, memory {grown_bytes >> 20} MiB")
        # The readers are in this process too, with what is on the way to them.
        bound_bytes = WATCHERS * (WINDOW_BYTES + STREAM_BYTES) + NOISE_BYTES
        assert all_bytes > 2 * bound_bytes, "nothing would be shown"
        assert sent.size_bytes < WATCHERS * WINDOW_BYTES
        assert grown_bytes < bound_bytes
        rest = [sequence async for sequence in _until(streams[0], EVENTS)]
        assert list(range(2, EVENTS + 1)) == rest


async def _until(stream: AsyncIterator[int], last: int) -> AsyncIterator[int]:
    async for sequence in stream:
        yield sequence
        if sequence == last:
            return
