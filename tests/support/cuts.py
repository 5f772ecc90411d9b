"""Watches of a real Cognate service through proxies that reset their connections, as often as is asked for."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cognate_server import migrations
from cognateforge.client import AsyncCognateClient, CognateClient, ModelSnapshot
from tests.benchmarks.cognate_process import cognate_process
from tests.support.outbox import append_job_events, job_with_events, open_database, publish_rows
from tests.support.proxy import FaultyProxy
from training_common.store.database import Database

# Watchers of each kind: sync and asyncio, of the job and of the models.
EACH_KIND = 4
# Rows at the start, and how the history then grows while it is watched.
FIRST_ROWS = 100
GROWTH_ROWS, GROWTH_INTERVAL_S = 20, 0.05
# Some connections are reset at a byte instead of behind an event, in the midst of frames. HTTP/2's settings come
# before: a connection that dies earlier was none, and is made again after a longer pause.
_FIRST_CUT_BYTES, _LAST_CUT_BYTES = 200, 20_000
NEVER = 1 << 40


@dataclass
class Watcher:
    """One watch behind a proxy of its own, whose connection is reset after every few events that arrived."""

    proxy: FaultyProxy
    cuts: int
    pick: random.Random
    sequences: list[int] = field(default_factory=list)
    _until_cut: int = 1

    def take(self, sequence: int) -> bool:
        """Note an event, and return whether the watch goes on."""
        self.sequences.append(sequence)
        self._until_cut -= 1
        if self._until_cut <= 0:
            self.proxy.cut_all()
            self._until_cut = self.pick.randint(1, 3)
        return self.proxy.cut < self.cuts

    @property
    def lost(self) -> int:
        """Events below the last one that never came."""
        return len(set(range(1, self.sequences[-1] + 1)) - set(self.sequences))

    @property
    def doubled(self) -> int:
        """Events that came more than once, or too late."""
        return sum(later <= earlier for earlier, later in zip(self.sequences, self.sequences[1:], strict=False))


@dataclass(frozen=True, kw_only=True)
class CutResult:
    """What became of the events."""

    cuts: int
    events: int
    lost: int
    doubled: int
    seconds: float


def watch_through_cuts(folder: Path, *, cuts: int, seed: int = 0) -> CutResult:
    """Watch one job and the models with both clients until their connections were reset so many times in all."""
    pick = random.Random(seed)  # noqa: S311
    database = open_database(folder)
    database.upgrade(Path(migrations.__file__).parent)
    publish_rows(database, FIRST_ROWS)
    job = job_with_events(database, FIRST_ROWS, end=False)
    try:
        with cognate_process(folder) as address, _growing(database, job):
            watchers = [_watcher(address, -(-cuts // (4 * EACH_KIND)), pick) for _ in range(4 * EACH_KIND)]
            started = time.monotonic()
            try:
                _run(watchers, job)
            finally:
                for watcher in watchers:
                    watcher.proxy.close()
            seconds = time.monotonic() - started
    finally:
        database.close()
    return CutResult(
        cuts=sum(min(watcher.proxy.cut, watcher.cuts) for watcher in watchers),
        events=sum(len(watcher.sequences) for watcher in watchers),
        lost=sum(watcher.lost for watcher in watchers),
        doubled=sum(watcher.doubled for watcher in watchers),
        seconds=seconds,
    )


def _watcher(address: str, cuts: int, pick: random.Random) -> Watcher:
    after = [pick.choice((NEVER, NEVER, pick.randint(_FIRST_CUT_BYTES, _LAST_CUT_BYTES))) for _ in range(cuts)]
    proxy = FaultyProxy(int(address.rpartition(":")[2]), after_bytes=after)
    return Watcher(proxy, cuts, random.Random(pick.random()))  # noqa: S311


def _run(watchers: list[Watcher], job: str) -> None:
    quarter = len(watchers) // 4
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return run

    async def all_aio() -> None:
        async with asyncio.TaskGroup() as group:
            for place, watcher in enumerate(watchers[2 * quarter :]):
                group.create_task(_watch_aio(watcher, job if place < quarter else ""))

    threads = [threading.Thread(target=guarded(lambda: asyncio.run(all_aio())))]
    for place, watcher in enumerate(watchers[: 2 * quarter]):
        name = job if place < quarter else ""
        threads.append(threading.Thread(target=guarded(lambda w=watcher, n=name: _watch(w, n))))  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _watch(watcher: Watcher, job: str) -> None:
    with CognateClient(watcher.proxy.address) as client:
        if job:
            for frame in client.watch_job(job):
                if not watcher.take(frame.event.sequence):
                    return
        for news in client.watch_models():
            if isinstance(news, ModelSnapshot) or not watcher.take(news.sequence):
                return


async def _watch_aio(watcher: Watcher, job: str) -> None:
    async with AsyncCognateClient(watcher.proxy.address) as client:
        if job:
            async for frame in client.watch_job(job):
                if not watcher.take(frame.event.sequence):
                    return
        async with aclosing(client.watch_models()) as watch:
            async for news in watch:
                if isinstance(news, ModelSnapshot) or not watcher.take(news.sequence):
                    return


@contextmanager
def _growing(database: Database, job: str) -> Iterator[None]:
    """Let both histories grow while they are watched, as workers do: from another process than the server's."""
    ended = threading.Event()

    def grow() -> None:
        while not ended.wait(GROWTH_INTERVAL_S):
            publish_rows(database, GROWTH_ROWS)
            append_job_events(database, job, GROWTH_ROWS)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
