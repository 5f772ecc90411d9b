"""Tells Cognate what descends from its models, until it knows: at least once, and in any order of restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from agent_server import descents, foundation
from cognateforge.exceptions import ForgeError, ModelNotFoundError, NotImplementedByServerError
from training_common.store.database import Database

log = structlog.get_logger(__name__)

# A job holds its model before it needs it, by a call of its own: what is told here may be some seconds late.
_TICK_S = 5.0
# Cognate may have been restored from a backup of a time before it was told.
_ALL_AGAIN_S = 86_400.0
# A server that stops waits for so long at most.
_CALL_S = 5.0
# Cognate may be updated while this service runs.
_ASK_AGAIN_S = 3600.0


class Teller:
    """Tells what the rows of `descents` say. It keeps nothing that a restart could lose."""

    def __init__(self, database: Database, link: foundation.CognateLink) -> None:
        self._database = database
        self._link = link
        self._away = False
        self._stopping = False
        self._not_before_s = 0.0
        self._all_again_s = time.monotonic()

    async def run(self) -> None:
        """Tell what is new, until cancelled. While Cognate is away it is tried again."""
        while True:
            work = asyncio.create_task(asyncio.to_thread(self.tick))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                self._stopping = True
                await asyncio.wait([work])  # its call must not outlive the connection
                raise
            except Exception as error:  # the store is away or busy
                log.warning("descent not told", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(_TICK_S)

    def tick(self) -> None:
        """Let go of what ended jobs held, and tell Cognate all that it does not know."""
        while descents.let_go_of_ended_jobs(self._database) == descents.BATCH:
            pass
        if time.monotonic() < self._not_before_s:
            return
        if time.monotonic() >= self._all_again_s:
            descents.tell_again(self._database)
            self._all_again_s = time.monotonic() + _ALL_AGAIN_S
        try:
            # What holds goes first: an agent before the job that has made it.
            for holds in (True, False):
                while not self._stopping and (rows := descents.untold(self._database, holds=holds)):
                    self._tell(rows, holds=holds)
                    descents.set_told(self._database, rows)
        except NotImplementedByServerError:
            self._not_before_s = time.monotonic() + _ASK_AGAIN_S
            log.warning("this Cognate knows no dependents: it may collect models that agents descend from")
        except ForgeError as error:
            if not self._away:
                log.warning("Cognate is not told what descends from its models", detail=error.message)
            self._away = True
        else:
            self._away = False

    def _tell(self, rows: Sequence[descents.Untold], *, holds: bool) -> None:
        told = [row.descent for row in rows]
        with self._link.client_within(_CALL_S) as client:
            if not holds:
                foundation.release(client, told)
                return
            try:
                foundation.register(client, told)
            except ModelNotFoundError:
                for one in told:  # all or nothing: the others must not wait for one that is gone
                    try:
                        foundation.register(client, [one])
                    except ModelNotFoundError as error:
                        log.warning("a foundation is gone", descendant=one.name, detail=error.message)
