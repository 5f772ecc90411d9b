"""Watchers that want the same at the same moment share one read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from training_common.jobs.shared import SharedReads
from training_common.store.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Threads to read in."""
    database = Database(f"sqlite:///{tmp_path / 'store.db'}")
    yield database
    database.close()


async def test_a_read_is_shared_while_it_runs_and_not_after(database: Database) -> None:
    """Sixteen ask at once and one reads; another key, or a later moment, is another read."""
    gate, reads = threading.Event(), []

    def work() -> int:
        reads.append(gate.wait(10))
        return len(reads)

    shared: SharedReads[int] = SharedReads(database)
    asked = [asyncio.create_task(shared.get(("a", 1), work)) for _ in range(16)]
    await asyncio.sleep(0)  # all have asked
    other = asyncio.create_task(shared.get(("a", 2), work))
    gate.set()
    results = await asyncio.gather(*asked)
    await other
    assert (1, 2) == (len(set(results)), len(reads))
    assert 3 == await shared.get(("a", 1), work)


async def test_one_that_leaves_takes_the_read_from_nobody(database: Database) -> None:
    """The first who asked is cancelled; the second has the result. A failure reaches everybody, and is not kept."""
    gate, started = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> str:
        loop.call_soon_threadsafe(started.set)
        gate.wait(10)
        return "read"

    def fail() -> str:
        raise OSError("the store is away")

    shared: SharedReads[str] = SharedReads(database)
    first, second = (asyncio.create_task(shared.get("k", work)) for _ in range(2))
    await started.wait()
    first.cancel()
    gate.set()
    assert "read" == await second
    assert first.cancelled()
    failures = await asyncio.gather(*(shared.get("k", fail) for _ in range(3)), return_exceptions=True)
    assert [OSError] * 3 == [type(failure) for failure in failures]
    assert "read" == await shared.get("k", work)
