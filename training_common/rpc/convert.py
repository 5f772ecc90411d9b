"""From rows to the messages of job/v1 and artifact/v1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, overload

from google.protobuf.timestamp_pb2 import Timestamp

from cognateforge.artifact.v1 import artifact_pb2, storage_pb2
from cognateforge.exceptions import FieldViolation, InvalidFieldError
from cognateforge.job.v1 import job_pb2
from training_common.artifacts.registry import ArtifactRow
from training_common.jobs.queue import Scheduling
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.store import CheckpointRow, EventRow, JobRow
from training_common.jobs.verifications import Claim
from training_common.jobs.waits import Wait
from training_common.store.database import now_us
from training_common.telemetry.traces import trace_id_of

# The first moment of the year 2100: nobody means a deadline beyond it.
_LATEST_US = 4_102_444_800_000_000


@overload
def timestamp(time_us: int) -> Timestamp: ...
@overload
def timestamp(time_us: None) -> None: ...
@overload
def timestamp(time_us: int | None) -> Timestamp | None: ...
def timestamp(time_us: int | None) -> Timestamp | None:
    """Return a Timestamp of microseconds since 1970, or None."""
    if time_us is None:
        return None
    result = Timestamp()
    result.FromMicroseconds(time_us)
    return result


def state(value: JobState | str) -> job_pb2.JobState.ValueType:
    """Return the contract's state; the empty string is UNSPECIFIED."""
    return job_pb2.JobState.Value(f"JOB_STATE_{value or 'UNSPECIFIED'}")


def states(values: Iterable[job_pb2.JobState.ValueType]) -> list[JobState]:
    """Return the states of a filter."""
    return [JobState(job_pb2.JobState.Name(value).removeprefix("JOB_STATE_")) for value in values]


def failure(row: JobRow) -> job_pb2.Failure | None:
    """Return why a job failed, or None."""
    if not row.failure_reason:
        return None
    return job_pb2.Failure(reason=row.failure_reason, message=row.failure_message)


def job(row: JobRow) -> job_pb2.Job:
    """Return the part of a job that every service tells."""
    return job_pb2.Job(
        name=row.name,
        state=state(row.state),
        observed=row.observed,
        attempt=row.attempt,
        step=row.step,
        total_steps=row.total_steps,
        last_sequence=row.last_sequence,
        create_time=timestamp(row.create_us),
        start_time=timestamp(row.start_us),
        end_time=timestamp(row.end_us),
        failure=failure(row),
        caller=row.caller,
        artifact=row.artifact,
        scheduling=job_pb2.Scheduling(
            priority=row.priority,
            start_by=timestamp(row.start_by_us),
            finish_by=timestamp(row.finish_by_us),
        ),
        first_sequence=row.first_sequence,
        files_removed_time=timestamp(row.files_removed_us),
        trace_id=trace_id_of(row.traceparent) if row.traceparent else "",
    )


def wait(found: Wait, expected_start_us: int | None = None) -> job_pb2.Wait:
    """Return why a job has no worker, and when it is likely to get one."""
    return job_pb2.Wait(
        reason=job_pb2.WaitReason.Value(f"WAIT_REASON_{found.reason}"),
        message=found.message[:2000],
        queue_position=found.position,
        not_before=timestamp(found.not_before_us),
        expected_start=timestamp(expected_start_us),
    )


def scheduling(message: job_pb2.Scheduling) -> Scheduling:
    """Return when a new job is to run. Errors: InvalidFieldError, for a deadline that cannot be kept."""
    start_by = _deadline("start_by", message.start_by) if message.HasField("start_by") else None
    finish_by = _deadline("finish_by", message.finish_by) if message.HasField("finish_by") else None
    if start_by is not None and finish_by is not None and start_by >= finish_by:
        raise _refused("start_by", "must be before finish_by: a job that starts then has no time to end")
    return Scheduling(priority=message.priority, start_by_us=start_by, finish_by_us=finish_by)


def moment_us(request: Any, field: str, *, within: str = "") -> int:
    """Return a time of a request in microseconds since 1970. within: the path to the message that has the field.

    Errors: InvalidFieldError, beyond 1970 to 2100.
    """
    try:
        time_us: int = getattr(request, field).ToMicroseconds()
    except ValueError:
        time_us = -1
    if not 0 <= time_us < _LATEST_US:
        name, rule = f"{within}{field}", "must lie after the year 1970 and before 2100"
        raise InvalidFieldError(f"{name} {rule}", violations=[FieldViolation(field=name, description=rule)])
    return time_us


def _deadline(field: str, time: Timestamp) -> int:
    try:
        time_us = time.ToMicroseconds()
    except ValueError:
        time_us = _LATEST_US
    if not now_us() < time_us < _LATEST_US:
        now = timestamp(now_us()).ToJsonString()
        raise _refused(field, f"must lie after the server's time, which is {now}, and before the year 2100")
    return time_us


def _refused(field: str, rule: str) -> InvalidFieldError:
    name = f"scheduling.{field}"
    return InvalidFieldError(f"{name} {rule}", violations=[FieldViolation(field=name, description=rule)])


def metric(name: str, value: Any, units: Mapping[str, str]) -> job_pb2.Metric:
    """Return one measured quantity: a number, or a list as a histogram."""
    if isinstance(value, list):
        return job_pb2.Metric(name=name, unit=units.get(name, ""), bins=value)
    return job_pb2.Metric(name=name, unit=units.get(name, ""), value=value)


def event(row: EventRow, units: Mapping[str, str]) -> job_pb2.JobEvent:
    """Return one event of a job."""
    result = job_pb2.JobEvent(sequence=row.sequence, time=timestamp(row.time_us), attempt=row.attempt)
    facts = row.payload
    match row.kind:
        case "state_change":
            result.state_change.CopyFrom(
                job_pb2.StateChange(
                    **{"from": state(facts["from"]), "to": state(facts["to"])},  # "from" is a Python keyword
                    message=facts["message"],
                )
            )
        case "attempt_started":
            result.attempt_started.CopyFrom(job_pb2.AttemptStarted(**facts))
        case "progress":
            metrics = [metric(name, value, units) for name, value in facts["metrics"].items()]
            result.progress.CopyFrom(
                job_pb2.Progress(step=facts["step"], total_steps=facts["total_steps"], metrics=metrics)
            )
        case "checkpoint":
            result.checkpoint.CopyFrom(
                job_pb2.Checkpoint(
                    step=facts["step"],
                    digest=facts["digest"],
                    size_bytes=facts["size_bytes"],
                    create_time=timestamp(facts["create_us"]),
                    available=True,
                )
            )
        case "artifact_published":
            result.artifact_published.CopyFrom(job_pb2.ArtifactPublished(**facts))
        case _:
            result.note.CopyFrom(job_pb2.Note(**facts))
    return result


def checkpoint(row: CheckpointRow) -> job_pb2.Checkpoint:
    """Return one checkpoint."""
    return job_pb2.Checkpoint(
        step=row.step,
        digest=row.digest,
        size_bytes=row.size_bytes,
        create_time=timestamp(row.create_us),
        available=row.available,
        pinned=row.pinned,
        score=row.score,
    )


def verification(claim: Claim) -> job_pb2.Verification:
    """Return a verification, with its receipt when there is one."""
    row = claim.row
    return job_pb2.Verification(
        name=row.name,
        job=claim.job.name,
        state=job_pb2.VerificationState.Value(f"VERIFICATION_STATE_{row.state}"),
        from_checkpoint=checkpoint(claim.start),
        to_checkpoint=checkpoint(claim.target),
        caller=row.caller,
        create_time=timestamp(row.create_us),
        start_time=timestamp(row.start_us),
        end_time=timestamp(row.end_us),
        failure=row.failure,
        receipt=None if row.receipt is None else _receipt(row.receipt),
    )


def _receipt(stored: Mapping[str, Any]) -> job_pb2.ResumeReceipt:
    return job_pb2.ResumeReceipt(
        verdict=job_pb2.ResumeVerdict.Value(f"RESUME_VERDICT_{stored['verdict']}"),
        recorded_digest=stored["recorded_digest"],
        replayed_digest=stored["replayed_digest"],
        files=[job_pb2.ReplayedFile(**one) for one in stored["files"]],
        environment=stored["environment"],
        seconds=stored["seconds"],
    )


def end_frame(row: JobRow) -> job_pb2.WatchFrame | None:
    """Return the last frame of a watch, or None while the job goes on."""
    if row.state not in FINAL:
        return None
    end = job_pb2.End(state=state(row.state), last_sequence=row.last_sequence, failure=failure(row))
    return job_pb2.WatchFrame(end=end)


def files(row: ArtifactRow) -> list[artifact_pb2.File]:
    """Return an artifact's files in payload order."""
    return [artifact_pb2.File(path=f.path, size_bytes=f.size_bytes, digest=f.digest) for f in row.files]


def data_sources(row: ArtifactRow) -> list[artifact_pb2.DataSource]:
    """Return where an artifact's training data came from."""
    return [
        artifact_pb2.DataSource(name=s["name"], kind=s["kind"], rows=s["rows"], digest=s.get("digest", ""))
        for s in row.body.get("data", ())
    ]


def to_tier(value: storage_pb2.Tier.ValueType) -> str:
    """Return a tier as it is stored."""
    return storage_pb2.Tier.Name(value).removeprefix("TIER_")


def storage(row: ArtifactRow, dependents: int = 0) -> storage_pb2.Storage:
    """Return how a version is kept. dependents: how many artifacts and jobs descend from it."""
    return storage_pb2.Storage(
        tier=storage_pb2.Tier.Value(f"TIER_{row.tier}"),
        pinned=row.pinned,
        verify_time=timestamp(row.verify_us),
        damage=row.damage,
        key=row.key,
        dependents=dependents,
    )
