"""Messages as the pages read them: small, with seconds for moments and null for what JSON cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from cognateforge.cli.plain import enum_word, to_plain
from cognateforge.exceptions import ForgeError
from cognateforge.job.v1 import job_pb2

# A screen has no more than four digits of pixels.
_DIGITS = 7


def short(value: float) -> float | None:
    """Return a number with the digits that a plot can show; None for one that is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def seconds(moment: Timestamp) -> float:
    """Return a moment as seconds since 1970."""
    return moment.seconds + moment.nanos / 1e9


def error_json(error: ForgeError) -> dict[str, Any]:
    """Return an error as the pages tell it: with the field and the remedy that the service named."""
    return {
        "reason": error.unknown_reason or error.reason_name(),
        "message": error.message,
        "violations": [{"field": one.field, "description": one.description} for one in error.violations],
    }


def series_json(series: Iterable[job_pb2.MetricSeries]) -> list[dict[str, Any]]:
    """Return metrics over steps."""
    return [
        {"name": one.name, "unit": one.unit, "steps": list(one.steps), "values": [short(value) for value in one.values]}
        for one in series
    ]


def event_json(event: job_pb2.JobEvent) -> dict[str, Any]:
    """Return one event; of progress its numbers under `metrics` and its histograms under `bins`."""
    kind = event.WhichOneof("kind") or "unknown"
    plain: dict[str, Any] = {
        "sequence": event.sequence,
        "time": seconds(event.time),
        "attempt": event.attempt,
        "kind": kind,
    }
    if kind == "progress":
        told = event.progress.metrics
        plain |= {"step": event.progress.step, "total_steps": event.progress.total_steps}
        plain["metrics"] = {one.name: short(one.value) for one in told if one.HasField("value")}
        plain["units"] = {one.name: one.unit for one in told if one.HasField("value")}
        plain["bins"] = {one.name: [short(value) for value in one.bins] for one in told if one.bins}
    elif kind != "unknown":
        plain |= to_plain(getattr(event, kind))
        if kind == "note":
            plain |= {"kind": "note", "note": event.note.kind}
    return plain


def step_of(event: job_pb2.JobEvent) -> int | None:
    """Return the step that an event itself tells, if it does."""
    match event.WhichOneof("kind"):
        case "progress":
            return event.progress.step
        case "checkpoint":
            return event.checkpoint.step
        case "note" if event.note.facts.get("step", "").isdecimal():
            return int(event.note.facts["step"])
    return None


def job_json(service: str, item: Any) -> dict[str, Any]:
    """Return a job of either service: what every job tells, with its plan and its service."""
    plain = to_plain(item)
    job: dict[str, Any] = plain.pop("job")
    return {**job, **plain, "service": service, "id": item.job.name.removeprefix("jobs/")}


def row_json(service: str, item: Any) -> dict[str, Any]:
    """Return what a list shows of a job."""
    job: job_pb2.Job = item.job
    row = {
        "service": service,
        "id": job.name.removeprefix("jobs/"),
        "state": enum_word(job_pb2.JobState.DESCRIPTOR, job.state),
        "observed": job.observed,
        "attempt": job.attempt,
        "step": job.step,
        "total_steps": job.total_steps,
        "create_time": seconds(job.create_time),
        "artifact": job.artifact,
        "caller": job.caller,
        "priority": job.scheduling.priority,
        "makes": item.plan.agent if service == "agent" else "cognate-25m",
    }
    if job.HasField("end_time"):
        row["end_time"] = seconds(job.end_time)
    if job.HasField("failure"):
        row["failure"] = to_plain(job.failure)
    if job.HasField("wait"):
        row["wait"] = to_plain(job.wait)
    return row
