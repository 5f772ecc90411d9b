"""The worker process: one attempt at one job, from its registration to its last write.

    python -m <service>.worker --settings FILE --job jobs/... --attempt N --token N
    python -m <service>.worker --settings FILE --verify verifications/... --attempt N

It writes to the service's store itself, always under its fencing token, so it needs no server to go on. A thread beats
and learns what the owner wishes. The exit status is 0 whenever the store tells what became of the attempt.

Where a launcher has started several processes, the first of them is the worker, and the others assist it: they compute,
and write nothing but the failure of a job by an error of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import sqlalchemy as sa
import structlog

from cognateforge.cli.plain import to_plain
from cognateforge.exceptions import ForgeError, IllegalTransitionError
from cognateforge.masking import Redactor
from training_common import faults, logs
from training_common.artifacts.places import StoreAwayError
from training_common.artifacts.signing import SigningKeyError, signer_of
from training_common.attempt import (
    Attempt,
    AttemptStopped,
    AttemptWaits,
    CheckpointRef,
    FencedOutError,
    Json,
    PartDone,
    StopKind,
    TeamBrokenError,
)
from training_common.attempt_log import kept_bounded
from training_common.checkpoint_writer import CheckpointWriter
from training_common.checkpoints import CheckpointFolder
from training_common.devices import take_devices
from training_common.digests import files_under
from training_common.engines.processes import EX_TEMPFAIL, end_with_parent, exit_at_once, own_handle, parent_handle
from training_common.exporters import NO_EXPORTS, Exports, RunInfo
from training_common.jobs.folders import job_dir, jobs_dir, log_name, scratch_dir, verification_log_name
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobStore, Loss, note_of, past_finish_by
from training_common.jobs.verifications import VerificationStore
from training_common.leftovers import end_leftovers
from training_common.masking import secrets_of, secrets_of_environment
from training_common.retention import Retention
from training_common.settings import ServiceSettings
from training_common.store.database import Database
from training_common.telemetry.attempt_trace import AttemptTrace, tracing

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from training_common.team import Team

log = structlog.get_logger(__name__)
# A store that was away for an hour is not coming back by itself: the worker ends then, and its checkpoint stays.
_STORE_PATIENCE_S = 3600.0
# Where a job waits until its files can be written again.
_STORAGE = "storage"
# Where it waits until what it makes can be signed.
_SIGNING_KEY = "signing key"
# What has to fit where nobody knows yet how large a checkpoint is.
_LEAST_ROOM_BYTES = 1 << 20
_CHECKPOINTS = "checkpoints"
# The fact of a job that tells how much has to fit before it is tried again.
_ROOM_FACT = "room_bytes"
# What the interpreter's own end may take.
_END_S = 10.0
S = TypeVar("S", bound=ServiceSettings)


class WorkerAttempt(Attempt):
    """The `Attempt` of a trainer, over the store."""

    # Who hears of progress and events beside the store. A replay tells nobody.
    exports: Exports = NO_EXPORTS

    def __init__(
        self,
        store: AttemptStore,
        *,
        workdir: Path,
        saves_in_background: bool = False,
        trace: AttemptTrace | None = None,
    ) -> None:
        self.store = store
        self._trace = trace or AttemptTrace()
        self._workdir = workdir
        self._stop: StopKind | None = None
        workdir.mkdir(parents=True, exist_ok=True)
        self._checkpoints = CheckpointFolder(workdir / _CHECKPOINTS, store)
        self._writer = CheckpointWriter(self._checkpoints, background=saves_in_background)

    @property
    def job(self) -> str:
        return self.store.job.name

    @property
    def workdir(self) -> Path:
        return self._workdir

    def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Json]) -> None:
        self._writer.check()
        measured = _finite(metrics)
        self.store.progress(step=step, payload={"step": step, "total_steps": total_steps, "metrics": measured})
        self.exports.log(step, measured)

    def event(self, kind: str, payload: Mapping[str, Json]) -> None:
        facts = {key: str(value)[:500] for key, value in payload.items() if key != "message"}
        message = str(payload.get("message", ""))
        self.store.append("note", note_of(kind, message, facts))
        self.exports.event(kind, message, facts)

    def trained(self) -> None:
        self.settle()
        self.move(JobState.VALIDATING)

    def stop_requested(self) -> StopKind | None:
        self._writer.check()
        return self._stop

    def require_storage(self) -> None:
        """Make sure that a checkpoint fits, and that those of before are there. Errors: AttemptWaits."""
        self._checkpoints.require_present()
        newest = next((row.size_bytes for row in self.store.checkpoints()), 0)
        # What an attempt before this one has left of its product is written over.
        beyond = int(self.store.job.facts.get(_ROOM_FACT, 0)) - self._made_bytes()
        room_bytes = max(newest, _LEAST_ROOM_BYTES, beyond)
        probe = self._workdir / f".room.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room_bytes)
                os.fsync(file.fileno())
        except OSError as error:
            if not faults.of_storage(error):
                raise
            message = f"{error.strerror}: {room_bytes} bytes for a checkpoint or a product cannot be written"
            raise AttemptWaits(_STORAGE, message=message) from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def remember_room(self) -> None:
        """Let the next attempt begin when twice of what this one could write beside its checkpoints fits.

        How large the product would have become is not known.
        """
        with contextlib.suppress(sa.exc.OperationalError):  # the store may be on the same full disk
            self.store.set_facts({_ROOM_FACT: str(2 * self._made_bytes())})

    def _made_bytes(self) -> int:
        folders = [path for path in self._workdir.iterdir() if path.is_dir() and path.name != _CHECKPOINTS]
        return sum(file.stat().st_size for folder in folders for file in files_under(folder))

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
        latest = self._checkpoints.latest()
        # A trainer asks once, to go on from there.
        self.exports.begin(0 if latest is None else latest.step)
        return latest

    def move(self, to: JobState, *, message: str = "") -> None:
        """Move the job on. Errors: AttemptStopped, when its owner wished for a stop meanwhile; FencedOutError."""
        with self.moving():
            self.store.move(to, message=message)
        self._trace.begin_phase(to)

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
    """What a service's own part of the worker gets. team: the processes of the worker, None of one alone."""

    settings: S
    database: Database
    attempt: WorkerAttempt
    job_dir: Path
    team: Team | None = None


@dataclass(frozen=True, kw_only=True)
class AssistantContext(Generic[S]):
    """What a service's own part of the worker gets in every process but the first. plan: the job's."""

    settings: S
    plan: bytes
    job: str
    job_dir: Path
    team: Team


Work = Callable[[WorkerContext[S]], None]
Assist = Callable[[AssistantContext[S]], None]


def main(
    argv: list[str],
    *,
    load_settings: Callable[[Path | None], S],
    work: Work[S],
    assist: Assist[S] | None = None,
    plan_type: type[Message] | None = None,
) -> int:
    """Run one attempt. `work` prepares, trains, validates and publishes; it ends with the job SUCCEEDED.

    plan_type: what a job's plan is, for exporters that show it.
    assist: takes part in the training of `work` in every process but the first.
    """
    parser = argparse.ArgumentParser(description="Runs one attempt at one job. Started by the server.")
    parser.add_argument("--settings", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--job")
    what.add_argument("--verify", help="a verification: its job's steps are replayed")
    parser.add_argument("--attempt", type=int, required=True, help="of the job, or of the verification")
    parser.add_argument("--token", type=int, default=0)
    parser.add_argument("--threads", type=int, help="instead of the setting, for instance on borrowed capacity")
    parser.add_argument("--handle", help="by which the engine knows this worker, where it is no process of its host")
    options = parser.parse_args(argv)
    settings = load_settings(options.settings)
    logs.configure(secrets=secrets_of(settings))
    structlog.contextvars.bind_contextvars(
        **({"job": options.job} if options.job else {"verification": options.verify}), attempt=options.attempt
    )
    if options.threads is not None:
        workers = settings.workers.model_copy(update={"threads": options.threads})
        settings = settings.model_copy(update={"workers": workers})
    is_launched = _is_launched()
    if is_launched:
        end_with_parent(os.getppid())
    database = Database(settings.database_url, patience_s=_STORE_PATIENCE_S)
    try:
        if options.verify:
            _verify(options.verify, options.attempt, options.handle or own_handle(), settings, database, work)
            return 0
        store = JobStore(database).attempt(options.job, options.attempt, options.token)
        rank = os.environ["RANK"] if is_launched else "0"
        with tracing(settings) as trace, trace.of(store, rank=rank):
            if rank == "0":
                # The launcher lives as long as all of its processes do.
                handle = options.handle or (parent_handle() if is_launched else own_handle())
                if not store.register(handle):
                    return _leave_to_another(store, settings)
                return _lead(store, settings, database, work, trace, plan_type)
            if assist is None:
                raise ValueError("this worker trains in one process only")
            _assist(store, settings, assist, trace)
    except FencedOutError as error:
        log.warning("fenced out", detail=str(error))
    except sa.exc.OperationalError as error:
        # Before or after the work itself: a store that is full or away is no fault of the job.
        log.warning("the store cannot be used", detail=str(error.orig))
        return EX_TEMPFAIL
    finally:
        database.close()
    return 0


def _leave_to_another(store: AttemptStore, settings: ServiceSettings) -> int:
    """End an attempt that was begun before, and return the exit status.

    The job goes on in a new one, whose fencing token shuts out whatever is left of this one. No retry is counted. It
    counts as ended from outside: a job that ends each of its workers would otherwise be started anew for ever.
    """
    number = store.attempt.number
    log.warning("attempt was begun before")
    message = f"attempt {number}: its worker was ended and started anew"
    most = settings.workers.kills_without_progress
    JobStore(store.database).cut(store.job, store.attempt, message=message, loss=Loss.KILLED, most=most, lost=True)
    return EX_TEMPFAIL if _is_launched() else 0


def _lead(
    store: AttemptStore,
    settings: S,
    database: Database,
    work: Work[S],
    trace: AttemptTrace,
    plan_type: type[Message] | None,
) -> int:
    """Work on an attempt in its first process, and return the exit status."""
    name, is_launched = store.job.name, _is_launched()
    folder = job_dir(settings, name)
    with kept_bounded(jobs_dir(settings) / log_name(name, store.attempt.number), settings.logs):
        attempt = _open(store, folder, in_background=settings.workers.checkpoints == "async", trace=trace)
        if attempt is None:
            # Others of the team would wait for this process: its end by a fault ends them too.
            return EX_TEMPFAIL if is_launched else 0
        with (
            attempt.beating(settings.workers.heartbeat_interval_s),
            _exporting(attempt, settings, plan_type),
            _ending(store, trace, leads=True),
        ):
            team = _join(settings) if is_launched else None
            context = WorkerContext(settings=settings, database=database, attempt=attempt, job_dir=folder, team=team)
            _run(context, work)
    return 0


def _open(store: AttemptStore, folder: Path, *, in_background: bool, trace: AttemptTrace) -> WorkerAttempt | None:
    """Return the attempt with its folder, or None: then its job waits until the folder can be written."""
    try:
        return WorkerAttempt(store, workdir=folder, saves_in_background=in_background, trace=trace)
    except OSError as error:
        if not faults.of_storage(error):
            raise
        log.warning("attempt waits", what=_STORAGE, detail=error.strerror)
        store.wait(AttemptWaits(_STORAGE, message=f"{error.strerror}: the job's folder cannot be written"))
        return None


@contextlib.contextmanager
def _exporting(attempt: WorkerAttempt, settings: ServiceSettings, plan_type: type[Message] | None) -> Iterator[None]:
    """Let exporters hear of the attempt, and of how the job fares when it is over."""
    names = settings.exporters.names
    if not names:
        yield
        return
    store = attempt.store
    redactor = Redactor([*secrets_of(settings), *secrets_of_environment()])

    def run(from_step: int) -> RunInfo:
        return RunInfo(
            job=store.job.name,
            attempt=store.attempt.number,
            total_steps=store.job.total_steps,
            from_step=from_step,
            folder=attempt.workdir,
            plan=redactor.plain(_plan_of(store.job.plan, plan_type)),
        )

    def tell(exporter: str, problem: str) -> None:
        message = redactor.text(f"exporter {exporter}: {problem}")
        store.note_at_work("exporter_failed", message, {"exporter": exporter[:500]})

    attempt.exports = Exports(names, settings.exporters, run=run, tell=tell)
    try:
        yield
    finally:
        attempt.exports.finish(_state_of(store))


def _plan_of(plan: bytes, plan_type: type[Message] | None) -> dict[str, Any]:
    return {} if plan_type is None else to_plain(plan_type.FromString(plan))


def _state_of(store: AttemptStore) -> str:
    """Return the job's state as the store has it now; "UNKNOWN" while it cannot be asked."""
    try:
        return str(JobStore(store.database).get(store.job.name).state.value)
    except sa.exc.SQLAlchemyError:
        return "UNKNOWN"


def _join(settings: ServiceSettings) -> Team:
    # Only workers of several processes need torch here.
    from training_common.team import Team

    return Team.join(timeout_s=settings.workers.exchange_timeout_s)


def _assist(store: AttemptStore, settings: S, assist: Assist[S], trace: AttemptTrace) -> None:
    """Take part in an attempt's training. What the others would miss ends the attempt, and an error fails the job."""
    folder = job_dir(settings, store.job.name)
    with _ending(store, trace, leads=False):
        try:
            take_devices(settings.workers, job=store.job.name)
        except AttemptWaits as wait:
            # Its end by a fault ends the others, which may have theirs.
            log.warning("attempt waits", what=wait.what, detail=wait.message)
            with contextlib.suppress(IllegalTransitionError):
                store.wait(wait)
            raise SystemExit(EX_TEMPFAIL) from wait
        context = AssistantContext(
            settings=settings, plan=store.job.plan, job=store.job.name, job_dir=folder, team=_join(settings)
        )
        # The first process tells what became of the attempt.
        with contextlib.suppress(AttemptStopped, PartDone):
            assist(context)


def _run(context: WorkerContext[S], work: Work[S]) -> None:
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
            why = "gave borrowed capacity back" if store.job.lease else "let go as it was asked to"
            store.move(JobState.RECOVERING, message=f"{why}; goes on from its checkpoint")
        else:
            store.move(JobState.PAUSED, message="paused")
    log.info("attempt ended", seconds=round(time.monotonic() - started, 1))


@contextlib.contextmanager
def _ending(store: AttemptStore, trace: AttemptTrace | None = None, *, leads: bool) -> Iterator[None]:
    """Turn errors into the job's failure, or into the attempt's end where the job has no part in them."""
    trace = trace or AttemptTrace()
    try:
        yield
    except FencedOutError:
        raise
    except Exception as error:
        fault = _platform_fault(error)
        if isinstance(error, ForgeError) and not fault:
            trace.failed(error.reason_name())
            log.error("job failed", reason=error.reason_name(), detail=error.message)
            _fail(store, error.reason_name(), error.message, leads=leads)
            return
        if fault:
            trace.failed("PLATFORM")
            # The process ends, and the scheduler gives the job another worker.
            log.exception("attempt ended by the platform")
            # Of a process that is gone the engine tells.
            if not _misses_another(error):
                with contextlib.suppress(sa.exc.OperationalError):
                    store.append("note", note_of("platform", f"{fault}; another attempt will go on", {}))
            raise SystemExit(EX_TEMPFAIL) from error
        trace.failed("INTERNAL")
        # The detail stays in the worker's log: error text of libraries may hold paths and data.
        log.exception("job failed by an unexpected error")
        _fail(store, "INTERNAL", _place_of(error), leads=leads)


def _verify(name: str, number: int, handle: str, settings: S, database: Database, work: Work[S]) -> None:
    """Replay steps of a job, and store the receipt or why there is none. Errors: FencedOutError."""
    from training_common import replay  # it stands on this module

    store = VerificationStore(JobStore(database))
    claim = store.claimed(name, number)
    folder = job_dir(settings, claim.job.name)
    scratch = scratch_dir(settings, name)

    def run(attempt: replay.ReplayAttempt) -> None:
        take_devices(settings.workers, job=claim.job.name)
        work(WorkerContext(settings=settings, database=database, attempt=attempt, job_dir=scratch))

    log_path = jobs_dir(settings) / verification_log_name(claim.job.name, claim.row.id)
    with (
        kept_bounded(log_path, settings.logs),
        replay.beating(store, claim, handle, settings.workers.heartbeat_interval_s) as given_up,
    ):
        try:
            threads = settings.workers.threads or os.cpu_count() or 1
            receipt = replay.replay(
                store, claim, job_dir=folder, scratch=scratch, run=run, given_up=given_up, threads=threads
            )
            store.finish(claim.row, receipt)
            log.info("verification done", verdict=receipt["verdict"])
        except FencedOutError:
            raise
        except AttemptWaits as wait:
            store.fail(claim.row, f"{wait.what} is away: {wait.message}; verify again when it is back")
        except ForgeError as error:
            store.fail(claim.row, f"{error.reason_name()}: {error.message}")
        except Exception as error:
            fault = _platform_fault(error)
            log.exception("verification ended by the platform" if fault else "verification failed")
            if fault:
                raise SystemExit(EX_TEMPFAIL) from error
            store.fail(claim.row, _place_of(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _require_signing_key(settings: ServiceSettings) -> None:
    """Make sure, before a long training, that what comes of it can be signed. Errors: AttemptWaits."""
    signer = signer_of(settings)
    if signer is not None:
        try:
            signer.require_key()
        except SigningKeyError as error:
            raise AttemptWaits(_SIGNING_KEY, message=str(error)) from error


def _place_of(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}; the worker's log has the detail"


def _work_or_wait(context: WorkerContext[S], work: Work[S]) -> None:
    try:
        context.attempt.require_storage()
        _require_signing_key(context.settings)
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
    except (ForgeError, FencedOutError, sa.exc.OperationalError):
        raise
    except Exception as error:
        if _misses_another(error) or not faults.of_full_disk(error, context.job_dir):
            raise
        context.attempt.remember_room()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(errno.ENOSPC, "no space left on device", str(context.job_dir)) from error
    finally:
        # Whatever the job becomes, no checkpoint is recorded after it.
        context.attempt.close()


def _platform_fault(error: Exception) -> str:
    """Return what of this machine ended the attempt through no fault of its job, or nothing."""
    if isinstance(error, sa.exc.OperationalError):
        return "the store did not answer in time"
    if isinstance(error, SigningKeyError):
        return f"what was made cannot be signed: {error}"
    if isinstance(error, StoreAwayError):
        return "the store of artifacts cannot be used"
    if _misses_another(error):
        return "another process of the worker is gone"
    if isinstance(error, OSError) and faults.of_machine(error):
        return f"the worker's machine failed it: {error.strerror}"
    return ""


def _misses_another(error: Exception) -> bool:
    if not _is_launched():
        return False
    # What is exchanged in the middle of a step raises torch's own errors.
    from training_common.team import is_exchange_error

    return isinstance(error, TeamBrokenError) or is_exchange_error(error)


def _is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _fail(store: AttemptStore, reason: str, message: str, *, leads: bool) -> None:
    failure = {"failure_reason": reason, "failure_message": message[:2000]}
    if leads:
        store.move(JobState.FAILED, message=message, **failure)
        return
    # The first process may have met the same error, and told of it. Otherwise it is to write nothing after this.
    with contextlib.suppress(IllegalTransitionError):
        store.move(JobState.FAILED, message=message, fencing_token=store.attempt.fencing_token + 1, **failure)


def run(
    load_settings: Callable[[Path | None], S],
    work: Work[S],
    assist: Assist[S] | None = None,
    plan_type: type[Message] | None = None,
) -> None:
    """Run `main` on the process's arguments and exit."""
    try:
        status = main(sys.argv[1:], load_settings=load_settings, work=work, assist=assist, plan_type=plan_type)
    except SystemExit as end:
        if end.code != EX_TEMPFAIL:
            raise
        status = EX_TEMPFAIL
    finally:
        # After the exporters have said their last, which may have processes of their own.
        end_leftovers()
    if status == EX_TEMPFAIL:
        exit_at_once(status)
    _end_within(_END_S, status)
    sys.exit(status)


def _end_within(seconds: float, status: int) -> None:
    """End this process after so long, whatever still runs in it.

    All of its work is done, and its place is the next job's. What a package has left to the interpreter's end, a thread
    that is waited for or a function that is called there, would keep the memory and devices of a worker for ever.
    """

    def end() -> None:
        time.sleep(seconds)
        log.warning("worker ended at once: something held its end up", waited_s=seconds)
        exit_at_once(status)

    threading.Thread(target=end, name="end", daemon=True).start()
