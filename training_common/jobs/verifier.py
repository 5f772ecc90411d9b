"""Gives verifications a worker when a slot is free, and takes them from workers that are gone, for the scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from training_common.jobs.folders import verification_log_name
from training_common.jobs.life import SignsOfLife
from training_common.jobs.verifications import VerificationRow, VerificationStore
from training_common.settings import WorkerSettings
from training_common.store.database import now_us

if TYPE_CHECKING:
    from training_common.jobs.scheduler import Engine

log = structlog.get_logger(__name__)

# A verification that ended so many workers ends a further one too.
MOST_TRIES = 3


class Verifier:
    """Matches verifications and workers of one server."""

    def __init__(
        self,
        store: VerificationStore,
        engine: Engine,
        settings: WorkerSettings,
        *,
        settings_file: Path | None,
        server: str = "",
        may_start: Callable[[sa.Connection], bool] = lambda _connection: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """may_start: asked in the transaction that gives a replay a slot whether it may have one."""
        self._store = store
        self._engine = engine
        self._settings = settings
        self._settings_file = settings_file
        self._server = server
        self._may_start = may_start
        self._life = SignsOfLife(clock)
        # Handles of workers that have not registered yet, by verification and try.
        self._launched: dict[tuple[int, int], str] = {}

    def look(self) -> int:
        """Look at every verification that a worker holds, and return how many slots of this server's they use."""
        running = self._store.running()
        self._life.look((row.id, row.heartbeat_us) for row in running)
        self._launched = {key: handle for key, handle in self._launched.items() if key in set(map(_key, running))}
        for row in running:
            self._look_at(row)
        return sum(row.server == self._server for row in running)

    def end_all(self) -> None:
        """Take every verification from this server's workers: others begin it again."""
        for row in self._store.running():
            if row.server == self._server:
                self._give_up(row, "its server was stopped", kill=self._handle_of(row))

    def _look_at(self, row: VerificationRow) -> None:
        silent_s = self._life.silent_s(row.id)
        ours = row.server == self._server
        handle = self._handle_of(row)
        if ours and handle and not self._engine.alive(handle):
            self._give_up(row, self._engine.ending(handle).words)
        elif ours and not handle and now_us() - row.heartbeat_us > 1e6 * self._settings.start_timeout_s:
            # The server that was to start it ended over it. By the wall clock, as that one may end again and again.
            self._give_up(row, "its server ended before a worker had registered")
        elif ours and not row.handle and silent_s > self._settings.start_timeout_s:
            self._give_up(row, "no worker registered in time", kill=handle)
        elif silent_s > self._settings.silent_cut_s:
            self._give_up(row, f"no sign of life for {silent_s:.0f} s", kill=handle if ours else "")

    def _handle_of(self, row: VerificationRow) -> str:
        return row.handle or row.launched or self._launched.get(_key(row), "")

    def _give_up(self, row: VerificationRow, words: str, *, kill: str = "") -> None:
        if kill:
            self._engine.kill(kill)
        self._store.give_up(row, f"try {row.tries}: {words}", most_tries=MOST_TRIES)
        log.warning("verification lost its worker", verification=row.name, number=row.tries, detail=words)

    def start(self) -> bool:
        """Give the next verification a worker. Returns whether one was started."""
        claim = self._store.begin(self._server, may_start=self._may_start)
        if claim is None:
            return False
        row = claim.row
        arguments = ["--verify", row.name, "--attempt", str(row.tries)]
        if self._settings_file is not None:
            arguments += ["--settings", str(self._settings_file)]
        try:
            log_name = verification_log_name(claim.job.name, row.id)
            self._launched[_key(row)] = self._engine.launch(arguments, log_name=log_name, processes=1)
        except OSError as error:
            self._give_up(row, f"the worker could not be started: {error.strerror}")
            return False
        self._store.set_launched(row, self._launched[_key(row)])
        log.info("verification started", verification=row.name, job=claim.job.name, number=row.tries)
        return True


def _key(row: VerificationRow) -> tuple[int, int]:
    return row.id, row.tries
