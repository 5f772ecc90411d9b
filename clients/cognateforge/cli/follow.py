"""Following a job on the terminal: a live bar, or a plain line every so often. Following the models: lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from cognateforge.cli.exits import Exit
from cognateforge.cli.plain import enum_word, to_plain
from cognateforge.cli.session import Session, print_line, say
from cognateforge.cli.terminal import can_draw, console, printable, restored
from cognateforge.exceptions import BY_REASON, JobFailedError
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from cognateforge.client import ModelNews
    from cognateforge.job.v1.job_pb2 import Job, WatchFrame

# A log that a person reads later: a line every ten seconds is enough.
LINE_EVERY_S = 10.0

VALIDATION_LOSS = "validation_loss"

# What a bar has room for, and the metrics' names.
SHOWN: Mapping[str, str] = {
    "loss": "loss",
    "lr": "learning_rate",
    "ponder": "mean_ponder_steps",
    "tok/s": "tokens_per_s",
    "rows/s": "samples_per_s",
    "accuracy": "train_accuracy",
    "validation loss": VALIDATION_LOSS,
}

# What is told of an event whose kind a newer service has, and this release has not.
_UNKNOWN = "something of a kind that this release does not know"

OnFrame = Callable[["WatchFrame"], None]


def follow(
    session: Session,
    frames: Iterator[WatchFrame],
    job: Job,
    *,
    progress: bool | None,
    verdict: Callable[[str], str],
    metrics: Sequence[str] = (),
) -> Exit:
    """Print events and progress until the job's end, then its result. Ctrl-C leaves the job alone.

    metrics: names of metrics that are shown beside the usual ones.
    verdict: what is to be told to people about the published artifact of that name.
    """
    artifact = job.artifact
    try:
        with _display(session, job, progress, metrics) as show:
            for frame in frames:
                if session.as_json:
                    session.emit(frame)
                show(frame)
                if frame.WhichOneof("frame") == "event" and frame.event.HasField("artifact_published"):
                    artifact = frame.event.artifact_published.name
                if frame.HasField("end"):
                    break
            else:
                raise AssertionError("a watch ends with an end frame or an error")
        if artifact and not session.as_json and (text := verdict(artifact)):
            say(text)
        return _ended(session, job.name, frame.end, artifact)
    except KeyboardInterrupt:
        say(f"no longer watching; the job goes on: forge watch {job.name}")
        return Exit.INTERRUPTED


def show_logs(session: Session, frames: Iterator[job_pb2.LogFrame], name: str) -> Exit:
    """Print what workers have written, each attempt's under a word about it. Ctrl-C leaves the job alone."""
    attempt = 0
    try:
        for frame in frames:
            if session.as_json:
                session.emit(frame)
                continue
            part = frame.gap if frame.HasField("gap") else frame.lines
            if part.attempt > attempt:
                attempt = part.attempt
                say(f"attempt {attempt}")
            if frame.HasField("gap"):
                say(f"{frame.gap.next_position - frame.gap.position} bytes are no longer kept")
            for line in frame.lines.lines:
                print_line(line.text, newline=not line.continued)
    except KeyboardInterrupt:
        say(f"no longer following; the job goes on: forge logs --follow {name}")
        return Exit.INTERRUPTED
    return Exit.OK


def show_models(session: Session, news: Iterator[ModelNews]) -> None:
    """Print what happens to models, a line for each event or model of a snapshot, as long as there is something."""
    for one in news:
        if isinstance(one, model_pb2.ModelEvent):
            if session.as_json:
                session.emit({"event": to_plain(one)})
            elif one.WhichOneof("kind") == "published":
                print_line(f"{one.sequence} published {_named(one.published)}")
            elif one.WhichOneof("kind") == "changed":
                print_line(f"{one.sequence} {_changed(one.changed)}")
            else:
                print_line(f"{one.sequence} {_UNKNOWN}")
            continue
        for model in one.models:
            if session.as_json:
                session.emit({"snapshot": {"last_sequence": one.last_sequence, "model": to_plain(model)}})
            else:
                print_line(f"up to {one.last_sequence} there is {_named(model)}")


def _changed(changed: model_pb2.ModelChanged) -> str:
    word = enum_word(model_pb2.ModelChange.DESCRIPTOR, changed.change).lower()
    damage = f": {changed.model.storage.damage}" if changed.change == model_pb2.MODEL_CHANGE_DAMAGED else ""
    return f"{word} {_named(changed.model)}{damage}"


def _named(model: model_pb2.FoundationModel) -> str:
    return f"{model.name} {enum_word(model_pb2.ModelState.DESCRIPTOR, model.state)} {model.digest}".rstrip()


def _ended(session: Session, name: str, end: job_pb2.End, artifact: str) -> Exit:
    word = enum_word(job_pb2.JobState.DESCRIPTOR, end.state)
    if not session.as_json:
        print_line(f"{name} {word} {artifact}".rstrip())
    if end.HasField("failure") and session.as_json:
        error = BY_REASON.get(end.failure.reason, JobFailedError)(end.failure.message)
        error.unknown_reason = end.failure.reason if end.failure.reason not in BY_REASON else ""
        session.report(error)
    elif end.HasField("failure"):
        say(f"error: {end.failure.reason}: {end.failure.message}")
    return Exit.OK if end.state == job_pb2.JOB_STATE_SUCCEEDED else Exit.JOB_FAILED


def _display(
    session: Session, job: Job, progress: bool | None, metrics: Sequence[str]
) -> AbstractContextManager[OnFrame]:
    # Who asks for it gets it in a pipe, too.
    if progress is not False and (can_draw(sys.stderr) or (progress and not sys.stderr.isatty())):
        return _screen(job, metrics)
    if progress is False or session.as_json:
        return _nothing()
    return _lines(metrics)


@contextmanager
def _nothing() -> Iterator[OnFrame]:
    yield lambda frame: None


@contextmanager
def _lines(metrics: Sequence[str]) -> Iterator[OnFrame]:
    wanted = {**SHOWN, **{name: name for name in metrics if name not in SHOWN.values()}}
    last = float("-inf")

    def show(frame: WatchFrame) -> None:
        nonlocal last
        event = frame.event
        if event.HasField("progress"):
            if not _due(event.progress, last, wanted):
                return
            last = time.monotonic()
            values = " ".join(f"{key} {value}" for key, value in shown(event.progress, wanted).items())
            say(f"step {event.progress.step}/{event.progress.total_steps} {values}{_time_left(event.progress)}")
        elif text := told(frame):
            say(text)

    yield show


def _due(progress: job_pb2.Progress, last: float, wanted: Mapping[str, str]) -> bool:
    """Whether progress is worth a line of a log: validation always, a step now and then and at the end."""
    names = {metric.name for metric in progress.metrics}
    if names.isdisjoint(wanted.values()):
        return False
    final = progress.step == progress.total_steps
    return VALIDATION_LOSS in names or final or time.monotonic() - last >= LINE_EVERY_S


@contextmanager
def _screen(job: Job, metrics: Sequence[str]) -> Iterator[OnFrame]:
    """Draw a board below the events, which stay in the terminal's history."""
    from rich.live import Live

    from cognateforge.cli.board import Board

    board = Board(job, metrics)
    below = console(stderr=True)
    with restored(below), Live(board, console=below, refresh_per_second=4, redirect_stdout=False) as live:

        def show(frame: WatchFrame) -> None:
            if frame.HasField("event"):
                board.take(frame.event)
            if text := told(frame):
                live.console.print(printable(text), markup=False, highlight=False)

        yield show
    for name in metrics:
        if board.curves[name].last is None:
            say(f"no {name} was reported: forge metrics {job.name} lists what was")


def _time_left(progress: job_pb2.Progress) -> str:
    from cognateforge.cli.board import SECONDS_LEFT
    from cognateforge.cli.curve import span

    left = next((metric.value for metric in progress.metrics if metric.name == SECONDS_LEFT), 0.0)
    return f", {span(left)} left" if left > 0 else ""


def shown(progress: job_pb2.Progress, wanted: Mapping[str, str] = SHOWN) -> dict[str, str]:
    """Return the metrics that a line has room for, by their labels. wanted: names of metrics by label."""
    values = {metric.name: metric.value for metric in progress.metrics if metric.HasField("value")}
    return {label: f"{values[name]:.4g}" for label, name in wanted.items() if name in values}


def told(frame: WatchFrame) -> str:
    """Return one line about an event that is no progress, or nothing."""
    event = frame.event
    match event.WhichOneof("kind"):
        case "state_change":
            word = enum_word(job_pb2.JobState.DESCRIPTOR, event.state_change.to)
            return f"{word} {event.state_change.message}".rstrip()
        case "attempt_started":
            return f"attempt {event.attempt_started.attempt} on {event.attempt_started.engine}"
        case "checkpoint":
            return f"checkpoint at step {event.checkpoint.step}"
        case "artifact_published":
            return f"published {event.artifact_published.name}"
        case "note":
            return f"{event.note.kind}: {event.note.message}"
        case None if frame.HasField("event"):
            return f"event {event.sequence}: {_UNKNOWN}"
    return ""
