"""`forge export-metrics`: a job's metrics as files of other tools, whenever they are wanted."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.jobs import JobName, JobService, ServiceOption, owner
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.event_files import EventFile
    from cognateforge.job.v1.job_pb2 import Job, JobEvent, MetricSeries

# The contract's bound of a series.
_MOST_POINTS = 10_000


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "export-metrics")
    def export_metrics(
        session: Session,
        name: JobName,
        service: ServiceOption = None,
        tensorboard: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Write a run of TensorBoard into DIR/JOB, with every event.")
        ] = None,
        csv_file: Annotated[
            Path | None, typer.Option("--csv", metavar="FILE", help="Rows of metric, unit, step, value. - for stdout.")
        ] = None,
        jsonl: Annotated[
            Path | None, typer.Option(metavar="FILE", help="The same, an object a line. - for stdout.")
        ] = None,
        metric: Annotated[list[str] | None, typer.Option(help="Only this metric. May be repeated.")] = None,
    ) -> None:
        """Write a job's metrics for other tools. Files that are there are not replaced.

        Rows hold 10,000 points of a metric at most, thinned evenly; TensorBoard's run holds all of them.
        """
        wanted = [one for one in (tensorboard, csv_file, jsonl) if one is not None]
        if len(wanted) != 1:
            raise typer.BadParameter("name one of --tensorboard, --csv and --jsonl")
        found, item = owner(session, service, name)
        if tensorboard is not None:
            _run(session, found, item.job, tensorboard, metric or [])
            return
        series = found.metrics(item.job.name, metric or [])
        for one in series:
            if len(one.values) == _MOST_POINTS:
                say(f"{one.name} is thinned to {_MOST_POINTS} points: --tensorboard has all of them")
        _write(wanted[0], _csv(series) if csv_file is not None else _jsonl(series))


def _csv(series: list[MetricSeries]) -> Iterator[str]:
    yield "metric,unit,step,value\n"
    for one in series:
        buffer = io.StringIO()
        rows = csv.writer(buffer, lineterminator="\n")
        # repr is the shortest text that is the same number again.
        points = zip(one.steps, one.values, strict=True)
        rows.writerows((one.name, one.unit, step, repr(value)) for step, value in points)
        yield buffer.getvalue()


def _jsonl(series: list[MetricSeries]) -> Iterator[str]:
    for one in series:
        for step, value in zip(one.steps, one.values, strict=True):
            yield json.dumps({"metric": one.name, "unit": one.unit, "step": step, "value": value}) + "\n"


def _write(path: Path, parts: Iterator[str]) -> None:
    from cognateforge.exceptions import LocalStorageError

    if str(path) == "-":
        for part in parts:
            sys.stdout.write(part)
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(parts)
    except FileExistsError as error:
        raise LocalStorageError(f"{path} exists: name another file") from error
    except OSError as error:
        raise LocalStorageError(f"{path} cannot be written: {error.strerror}") from error
    print_line(str(path))


def _run(session: Session, jobs: JobService, job: Job, folder: Path, metrics: list[str]) -> None:
    """Write one event file out of the job's history as it is now."""
    from cognateforge.event_files import EventFile, require_tensorboard
    from cognateforge.exceptions import LocalStorageError

    require_tensorboard()
    run = folder / job.name.removeprefix("jobs/")
    if run.exists():
        raise LocalStorageError(f"{run} exists: name another folder, or remove that run")
    points = 0
    try:
        begun_s = job.create_time.ToMicroseconds() / 1e6
        with contextlib.closing(EventFile(run, attempt=1, from_step=0, at_s=begun_s)) as file:
            for event in _history(jobs, job):
                points += _take(file, event, metrics)
    except OSError as error:
        raise LocalStorageError(f"{run} cannot be written: {error.strerror}") from error
    if session.as_json:
        session.emit({"path": str(run), "points": points})
    else:
        say(f"{points} points; tensorboard --logdir {folder}")
        print_line(str(run))


def _take(file: EventFile, event: JobEvent, metrics: list[str]) -> int:
    """Write an event, and return how many values it had."""
    from cognateforge.cli.follow import told
    from cognateforge.job.v1 import job_pb2

    at_s = event.time.ToMicroseconds() / 1e6
    if not event.HasField("progress"):
        kind = event.note.kind if event.HasField("note") else event.WhichOneof("kind") or "event"
        file.text(kind, told(job_pb2.WatchFrame(event=event)), at_s=at_s)
        return 0
    values: dict[str, float | list[float]] = {}
    for one in event.progress.metrics:
        if not metrics or one.name in metrics:
            values[one.name] = one.value if one.HasField("value") else list(one.bins)
    file.log(event.progress.step, values, at_s=at_s)
    return len(values)


def _history(jobs: JobService, job: Job) -> Iterator[JobEvent]:
    if job.first_sequence > 1:
        say(f"the events before {job.first_sequence} are no longer kept")
    if not job.last_sequence:
        return
    for frame in jobs.watch(job.name, max(0, job.first_sequence - 1)):
        if not frame.HasField("event"):
            return
        yield frame.event
        if frame.event.sequence >= job.last_sequence:
            return
