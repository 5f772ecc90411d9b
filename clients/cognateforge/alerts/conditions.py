"""The conditions: pure functions from what a service told to what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from cognateforge.alerts.model import DETECTORS, KINDS, Alert
from cognateforge.alerts.observe import Observed
from cognateforge.job.v1 import job_pb2

_BY_REASON = {"TRAINING_DIVERGED": "ForgeTrainingDiverged", "RETRY_BUDGET_SPENT": "ForgeRetryBudgetSpent"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """From when on something is wrong. They are those of the rules in deploy/monitoring/prometheus.

    failed_s: how long a failed job is told. recovery_s: how long an action is, unless the run is found stable before.
    """

    queue_wait_s: float = 1800.0
    stalled_s: float = 900.0
    recovery_s: float = 900.0
    failed_s: float = 3600.0


def conditions(seen: Observed, limits: Limits, *, failed_since: datetime | None = None) -> Iterator[Alert]:
    """Yield what is wrong with a service and its jobs.

    failed_since: jobs that have failed since then are told in any case, however long ago that is.
    """
    if seen.trouble:
        yield _alert(seen, "ForgeServiceDown", f"{seen.service} cannot be asked: {seen.trouble}")
        return
    yield from _service(seen)
    for job in seen.jobs:
        if job.state == job_pb2.JOB_STATE_FAILED:
            yield from _failed(seen, job, limits, failed_since)
        elif job.state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RECOVERING):
            yield from _waiting(seen, job, limits)
        yield from _training(seen, job, limits)


def _service(seen: Observed) -> Iterator[Alert]:
    if seen.health != "SERVING":
        yield _alert(seen, "ForgeNotServing", f"{seen.service} answers, and its health is {seen.health}")
    if seen.info.damaged_artifacts:
        text = f"{seen.service} holds {seen.info.damaged_artifacts} published versions with damaged files"
        yield _alert(seen, "ForgeArtifactsDamaged", text)
    for peer in seen.info.peers:
        if peer.circuit == job_pb2.CIRCUIT_OPEN:
            text = f"{seen.service} holds back calls to {peer.name}: {peer.failed} of {peer.admitted} calls failed"
            yield _alert(seen, "ForgeCircuitOpen", text, peer=peer.name)


def _failed(seen: Observed, job: job_pb2.Job, limits: Limits, since: datetime | None) -> Iterator[Alert]:
    if not job.HasField("end_time"):
        return
    if _age_s(seen, job.end_time) > limits.failed_s and not (since and _utc(job.end_time) > since):
        return
    name = _BY_REASON.get(job.failure.reason, "ForgeJobFailed")
    text = f"{job.name} failed at step {job.step}: {job.failure.reason}: {job.failure.message}"
    yield _alert(seen, name, text, since=_utc(job.end_time), job=job.name, reason=job.failure.reason)


def _waiting(seen: Observed, job: job_pb2.Job, limits: Limits) -> Iterator[Alert]:
    reason = job.wait.reason
    if reason == job_pb2.WAIT_REASON_LAUNCH:
        yield _alert(seen, "ForgeWorkersDoNotStart", f"{job.name} gets no worker: {job.wait.message}", job=job.name)
    if reason == job_pb2.WAIT_REASON_LENT:
        lent = ", ".join(f"{one.lent} of {one.total}" for one in seen.capacities if one.lent)
        text = f"{job.name} waits for capacity that is lent ({lent or 'amount unknown'}) and was asked back"
        yield _alert(seen, "ForgeCapacityNotReturned", text, job=job.name)
    first = job.state == job_pb2.JOB_STATE_QUEUED and not job.HasField("start_time")
    # One that waits on purpose, for its reservation, is not late.
    if first and reason != job_pb2.WAIT_REASON_RESERVED and _age_s(seen, job.create_time) > limits.queue_wait_s:
        late = _utc(job.create_time) + timedelta(seconds=limits.queue_wait_s)
        text = f"{job.name} has waited for {_age_s(seen, job.create_time) / 60:.0f} minutes: {job.wait.message}"
        yield _alert(seen, "ForgeQueueWait", text.rstrip(": "), since=late, job=job.name)


def _training(seen: Observed, job: job_pb2.Job, limits: Limits) -> Iterator[Alert]:
    has_worker = job.state in (job_pb2.JOB_STATE_PREPARING, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_VALIDATING)
    if has_worker and not job.observed:
        yield _alert(seen, "ForgeJobsUnobserved", f"no recent sign of the worker of {job.name}", job=job.name)
    news = seen.news.get(job.name)
    if news is None or news.time is None:
        return
    silent_s = (seen.time - news.time).total_seconds()
    if job.state == job_pb2.JOB_STATE_RUNNING and silent_s > limits.stalled_s:
        text = f"{job.name} has told nothing for {silent_s / 60:.0f} minutes, at step {job.step} of {job.total_steps}"
        yield _alert(seen, "ForgeJobStalled", text, since=news.time, job=job.name)
    for recovery in news.recoveries.values():
        kind = DETECTORS.get(recovery.detector)
        if kind is not None and (seen.time - recovery.time).total_seconds() <= limits.recovery_s:
            text = f"{job.name}: {recovery.message}"
            yield _alert(seen, kind, text, since=recovery.time, job=job.name, detector=recovery.detector)


def _alert(seen: Observed, name: str, summary: str, *, since: datetime | None = None, **labels: str) -> Alert:
    kind = KINDS[name]
    return Alert(
        name=name,
        severity=kind.severity,
        service=seen.service,
        labels=labels,
        summary=summary,
        runbook=kind.runbook,
        since=since or seen.time,
    )


def _utc(time: Timestamp) -> datetime:
    return time.ToDatetime(tzinfo=UTC)


def _age_s(seen: Observed, time: Timestamp) -> float:
    return (seen.time - _utc(time)).total_seconds()
