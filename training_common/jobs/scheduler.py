"""The scheduler: gives waiting jobs a worker, and takes jobs away from workers that are gone.

It keeps nothing that a restart could lose: every decision is a transaction, and a worker that outlived the server is
found by its handle. A worker whose heart is silent while its process lives is unobserved, not failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
import structlog

from training_common.attempt import StopKind
from training_common.jobs.folders import log_name
from training_common.jobs.life import SignsOfLife
from training_common.jobs.states import JobState
from training_common.jobs.store import STOPPING, AttemptRow, JobRow, JobStore, Loan, Loss, first_due
from training_common.jobs.verifier import Verifier
from training_common.jobs.waits import Standing
from training_common.jobs.yielding import ask, can_let_go
from training_common.settings import WorkerSettings
from training_common.store.database import now_us
from training_common.telemetry.traces import trace_id_of

log = structlog.get_logger(__name__)

# How often workers are looked at. A submit wakes the scheduler at once.
TICK_S = 0.5
# After a worker could not be started, the next try waits this long, and twice as long after each further failure.
LAUNCH_PAUSE_S = 1.0
MAX_LAUNCH_PAUSE_S = 60.0
# One may be late, for the store is busy at times.
_BEATS_MISSED = 3


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a worker ended: in words, and whether something outside it ended it, so that its job has no part in it."""

    words: str
    from_outside: bool


class Engine(Protocol):
    """Starts workers somewhere and tells whether they live."""

    @property
    def name(self) -> str:
        """Short name, recorded with every attempt."""

    def launch(self, arguments: Sequence[str], *, log_name: str, processes: int, nodes: int = 1) -> str:
        """Start a worker of so many processes on so many machines, and return its handle. Errors: OSError."""

    def alive(self, handle: str) -> bool:
        """Whether the worker still runs."""

    def waits(self, handle: str) -> bool:
        """Whether a worker that was started waits for capacity of the engine's own, which may take long."""

    def ending(self, handle: str) -> Ending:
        """Return how a worker that runs no longer has ended. Asked once."""

    def tidy(self) -> None:
        """Let go of what ended workers have left behind. Called at every tick."""

    def kill(self, handle: str) -> None:
        """End a worker that was given up."""


class Preempting(Protocol):
    """Stops running jobs for those that matter more."""

    def look(self, held: Sequence[tuple[JobRow, AttemptRow]], *, free: int) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        """Ask workers to let go where a slot is needed; return those that must be given up, and why, in words.

        held: jobs of this server's workers. free: its slots that nobody takes.
        """


class Scheduler:
    """Matches jobs and workers of one service."""

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        settings: WorkerSettings,
        *,
        settings_file: Path | None,
        server: str = "",
        in_the_way: Callable[[sa.Connection, JobRow], str] = lambda _connection, _job: "",
        verifier: Verifier | None = None,
        preempting: Preempting | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """server: this server's name among those that share the store; it looks after the workers it has started.
        in_the_way: asked in the transaction that gives a job a free slot: what keeps it from it, in words, or nothing.
        verifier: gets the slots that no job waits for.
        preempting: stops running jobs for those that matter more; by default none is stopped."""
        self._store = store
        self._engine = engine
        self._settings = settings
        self._settings_file = settings_file
        self._in_the_way = in_the_way
        self._verifier = verifier
        self._preempting = preempting
        self._server = server
        self._wake = asyncio.Event()
        # Handles of workers that were launched here and have not registered yet, by attempt id.
        self._launched: dict[int, str] = {}
        self.last_launch_failed = False
        self._most_nodes = None if settings.rendezvous_host else 1
        self._clock = clock
        self._launch_again_at = clock() + settings.start_delay_s
        self._launch_pause_s = LAUNCH_PAUSE_S
        self._life = SignsOfLife(clock)
        # Since when own workers are known to have been cancelled, by attempt id.
        self._cancelled_s: dict[int, float] = {}
        # What the last look found: own slots in use, and what kept a job from a free one.
        self._taken, self._lent = 0, ""
        # Why no other place than a slot is to be had now, in words; told by who looks for such places.
        self.beyond = ""
        self._ticked_at_s: float | None = None
        # Since when this server hands its workers' jobs over, and whether none of them is left.
        self._leaving_s: float | None = None
        self._has_left, self._left = False, asyncio.Event()

    @property
    def standing(self) -> Standing:
        """What this server can give to waiting jobs, as of its last look."""
        again_s = max(0.0, self._launch_again_at - self._clock()) if self.last_launch_failed else None
        return Standing(
            slots=self._settings.slots,
            taken=self._taken,
            lent=self._lent,
            launch_again_s=again_s,
            beyond=self.beyond,
        )

    @property
    def starts_workers(self) -> bool:
        """Whether a worker could be started now: not on trial, not after a failed start, not while it hands over."""
        return self._leaving_s is None and self._launch_works()

    @property
    def tick_age_s(self) -> float | None:
        """Seconds since it last looked at all jobs; None before the first look."""
        return None if self._ticked_at_s is None else max(0.0, self._clock() - self._ticked_at_s)

    def wake(self) -> None:
        """Look for work now. Call it on the event loop."""
        self._wake.set()

    async def run(self) -> None:
        """Schedule until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self._store.database.run_write(self.tick)
                if self._has_left:
                    self._left.set()
            except Exception as error:
                # The store is away or busy: workers go on by themselves, and the next tick tries again.
                log.warning("scheduler tick failed", error=f"{type(error).__name__}: {error}")
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def hand_over(self) -> None:
        """Have every worker of this server save and let go, so that other servers go on with the jobs at once.

        No further worker is started. Returns when none is left, or when this cannot be told: the store is away, and
        workers whose machine stays go on as they would without it. `run` must be under way.
        """
        self._leaving_s = self._clock()
        self.wake()
        try:
            # A worker that was killed is gone at the next look; two more for a store that is slow.
            async with asyncio.timeout(self._settings.hand_over_grace_s + 4 * TICK_S):
                await self._left.wait()
        except TimeoutError:
            log.warning("workers are left behind: no server looks after them but one with this data_dir")

    def tick(self) -> None:
        """Look at every held job and every deadline once, then fill the free slots."""
        self._engine.tidy()
        held, every = [], self._store.held()
        self._life.look((attempt.id, attempt.heartbeat_us) for _, attempt in every)
        for job, attempt in every:
            # Attempts of earlier releases name no server: there was only one.
            if attempt.server in ("", self._server) and attempt.engine == self._engine.name:
                held.append((job, attempt))
                self._look_at(job, attempt)
            else:
                self._look_at_anothers(job, attempt)
        self._end_overdue(every)
        self._end_cancelled(held)
        replays = self._verifier.look() if self._verifier else 0
        self._taken, self._lent = sum(job.slots for job, _ in held if not job.lease) + replays, ""
        if self._leaving_s is not None:
            self._let_go(held, replays, self._clock() - self._leaving_s)
            self._ticked_at_s = self._clock()
            return
        self._fill()
        if self._preempting is not None:
            for job, attempt, message in self._preempting.look(held, free=self._settings.slots - self._taken):
                self.give_up(job, attempt, message)
        self._ticked_at_s = self._clock()

    def _let_go(self, held: Sequence[tuple[JobRow, AttemptRow]], replays: int, since_s: float) -> None:
        """Ask own workers to save and let go, and take their jobs from those that had the time."""
        grace_s = self._settings.hand_over_grace_s
        if not held and not replays:
            self._has_left = True
        elif since_s <= grace_s:
            for job, _ in held:
                if can_let_go(job):
                    with self._store.database.write() as connection:
                        ask(self._store, connection, job, kind="handed_over", message="its server stops", facts={})
        else:
            for job, attempt in held:
                self.give_up(
                    job, attempt, f"attempt {attempt.number}: still at work {grace_s:g} s after its server's end"
                )
            if self._verifier is not None:
                self._verifier.end_all()

    def _fill(self) -> None:
        while self._taken < self._settings.slots and self._launch_works():
            started = self._start(free=self._settings.slots - self._taken, may_start=self._nothing_in_the_way)
            if self._lent:
                return
            if started is None and not self._start_replay():
                return
            self._taken += 1 if started is None else started.slots

    def _nothing_in_the_way(self, connection: sa.Connection, job: JobRow) -> bool:
        self._lent = self._in_the_way(connection, job)
        return not self._lent

    def _start_replay(self) -> bool:
        """Give a slot that no job waits for to a verification. Returns whether one was started."""
        if self._verifier is None or not self._launch_works():
            return False
        with self._store.database.read() as connection:
            if first_due(connection, most=self._settings.slots, most_nodes=self._most_nodes) is not None:
                return False
        return self._verifier.start()

    def _launch_works(self) -> bool:
        return self._clock() >= self._launch_again_at

    def _end_overdue(self, every: Sequence[tuple[JobRow, AttemptRow]]) -> None:
        """End jobs that have passed a deadline. One that a worker holds gets time to save and let go."""
        for late in self._store.overdue():
            if self._store.pass_deadline(late.name, grace_s=self._settings.deadline_grace_s) is None:
                continue
            for job, attempt in every:
                if job.id == late.id:
                    self.give_up(job, attempt, f"attempt {attempt.number}: still at work after its deadline's grace")

    def _end_cancelled(self, held: Sequence[tuple[JobRow, AttemptRow]]) -> None:
        """End workers that do not heed a cancel: a stranger's code that hangs in one gives signs of life for good."""
        now = self._clock()
        cancelled = [(job, attempt) for job, attempt in held if job.state is JobState.CANCELLING]
        self._cancelled_s = {attempt.id: self._cancelled_s.get(attempt.id, now) for _, attempt in cancelled}
        for job, attempt in cancelled:
            if now - self._cancelled_s[attempt.id] > self._settings.cancel_grace_s:
                told = f"had not ended {self._settings.cancel_grace_s:g} s after it was cancelled"
                self.give_up(job, attempt, f"attempt {attempt.number}: {told}")

    def _look_at(self, job: JobRow, attempt: AttemptRow) -> None:
        handle = self._handle_of(attempt)
        if attempt.handle:
            self._launched.pop(attempt.id, None)
        silent_s = self._life.silent_s(attempt.id)
        is_asked = job.state in STOPPING or job.wish == StopKind.YIELD
        if handle and not attempt.handle and is_asked and self._engine.waits(handle):
            # It would learn of the wish only when it has capacity.
            self._engine.kill(handle)
            self._cut(job, attempt, f"attempt {attempt.number}: stopped while it waited for capacity")
        elif handle and silent_s > self._quiet_s(attempt) and self._engine.waits(handle):
            if attempt.handle:
                # It has run, and the engine took its capacity away: another attempt goes on from the checkpoint.
                self._engine.kill(handle)
                self._cut(job, attempt, f"attempt {attempt.number}: the worker was suspended while it ran", lost=True)
            else:
                self._store.beat_for(attempt)
        elif handle and not self._engine.alive(handle):
            ending = self._engine.ending(handle)
            loss = Loss.KILLED if ending.from_outside else Loss.CRASHED
            self._cut(job, attempt, f"attempt {attempt.number}: {ending.words}", loss, lost=True)
        elif not handle and now_us() - attempt.start_us > 1e6 * self._settings.start_timeout_s:
            # The server that was to start it ended over it. By the wall clock, as that one may end again and again.
            self._cut(
                job, attempt, f"attempt {attempt.number}: its server ended before a worker had registered", lost=True
            )
        elif not attempt.handle and silent_s > self._settings.start_timeout_s:
            if handle:
                self._engine.kill(handle)
            self._cut(job, attempt, f"attempt {attempt.number}: no worker registered in time", Loss.CRASHED, lost=True)
        elif attempt.handle and silent_s > self._settings.silent_cut_s:
            self._engine.kill(handle)
            message = f"attempt {attempt.number}: the worker gave no sign of life for {silent_s:.0f} s"
            self._cut(job, attempt, message, Loss.CRASHED, lost=True)
        else:
            self._observe(job, silent_s)

    def _quiet_s(self, attempt: AttemptRow) -> float:
        """After which silence an engine is asked whether a worker waits: soon, where it has run and should be heard."""
        usual = self._settings.lost_after_s / 2
        return min(usual, _BEATS_MISSED * self._settings.heartbeat_interval_s) if attempt.handle else usual

    def _handle_of(self, attempt: AttemptRow) -> str:
        return attempt.handle or attempt.launched or self._launched.get(attempt.id, "")

    def _look_at_anothers(self, job: JobRow, attempt: AttemptRow) -> None:
        """Take a job from a worker of another server when both are silent: nobody else would.

        A worker that goes on without its server beats by itself, and is left alone.
        """
        silent_s = self._life.silent_s(attempt.id)
        if silent_s > self._settings.silent_cut_s:
            message = f"attempt {attempt.number}: no sign of life from {attempt.server} for {silent_s:.0f} s"
            # A machine that went away is no fault of the job.
            self._cut(job, attempt, message, lost=True)
        else:
            self._observe(job, silent_s)

    def _observe(self, job: JobRow, silent_s: float) -> None:
        observed = silent_s <= self._settings.lost_after_s
        if observed != job.observed:
            self._store.set_observed(job, observed)

    def start_on(self, loan: Loan) -> JobRow | None:
        """Give the next waiting job of one process a worker on borrowed capacity, or return None.

        Its slot is none of our own.
        """
        return self._start(loan) if self.starts_workers else None

    def give_up(self, job: JobRow, attempt: AttemptRow, message: str) -> None:
        """End a worker and take its job away: the job goes on elsewhere, and its retry budget is not touched."""
        handle = self._handle_of(attempt)
        # A worker of another server is fenced out: its handle could name a process of this machine.
        if handle and attempt.server in ("", self._server):
            self._engine.kill(handle)
        self._cut(job, attempt, message)

    def _start(
        self,
        loan: Loan | None = None,
        *,
        free: int = 1,
        may_start: Callable[[sa.Connection, JobRow], bool] = lambda _connection, _job: True,
    ) -> JobRow | None:
        job = self._store.begin_attempt(
            self._engine.name,
            self._server,
            loan,
            most=self._settings.slots if loan is None else 1,
            free=free,
            most_nodes=self._most_nodes if loan is None else 1,
            may_start=may_start,
        )
        if job is None:
            self.last_launch_failed = False  # nothing waits that could show whether workers start again
            return None
        arguments = ["--job", job.name, "--attempt", str(job.attempt), "--token", str(job.fencing_token)]
        if loan is not None:
            arguments += ["--threads", str(loan.amount)]
        if self._settings_file is not None:
            arguments += ["--settings", str(self._settings_file)]
        _, attempt = next(pair for pair in self._store.held() if pair[0].id == job.id)
        try:
            self._launched[attempt.id] = self._engine.launch(
                arguments,
                log_name=log_name(job.name, job.attempt),
                processes=job.processes,
                nodes=job.nodes,
            )
        except OSError as error:
            self.last_launch_failed = True
            self._launch_again_at = self._clock() + self._launch_pause_s
            self._launch_pause_s = min(MAX_LAUNCH_PAUSE_S, 2 * self._launch_pause_s)
            # The job has no part in it, so its retry budget is not touched.
            message = f"attempt {attempt.number}: the worker could not be started: {error.strerror}"
            self._cut(job, attempt, message)
            return None
        self.last_launch_failed = False
        self._launch_pause_s = LAUNCH_PAUSE_S
        self._store.set_launched(attempt.id, self._launched[attempt.id])
        log.info("worker started", job=job.name, attempt=job.attempt, lease=job.lease, **_trace_of(job))
        return job

    def _cut(
        self, job: JobRow, attempt: AttemptRow, message: str, loss: Loss | None = None, *, lost: bool = False
    ) -> None:
        self._launched.pop(attempt.id, None)
        most = 0 if loss is None else getattr(self._settings, loss)
        after = self._store.cut(job, attempt, message=message, loss=loss, most=most, lost=lost)
        if after is not None:
            facts = {"detail": message, "state": after.state.value, **_trace_of(job)}
            log.warning("worker lost", job=job.name, attempt=attempt.number, **facts)


def _trace_of(job: JobRow) -> dict[str, str]:
    """Return the job's trace as a field of log lines."""
    return {"trace_id": trace_id_of(job.traceparent)} if job.traceparent else {}
