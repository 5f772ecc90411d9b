"""Commands about jobs, whichever service runs them."""

from __future__ import annotations

import enum
import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.names import full_job_name
from cognateforge.cli.session import Session, command, first_found, new_request_id, print_line, say

if TYPE_CHECKING:
    from cognateforge.cli.session import Row
    from cognateforge.job.v1.job_pb2 import Checkpoint, Job, JobEvent, LogFrame, MetricSeries, Verification, WatchFrame

JobName = Annotated[str, typer.Argument(help="Job: jobs/UUID, or the UUID alone.", metavar="NAME")]
RequestId = Annotated[str | None, typer.Option(help="UUID of this wish: the same one again changes nothing twice.")]
CheckpointStep = Annotated[int, typer.Argument(min=0, help="The checkpoint's step.", metavar="STEP")]
CheckpointDigest = Annotated[str, typer.Option(help="Which one of that step. Default: the newest.")]
Progress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="Progress on stderr. Default: when it is a terminal.")
]


# A replay takes seconds at least.
POLL_S = 1.0


class Service(enum.StrEnum):
    """Which service a job belongs to."""

    COGNATE = "cognate"
    AGENT = "agent"


ServiceOption = Annotated[Service | None, typer.Option("--service", help="Whose job it is. Default: both are asked.")]


@dataclass(frozen=True)
class JobService:
    """The job calls that both services have, under the same names in different packages."""

    service: Service
    session: Session

    @property
    def _client(self) -> Any:
        return self.session.cognate_client if self.service is Service.COGNATE else self.session.agent_client

    @property
    def _stub(self) -> Any:
        return self._client.pretraining if self.service is Service.COGNATE else self._client.training

    def _request(self, kind: str, /, **fields: Any) -> Any:
        module = "cognate.v1.pretraining_pb2" if self.service is Service.COGNATE else "agent.v1.training_pb2"
        return getattr(importlib.import_module(f"cognateforge.{module}"), kind)(**fields)

    def get(self, name: str) -> Any:
        """Return the service's own job message: `job`, `plan` and more."""
        return self._stub.GetJob(self._request("GetJobRequest", name=name)).job

    def newest(self, states: Sequence[int], limit: int) -> Iterator[Any]:
        """Yield jobs, newest first."""
        token = ""
        while limit > 0:
            page = self._stub.ListJobs(
                self._request("ListJobsRequest", page_size=min(limit, 500), page_token=token, states=states)
            )
            yield from page.jobs[:limit]
            limit, token = limit - len(page.jobs), page.next_page_token
            if not token:
                return

    def steer(self, verb: str, name: str, request_id: str) -> Any:
        """Pause, Resume or Cancel a job, and return it."""
        request = self._request(f"{verb}JobRequest", name=name, request_id=request_id)
        return getattr(self._stub, f"{verb}Job")(request).job

    def checkpoints(self, name: str) -> list[Checkpoint]:
        """Return a job's checkpoints, newest first."""
        return list(self._stub.ListCheckpoints(self._request("ListCheckpointsRequest", name=name)).checkpoints)

    def pin(self, verb: str, name: str, step: int, digest: str, request_id: str) -> Any:
        """Pin or Unpin a checkpoint, and return it."""
        fields = {"name": name, "step": step, "digest": digest, "request_id": request_id}
        return getattr(self._stub, f"{verb}Checkpoint")(self._request(f"{verb}CheckpointRequest", **fields)).checkpoint

    def verify(self, name: str, from_step: int, to_step: int, request_id: str) -> Verification:
        """Ask for a replay of some steps, and return it."""
        fields = {"name": name, "from_step": from_step, "to_step": to_step, "request_id": request_id}
        answer = self._stub.VerifyResume(self._request("VerifyResumeRequest", **fields))
        return cast("Verification", answer.verification)

    def verifications(self, name: str) -> list[Verification]:
        """Return a job's verifications, newest first."""
        return list(self._stub.ListVerifications(self._request("ListVerificationsRequest", name=name)).verifications)

    def metrics(self, name: str, metrics: list[str], *, max_points: int = 0) -> list[MetricSeries]:
        """Return a job's metrics over its steps. max_points: of each, 0 for as many as the contract allows."""
        request = self._request("GetMetricsRequest", name=name, metrics=metrics, max_points=max_points)
        return list(self._stub.GetMetrics(request).series)

    def events_until(self, name: str, after_sequence: int, last_sequence: int) -> list[JobEvent]:
        """Return a job's events up to one that is there already, without waiting for what comes later."""
        events: list[JobEvent] = []
        if after_sequence >= last_sequence:
            return events
        request = self._request("WatchJobRequest", name=name, after_sequence=after_sequence)
        stream = self._stub.WatchJob(request, timeout=self.session.timeout_s)
        try:
            for response in stream:
                kind = response.frame.WhichOneof("frame")
                if kind == "event":
                    events.append(response.frame.event)
                if kind == "end" or (events and events[-1].sequence >= last_sequence):
                    break
        finally:
            stream.cancel()
        return events

    def info(self) -> Any:
        """Return what the server says of itself."""
        return self._stub.GetServerInfo(self._request("GetServerInfoRequest")).info

    def health(self, service: str = "") -> str:
        """Return the service's own word. service: one gRPC service of it, by its full name."""
        return str(self._client.health(service) if service else self._client.health())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where its calls go. Errors: ClientSetupError, UnavailableError."""
        return tuple(self._client.addresses)

    def breaker_state(self) -> str:
        """Return where this client's own circuit stands."""
        return str(self._client.breaker_state)

    def verdict(self, artifact: str) -> str:
        """Return what a published model's checks came to, for people; "" for agents, or when nobody can tell now."""
        from cognateforge.cli.plain import enum_word
        from cognateforge.exceptions import ForgeError
        from cognateforge.exchange.v1 import model_pb2

        if self.service is not Service.COGNATE:
            return ""
        try:
            model = self.session.cognate_client.models.GetModel(model_pb2.GetModelRequest(name=artifact)).model
        except ForgeError:
            return ""
        failed = ", ".join(check.name for check in model.checks if not check.passed)
        state = enum_word(model_pb2.ModelState.DESCRIPTOR, model.state)
        return f"{model.name} is {state}{f'; checks that failed: {failed}' if failed else ''}"

    def watch(self, name: str, after_sequence: int) -> Iterator[WatchFrame]:
        """Yield a job's events and its end."""
        return cast("Iterator[WatchFrame]", self._client.watch_job(name, after_sequence))

    def logs(self, name: str, *, attempt: int, position: int, follow: bool) -> Iterator[LogFrame]:
        """Yield what a job's workers write, and the end."""
        frames = self._client.watch_logs(name, attempt=attempt, position=position, follow=follow)
        return cast("Iterator[LogFrame]", frames)


def owner(session: Session, service: Service | None, name: str) -> tuple[JobService, Any]:
    """Return the service that has the job, and the job."""

    full_name = full_job_name(name)

    def ask(one: Service) -> tuple[JobService, Any]:
        jobs = JobService(one, session)
        return jobs, jobs.get(full_name)

    asked = [service] if service else list(Service)
    return first_found([lambda one=one: ask(one) for one in asked])  # type: ignore[misc]


def state_word(job: Job) -> str:
    """Return a job's state as a word, with a mark when its worker is out of sight."""
    from cognateforge.cli.plain import enum_word
    from cognateforge.job.v1 import job_pb2

    word = enum_word(job_pb2.JobState.DESCRIPTOR, job.state)
    return word if job.observed or word not in {"PREPARING", "RUNNING", "VALIDATING"} else f"{word} (out of sight)"


def wait_words(job: Job) -> str:
    """Return in a few words why a job has no worker, "" where it has one or needs none."""
    from cognateforge.cli.plain import enum_word
    from cognateforge.job.v1 import job_pb2

    if not job.HasField("wait"):
        return ""
    word = enum_word(job_pb2.WaitReason.DESCRIPTOR, job.wait.reason).lower()
    if job.wait.queue_position:
        return f"{word}, place {job.wait.queue_position}"
    return f"{word}, until {job.wait.not_before.ToJsonString()}" if job.wait.HasField("not_before") else word


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for add in (_reading, _watching, _steering, _pinning, _verifying):
        add(app)


def _reading(app: typer.Typer) -> None:
    @command(app)
    def jobs(
        session: Session,
        service: Annotated[Service | None, typer.Argument(help="Only this service's jobs.")] = None,
        state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state. May be repeated.")] = None,
        limit: Annotated[int, typer.Option(min=1, help="Most jobs of each service.")] = 50,
    ) -> Exit:
        """List jobs, newest first."""
        from cognateforge.exceptions import UnavailableError

        states = [_state_number(word) for word in state or []]
        rows: list[Row] = []
        code = Exit.OK
        for one in [service] if service else list(Service):
            try:
                found = list(JobService(one, session).newest(states, limit))
            except UnavailableError as error:
                if not session.as_json:
                    say(f"{one}:")
                code = session.report(error, service=one.value)
                continue
            for item in found:
                job: Job = item.job
                steps, told = f"{job.step}/{job.total_steps}", wait_words(job)
                cells = (job.name, one, state_word(job), steps, job.scheduling.priority, told, job.artifact, job.caller)
                rows.append((item, {"service": one.value}, cells))
        session.table(("name", "service", "state", "step", "priority", "waits for", "artifact", "caller"), rows)
        return code

    @command(app)
    def job(session: Session, name: JobName, service: ServiceOption = None) -> None:
        """Show one job and its plan."""
        found, item = owner(session, service, name)
        session.show(item, service=found.service.value)

    @command(app)
    def checkpoints(session: Session, name: JobName, service: ServiceOption = None) -> None:
        """List a job's checkpoints, newest first."""
        found, _ = owner(session, service, name)
        items = found.checkpoints(full_job_name(name))
        rows: list[Row] = [
            (item, {}, (item.step, item.size_bytes, _yes(item.available), _yes(item.pinned), _score(item), item.digest))
            for item in items
        ]
        session.table(("step", "bytes", "available", "pinned", "score", "digest"), rows)

    @command(app)
    def metrics(
        session: Session,
        name: JobName,
        service: ServiceOption = None,
        metric: Annotated[list[str] | None, typer.Option(help="Only this metric. May be repeated.")] = None,
    ) -> None:
        """Show a job's metrics: first and last value, or every point with --json."""
        found, _ = owner(session, service, name)
        items = found.metrics(full_job_name(name), metric or [])
        rows: list[Row] = [
            (item, {}, (item.name, item.unit, len(item.values), *_ends(item.values), item.steps[-1]))
            for item in items
            if item.values
        ]
        session.table(("metric", "unit", "points", "first", "last", "at step"), rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _score(item: Checkpoint) -> str:
    return f"{item.score:.5g}" if item.HasField("score") else ""


def _ends(values: Any) -> tuple[str, str]:
    return f"{values[0]:.5g}", f"{values[-1]:.5g}"


def _state_number(word: str) -> int:
    from cognateforge.job.v1 import job_pb2

    try:
        return job_pb2.JobState.Value(f"JOB_STATE_{word.upper()}")
    except ValueError:
        words = ", ".join(name.removeprefix("JOB_STATE_").lower() for name in job_pb2.JobState.keys()[1:])
        raise typer.BadParameter(f"{word!r} is no state: {words}", param_hint="--state") from None


def _watching(app: typer.Typer) -> None:
    @command(app)
    def watch(
        session: Session,
        name: JobName,
        service: ServiceOption = None,
        after_sequence: Annotated[int, typer.Option(min=0, help="Only events after this one.")] = 0,
        progress: Progress = None,
        metric: Annotated[
            list[str] | None, typer.Option(help="Show this metric too, on a terminal as a curve. May be repeated.")
        ] = None,
    ) -> Exit:
        """Follow a job to its end. The exit code tells how it ended."""
        from cognateforge.cli.follow import follow

        found, item = owner(session, service, name)
        if not after_sequence and item.job.first_sequence > 1:
            after_sequence = item.job.first_sequence - 1
            say(f"the events before {item.job.first_sequence} are no longer kept")
        frames = found.watch(item.job.name, after_sequence)
        return follow(session, frames, item.job, progress=progress, verdict=found.verdict, metrics=metric or [])

    @command(app)
    def logs(
        session: Session,
        name: JobName,
        service: ServiceOption = None,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
        attempt: Annotated[int, typer.Option(min=0, help="Which attempt's. Default: the newest.")] = 0,
        position: Annotated[int, typer.Option(min=0, help="Where in it to begin, as --json tells.")] = 0,
    ) -> Exit:
        """Print what a job's workers have written."""
        from cognateforge.cli.follow import show_logs

        found, item = owner(session, service, name)
        frames = found.logs(item.job.name, attempt=attempt, position=position, follow=follow)
        return show_logs(session, frames, item.job.name)


def _steering(app: typer.Typer) -> None:
    def steer(session: Session, verb: str, name: str, service: Service | None, request_id: str | None) -> None:
        found, item = owner(session, service, name)
        answer = found.steer(verb, item.job.name, new_request_id(request_id))
        if session.as_json:
            session.show(answer, service=found.service.value)
        else:
            say(f"{answer.job.name} {state_word(answer.job)}")

    @command(app)
    def pause(session: Session, name: JobName, service: ServiceOption = None, request_id: RequestId = None) -> None:
        """Ask a job to save a checkpoint and let go of its worker."""
        steer(session, "Pause", name, service, request_id)

    @command(app)
    def resume(session: Session, name: JobName, service: ServiceOption = None, request_id: RequestId = None) -> None:
        """Queue a paused job again."""
        steer(session, "Resume", name, service, request_id)

    @command(app)
    def cancel(session: Session, name: JobName, service: ServiceOption = None, request_id: RequestId = None) -> None:
        """Ask a job to end without an artifact."""
        steer(session, "Cancel", name, service, request_id)


def _pinning(app: typer.Typer) -> None:
    def change(
        session: Session, verb: str, name: str, step: int, digest: str, service: Service | None, request_id: str | None
    ) -> None:
        found, item = owner(session, service, name)
        checkpoint = found.pin(verb, item.job.name, step, digest, new_request_id(request_id))
        if session.as_json:
            session.show(checkpoint, service=found.service.value)
        else:
            say(f"{item.job.name} step {checkpoint.step} {'pinned' if checkpoint.pinned else 'unpinned'}")

    @command(app)
    def pin(
        session: Session,
        name: JobName,
        step: CheckpointStep,
        digest: CheckpointDigest = "",
        service: ServiceOption = None,
        request_id: RequestId = None,
    ) -> None:
        """Keep a checkpoint of a job, whatever its policy says."""
        change(session, "Pin", name, step, digest, service, request_id)

    @command(app)
    def unpin(
        session: Session,
        name: JobName,
        step: CheckpointStep,
        digest: CheckpointDigest = "",
        service: ServiceOption = None,
        request_id: RequestId = None,
    ) -> None:
        """Leave a checkpoint to its job's policy again."""
        change(session, "Unpin", name, step, digest, service, request_id)


def _verifying(app: typer.Typer) -> None:
    @command(app, "verify-resume")
    def verify_resume(
        session: Session,
        name: JobName,
        from_step: Annotated[int, typer.Option("--from", min=0, help="Step of the checkpoint to begin with.")] = 0,
        to_step: Annotated[int, typer.Option("--to", min=0, help="Step of the one to compare. Default: newest.")] = 0,
        wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the receipt.")] = True,
        service: ServiceOption = None,
        request_id: RequestId = None,
    ) -> Exit:
        """Replay steps of a job that has ended or is paused, and compare every bit of its parameters."""
        found, item = owner(session, service, name)
        one = found.verify(item.job.name, from_step, to_step, new_request_id(request_id))
        if not session.as_json:
            say(f"{one.name} replays steps {one.from_checkpoint.step} to {one.to_checkpoint.step}")
        while wait and not one.HasField("receipt") and not one.failure:
            time.sleep(POLL_S)
            name_wanted = one.name
            one = next(each for each in found.verifications(item.job.name) if each.name == name_wanted)
        return _tell_verification(session, one, found.service)

    @command(app)
    def verifications(session: Session, name: JobName, service: ServiceOption = None) -> None:
        """List a job's verifications, newest first."""
        found, item = owner(session, service, name)
        rows: list[Row] = [
            (one, {}, (one.name, _verdict(one), one.from_checkpoint.step, one.to_checkpoint.step, one.failure))
            for one in found.verifications(item.job.name)
        ]
        session.table(("name", "verdict", "from", "to", "failure"), rows)


def _tell_verification(session: Session, one: Verification, service: Service) -> Exit:
    from cognateforge.job.v1 import job_pb2

    if session.as_json:
        session.show(one, service=service.value)
    else:
        print_line(f"{one.name} {_verdict(one)} {one.failure}".rstrip())
    different = one.receipt.verdict == job_pb2.RESUME_VERDICT_DIFFERENT
    return Exit.JOB_FAILED if one.failure or different else Exit.OK


def _verdict(one: Verification) -> str:
    """Return the verdict of a verification, or its state while it has none."""
    from cognateforge.cli.plain import enum_word
    from cognateforge.job.v1 import job_pb2

    if one.HasField("receipt"):
        return enum_word(job_pb2.ResumeVerdict.DESCRIPTOR, one.receipt.verdict)
    return enum_word(job_pb2.VerificationState.DESCRIPTOR, one.state)
