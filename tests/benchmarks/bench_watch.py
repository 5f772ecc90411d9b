"""Latency and memory of 1,000 concurrent watches of models on one Cognate service.

The service runs in a process of its own. Clients in another one watch over ten connections, and an event is published
now and then into the store, as a worker does. An event's latency is the time from its transaction's end until a watch
has it. The yardstick is the interval in which the service looks for new events: half of it is the least that a watch
can wait on average.
Usage: python tests/benchmarks/bench_watch.py [watches] [events]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from cognateforge.client import AsyncCognateClient
from cognateforge.exchange.v1 import model_pb2
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result
from tests.support.outbox import open_database, publish_rows
from training_common.jobs.hub import POLL_INTERVAL_S
from training_common.store.database import Database

CONNECTIONS = 10
TIMEOUT_S = 300.0


class Watches:
    """So many open watches, and what they have seen."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.arrivals: dict[int, list[float]] = {}
        self._all_here = asyncio.Event()
        self._wanted = 0

    def take(self, sequence: int) -> None:
        """Note that a watch has an event."""
        times = self.arrivals.setdefault(sequence, [])
        times.append(time.monotonic())
        if sequence == self._wanted and len(times) == self.count:
            self._all_here.set()

    async def everywhere(self, sequence: int) -> None:
        """Wait until every watch has an event."""
        self._wanted = sequence
        self._all_here.clear()
        if len(self.arrivals.get(sequence, ())) < self.count:
            async with asyncio.timeout(TIMEOUT_S):
                await self._all_here.wait()


async def watch(client: AsyncCognateClient, watches: Watches) -> None:
    """Watch the models over one stream."""
    async for frame in client.models.WatchModels(model_pb2.WatchModelsRequest(), timeout=TIMEOUT_S):
        if frame.HasField("event"):
            watches.take(frame.event.sequence)


@asynccontextmanager
async def watching(address: str, count: int) -> AsyncIterator[Watches]:
    """Yield open watches that all have the first event."""
    watches = Watches(count)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncCognateClient(address)) for _ in range(CONNECTIONS)]
        tasks = [asyncio.create_task(watch(clients[n % CONNECTIONS], watches)) for n in range(count)]
        try:
            await watches.everywhere(1)
            yield watches
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def measure(address: str, database: Database, count: int, events: int) -> tuple[list[float], int]:
    """Return every latency in seconds, and by how many bytes the service grew."""
    publish_rows(database, 1)
    [service] = [one for one in psutil.Process().children() if "cognate_server" in one.cmdline()]
    async with watching(address, CONNECTIONS):
        pass  # what the first calls load and compile is no watch's cost
    before_bytes = service.memory_info().rss
    latencies: list[float] = []
    async with watching(address, count) as watches:
        grown_bytes = service.memory_info().rss - before_bytes
        for sequence in range(2, events + 2):
            publish_rows(database, 1)
            published = time.monotonic()
            await watches.everywhere(sequence)
            latencies += [arrival - published for arrival in watches.arrivals[sequence]]
    return latencies, grown_bytes


def main(count: int, events: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-watch-") as name:
        folder = Path(name)
        limits = {"COGNATE_SERVER_LIMITS__MAX_CONCURRENT_RPCS": str(2 * count + 100)}
        with cognate_process(folder, None, **limits) as address:
            database = open_database(folder)
            try:
                latencies, grown_bytes = asyncio.run(measure(address, database, count, events))
            finally:
                database.close()
    cuts = statistics.quantiles(latencies, n=100)
    print_result(
        "watch",
        cuts[98] * 1000,
        POLL_INTERVAL_S * 1000,
        unit="ms",
        runs=events,
        watches=count,
        p50_ms=cuts[49] * 1000,
        kib_per_watch=grown_bytes / count / 1024,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 20)
