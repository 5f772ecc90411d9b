"""Jobs whose workers are played by the test: it writes their logs."""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa

from training_common.attempt_log import open_log
from training_common.jobs.folders import log_name
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobStore
from training_common.store import tables as t
from training_common.store.database import Database


class PlayedWorker:
    """A worker of one job after another attempt. folder: the service's data_dir."""

    def __init__(self, folder: Path, *, job: str = "", server: str = "node-7:/srv/data") -> None:
        self.database = Database(f"sqlite:///{folder / 'store.db'}")
        self._folder, self._server = folder, server
        self.store = JobStore(self.database)
        if not job:
            with self.database.write() as connection:
                job = self.store.submit(connection, plan=b"", total_steps=9, caller="test").name
        self.job = job
        self.attempt: AttemptStore | None = None

    def begin(self) -> AttemptStore:
        """Begin the job's next attempt, whose log is there."""
        row = self.store.begin_attempt("local", self._server)
        assert row is not None
        assert row.name == self.job
        self.attempt = self.store.attempt(row.name, row.attempt, row.fencing_token)
        self.attempt.register("1:1")
        os.close(open_log(self.path))
        return self.attempt

    @property
    def path(self) -> Path:
        """The current attempt's log."""
        assert self.attempt is not None
        return self._folder / "jobs" / log_name(self.job, self.attempt.attempt.number)

    def write(self, text: str) -> None:
        """Write into the current attempt's log."""
        with self.path.open("a") as file:
            file.write(text)

    def lose(self) -> None:
        """Be lost: the job recovers."""
        held, attempt = self.store.held()[0]
        self.store.cut(held, attempt, message="lost")

    def end(self, *, ago_s: float = 0.0) -> None:
        """End the job, so many seconds ago."""
        assert self.attempt is not None
        self.attempt.move(JobState.FAILED)
        with self.database.write() as connection:
            for table, key in ((t.jobs, t.jobs.c.id), (t.attempts, t.attempts.c.job_id)):
                changed = {"end_us": table.c.end_us - round(1e6 * ago_s)}
                connection.execute(sa.update(table).where(key == self.attempt.job.id).values(**changed))
