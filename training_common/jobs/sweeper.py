"""Retention: removes what ended jobs leave behind once it is old enough. A job's own row stays for good.

Files go first marked, then removed: no checkpoint is told to be available whose files are about to go, and a sweep that
was cut is done again by the next. Servers that share a store may sweep at once: rows that another one holds are passed
over, and what is gone already is no error.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import structlog

from cognateforge.job.v1 import job_pb2
from training_common.jobs.age_clock import AgeClock
from training_common.jobs.folders import folder_name
from training_common.jobs.states import FINAL
from training_common.jobs.store import is_wanted
from training_common.settings import RetentionSettings
from training_common.store import tables as t
from training_common.store.database import Database, now_us

log = structlog.get_logger(__name__)

_DAY_US = 86_400 * 10**6
# Rows of one transaction: workers wait for the write lock meanwhile, a few milliseconds.
_BATCH = 1000
# Jobs that are looked up at once.
_JOBS = 100
_CHECKPOINTS, _VERIFICATIONS = "checkpoints", "verifications"


@dataclass(kw_only=True)
class Removed:
    """What was removed by this server since its start."""

    job_folders: int = 0
    size_bytes: int = 0
    events: int = 0
    request_ids: int = 0


class Sweeper:
    """Applies a service's retention. root: the folder of all jobs' folders.

    clock: microseconds since 1970, or None while nobody can tell; by default the wall clock, doubted when it jumps.
    """

    def __init__(
        self,
        database: Database,
        root: Path,
        settings: RetentionSettings,
        *,
        clock: Callable[[], int | None] | None = None,
    ) -> None:
        self._database = database
        self._root = root
        self._settings = settings
        self._clock = AgeClock(database) if clock is None else clock
        self._stop = threading.Event()
        self.removed = Removed()

    def message(self) -> job_pb2.Removed:
        """Return the counts as the contract tells them."""
        one = self.removed
        return job_pb2.Removed(
            job_folders=one.job_folders, size_bytes=one.size_bytes, events=one.events, request_ids=one.request_ids
        )

    async def run(self) -> None:
        """Sweep now and then, until cancelled. What cannot be removed is tried again by the next sweep."""
        try:
            while True:
                try:
                    await asyncio.to_thread(self.sweep)
                except Exception as error:  # the store is away or busy
                    log.warning("retention not applied", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(self._settings.sweep_interval_s)
        finally:
            self._stop.set()

    def sweep(self) -> None:
        """Remove all that is too old. Nothing has an age while the clock is in doubt."""
        before = Removed(**vars(self.removed))
        # Once for all: a clock that jumps from now on is doubted by the next sweep.
        now = self._clock()
        if now is not None:
            self._remove_old(now)
        self._remove_scratch()
        if self.removed != before:
            log.info("retention applied", **vars(self.removed))

    def _remove_old(self, now: int) -> None:
        settings = self._settings
        if settings.request_ids_days:
            request_cutoff = _cutoff(now, settings.request_ids_days)
            self._each_batch(lambda: self._remove_request_ids(request_cutoff))
        if settings.job_events_days:
            some_left = t.jobs.c.first_sequence < t.jobs.c.last_sequence
            self._each_job(some_left, _cutoff(now, settings.job_events_days), self._compact)
        # Where the folder of all jobs is not mounted, nothing is known about any.
        if settings.job_files_days and self._root.is_dir():
            some_left = t.jobs.c.files_removed_us.is_(None)
            self._each_job(some_left, _cutoff(now, settings.job_files_days), self._remove_files)

    def _each_batch(self, work: Callable[[], int]) -> None:
        while not self._stop.is_set() and work():
            pass

    def _each_job(self, condition: sa.ColumnElement[bool], cutoff: int, work: Callable[[int, str], None]) -> None:
        """Do some work for every job that ended before `cutoff` and fulfils a condition."""
        last = 0
        query = (
            sa.select(t.jobs.c.id, t.jobs.c.name)
            .where(_ended_before(cutoff), condition, t.jobs.c.id > sa.bindparam("last"))
            .order_by(t.jobs.c.id)
            .limit(_JOBS)
        )
        while True:
            with self._database.read() as connection:
                jobs = connection.execute(query, {"last": last}).all()
            for job_id, name in jobs:
                if self._stop.is_set():
                    return
                try:
                    work(job_id, name)
                except OSError as error:
                    log.warning("job folder not removed", job=name, error=error.strerror)
                last = job_id
            if len(jobs) < _JOBS:
                return

    def _remove_request_ids(self, cutoff: int) -> int:
        key = (t.requests.c.caller, t.requests.c.request_id)
        old = sa.select(*key).where(t.requests.c.create_us < cutoff).limit(_BATCH).with_for_update(skip_locked=True)
        with self._database.write() as connection:
            count = connection.execute(sa.delete(t.requests).where(sa.tuple_(*key).in_(old))).rowcount
        self.removed.request_ids += count
        return count

    def _compact(self, job_id: int, _name: str) -> None:
        """Remove a job's events but the last one, which tells how it ended."""
        self._each_batch(lambda: self._compact_some(job_id))

    def _compact_some(self, job_id: int) -> int:
        with self._database.write() as connection:
            query = sa.select(t.jobs.c.first_sequence, t.jobs.c.last_sequence).where(t.jobs.c.id == job_id)
            row = connection.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return 0
            first = min(row.last_sequence, row.first_sequence + _BATCH)
            old = (t.events.c.job_id == job_id) & (t.events.c.sequence < first)
            count = connection.execute(sa.delete(t.events).where(old)).rowcount
            connection.execute(sa.update(t.jobs).where(t.jobs.c.id == job_id).values(first_sequence=first))
        self.removed.events += count
        return count

    def _remove_files(self, job_id: int, name: str) -> None:
        """Remove a job's folder, but for checkpoints that are pinned. Errors: OSError.

        While the job is being verified nothing goes: a replay reads more than checkpoints.
        """
        kept = self._give_up_checkpoints(job_id)
        if kept is None:
            return
        folder = self._root / folder_name(name)
        if kept:
            for path in sorted(folder.iterdir()):
                for one in sorted(path.iterdir()) if path.name == _CHECKPOINTS else [path]:
                    if one.name not in kept:
                        self._remove(one)
            return
        self._remove(folder)
        with self._database.write() as connection:
            ours = sa.update(t.jobs).where(t.jobs.c.id == job_id, t.jobs.c.files_removed_us.is_(None))
            self.removed.job_folders += connection.execute(ours.values(files_removed_us=now_us())).rowcount

    def _remove_scratch(self) -> None:
        """Remove folders of replays that have ended. One whose worker was killed does not do so itself."""
        root = self._root.parent / _VERIFICATIONS
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            query = sa.select(t.verifications.c.end_us).filter_by(name=f"{_VERIFICATIONS}/{folder.name}")
            with self._database.read() as connection:
                row = connection.execute(query).first()
            if row is not None and row.end_us is not None and not self._stop.is_set():
                self._remove(folder)

    def _give_up_checkpoints(self, job_id: int) -> Collection[str] | None:
        """Tell that a job's checkpoints are gone, but for pinned ones, and return the folders of those.

        None: another server is at it, or the job is being verified.
        """
        verified = sa.exists().where(t.verifications.c.job_id == t.jobs.c.id, t.verifications.c.end_us.is_(None))
        with self._database.write() as connection:
            query = sa.select(t.jobs.c.id).where(t.jobs.c.id == job_id, ~verified).with_for_update(skip_locked=True)
            if connection.execute(query).first() is None:
                return None
            mine = (t.checkpoints.c.job_id == job_id) & t.checkpoints.c.available
            connection.execute(sa.update(t.checkpoints).where(mine, ~is_wanted()).values(available=False))
            return frozenset(connection.execute(sa.select(t.checkpoints.c.folder).where(mine)).scalars())

    def _remove(self, path: Path) -> None:
        """Remove a file, or a folder and what is in it, and count the bytes. What is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                for below in sorted(path.iterdir()):
                    self._remove(below)
                path.rmdir()
            else:
                size_bytes = path.lstat().st_size
                path.unlink()
                self.removed.size_bytes += size_bytes


def _cutoff(now: int, days: float) -> int:
    return now - round(days * _DAY_US)


def _ended_before(cutoff: int) -> sa.ColumnElement[bool]:
    return t.jobs.c.state.in_([state.value for state in FINAL]) & (t.jobs.c.end_us < cutoff)
