"""Small real servers with scripted behaviour, and one face over the sync and the asyncio clients."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cognateforge import exceptions
from cognateforge.agent.v1 import agent_pb2, agent_pb2_grpc, training_pb2, training_pb2_grpc
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.client import (
    AgentClient,
    AsyncAgentClient,
    AsyncCognateClient,
    CognateClient,
    FetchedArtifact,
    ModelNews,
    ModelSnapshot,
)
from cognateforge.cognate.v1 import pretraining_pb2, pretraining_pb2_grpc
from cognateforge.exchange.v1 import model_pb2, model_pb2_grpc
from cognateforge.job.v1 import job_pb2

JOB = "jobs/00000000-0000-4000-8000-000000000001"
AGENT_JOB = "jobs/00000000-0000-4000-8000-000000000002"
RESERVATION = "reservations/00000000-0000-4000-8000-000000000003"

Failure = exceptions.ForgeError | grpc.StatusCode
CARD = "# A card\n\n| metric | value |\n| --- | --- |\n| accuracy | 0.5 |\n"


@dataclass
class Call:
    """What a server saw of one call."""

    method: str
    metadata: dict[str, str]
    time_remaining_s: float
    request: Any


@dataclass
class Script:
    """What the next calls meet. `failures` are used up one by one, `always` stays."""

    failures: deque[Failure] = field(default_factory=deque)
    always: Failure | None = None
    calls: list[Call] = field(default_factory=list)
    # While it is set to an Event, calls wait for it. `arrived` counts those that wait.
    gate: threading.Event | None = None
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def meet(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        """Record a call, and let it wait or fail as the script says."""
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.calls.append(Call(method, metadata, context.time_remaining(), request))
        if self.gate is not None:
            self.arrived.release()
            self.gate.wait(10)
        failure = self.failures.popleft() if self.failures else self.always
        if failure is not None:
            fail(context, failure)

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(call.method == method for call in self.calls)


def fail(context: grpc.ServicerContext, failure: Failure) -> NoReturn:
    """End a call as a server of ours, or as a proxy would."""
    if isinstance(failure, exceptions.ForgeError):
        status = exceptions.to_status(failure, request_id="request-7")
        context.abort_with_status(rpc_status.to_status(status))
    context.abort(failure, "no details")


def progress_events(count: int) -> list[job_pb2.JobEvent]:
    """Return a job's history: running, steps, an artifact."""
    events = [job_pb2.JobEvent(sequence=1, state_change=job_pb2.StateChange(to=job_pb2.JOB_STATE_RUNNING))]
    for sequence in range(2, count):
        metrics = [
            job_pb2.Metric(name="loss", unit="nats/token", value=5.0 / sequence),
            job_pb2.Metric(name="mean_ponder_steps", unit="steps", value=2.5),
        ]
        progress = job_pb2.Progress(step=sequence, total_steps=count, metrics=metrics)
        events.append(job_pb2.JobEvent(sequence=sequence, attempt=1, progress=progress))
    published = job_pb2.ArtifactPublished(name="cognate-25m@7")
    return [*events, job_pb2.JobEvent(sequence=count, artifact_published=published)]


@dataclass
class History:
    """A job's events, and how many of them each stream sends before it breaks."""

    events: list[job_pb2.JobEvent] = field(default_factory=lambda: progress_events(20))
    end: job_pb2.End = field(default_factory=lambda: job_pb2.End(state=job_pb2.JOB_STATE_SUCCEEDED))
    cuts: deque[int] = field(default_factory=deque)
    how: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    # Events before after_sequence that a careless server sends again.
    overlap: int = 0
    # While it is set to an Event, a stream that sent every event waits for it.
    pause_before_end: threading.Event | None = None

    def frames(self, after: int, context: grpc.ServicerContext) -> Iterator[job_pb2.WatchFrame]:
        """Yield what one stream sends."""
        cut = self.cuts.popleft() if self.cuts else None
        start = max(after - self.overlap, 0)
        for sent, event in enumerate(self.events[start:]):
            if sent == cut:
                if self.how is None:
                    return
                fail(context, self.how)
            yield job_pb2.WatchFrame(event=event)
        yield job_pb2.WatchFrame(heartbeat=job_pb2.Heartbeat(last_sequence=len(self.events)))
        if self.pause_before_end is not None:
            self.pause_before_end.wait(10)
        end = job_pb2.End()
        end.CopyFrom(self.end)
        end.last_sequence = len(self.events)
        yield job_pb2.WatchFrame(end=end)


@dataclass
class Logs:
    """What the workers of two attempts wrote, and how many frames each stream sends before it breaks."""

    written: list[list[str]] = field(default_factory=lambda: [["one", "two", "died"], ["three", "four"]])
    cuts: deque[int] = field(default_factory=deque)
    how: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    # Bytes after the beginning of the second attempt's log that are no longer kept.
    gap: int = 0
    # A careless server begins so many bytes late.
    late: int = 0

    def frames(self, request: Any, context: grpc.ServicerContext) -> Iterator[job_pb2.LogFrame]:
        """Yield what one stream sends, a line in each frame."""
        cut = self.cuts.popleft() if self.cuts else None
        for sent, frame in enumerate(self._all(request)):
            if sent == cut:
                if self.how is None:
                    return
                fail(context, self.how)
            yield frame

    def _all(self, request: Any) -> Iterator[job_pb2.LogFrame]:
        first = request.attempt or len(self.written)
        attempt, position = first, request.position + self.late
        for attempt in range(first, len(self.written) + 1) if request.follow else [first]:
            position = position if attempt == first else 0
            if attempt == 2 and position < self.gap:
                yield job_pb2.LogFrame(gap=job_pb2.LogGap(attempt=attempt, position=position, next_position=self.gap))
                position = self.gap
            place = 0
            for text in self.written[attempt - 1]:
                if place >= position:
                    line, position = job_pb2.LogLine(position=place, text=text), place + len(text) + 1
                    yield job_pb2.LogFrame(
                        lines=job_pb2.LogLines(attempt=attempt, lines=[line], next_position=position)
                    )
                place += len(text) + 1
            yield job_pb2.LogFrame(heartbeat=job_pb2.LogHeartbeat(attempt=attempt, next_position=position))
        yield job_pb2.LogFrame(end=job_pb2.LogEnd(attempt=attempt, next_position=position))


@dataclass
class Verifications:
    """Verifications of one job: each is done when it is listed for the second time."""

    verdict: job_pb2.ResumeVerdict.ValueType = job_pb2.RESUME_VERDICT_EQUAL
    failure: str = ""
    all: list[job_pb2.Verification] = field(default_factory=list)
    looked: int = 0

    def begin(self, request: Any) -> job_pb2.Verification:
        """Return a new one."""
        name = f"verifications/00000000-0000-4000-8000-00000000000{len(self.all)}"
        begins, ends = (job_pb2.Checkpoint(step=step) for step in (request.from_step or 10, request.to_step or 20))
        one = job_pb2.Verification(
            name=name,
            job=request.name,
            state=job_pb2.VERIFICATION_STATE_QUEUED,
            from_checkpoint=begins,
            to_checkpoint=ends,
        )
        self.all.insert(0, one)
        return one

    def listed(self) -> list[job_pb2.Verification]:
        """Return all of them, newest first."""
        self.looked += 1
        if self.looked > 1 and self.failure:
            self.all[0].state, self.all[0].failure = job_pb2.VERIFICATION_STATE_FAILED, self.failure
        elif self.looked > 1:
            self.all[0].state = job_pb2.VERIFICATION_STATE_DONE
            self.all[0].receipt.verdict = self.verdict
        return self.all


@dataclass
class Outbox:
    """What happened to models, how much of it is kept, and how many frames each stream sends before it breaks."""

    count: int = 20
    # The newest events that are kept; a watch from before them gets a snapshot, or is refused.
    keep: int = 10_000
    page: int = 7
    # Events that happen after a snapshot was taken.
    after_snapshot: int = 0
    cuts: deque[int] = field(default_factory=deque)
    how: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    overlap: int = 0
    missing: int = 0

    def frames(self, after: int, context: grpc.ServicerContext) -> Iterator[model_pb2.WatchModelsResponse]:
        """Yield what one stream sends; then heartbeats, as nothing more happens."""
        cut = self.cuts.popleft() if self.cuts else None
        for sent, frame in enumerate(self._all(after, context)):
            if sent == cut:
                if self.how is None:
                    return
                fail(context, self.how)
            yield frame
        while context.is_active() and not _stopping.wait(0.02):
            yield model_pb2.WatchModelsResponse(heartbeat=model_pb2.ModelHeartbeat(last_sequence=self.count))

    def _all(self, after: int, context: grpc.ServicerContext) -> Iterator[model_pb2.WatchModelsResponse]:
        oldest = max(1, self.count - self.keep + 1)
        if after + 1 < oldest and after > 0:
            metadata = {"oldest_sequence": str(oldest)}
            fail(context, exceptions.SequenceOutOfRangeError("no longer kept", metadata=metadata))
        if oldest > 1 and after == 0:
            after = self.count - self.after_snapshot
            yield from self._snapshot(after)
        for sequence in range(max(1, after + 1 - self.overlap), self.count + 1):
            if sequence != self.missing:
                event = model_pb2.ModelEvent(sequence=sequence, published=published(sequence))
                yield model_pb2.WatchModelsResponse(event=event)

    def _snapshot(self, last: int) -> Iterator[model_pb2.WatchModelsResponse]:
        for first in range(1, last + 1, self.page):
            numbers = range(first, min(first + self.page, last + 1))
            snapshot = model_pb2.ModelSnapshot(
                models=map(published, numbers), last_sequence=last, more=numbers[-1] < last
            )
            yield model_pb2.WatchModelsResponse(snapshot=snapshot)


def published(version: int) -> model_pb2.FoundationModel:
    """Return the model that an event tells of."""
    return model_pb2.FoundationModel(name=f"cognate-25m@{version}", state=model_pb2.MODEL_STATE_READY)


@dataclass
class Artifact:
    """A stored artifact, and how many payload bytes each stream sends before it breaks."""

    files: dict[str, bytes]
    name: str = "cognate-25m@7"
    chunk_bytes: int = 1000
    cuts: deque[int] = field(default_factory=deque)
    tamper: Callable[[bytes], bytes] = lambda payload: payload
    manifest_override: bytes | None = None
    digest_override: str | None = None
    signature: bytes = b""
    sent_bytes: int = 0

    @property
    def manifest(self) -> bytes:
        """The manifest as stored."""
        if self.manifest_override is not None:
            return self.manifest_override
        files = [
            {"path": path, "size_bytes": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
            for path, data in self.files.items()
        ]
        return json.dumps({"name": self.name, "files": files}).encode()

    @property
    def digest(self) -> str:
        """The manifest's digest."""
        if self.digest_override is not None:
            return self.digest_override
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    @property
    def provenance(self) -> artifact_pb2.Provenance:
        """What is told of it without its payload. It has no statement."""
        return artifact_pb2.Provenance(
            name=self.name, digest=self.digest, manifest=self.manifest, signature=self.signature
        )

    @property
    def payload(self) -> bytes:
        """The files, one after the other."""
        return b"".join(self.files.values())

    def chunks(self, offset: int, context: grpc.ServicerContext) -> Iterator[artifact_pb2.Chunk]:
        """Yield what one stream sends after its header."""
        payload = self.tamper(self.payload)
        stop = offset + self.cuts.popleft() if self.cuts else len(payload) + 1
        while offset < len(payload):
            if offset >= stop:
                fail(context, grpc.StatusCode.UNAVAILABLE)
            data = payload[offset : min(offset + self.chunk_bytes, max(stop, offset + 1))]
            yield artifact_pb2.Chunk(offset_bytes=offset, data=data)
            offset += len(data)
            self.sent_bytes += len(data)


def some_artifact(seed: int = 0) -> Artifact:
    """Return an artifact of odd sizes: empty files, a folder, more than one chunk."""
    pick = random.Random(seed)  # noqa: S311
    return Artifact(
        {
            "empty.txt": b"",
            "model.safetensors": pick.randbytes(7_777),
            "tokenizer/vocab.json": pick.randbytes(1),
            "tokenizer/merges.txt": pick.randbytes(3_210),
            "last": b"",
        }
    )


class FakePretraining(pretraining_pb2_grpc.CognatePretrainingServiceServicer):
    """Pretraining jobs from a script."""

    def __init__(self, script: Script, history: History, logs: Logs) -> None:
        self.script, self.history, self.logs = script, history, logs
        self.verifications = Verifications()
        self.job = pretraining_pb2.PretrainingJob(
            job=job_pb2.Job(name=JOB, state=job_pb2.JOB_STATE_RUNNING, observed=True, step=2, total_steps=20, attempt=1)
        )
        self.estimate: job_pb2.Estimate | None = None
        self.reservation = pretraining_pb2.Reservation()

    def _known(self, name: str, context: grpc.ServicerContext) -> None:
        if name != JOB:
            fail(context, exceptions.JobNotFoundError(f"no job {name}"))

    def StartPretraining(self, request: Any, context: Any) -> Any:
        self.script.meet("StartPretraining", request, context)
        made = None if request.validate_only else self.job.job
        return pretraining_pb2.StartPretrainingResponse(
            job=pretraining_pb2.PretrainingJob(job=made, plan=request.plan), estimate=self.estimate
        )

    def GetJob(self, request: Any, context: Any) -> Any:
        self.script.meet("GetJob", request, context)
        self._known(request.name, context)
        return pretraining_pb2.GetJobResponse(job=self.job)

    def CreateReservation(self, request: Any, context: Any) -> Any:
        self.script.meet("CreateReservation", request, context)
        fields = {name: getattr(request, name) for name in ("slots", "start_time", "end_time", "purpose")}
        self.reservation = pretraining_pb2.Reservation(name=RESERVATION, caller="local", **fields)
        return pretraining_pb2.CreateReservationResponse(reservation=self.reservation)

    def ListReservations(self, request: Any, context: Any) -> Any:
        self.script.meet("ListReservations", request, context)
        token = "" if request.page_token else "second"
        return pretraining_pb2.ListReservationsResponse(reservations=[self.reservation], next_page_token=token)

    def CancelReservation(self, request: Any, context: Any) -> Any:
        self.script.meet("CancelReservation", request, context)
        if request.name != RESERVATION:
            fail(context, exceptions.ReservationNotFoundError(f"no reservation {request.name}; list them"))
        self.reservation.cancel_time.GetCurrentTime()
        return pretraining_pb2.CancelReservationResponse(reservation=self.reservation)

    def ListJobs(self, request: Any, context: Any) -> Any:
        self.script.meet("ListJobs", request, context)
        if not request.page_token:
            return pretraining_pb2.ListJobsResponse(jobs=[self.job], next_page_token="second")  # noqa: S106
        return pretraining_pb2.ListJobsResponse(jobs=[self.job])

    def WatchJob(self, request: Any, context: Any) -> Any:
        self.script.meet("WatchJob", request, context)
        self._known(request.name, context)
        for frame in self.history.frames(request.after_sequence, context):
            yield pretraining_pb2.WatchJobResponse(frame=frame)

    def WatchLogs(self, request: Any, context: Any) -> Any:
        self.script.meet("WatchLogs", request, context)
        self._known(request.name, context)
        for frame in self.logs.frames(request, context):
            yield pretraining_pb2.WatchLogsResponse(frame=frame)

    def _steered(self, method: str, state: job_pb2.JobState.ValueType, request: Any, context: Any) -> Any:
        self.script.meet(method, request, context)
        self._known(request.name, context)
        self.job.job.state = state
        return self.job

    def PauseJob(self, request: Any, context: Any) -> Any:
        job = self._steered("PauseJob", job_pb2.JOB_STATE_PAUSING, request, context)
        return pretraining_pb2.PauseJobResponse(job=job)

    def ResumeJob(self, request: Any, context: Any) -> Any:
        fail(context, exceptions.IllegalTransitionError("job is RUNNING; PAUSED jobs can be resumed"))

    def CancelJob(self, request: Any, context: Any) -> Any:
        job = self._steered("CancelJob", job_pb2.JOB_STATE_CANCELLING, request, context)
        return pretraining_pb2.CancelJobResponse(job=job)

    def ListCheckpoints(self, request: Any, context: Any) -> Any:
        checkpoint = job_pb2.Checkpoint(step=10, digest="sha256:" + "0" * 64, size_bytes=5, available=True)
        return pretraining_pb2.ListCheckpointsResponse(checkpoints=[checkpoint])

    def PinCheckpoint(self, request: Any, context: Any) -> Any:
        return pretraining_pb2.PinCheckpointResponse(
            checkpoint=job_pb2.Checkpoint(step=request.step, available=True, pinned=True)
        )

    def UnpinCheckpoint(self, request: Any, context: Any) -> Any:
        return pretraining_pb2.UnpinCheckpointResponse(checkpoint=job_pb2.Checkpoint(step=request.step, available=True))

    def VerifyResume(self, request: Any, context: Any) -> Any:
        self.script.meet("VerifyResume", request, context)
        self._known(request.name, context)
        return pretraining_pb2.VerifyResumeResponse(verification=self.verifications.begin(request))

    def ListVerifications(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return pretraining_pb2.ListVerificationsResponse(verifications=self.verifications.listed())

    def GetMetrics(self, request: Any, context: Any) -> Any:
        series = job_pb2.MetricSeries(name="loss", unit="nats/token", steps=[1, 2], values=[4.0, 3.5])
        return pretraining_pb2.GetMetricsResponse(series=[series])

    def ValidateModel(self, request: Any, context: Any) -> Any:
        check = artifact_pb2.Check(
            name="memory_gain_nats", value=0.5, threshold=0.125, passed=True, detail="must be > the threshold"
        )
        return pretraining_pb2.ValidateModelResponse(checks=[check])

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        info = job_pb2.ServerInfo(version="9.9", capabilities=["generated-data"], slots=4, slots_taken=1)
        return pretraining_pb2.GetServerInfoResponse(info=info)


class FakeModels(model_pb2_grpc.ModelServiceServicer):
    """One foundation model, and an outbox that tells of more."""

    def __init__(self, script: Script, artifact: Artifact, outbox: Outbox) -> None:
        self.script, self.artifact, self.outbox = script, artifact, outbox

    def GetModelCard(self, request: model_pb2.GetModelCardRequest, context: Any) -> model_pb2.GetModelCardResponse:
        return model_pb2.GetModelCardResponse(name=self.artifact.name, markdown=CARD)

    def _model(self) -> model_pb2.FoundationModel:
        return model_pb2.FoundationModel(
            name=self.artifact.name,
            state=model_pb2.MODEL_STATE_EXPERIMENTAL,
            digest=self.artifact.digest,
            size_bytes=len(self.artifact.payload),
            checks=[artifact_pb2.Check(name="loss_is_finite", passed=True), artifact_pb2.Check(name="memory_helps")],
            results=[artifact_pb2.Result(metric="gsm8k_exact_match", dataset="gsm8k/validation", value=0.125, rows=8)],
        )

    def _known(self, name: str, context: grpc.ServicerContext) -> None:
        if name not in {self.artifact.name, self.artifact.name.partition("@")[0]}:
            fail(context, exceptions.ModelNotFoundError(f"no model {name}"))

    def GetModel(self, request: Any, context: Any) -> Any:
        self.script.meet("GetModel", request, context)
        self._known(request.name, context)
        return model_pb2.GetModelResponse(model=self._model())

    def ListModels(self, request: Any, context: Any) -> Any:
        self.script.meet("ListModels", request, context)
        return model_pb2.ListModelsResponse(models=[self._model()])

    def FetchModel(self, request: Any, context: Any) -> Any:
        self.script.meet("FetchModel", request, context)
        self._known(request.name, context)
        header = model_pb2.FetchHeader(
            model=self._model(), manifest=self.artifact.manifest, signature=self.artifact.signature
        )
        yield model_pb2.FetchModelResponse(header=header)
        for chunk in self.artifact.chunks(request.offset_bytes, context):
            yield model_pb2.FetchModelResponse(chunk=chunk)

    def GetModelProvenance(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return model_pb2.GetModelProvenanceResponse(provenance=self.artifact.provenance)

    def CheckCompatibility(self, request: Any, context: Any) -> Any:
        fail(context, exceptions.NotImplementedByServerError())

    def RegisterDependents(self, request: Any, context: Any) -> Any:
        fail(context, exceptions.NotImplementedByServerError())

    def ReleaseDependents(self, request: Any, context: Any) -> Any:
        fail(context, exceptions.NotImplementedByServerError())

    def ListDependents(self, request: Any, context: Any) -> Any:
        fail(context, exceptions.NotImplementedByServerError())

    def WatchModels(self, request: Any, context: Any) -> Any:
        self.script.meet("WatchModels", request, context)
        yield from self.outbox.frames(request.after_sequence, context)


class FakeTraining(training_pb2_grpc.AgentForgeTrainingServiceServicer):
    """One agent training job."""

    def __init__(self, script: Script, history: History, logs: Logs) -> None:
        self.script, self.history, self.logs = script, history, logs
        self.verifications = Verifications()
        self.job = training_pb2.TrainingJob(
            job=job_pb2.Job(name=AGENT_JOB, state=job_pb2.JOB_STATE_QUEUED, total_steps=20)
        )

    def _known(self, name: str, context: grpc.ServicerContext) -> None:
        if name != AGENT_JOB:
            fail(context, exceptions.JobNotFoundError(f"no job {name}"))

    def StartTraining(self, request: Any, context: Any) -> Any:
        self.script.meet("StartTraining", request, context)
        return training_pb2.StartTrainingResponse(job=training_pb2.TrainingJob(job=self.job.job, plan=request.plan))

    def GetJob(self, request: Any, context: Any) -> Any:
        self.script.meet("GetJob", request, context)
        self._known(request.name, context)
        return training_pb2.GetJobResponse(job=self.job)

    def ListJobs(self, request: Any, context: Any) -> Any:
        return training_pb2.ListJobsResponse(jobs=[self.job])

    def WatchJob(self, request: Any, context: Any) -> Any:
        self.script.meet("WatchJob", request, context)
        self._known(request.name, context)
        for frame in self.history.frames(request.after_sequence, context):
            yield training_pb2.WatchJobResponse(frame=frame)

    def WatchLogs(self, request: Any, context: Any) -> Any:
        self.script.meet("WatchLogs", request, context)
        self._known(request.name, context)
        for frame in self.logs.frames(request, context):
            yield training_pb2.WatchLogsResponse(frame=frame)

    def PauseJob(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return training_pb2.PauseJobResponse(job=self.job)

    def ResumeJob(self, request: Any, context: Any) -> Any:
        return training_pb2.ResumeJobResponse(job=self.job)

    def CancelJob(self, request: Any, context: Any) -> Any:
        return training_pb2.CancelJobResponse(job=self.job)

    def ListCheckpoints(self, request: Any, context: Any) -> Any:
        return training_pb2.ListCheckpointsResponse()

    def PinCheckpoint(self, request: Any, context: Any) -> Any:
        return training_pb2.PinCheckpointResponse(
            checkpoint=job_pb2.Checkpoint(step=request.step, available=True, pinned=True)
        )

    def UnpinCheckpoint(self, request: Any, context: Any) -> Any:
        return training_pb2.UnpinCheckpointResponse(checkpoint=job_pb2.Checkpoint(step=request.step, available=True))

    def VerifyResume(self, request: Any, context: Any) -> Any:
        self.script.meet("VerifyResume", request, context)
        self._known(request.name, context)
        return training_pb2.VerifyResumeResponse(verification=self.verifications.begin(request))

    def ListVerifications(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return training_pb2.ListVerificationsResponse(verifications=self.verifications.listed())

    def GetMetrics(self, request: Any, context: Any) -> Any:
        return training_pb2.GetMetricsResponse()

    def EvaluateAgent(self, request: Any, context: Any) -> Any:
        self.script.meet("EvaluateAgent", request, context)
        found = agent_pb2.Evaluation(metric="accuracy", dataset="forge-intents/test", value=0.5, rows=4)
        return training_pb2.EvaluateAgentResponse(evaluations=[found])

    def ListArchitectures(self, request: Any, context: Any) -> Any:
        one = training_pb2.AgentArchitecture(name="cognate", tasks=["classification"], description="On Cognate.")
        broken = training_pb2.ArchitectureProblem(name="echo", value="echo_plugin:Echo", reason="SystemExit: bye")
        return training_pb2.ListArchitecturesResponse(architectures=[one], problems=[broken])

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        return training_pb2.GetServerInfoResponse(info=job_pb2.ServerInfo(version="9.9"))


class FakeAgents(agent_pb2_grpc.AgentServiceServicer):
    """One agent."""

    def __init__(self, script: Script, artifact: Artifact) -> None:
        self.script, self.artifact = script, artifact

    def GetAgentCard(self, request: agent_pb2.GetAgentCardRequest, context: Any) -> agent_pb2.GetAgentCardResponse:
        return agent_pb2.GetAgentCardResponse(name=self.artifact.name, markdown=CARD)

    def _agent(self) -> agent_pb2.Agent:
        return agent_pb2.Agent(
            name=self.artifact.name,
            aliases=["production"],
            digest=self.artifact.digest,
            task="classification",
            lifecycle=agent_pb2.LIFECYCLE_DRAFT,
        )

    def _known(self, name: str, context: grpc.ServicerContext) -> None:
        if name.partition("@")[0] != self.artifact.name.partition("@")[0]:
            fail(context, exceptions.AgentNotFoundError(f"no agent {name}"))

    def GetAgent(self, request: Any, context: Any) -> Any:
        self.script.meet("GetAgent", request, context)
        self._known(request.name, context)
        return agent_pb2.GetAgentResponse(agent=self._agent())

    def ListAgents(self, request: Any, context: Any) -> Any:
        self.script.meet("ListAgents", request, context)
        return agent_pb2.ListAgentsResponse(agents=[self._agent()])

    def FetchAgent(self, request: Any, context: Any) -> Any:
        self.script.meet("FetchAgent", request, context)
        header = agent_pb2.FetchAgentHeader(
            agent=self._agent(), manifest=self.artifact.manifest, signature=self.artifact.signature
        )
        yield agent_pb2.FetchAgentResponse(header=header)
        for chunk in self.artifact.chunks(request.offset_bytes, context):
            yield agent_pb2.FetchAgentResponse(chunk=chunk)

    def GetAgentProvenance(self, request: Any, context: Any) -> Any:
        self._known(request.name, context)
        return agent_pb2.GetAgentProvenanceResponse(provenance=self.artifact.provenance)

    def SetAlias(self, request: Any, context: Any) -> Any:
        self.script.meet("SetAlias", request, context)
        return agent_pb2.SetAliasResponse(agent=self._agent())

    def SetLifecycle(self, request: Any, context: Any) -> Any:
        self.script.meet("SetLifecycle", request, context)
        agent = self._agent()
        agent.lifecycle = request.lifecycle
        return agent_pb2.SetLifecycleResponse(agent=agent)

    def ListMoves(self, request: Any, context: Any) -> Any:
        self.script.meet("ListMoves", request, context)
        lifecycle = agent_pb2.LifecycleMove(
            from_lifecycle=agent_pb2.LIFECYCLE_DRAFT, to_lifecycle=agent_pb2.LIFECYCLE_CANDIDATE
        )
        first = agent_pb2.AliasMove(alias="production")
        again = agent_pb2.AliasMove(alias="production", from_version=2)
        return agent_pb2.ListMovesResponse(
            moves=[
                agent_pb2.Move(caller="local", version=3, alias=again),
                agent_pb2.Move(caller="local", version=3, lifecycle=lifecycle),
                agent_pb2.Move(caller="local", version=2, alias=first),
            ]
        )


class FakeHealth(health_pb2_grpc.HealthServicer):
    """SERVING, unless the script says otherwise."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def Check(self, request: Any, context: Any) -> Any:
        self.script.meet("Check", request, context)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def Watch(self, request: Any, context: Any) -> Any:
        yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        while context.is_active() and not _stopping.wait(0.05):
            pass


_stopping = threading.Event()


class Fake:
    """A real gRPC server on a free port that plays both services."""

    def __init__(self) -> None:
        self.script = Script()
        self.history, self.agent_history, self.outbox = History(), History(), Outbox()
        self.logs = Logs()
        self.model, self.agent = some_artifact(), some_artifact(seed=1)
        self.agent.name = "intent-router@3"
        self.pretraining = FakePretraining(self.script, self.history, self.logs)
        self.port = 0
        self.unix_path: Path | None = None
        self.tls: grpc.ServerCredentials | None = None
        self.start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        pretraining_pb2_grpc.add_CognatePretrainingServiceServicer_to_server(self.pretraining, self.server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(FakeModels(self.script, self.model, self.outbox), self.server)
        training = FakeTraining(self.script, self.agent_history, self.logs)
        training_pb2_grpc.add_AgentForgeTrainingServiceServicer_to_server(training, self.server)
        agent_pb2_grpc.add_AgentServiceServicer_to_server(FakeAgents(self.script, self.agent), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(FakeHealth(self.script), self.server)
        if self.tls is None:
            self.port = self.server.add_insecure_port(self.address)
        else:
            self.port = self.server.add_secure_port(self.address, self.tls)
        if self.unix_path is not None:
            self.server.add_insecure_port(f"unix:{self.unix_path}")
        self.server.start()

    def stop(self) -> None:
        """End every call at once."""
        if self.script.gate is not None:
            self.script.gate.set()
        self.server.stop(None).wait()


def sequence_of(news: ModelNews) -> int:
    """Return where a watch stands after it."""
    return news.last_sequence if isinstance(news, ModelSnapshot) else news.sequence


class Driver:
    """The calls that the tests make, the same for both kinds of client."""

    def __init__(self, cognate: CognateClient | AsyncCognateClient, agent: AgentClient | AsyncAgentClient) -> None:
        self.cognate, self.agent = cognate, agent

    async def get_job(self, name: str = JOB, **kwargs: Any) -> pretraining_pb2.PretrainingJob:
        """Call a unary method."""
        request = pretraining_pb2.GetJobRequest(name=name)
        if isinstance(self.cognate, AsyncCognateClient):
            return (await self.cognate.pretraining.GetJob(request, **kwargs)).job
        return (await asyncio.to_thread(self.cognate.pretraining.GetJob, request, **kwargs)).job

    async def stream(self, name: str = JOB, after: int = 0, **kwargs: Any) -> list[pretraining_pb2.WatchJobResponse]:
        """Read one stream of the stub, without the watch around it."""
        request = pretraining_pb2.WatchJobRequest(name=name, after_sequence=after)
        if isinstance(self.cognate, AsyncCognateClient):
            return [response async for response in self.cognate.pretraining.WatchJob(request, **kwargs)]
        stub = self.cognate.pretraining
        return await asyncio.to_thread(lambda: list(stub.WatchJob(request, **kwargs)))

    async def watch(self, name: str = JOB, after: int = 0, **kwargs: Any) -> list[job_pb2.WatchFrame]:
        """Watch a job to its end."""
        if isinstance(self.cognate, AsyncCognateClient):
            return [frame async for frame in self.cognate.watch_job(name, after, **kwargs)]
        client = self.cognate
        return await asyncio.to_thread(lambda: list(client.watch_job(name, after, **kwargs)))

    async def watch_logs(self, name: str = JOB, **kwargs: Any) -> list[job_pb2.LogFrame]:
        """Watch a job's logs to the end."""
        if isinstance(self.cognate, AsyncCognateClient):
            return [frame async for frame in self.cognate.watch_logs(name, **kwargs)]
        client = self.cognate
        return await asyncio.to_thread(lambda: list(client.watch_logs(name, **kwargs)))

    async def watch_models(self, until: int, after: int = 0, **kwargs: Any) -> list[ModelNews]:
        """Watch the models until the event or the snapshot with that sequence."""
        if isinstance(self.cognate, AsyncCognateClient):
            seen: list[ModelNews] = []
            async with aclosing(self.cognate.watch_models(after, **kwargs)) as news:
                async for one in news:
                    seen.append(one)
                    if sequence_of(one) >= until:
                        break
            return seen
        client = self.cognate

        def read() -> list[ModelNews]:
            seen = []
            for one in client.watch_models(after, **kwargs):
                seen.append(one)
                if sequence_of(one) >= until:
                    break
            return seen

        return await asyncio.to_thread(read)

    async def fetch(self, destination: Path, name: str = "cognate-25m", **kwargs: Any) -> FetchedArtifact:
        """Fetch a model."""
        if isinstance(self.cognate, AsyncCognateClient):
            return await self.cognate.fetch_model(name, destination, **kwargs)
        return await asyncio.to_thread(self.cognate.fetch_model, name, destination, **kwargs)

    async def fetch_agent(self, destination: Path, name: str) -> FetchedArtifact:
        """Fetch an agent."""
        if isinstance(self.agent, AsyncAgentClient):
            return await self.agent.fetch_agent(name, destination)
        return await asyncio.to_thread(self.agent.fetch_agent, name, destination)

    async def health(self) -> str:
        """Ask for the service's health."""
        if isinstance(self.cognate, AsyncCognateClient):
            return await self.cognate.health()
        return await asyncio.to_thread(self.cognate.health)


@asynccontextmanager
async def driver(kind: str, where: Any, **kwargs: Any) -> AsyncIterator[Driver]:
    """Open both clients of one kind."""
    if kind == "aio":
        async with AsyncCognateClient(where, **kwargs) as cognate, AsyncAgentClient(where, **kwargs) as agent:
            yield Driver(cognate, agent)
    else:
        with CognateClient(where, **kwargs) as sync_cognate, AgentClient(where, **kwargs) as sync_agent:
            yield Driver(sync_cognate, sync_agent)
