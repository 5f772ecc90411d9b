"""One read for all watchers that want the same at the same moment: a thousand of them are woken by one event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from training_common.store.database import Database

T = TypeVar("T")


class SharedReads(Generic[T]):
    """Reads of a store that are shared while they run. Nothing is kept afterwards.

    A key must name everything that the result depends on, and the change that the reader was woken by: a read that
    began before it would not show it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._running: dict[Hashable, asyncio.Task[T]] = {}

    async def get(self, key: Hashable, work: Callable[[], T]) -> T:
        """Return the result of `work`, or of the one that runs for the key. Do not change it."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._database.run(work))
            task.add_done_callback(lambda done: self._end(key, done))
        # A watcher that leaves takes the read from nobody else.
        return await asyncio.shield(task)

    def _end(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._running[key]
        task.cancelled() or task.exception()  # looked at, for where every watcher has left
