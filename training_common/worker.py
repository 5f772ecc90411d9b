"""The worker process: one attempt at one job, from its registration to its last write.

    python -m <service>.worker --settings FILE --job jobs/... --attempt N --token N

It writes to the service's store itself, always under its fencing token, so it needs no server to go on. A thread beats
and learns what the owner wishes. The exit status is 0 whenever the store tells what became of the attempt.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import sqlalchemy as sa
import structlog

from cognateforge.exceptions import ForgeError, IllegalTransitionError
from training_common import logs
from training_common.attempt import (
    Attempt,
    AttemptStopped,
    AttemptWaits,
    CheckpointRef,
    FencedOutError,
    Json,
    StopKind,
)
from training_common.checkpoint_writer import CheckpointWriter
from training_common.checkpoints import CheckpointFolder
from training_common.devices import take_devices
from training_common.engines.local import EX_TEMPFAIL, own_handle
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobStore, note_of, past_finish_by
from training_common.retention import Retention
from training_common.settings import ServiceSettings
from training_common.store.database import Database

log = structlog.get_logger(__name__)
# A store that was away for an hour is not coming back by itself: the worker ends then, and its checkpoint stays.
_STORE_PATIENCE_S = 3600.0
# Full, out of something, or gone for the moment: what another attempt, later or elsewhere, need not meet again.
_PLATFORM_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EROFS,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.ETIMEDOUT,
    }
)
S = TypeVar("S", bound=ServiceSettings)


class WorkerAttempt(Attempt):
    """The `Attempt` of a trainer, over the store."""

    def __init__(self, store: AttemptStore, *, workdir: Path, saves_in_background: bool = False) -> None:
        self.store = store
        self._workdir = workdir
        self._stop: StopKind | None = None
        workdir.mkdir(parents=True, exist_ok=True)
        self._checkpoints = CheckpointFolder(workdir / "checkpoints", store)
        self._writer = CheckpointWriter(self._checkpoints, background=saves_in_background)

    @property
    def job(self) -> str:
        return self.store.job.name

    @property
    def workdir(self) -> Path:
        return self._workdir

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        self._writer.check()
        payload: dict[str, Json] = {"step": step, "total_steps": total_steps, "metrics": _finite(metrics)}
        self.store.progress(step=step, payload=payload)

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        facts = {key: str(value)[:500] for key, value in payload.items() if key != "message"}
        self.store.append("note", note_of(kind, str(payload.get("message", "")), facts))

    def trained(self) -> None:
        self.settle()
        self.move(JobState.VALIDATING)

    def stop_requested(self) -> StopKind | None:
        self._writer.check()
        return self._stop

    def keep(self, retention: Retention) -> None:
        """Apply this retention from the next checkpoint on."""
        self._checkpoints.retention = retention

    @property
    def saves_in_background(self) -> bool:
        return self._writer.background

    def save_checkpoint(
        self, *, step: int, write: Callable[[Path], None], score: float | None = None
    ) -> Future[CheckpointRef]:
        return self._writer.save(step=step, write=write, score=score)

    def settle(self) -> None:
        """Wait until the newest checkpoint is durable. Errors: those of its save."""
        self._writer.settle()

    def close(self) -> None:
        """Wait until nothing is being written any more."""
        self._writer.close()

    def latest_checkpoint(self) -> CheckpointRef | None:
        return self._checkpoints.latest()

    def move(self, to: JobState, *, message: str = "") -> None:
        """Move the job on. Errors: AttemptStopped, when its owner wished for a stop meanwhile; FencedOutError."""
        with self.moving():
            self.store.move(to, message=message)

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Turn a move that the owner's wish made illegal into the stop that was wished for."""
        try:
            yield
        except IllegalTransitionError:
            wish = self.store.heartbeat()
            if wish:
                raise AttemptStopped(StopKind(wish)) from None
            raise

    @contextlib.contextmanager
    def beating(self, interval_s: float) -> Iterator[None]:
        """Give signs of life from a thread while the body runs, and turn the owner's wish into a stop."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(interval_s):
                try:
                    wish = self.store.heartbeat()
                except FencedOutError:
                    self._stop = StopKind.REVOKED
                    return
                except sa.exc.OperationalError as error:  # the store is busy or away: the next beat tries again
                    log.warning("heartbeat failed", error=str(error.orig))
                    continue
                if wish:
                    self._stop = StopKind(wish)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _finite(metrics: Mapping[str, Json]) -> dict[str, Json]:
    """Leave out what is not a number: it was not measured, and JSON cannot carry it."""
    return {name: value for name, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}


@dataclass(frozen=True, kw_only=True)
class WorkerContext(Generic[S]):
    """What a service's own part of the worker gets."""

    settings: S
    database: Database
    attempt: WorkerAttempt
    job_dir: Path


def job_dir(settings: ServiceSettings, job_name: str) -> Path:
    """Return the folder of one job: checkpoints, scratch files, logs."""
    return settings.files_dir / "jobs" / job_name.removeprefix("jobs/")


def main(
    argv: list[str], *, load_settings: Callable[[Path | None], S], work: Callable[[WorkerContext[S]], None]
) -> int:
    """Run one attempt. `work` prepares, trains, validates and publishes; it ends with the job SUCCEEDED."""
    parser = argparse.ArgumentParser(description="Runs one attempt at one job. Started by the server.")
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--token", type=int, required=True)
    parser.add_argument("--threads", type=int, help="instead of the setting, for instance on borrowed capacity")
    options = parser.parse_args(argv)
    logs.configure()
    structlog.contextvars.bind_contextvars(job=options.job, attempt=options.attempt)
    settings = load_settings(options.settings)
    if options.threads is not None:
        workers = settings.workers.model_copy(update={"threads": options.threads})
        settings = settings.model_copy(update={"workers": workers})
    database = Database(settings.database_url, patience_s=_STORE_PATIENCE_S)
    try:
        store = JobStore(database).attempt(options.job, options.attempt, options.token)
        store.register(own_handle())
        folder = job_dir(settings, options.job)
        in_background = settings.workers.checkpoints == "async"
        attempt = WorkerAttempt(store, workdir=folder, saves_in_background=in_background)
        context = WorkerContext(settings=settings, database=database, attempt=attempt, job_dir=folder)
        with attempt.beating(settings.workers.heartbeat_interval_s):
            _run(context, work)
    except FencedOutError as error:
        log.warning("fenced out", detail=str(error))
    finally:
        database.close()
    return 0


def _run(context: WorkerContext[S], work: Callable[[WorkerContext[S]], None]) -> None:
    store = context.attempt.store
    started = time.monotonic()
    try:
        _work_or_wait(context, work)
    except AttemptStopped:
        # The wish may have changed since the trainer saw it, for instance from pause to cancel: the newest one counts.
        wish = store.heartbeat()
        if wish == StopKind.CANCEL:
            store.move(JobState.CANCELLED, message="cancelled on request")
        elif wish == StopKind.DEADLINE:
            failure = past_finish_by(store.job)
            store.move(JobState.FAILED, message=failure["failure_message"], **failure)
        elif wish == StopKind.YIELD:
            why = "gave borrowed capacity back" if store.job.lease else "made room for another job"
            store.move(JobState.RECOVERING, message=f"{why}; goes on from its checkpoint")
        else:
            store.move(JobState.PAUSED, message="paused")
    except FencedOutError:
        raise
    except ForgeError as error:
        log.error("job failed", reason=error.reason_name(), detail=error.message)
        _fail(store, error.reason_name(), error.message)
    except Exception as error:
        fault = _platform_fault(error)
        if fault:
            # The process ends, and the scheduler gives the job another worker.
            log.exception("attempt ended by the platform")
            with contextlib.suppress(sa.exc.OperationalError):
                context.attempt.event("platform", {"message": f"{fault}; another attempt will go on"})
            raise SystemExit(EX_TEMPFAIL) from error
        # The detail stays in the worker's log: error text of libraries may hold paths and data.
        log.exception("job failed by an unexpected error")
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        _fail(store, "INTERNAL", f"{type(error).__name__} at {place}; the worker's log has the detail")
    log.info("attempt ended", seconds=round(time.monotonic() - started, 1))


def _work_or_wait(context: WorkerContext[S], work: Callable[[WorkerContext[S]], None]) -> None:
    try:
        take_devices(context.settings.workers, job=context.attempt.job)
        work(context)
    except AttemptWaits as wait:
        with context.attempt.moving():
            job = context.attempt.store.wait(wait)
        log.info("attempt waits", what=wait.what, detail=wait.message, state=job.state.value)
    except AttemptStopped as stop:
        if stop.kind.saves:
            context.attempt.settle()
        raise
    finally:
        # Whatever the job becomes, no checkpoint is recorded after it.
        context.attempt.close()


def _platform_fault(error: Exception) -> str:
    """Return what of this machine ended the attempt through no fault of its job, or nothing.

    A file that is missing or may not be read is no such fault: it would be missing for the next attempt too.
    """
    if isinstance(error, sa.exc.OperationalError):
        return "the store did not answer in time"
    if isinstance(error, OSError) and error.errno in _PLATFORM_ERRNOS:
        return f"the worker's machine failed it: {error.strerror}"
    return ""


def _fail(store: AttemptStore, reason: str, message: str) -> None:
    store.move(JobState.FAILED, message=message, failure_reason=reason, failure_message=message[:2000])


def run(load_settings: Callable[[Path | None], S], work: Callable[[WorkerContext[S]], None]) -> None:
    """Run `main` on the process's arguments and exit."""
    sys.exit(main(sys.argv[1:], load_settings=load_settings, work=work))
