"""Both services at a glance: what `forge top` knows of each, look by look."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cognateforge.cli.board import SECONDS_LEFT, Pace
from cognateforge.cli.jobs import JobService, Service, wait_words
from cognateforge.cli.plain import enum_word
from cognateforge.exceptions import ForgeError
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from cognateforge.job.v1.job_pb2 import Job, JobEvent

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
OPEN = [state for state in job_pb2.JobState.values() if state and state not in ENDED]
# With a worker; in this order they are shown.
AT_WORK = (
    job_pb2.JOB_STATE_RUNNING,
    job_pb2.JOB_STATE_VALIDATING,
    job_pb2.JOB_STATE_PREPARING,
    job_pb2.JOB_STATE_RECOVERING,
    job_pb2.JOB_STATE_PAUSING,
    job_pb2.JOB_STATE_CANCELLING,
)
# Events that a first look at a running job asks for: enough for its pace, little for the server.
_EVENTS = 20


@dataclass(frozen=True, kw_only=True)
class JobLine:
    """A job, and how it fares by its newest events. What is not known is None."""

    service: Service
    job: Job
    steps_per_s: float | None = None
    seconds_left: float | None = None
    loss: float | None = None

    @property
    def place(self) -> tuple[float, ...]:
        """Where it is shown: at work and soonest done, then by its turn, then paused, then what ended last."""
        job = self.job
        if job.state in AT_WORK:
            left = math.inf if self.seconds_left is None else self.seconds_left
            return (0, AT_WORK.index(job.state), left, job.create_time.ToMicroseconds())
        if job.state in ENDED:
            return (3, -job.end_time.ToMicroseconds())
        turn = job.wait.queue_position or math.inf
        return (1 if job.state == job_pb2.JOB_STATE_QUEUED else 2, turn, job.create_time.ToMicroseconds())

    def to_plain(self) -> dict[str, Any]:
        """Return it for --json."""
        job = self.job
        return {
            "name": job.name,
            "state": enum_word(job_pb2.JobState.DESCRIPTOR, job.state),
            "observed": job.observed,
            "step": job.step,
            "total_steps": job.total_steps,
            "steps_per_s": self.steps_per_s,
            "seconds_left": self.seconds_left,
            "loss": self.loss,
            "waits_for": wait_words(job),
            "priority": job.scheduling.priority,
            "caller": job.caller,
            "artifact": job.artifact,
            "failure_reason": job.failure.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """An amount of one resource of Cognate's host."""

    kind: str
    total: int
    held: int
    lent: int


@dataclass(frozen=True, kw_only=True)
class ServiceLine:
    """A service as it was last seen.

    away: why the last look found nothing, "" where it did. since: when that began, seconds since 1970. Everything else
    is then as of `seen`, None where it was never seen.
    """

    service: Service
    addresses: tuple[str, ...] = ()
    seen: float | None = None
    away: str = ""
    since: float | None = None
    health: str = ""
    version: str = ""
    damaged_artifacts: int = 0
    slots: int = 0
    slots_taken: int = 0
    circuits: dict[str, str] = field(default_factory=dict)
    capacities: tuple[Capacity, ...] = ()
    running: int = 0
    waiting: int = 0
    jobs: tuple[JobLine, ...] = ()

    @property
    def well(self) -> bool:
        """Whether it was reached and says that it serves."""
        return not self.away and self.health == "SERVING"

    def to_plain(self) -> dict[str, Any]:
        """Return it for --json."""
        plain = {name: value for name, value in vars(self).items() if name not in ("service", "capacities", "jobs")}
        return {
            "service": self.service.value,
            **plain,
            "addresses": list(self.addresses),
            "capacities": [vars(one) for one in self.capacities],
            "jobs": [one.to_plain() for one in self.jobs],
        }


class _Known:
    """What is remembered of a job between two looks."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.sequence = 0
        self.loss: float | None = None
        self.left: tuple[float, float] | None = None

    def take(self, event: JobEvent) -> None:
        self.sequence = event.sequence
        if event.HasField("attempt_started"):
            self.pace.forget()
        elif event.HasField("progress"):
            at_s = event.time.ToMicroseconds() / 1e6
            self.pace.add(at_s, event.progress.step)
            for metric in event.progress.metrics:
                if metric.name == "loss" and metric.HasField("value"):
                    self.loss = metric.value
                elif metric.name == SECONDS_LEFT:
                    self.left = (at_s, metric.value)

    def line(self, service: Service, job: Job, now_s: float) -> JobLine:
        speed, left = self.pace.steps_per_s, None
        if self.left is not None:
            left = max(0.0, self.left[0] + self.left[1] - now_s)
        elif speed is not None and job.total_steps:
            left = (job.total_steps - job.step) / speed
        return JobLine(service=service, job=job, steps_per_s=speed, seconds_left=left, loss=self.loss)


class Lookout:
    """Looks at one service again and again. One thread at a time.

    ended: how many jobs that have ended are shown.
    """

    def __init__(self, jobs: JobService, *, ended: int = 5, clock: Callable[[], float] = time.time) -> None:
        self._jobs, self._ended, self._clock = jobs, ended, clock
        self._known: dict[str, _Known] = {}
        self._last = ServiceLine(service=jobs.service)

    def look(self) -> ServiceLine:
        """Return the service as it is now; one that cannot be reached as it was, with the reason."""
        try:
            self._last = self._look()
        except ForgeError as error:
            since = self._last.since if self._last.away else self._clock()
            self._last = ServiceLine(**{**vars(self._last), "away": error.message, "since": since})
        return self._last

    def _look(self) -> ServiceLine:
        jobs = self._jobs
        health, info = jobs.health(), jobs.info()
        found = [item.job for item in jobs.newest(OPEN, 500)]
        if self._ended:
            found += [item.job for item in jobs.newest(list(ENDED), self._ended)]
        lines = [self._line(job) for job in found]
        self._known = {name: known for name, known in self._known.items() if name in {job.name for job in found}}
        return ServiceLine(
            service=jobs.service,
            addresses=jobs.addresses,
            seen=self._clock(),
            health=health,
            version=info.version,
            damaged_artifacts=info.damaged_artifacts,
            slots=info.slots,
            slots_taken=info.slots_taken,
            circuits={
                "of this client": jobs.breaker_state(),
                **{f"to {peer.name}": enum_word(job_pb2.Circuit.DESCRIPTOR, peer.circuit) for peer in info.peers},
            },
            capacities=tuple(self._capacities()),
            running=sum(job.state in AT_WORK for job in found),
            waiting=sum(job.state == job_pb2.JOB_STATE_QUEUED for job in found),
            jobs=tuple(sorted(lines, key=lambda line: line.place)),
        )

    def _line(self, job: Job) -> JobLine:
        if job.state not in AT_WORK:
            return JobLine(service=self._jobs.service, job=job)
        known = self._known.setdefault(job.name, _Known())
        after = max(known.sequence, job.last_sequence - _EVENTS, job.first_sequence - 1)
        try:
            for event in self._jobs.events_until(job.name, after, job.last_sequence):
                known.take(event)
        except ForgeError:
            pass  # it ended, or its events went meanwhile: the next look tells
        return known.line(self._jobs.service, job, self._clock())

    def _capacities(self) -> Iterable[Capacity]:
        if self._jobs.service is not Service.COGNATE:
            return
        from cognateforge.exchange.v1 import resource_pb2

        try:
            answer = self._jobs.session.cognate_client.resources.GetAvailability(resource_pb2.GetAvailabilityRequest())
        except ForgeError:  # some callers have no role for it
            return
        for one in answer.capacities:
            kind = enum_word(resource_pb2.ResourceKind.DESCRIPTOR, one.kind).lower()
            yield Capacity(kind=kind, total=one.total, held=one.held, lent=one.lent)
