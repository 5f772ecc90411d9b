"""The job RPCs that both operator APIs have, over either service's messages.

`JobService` does the work, `JobRpcs` are the handlers. Both APIs name these RPCs and messages alike, each in its own
package, so the handlers take the messages from the package that they are given.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc
import sqlalchemy as sa
import structlog
from google.protobuf.message import Message

from cognateforge.exceptions import SequenceOutOfRangeError
from cognateforge.job.v1 import job_pb2
from training_common.jobs.hub import ChangeHub
from training_common.jobs.pins import set_pinned
from training_common.jobs.queue import NOBODYS, Demand
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.shared import SharedReads
from training_common.jobs.states import WAITING
from training_common.jobs.store import JobRow, JobStore
from training_common.jobs.sweeper import Sweeper
from training_common.jobs.verifications import VerificationStore
from training_common.jobs.waits import Bounds, waits
from training_common.rpc import convert, mutations, paging
from training_common.rpc.estimates import Estimator
from training_common.rpc.identity import current_caller
from training_common.rpc.logs import LogWatcher
from training_common.rpc.series import SeriesBuilder
from training_common.telemetry import traces

# Frames read from the store at once. A slow reader is waited for, so that is all a watch holds in memory.
_BATCH = 200
_METRICS_BATCH = 1000
# The contract's bound on a list of them.
_VERIFICATIONS = 100

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)
A = TypeVar("A", bound=Message)
# A job, the sequence of its oldest event that is kept, and what follows of its events.
_Read = tuple[JobRow, int, list[job_pb2.WatchFrame]]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A job that may be made.

    memory: bytes of the parts of each of its processes. configuration: what decides how fast it is.
    demand: what it takes, and of whose share. reservation: the one that it is to run in, or nothing.
    also: what else belongs to the transaction that submits it.
    """

    plan: Message
    total_steps: int
    memory: Mapping[str, int]
    configuration: str
    demand: Demand = NOBODYS
    reservation: str = ""
    also: Callable[[sa.Connection, JobRow], None] = lambda _connection, _job: None


class JobService(Generic[M]):
    """Get, list, watch and steer jobs; `to_message` makes the service's own job message of a row."""

    def __init__(
        self,
        *,
        store: JobStore,
        scheduler: Scheduler,
        hub: ChangeHub,
        to_message: Callable[[JobRow], M],
        estimator: Estimator,
        units: Mapping[str, str],
        heartbeat_s: float,
        logs: LogWatcher,
        sweeper: Sweeper,
        damaged_artifacts: Callable[[], int] = lambda: 0,
        bounds: Bounds | None = None,
        forecast: Callable[[sa.Connection, Sequence[JobRow]], Mapping[int, int]] | None = None,
    ) -> None:
        """damaged_artifacts: returns how many versions' stored bytes are known to be damaged.
        bounds: tells what keeps waiting jobs from free places.
        forecast: tells when waiting jobs are likely to start, by id, in microseconds since 1970."""
        self.store = store
        self.logs = logs
        self._sweeper = sweeper
        self._damaged_artifacts = damaged_artifacts
        self._verifications = VerificationStore(store)
        self._bounds = bounds
        self._forecast = forecast
        self._scheduler = scheduler
        self._hub = hub
        self._to_message = to_message
        self._estimator = estimator
        self._units = units
        self._heartbeat_s = heartbeat_s
        self._frames: SharedReads[_Read] = SharedReads(store.database)

    async def mutate(
        self, method: str, request: Any, work: Callable[[sa.Connection], JobRow], answer: Callable[[M], Message]
    ) -> bytes:
        """Do a mutation once for its request id, and return the answer's bytes, replayed or new."""

        def transact(connection: sa.Connection) -> Message:
            [message] = self._messages(connection, [work(connection)])
            return answer(message)

        stored = await mutations.mutate(self.store.database, method, request, transact)
        self._scheduler.wake()
        return stored

    async def start(self, method: str, request: Any, draft: Callable[[], Draft], answer: type[A]) -> A:
        """Submit a job once for the request id, or only tell what would be made; `answer` is the response's class.

        draft: checks the request in full, and says what it comes to. A repeated start is answered as the first time,
        whatever would be refused by now, so that it is only asked for a new one.
        """

        def made(connection: sa.Connection, new: Draft) -> A:
            estimate = self._estimator.estimate(
                connection,
                memory=new.memory,
                configuration=new.configuration,
                total_steps=new.total_steps,
                processes=new.demand.processes,
            )
            return answer(estimate=estimate)

        def check() -> A:
            new = draft()
            convert.scheduling(request.scheduling)
            with self.store.database.read() as connection:
                response: Any = made(connection, new)
            response.job.plan.CopyFrom(new.plan)
            return cast("A", response)

        def submit(connection: sa.Connection) -> A:
            new = draft()
            response: Any = made(connection, new)
            job = self.store.submit(
                connection,
                plan=new.plan.SerializeToString(),
                total_steps=new.total_steps,
                caller=caller,
                scheduling=convert.scheduling(request.scheduling),
                configuration=new.configuration,
                demand=new.demand,
                reservation=new.reservation,
                traceparent=traceparent,
            )
            new.also(connection, job)
            response.job.CopyFrom(self._messages(connection, [job])[0])
            return cast("A", response)

        caller, traceparent = current_caller().name, str(traces.current() or "")
        if request.validate_only:
            return await self.store.database.run(check)
        stored = await mutations.mutate(self.store.database, method, request, submit)
        self._scheduler.wake()
        response: Any = answer.FromString(stored)
        structlog.contextvars.bind_contextvars(job=response.job.job.name)
        return cast("A", response)

    async def get(self, name: str) -> M:
        """Return one job's message."""
        row = await self.store.database.run_brief(self.store.get, name)
        if row.state not in WAITING:
            return self._to_message(row)
        [message] = await self.store.database.run(self._read_messages, [row])
        return message

    def _read_messages(self, rows: Sequence[JobRow]) -> list[M]:
        with self.store.database.read() as connection:
            return self._messages(connection, rows)

    def _messages(self, connection: sa.Connection, rows: Sequence[JobRow]) -> list[M]:
        """Return the messages of jobs, with what they wait for now."""
        found = waits(connection, rows, self._scheduler.standing, self._bounds)
        starts = self._forecast(connection, rows) if self._forecast is not None and found else {}
        messages = []
        for row in rows:
            message: Any = self._to_message(row)
            if row.id in found:
                message.job.wait.CopyFrom(convert.wait(found[row.id], starts.get(row.id)))
            messages.append(message)
        return messages

    async def page(self, request: Any) -> tuple[list[M], str]:
        """Return a page of jobs and the next page's token."""
        before = paging.read_token(request, request.page_token)
        size = paging.page_size(request.page_size)
        wanted = convert.states(request.states)

        def read() -> tuple[list[M], str]:
            rows = self.store.page(states=wanted, before_id=before, limit=size + 1)
            token = paging.make_token(request, rows[size - 1].id) if len(rows) > size else ""
            return self._read_messages(rows[:size]), token

        return await self.store.database.run(read)

    async def watch(self, name: str, after_sequence: int, progress_every: int = 1) -> AsyncIterator[job_pb2.WatchFrame]:
        """Yield every event after `after_sequence` once and in order, heartbeats, and the end frame.

        progress_every: above 1, of progress those events alone whose sequence is a multiple of it.
        """
        every = max(1, progress_every)
        job = await self.store.database.run(self.store.get, name)
        if after_sequence > job.last_sequence:
            raise SequenceOutOfRangeError(
                f"after_sequence {after_sequence} is beyond {name}'s last event {job.last_sequence}"
            )
        sequence, seen = after_sequence, 0
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()
        while True:
            job, oldest, frames = await self._frames.get(
                (name, sequence, every, seen), functools.partial(self._read, name, sequence, every)
            )
            _require_kept(job, sequence, oldest)
            for frame in frames:
                sequence = frame.event.sequence
                yield frame
                quiet_since = loop.time()
            if len(frames) == _BATCH:
                continue
            if every > 1:
                sequence = max(sequence, job.last_sequence)  # what is left out was passed over
            end = convert.end_frame(job)
            if end is not None and sequence >= job.last_sequence:
                yield end
                return
            if not frames:
                # Other jobs' events end a wait too, so what is left of the silence is counted across waits.
                seen = await self._hub.wait(seen, max(0.0, quiet_since + self._heartbeat_s - loop.time()))
                if loop.time() >= quiet_since + self._heartbeat_s:
                    yield job_pb2.WatchFrame(heartbeat=job_pb2.Heartbeat(last_sequence=sequence))
                    quiet_since = loop.time()

    def _read(self, name: str, after_sequence: int, every: int) -> _Read:
        # The job is read before its events: what its end frame counts is then among the events that follow.
        job = self.store.get(name)
        rows = self.store.events_after(job.id, after_sequence, _BATCH, progress_every=every)
        frames = [job_pb2.WatchFrame(event=convert.event(row, self._units)) for row in rows]
        if every > 1:  # the first that is sent need not be the first that is kept
            return job, self.store.get(name).first_sequence, frames
        return job, rows[0].sequence if rows else job.first_sequence, frames

    async def checkpoints(self, name: str) -> list[job_pb2.Checkpoint]:
        """Return a job's checkpoints, newest first."""
        job = await self.store.database.run(self.store.get, name)
        rows = await self.store.database.run(self.store.checkpoints, job.id)
        return [convert.checkpoint(row) for row in rows]

    def server_info(self, info: job_pb2.ServerInfo, peers: Sequence[job_pb2.Peer] = ()) -> job_pb2.ServerInfo:
        """Return what a server is, with what it counts."""
        standing = self._scheduler.standing
        return job_pb2.ServerInfo(
            slots=standing.slots,
            slots_taken=standing.taken,
            version=info.version,
            capabilities=info.capabilities,
            peers=peers,
            removed=self._sweeper.message(),
            damaged_artifacts=self._damaged_artifacts(),
        )

    async def pin(self, method: str, request: Any, answer: Callable[..., Message], *, pinned: bool) -> bytes:
        """Pin or unpin a checkpoint once for the request id, and return the answer's bytes."""

        def work(connection: sa.Connection) -> Message:
            job = self.store.get(request.name, connection)
            row = set_pinned(connection, job.id, step=request.step, digest=request.digest, pinned=pinned)
            return answer(checkpoint=convert.checkpoint(row))

        return await mutations.mutate(self.store.database, method, request, work)

    async def verify(self, request: Any, answer: Callable[..., Message]) -> bytes:
        """Ask for a verification once for the request id, and return the answer's bytes."""
        caller = current_caller().name

        def work(connection: sa.Connection) -> Message:
            row = self._verifications.submit(
                connection, request.name, from_step=request.from_step, to_step=request.to_step, caller=caller
            )
            return answer(verification=convert.verification(self._verifications.claim_of(connection, row)))

        stored = await mutations.mutate(self.store.database, "VerifyResume", request, work)
        self._scheduler.wake()
        return stored

    async def verifications(self, name: str) -> list[job_pb2.Verification]:
        """Return a job's verifications, newest first."""

        def read() -> list[job_pb2.Verification]:
            with self.store.database.read() as connection:
                job = self.store.get(name, connection)
                found = self._verifications.of_job(connection, job.id, _VERIFICATIONS)
            return [convert.verification(claim) for claim in found]

        return await self.store.database.run(read)

    async def metrics(self, request: Any) -> list[job_pb2.MetricSeries]:
        """Return a job's metrics over its steps."""
        job = await self.store.database.run(self.store.get, request.name)
        builder = SeriesBuilder(request.metrics, request.max_points)

        def read() -> list[job_pb2.MetricSeries]:
            sequence = 0
            while rows := self.store.progress_after(job.id, sequence, _METRICS_BATCH):
                for _, payload in rows:
                    builder.add(payload)
                sequence = rows[-1][0]
            return builder.series(self._units)

        return await self.store.database.run(read)


def _require_kept(job: JobRow, sequence: int, oldest: int) -> None:
    """Refuse to pass over events that retention has removed."""
    if oldest > sequence + 1:
        raise SequenceOutOfRangeError(
            f"retention has removed the events of {job.name} before {oldest}: watch after_sequence {oldest - 1} for "
            "what is left",
            metadata={"oldest_sequence": str(oldest)},
        )


class JobRpcs(Generic[M]):
    """Handlers of the job RPCs; a servicer inherits them beside its generated base class.

    `contract` is the generated module with the service's messages.
    """

    def __init__(self, jobs: JobService[M], contract: Any) -> None:
        self._jobs = jobs
        self._contract = contract

    async def GetJob(self, request: Any, context: Context) -> Any:
        return self._contract.GetJobResponse(job=await self._jobs.get(request.name))

    async def ListJobs(self, request: Any, context: Context) -> Any:
        jobs, token = await self._jobs.page(request)
        return self._contract.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(self, request: Any, context: Context) -> AsyncIterator[Any]:
        async for frame in self._jobs.watch(request.name, request.after_sequence, request.progress_every):
            yield self._contract.WatchJobResponse(frame=frame)

    async def WatchLogs(self, request: Any, context: Context) -> AsyncIterator[Any]:
        frames = self._jobs.logs.watch(
            request.name, attempt=request.attempt, position=request.position, follow=request.follow
        )
        async for frame in frames:
            yield self._contract.WatchLogsResponse(frame=frame)

    async def PauseJob(self, request: Any, context: Context) -> Any:
        return await self._steer("Pause", request, self._jobs.store.pause)

    async def ResumeJob(self, request: Any, context: Context) -> Any:
        return await self._steer("Resume", request, self._jobs.store.resume)

    async def CancelJob(self, request: Any, context: Context) -> Any:
        return await self._steer("Cancel", request, self._jobs.store.cancel)

    async def ListCheckpoints(self, request: Any, context: Context) -> Any:
        return self._contract.ListCheckpointsResponse(checkpoints=await self._jobs.checkpoints(request.name))

    async def PinCheckpoint(self, request: Any, context: Context) -> Any:
        answer = self._contract.PinCheckpointResponse
        return answer.FromString(await self._jobs.pin("PinCheckpoint", request, answer, pinned=True))

    async def UnpinCheckpoint(self, request: Any, context: Context) -> Any:
        answer = self._contract.UnpinCheckpointResponse
        return answer.FromString(await self._jobs.pin("UnpinCheckpoint", request, answer, pinned=False))

    async def VerifyResume(self, request: Any, context: Context) -> Any:
        answer = self._contract.VerifyResumeResponse
        return answer.FromString(await self._jobs.verify(request, answer))

    async def ListVerifications(self, request: Any, context: Context) -> Any:
        return self._contract.ListVerificationsResponse(verifications=await self._jobs.verifications(request.name))

    async def GetMetrics(self, request: Any, context: Context) -> Any:
        return self._contract.GetMetricsResponse(series=await self._jobs.metrics(request))

    async def _steer(self, verb: str, request: Any, move: Callable[[sa.Connection, str], JobRow]) -> Any:
        answer = getattr(self._contract, f"{verb}JobResponse")
        stored = await self._jobs.mutate(
            f"{verb}Job", request, lambda connection: move(connection, request.name), lambda job: answer(job=job)
        )
        return answer.FromString(stored)
