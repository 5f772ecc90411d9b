"""WatchLogs: what the workers of a job write, read from the files that all servers of a store reach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cognateforge.exceptions import AttemptNotFoundError, LogGoneError, UnavailableError
from cognateforge.job.v1 import job_pb2
from training_common.attempt_log import AttemptLog, LogPart
from training_common.jobs.folders import jobs_dir, log_name
from training_common.jobs.states import FINAL
from training_common.jobs.store import AttemptRow, JobRow, JobStore
from training_common.masking import Mask, secrets_of, secrets_of_environment
from training_common.settings import ServiceSettings
from training_common.store.database import now_us

# A log that grows is looked at this often, and less and less often while it does not.
_POLL_S, _LONGEST_POLL_S = 0.1, 1.0
# A worker's last words come after its job's end: it says goodbye, and Python flushes.
_LAST_WORDS_S = 1.0
# A new file can be hidden from other machines for as long as they keep a folder's listing: 60 s is NFS's default.
_HIDDEN_S = 60.0
# Files may be on a machine that hangs: those who read logs then wait for each other, and nobody else does.
_READERS = 4
T = TypeVar("T")


class LogWatcher:
    """Follows the logs of jobs. root: the folder of all jobs' folders."""

    def __init__(self, store: JobStore, root: Path, *, mask: Mask, heartbeat_s: float) -> None:
        self._store = store
        self._root = root
        self._mask = mask
        self._heartbeat_s = heartbeat_s
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="log-read")

    async def watch(self, name: str, *, attempt: int, position: int, follow: bool) -> AsyncIterator[job_pb2.LogFrame]:
        """Yield what follows a position of an attempt's log, heartbeats, and the end frame.

        attempt: 0 means the newest. follow: go on, with later attempts too, until the job has ended.
        Errors: JobNotFoundError, AttemptNotFoundError, LogGoneError, OffsetOutOfRangeError, UnavailableError.
        """
        job = await self._store.database.run_brief(self._store.get, name)
        if attempt > job.attempt:
            raise AttemptNotFoundError(f"{name} has had {job.attempt} attempts, and no attempt {attempt}")
        attempt = attempt or job.attempt
        loop = asyncio.get_running_loop()
        quiet_since, wait_s, until = loop.time(), _POLL_S, None
        while True:
            job, part, ended = await self._run(self._look, name, attempt, position, follow)
            # What is there at first: a worker may write faster than a caller reads.
            until = part.size_bytes if until is None else until
            if part.next_position > position and (follow or position < until):
                yield _frame(attempt, position, part)
                position = part.next_position
                quiet_since, wait_s = loop.time(), _POLL_S
            elif follow and attempt < job.attempt:
                attempt, position = attempt + 1, 0
            elif not follow or (ended and job.state in FINAL):
                yield job_pb2.LogFrame(end=job_pb2.LogEnd(attempt=attempt, next_position=position))
                return
            else:
                await asyncio.sleep(min(wait_s, max(0.0, quiet_since + self._heartbeat_s - loop.time())))
                wait_s = min(2 * wait_s, _LONGEST_POLL_S)
                if loop.time() >= quiet_since + self._heartbeat_s:
                    yield job_pb2.LogFrame(heartbeat=job_pb2.LogHeartbeat(attempt=attempt, next_position=position))
                    quiet_since = loop.time()

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _look(self, name: str, attempt: int, position: int, follow: bool) -> tuple[JobRow, LogPart, bool]:
        """Return the job, what follows in its log, and whether the attempt's worker will say no more."""
        # The job is read before its log: what was written before its end is then among what is read.
        job = self._store.get(name)
        row = self._store.attempt_row(job.id, attempt)
        if row is None:  # before the first
            return job, LogPart(next_position=position), True
        end_us = row.end_us or job.end_us
        # Either way: a clock that was set back must not make it talk for hours.
        ended = attempt < job.attempt or (end_us is not None and abs(now_us() - end_us) >= 1e6 * _LAST_WORDS_S)
        log = AttemptLog(self._root / log_name(name, attempt))
        try:
            return job, log.read(position, mask=self._mask, ended=ended, partial=not follow), ended
        except FileNotFoundError:
            self._require_silence(job, row)
            return job, LogPart(next_position=position), ended
        except OSError as error:
            raise UnavailableError(
                f"the log of attempt {attempt} of {name} cannot be read now: {error.strerror}"
            ) from error

    @staticmethod
    def _require_silence(job: JobRow, row: AttemptRow) -> None:
        """Refuse a log that should be there: its worker has run."""
        if job.files_removed_us is not None:
            raise LogGoneError(f"retention has removed the files of {job.name}, which ended long ago")
        if not row.handle or now_us() - row.start_us < 1e6 * _HIDDEN_S:
            return
        host = row.server.partition(":")[0] or "an unnamed host"
        raise LogGoneError(
            f"the log of attempt {row.number} of {job.name} is not among this server's files; its worker ran on "
            f"{host}: ask the server there, or give all servers of the store the same shared_dir"
        )


def log_watcher(settings: ServiceSettings, store: JobStore) -> LogWatcher:
    """Return a service's watcher, which shows none of the secrets that its settings and its environment hold."""
    mask = Mask([*secrets_of(settings), *secrets_of_environment()])
    return LogWatcher(store, jobs_dir(settings), mask=mask, heartbeat_s=settings.heartbeat_frame_s)


def _frame(attempt: int, position: int, part: LogPart) -> job_pb2.LogFrame:
    if part.hole:
        gap = job_pb2.LogGap(attempt=attempt, position=position, next_position=part.next_position)
        return job_pb2.LogFrame(gap=gap)
    lines = [job_pb2.LogLine(position=line.position, text=line.text, continued=line.continued) for line in part.lines]
    return job_pb2.LogFrame(lines=job_pb2.LogLines(attempt=attempt, lines=lines, next_position=part.next_position))
