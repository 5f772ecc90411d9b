"""Wakes watchers when there is something new, with one cheap query for all of them.

Workers write events into the database from their own processes, so the server asks for the newest event's id a few
times a second while anybody watches. That works alike on every database and needs no channel besides it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from training_common.store.database import Database

log = structlog.get_logger(__name__)

# A watcher sees an event at most this much later; one query per interval is all it costs.
POLL_INTERVAL_S = 0.1


class ChangeHub:
    """Tells waiters that a growing number in the database has grown."""

    def __init__(self, database: Database, newest: Callable[[], int]) -> None:
        self._database = database
        self._newest = newest
        self._seen = 0
        self._waiters = 0
        self._changed = asyncio.Condition()
        self._wanted = asyncio.Event()

    async def wait(self, seen: int, timeout_s: float) -> int:
        """Return the newest number once it differs from `seen`, or `seen` after `timeout_s` seconds."""
        self._waiters += 1
        self._wanted.set()
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._seen != seen)
                return self._seen
        except TimeoutError:
            return seen
        finally:
            self._waiters -= 1

    async def run(self) -> None:
        """Ask and wake, until cancelled. A store that does not answer is asked again."""
        while True:
            if self._waiters == 0:
                self._wanted.clear()
                await self._wanted.wait()
            await self._ask()
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _ask(self) -> None:
        try:
            newest = await self._database.run(self._newest)
        except Exception as error:  # health tells of a store that is away; watches just wait
            log.warning("watch poll failed", error=type(error).__name__)
            return
        if newest != self._seen:
            async with self._changed:
                self._seen = newest
                self._changed.notify_all()
