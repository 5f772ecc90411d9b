"""What both services tell of themselves at one moment, read through the generated clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from cognateforge.agent.v1 import training_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import ClientSetupError, ForbiddenError, ForgeError, NotFoundError, OutOfRangeError
from cognateforge.exchange.v1 import resource_pb2
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cognateforge.client import AsyncAgentClient, AsyncCognateClient

ENDED = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})
OPEN = tuple(
    state for state in job_pb2.JobState.values() if state not in ENDED and state != job_pb2.JOB_STATE_UNSPECIFIED
)
PAGE = 500  # the most that a page may hold
# Of a job that was not looked at before: recoveries further back are no news.
EVENTS_BACK = 2000
JOBS_AT_ONCE = 8
READ_S = 5.0  # of one job's events, in one look


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The newest action of a recovery manager that a detector led to."""

    detector: str
    action: str
    time: datetime
    message: str


@dataclass(kw_only=True)
class JobNews:
    """What a job's events have told so far.

    sequence: the last one that was read. time: when it was recorded. recoveries: by detector, since the run was last
    found stable.
    """

    sequence: int = 0
    time: datetime | None = None
    recoveries: dict[str, Recovery] = field(default_factory=dict)

    def take(self, event: job_pb2.JobEvent) -> None:
        """Read one event."""
        self.sequence, self.time = event.sequence, event.time.ToDatetime(tzinfo=UTC)
        if not event.HasField("note") or event.note.kind != "recovery":
            return
        detector = event.note.facts.get("detector", "")
        if not detector:  # stable again
            self.recoveries.clear()
            return
        action = event.note.facts.get("action", "")
        self.recoveries[detector] = Recovery(
            detector=detector, action=action, time=self.time, message=event.note.message
        )


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One service at one moment.

    trouble: why it could not be asked, and then nothing else is known; empty when it answered.
    jobs: those that have not ended, and failed ones. capacities: Cognate's alone.
    """

    service: str
    time: datetime
    trouble: str = ""
    health: str = ""
    info: job_pb2.ServerInfo = field(default_factory=job_pb2.ServerInfo)
    jobs: tuple[job_pb2.Job, ...] = ()
    news: Mapping[str, JobNews] = field(default_factory=dict)
    capacities: tuple[resource_pb2.Capacity, ...] = ()


Page = tuple[list[job_pb2.Job], str]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A service, as far as an observer asks it."""

    service: str
    health: Callable[[], Awaitable[str]]
    info: Callable[[], Awaitable[job_pb2.ServerInfo]]
    page: Callable[[Iterable[job_pb2.JobState.ValueType], str], Awaitable[Page]]
    job: Callable[[str], Awaitable[job_pb2.Job]]
    watch: Callable[[str, int], AsyncIterator[job_pb2.WatchFrame]]
    capacities: Callable[[], Awaitable[Iterable[resource_pb2.Capacity]]]


class _Jobs:
    """What both services' stubs have in common. messages: the module of the stub's requests."""

    def __init__(self, stub: Any, messages: Any) -> None:
        self._stub, self._messages = stub, messages

    async def info(self) -> job_pb2.ServerInfo:
        answer: job_pb2.ServerInfo = (await self._stub.GetServerInfo(self._messages.GetServerInfoRequest())).info
        return answer

    async def page(self, states: Iterable[job_pb2.JobState.ValueType], token: str) -> Page:
        request = self._messages.ListJobsRequest(page_size=PAGE, page_token=token, states=states)
        answer = await self._stub.ListJobs(request)
        return [one.job for one in answer.jobs], answer.next_page_token

    async def job(self, name: str) -> job_pb2.Job:
        found: job_pb2.Job = (await self._stub.GetJob(self._messages.GetJobRequest(name=name))).job.job
        return found


def cognate_source(client: AsyncCognateClient) -> Source:
    """Return the Cognate service."""
    calls = _Jobs(client.pretraining, pretraining_pb2)

    async def capacities() -> Iterable[resource_pb2.Capacity]:
        return (await client.resources.GetAvailability(resource_pb2.GetAvailabilityRequest())).capacities

    return Source(
        service="cognate",
        health=client.health,
        info=calls.info,
        page=calls.page,
        job=calls.job,
        watch=lambda name, after: client.watch_job(name, after, give_up_after_s=READ_S),
        capacities=capacities,
    )


def agent_source(client: AsyncAgentClient) -> Source:
    """Return the agent service."""
    calls = _Jobs(client.training, training_pb2)

    async def capacities() -> Iterable[resource_pb2.Capacity]:
        return ()

    return Source(
        service="agent",
        health=client.health,
        info=calls.info,
        page=calls.page,
        job=calls.job,
        watch=lambda name, after: client.watch_job(name, after, give_up_after_s=READ_S),
        capacities=capacities,
    )


class Observer:
    """Looks at one service again and again, and reads each event of a job once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._news: dict[str, JobNews] = {}

    @property
    def service(self) -> str:
        """Its name."""
        return self._source.service

    async def look(self) -> Observed:
        """Ask the service. Errors: ForbiddenError and ClientSetupError, which are the caller's own matter."""
        now = datetime.now(UTC)
        try:
            return await self._ask(now)
        except (ForbiddenError, ClientSetupError):
            raise
        except ForgeError as error:
            return Observed(service=self.service, time=now, trouble=error.message)

    async def _ask(self, now: datetime) -> Observed:
        source = self._source
        health, info = await source.health(), await source.info()
        jobs = await self._open()
        names = {job.name for job in jobs}
        failed, _ = await source.page([job_pb2.JOB_STATE_FAILED], "")
        # A job may be far older than the newest failures: those that were open are asked for by name.
        gone = [name for name in self._news if name not in names and name not in {job.name for job in failed}]
        ended = [job for job in [await self._job(name) for name in gone] if job is not None]
        self._news = {name: self._news.get(name, JobNews()) for name in names}
        await self._read(jobs)
        return Observed(
            service=self.service,
            time=now,
            health=health,
            info=info,
            jobs=(*jobs, *failed, *(job for job in ended if job.name not in names)),
            news=self._news,
            capacities=tuple(await source.capacities()),
        )

    async def _open(self) -> list[job_pb2.Job]:
        jobs, token = await self._source.page(OPEN, "")
        while token:
            more, token = await self._source.page(OPEN, token)
            jobs += more
        return jobs

    async def _job(self, name: str) -> job_pb2.Job | None:
        try:
            return await self._source.job(name)
        except NotFoundError:
            return None

    async def _read(self, jobs: Iterable[job_pb2.Job]) -> None:
        places = asyncio.Semaphore(JOBS_AT_ONCE)

        async def one(job: job_pb2.Job) -> None:
            async with places:
                await self._read_job(job)

        ends = await asyncio.gather(*(one(job) for job in jobs), return_exceptions=True)
        if error := next((end for end in ends if end is not None), None):
            raise error

    async def _read_job(self, job: job_pb2.Job) -> None:
        news = self._news[job.name]
        news.sequence = max(news.sequence, job.first_sequence - 1, job.last_sequence - EVENTS_BACK, 0)
        if news.sequence >= job.last_sequence:
            return
        # watch_job is a generator; closing it ends the stream, which otherwise goes on for as long as the job does.
        watch = cast("AsyncGenerator[job_pb2.WatchFrame, None]", self._source.watch(job.name, news.sequence))
        try:
            async with asyncio.timeout(READ_S), aclosing(watch) as frames:
                async for frame in frames:
                    if frame.HasField("event"):
                        news.take(frame.event)
                    if frame.HasField("end") or news.sequence >= job.last_sequence:
                        return
        except (NotFoundError, OutOfRangeError, TimeoutError):  # retention was faster; or the next look goes on
            return
