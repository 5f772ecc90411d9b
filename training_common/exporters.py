"""What workers report, passed on to people's own tools: TensorBoard, and whatever a package brings by entry point.

An exporter is a bystander. Each has a thread and a bounded queue of its own, so that one that is slow, hangs or fails
costs the job nothing but its own points; the job's history tells of it once.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import structlog

from cognateforge.event_files import REMEDY, EventFile, require_tensorboard
from cognateforge.exceptions import ClientSetupError
from training_common.settings import ExporterSettings, ServiceSettings, SettingsError

log = structlog.get_logger(__name__)

GROUP = "cognateforge.metric_exporters"
TENSORBOARD = "tensorboard"
# At its end a worker's place is wanted by the next job: what an exporter has not sent by then is lost.
_FINISH_S = 10.0
# Events before training begins: what the data are, mostly.
_MOST_EARLY = 100

Metrics = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What an exporter is told of the attempt.

    job: "jobs/" and a UUID, the same in every attempt. attempt: from 1. from_step: finished steps that it goes on from;
    what was exported of later steps is void, for they are trained again. folder: the job's own, kept between attempts.
    plan: the plan that was asked for, as JSON, without secrets.
    """

    job: str
    attempt: int
    total_steps: int
    from_step: int
    folder: Path
    plan: Mapping[str, Any]


class MetricExporter(Protocol):
    """What a package writes. Every call comes from one thread; whatever one raises ends the export of the attempt."""

    def start(self, run: RunInfo) -> None:
        """An attempt begins, or goes on from a checkpoint."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Something was measured at a step. A step may come twice, with other metrics. A lower one than before tells
        that training went back: what was logged at it and after it is void.
        """

    def event(self, kind: str, message: str, facts: Mapping[str, str]) -> None:
        """Something happened that is no measurement, for instance "recovery"."""

    def finish(self, state: str) -> None:
        """The attempt is over, and the job in this state."""


# What an entry point leads to. It gets the exporter's own settings.
MakeExporter = Callable[[Mapping[str, str]], MetricExporter]


class TensorBoardExporter:
    """Writes event files into the job's folder, or into a folder of the job below the one that is set."""

    def __init__(self, folder: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self._file: EventFile | None = None

    def start(self, run: RunInfo) -> None:
        below = run.folder / "tensorboard" if self._folder is None else self._folder / run.job.removeprefix("jobs/")
        first = not below.exists()
        now = self._clock()
        self._file = EventFile(below, attempt=run.attempt, from_step=run.from_step, at_s=now)
        if first and run.plan:
            text = json.dumps(run.plan, indent=2, ensure_ascii=False)
            # Four blanks are Markdown's way to leave a text as it is.
            self._file.text("plan", "\n".join(f"    {line}" for line in text.splitlines()), at_s=now, step=0)

    def log(self, step: int, metrics: Metrics) -> None:
        if self._file is not None:
            self._file.log(step, metrics, at_s=self._clock())

    def event(self, kind: str, message: str, facts: Mapping[str, str]) -> None:
        if self._file is not None:
            told = "".join(f"\n- {name}: {value}" for name, value in facts.items())
            self._file.text(kind, f"{message}\n{told}" if told else message, at_s=self._clock())

    def finish(self, state: str) -> None:
        if self._file is not None:
            self._file.text("end", f"attempt ended, the job is {state}", at_s=self._clock())
            self._file.close()


def require_exporters(settings: ServiceSettings) -> None:
    """Make sure, at a server's start, that what is asked for is installed. Errors: SettingsError, with the remedy.

    Workers that a cluster runs have an installation of their own, which is not looked at here.
    """
    if settings.workers.engine == "local":
        for name in settings.exporters.names:
            _maker(name, settings.exporters)


def _maker(name: str, settings: ExporterSettings) -> Callable[[], MetricExporter]:
    """Return what makes an exporter. Errors: SettingsError, where it is not installed."""
    if name == TENSORBOARD:
        try:
            require_tensorboard()
        except ClientSetupError as error:
            raise SettingsError(f"exporters.names: tensorboard is not installed: {REMEDY}, or leave it out") from error
        return lambda: TensorBoardExporter(settings.tensorboard_folder)
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted({TENSORBOARD, *found}))
        raise SettingsError(
            f"exporters.names: no installed package brings {name!r}: install it, leave it out, or name one of {known}"
        )
    options = settings.options.get(name, {})

    def make() -> MetricExporter:
        exporter: MetricExporter = found[name].load()(dict(options))
        return exporter

    return make


class Exports:
    """The exporters of one attempt. No call of this class waits, but for `finish`.

    tell: records an event of the job; called once for each exporter at most, from its thread.
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        settings: ExporterSettings | None = None,
        *,
        run: Callable[[int], RunInfo] | None = None,
        tell: Callable[[str, str], None] = lambda _exporter, _problem: None,
    ) -> None:
        """run: makes what exporters are told, from the step that the attempt goes on from."""
        self._settings = settings or ExporterSettings()
        self._run, self._begun = run, False
        self._early: list[tuple[str, str, Mapping[str, str]]] = []
        self._lines = [_Line(name, self._settings, tell) for name in names]

    def begin(self, from_step: int) -> None:
        """The attempt goes on from a step; of several calls the first one counts."""
        if self._begun or self._run is None or not self._lines:
            return
        self._begun = True
        run = self._run(from_step)
        for line in self._lines:
            line.put("start", run)
        for early in self._early:
            self.event(*early)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass measurements on. What is neither a number nor a list of them is left out."""
        if not self._lines:
            return
        self.begin(0)
        numbers = {name: value for name, value in metrics.items() if _is_number(value) or _is_list(value)}
        for line in self._lines:
            line.put("log", step, numbers)

    def event(self, kind: str, message: str, facts: Mapping[str, str]) -> None:
        """Pass an event on."""
        if not self._begun:
            self._early = [*self._early, (kind, message, facts)][:_MOST_EARLY]
            return
        for line in self._lines:
            line.put("event", kind, message, facts)

    def finish(self, state: str, *, patience_s: float = _FINISH_S) -> None:
        """Let exporters end what they have begun, all at the same time and for so long at most."""
        ends_s = time.monotonic() + patience_s
        for line in self._lines:
            line.end(state if self._begun else "")
        for line in self._lines:
            line.join(max(0.0, ends_s - time.monotonic()))


# Of what exports nothing.
NO_EXPORTS = Exports()


@dataclass
class _Line:
    """One exporter, its queue and its thread, which the first item starts."""

    name: str
    settings: ExporterSettings
    tell: Callable[[str, str], None]
    _thread: threading.Thread | None = None
    _broken: bool = False
    _said: bool = False

    def __post_init__(self) -> None:
        # None wakes a thread that waits at the end.
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(self.settings.queue_length)
        self._last: tuple[str, tuple[Any, ...]] | None = None
        self._ended = threading.Event()
        self._dropped = 0

    def put(self, call: str, *values: Any) -> None:
        if self._broken or self._ended.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"export-{self.name}", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((call, values))
        except queue.Full:
            self._dropped += 1

    def end(self, state: str) -> None:
        self._last = ("finish", (state,)) if state else None
        self._ended.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def join(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                log.warning("exporter did not end in time", exporter=self.name, waiting=self._queue.qsize())

    def _work(self) -> None:
        try:
            exporter = _maker(self.name, self.settings)()
            while (item := self._next()) is not None:
                call, values = item
                getattr(exporter, call)(*values)
                if self._dropped and not self._said:
                    self._say("it is too slow, and its queue (exporters.queue_length) is full: some points are lost")
        except BaseException as error:  # whatever a third party raises is its own matter, also where it is an exit
            self._broken = True
            log.warning("exporter failed", exporter=self.name, exc_info=True)
            self._say(f"{type(error).__name__}: {error}; nothing more of this attempt is exported by it")

    def _next(self) -> tuple[str, tuple[Any, ...]] | None:
        """Return the next item, the end as the last one, and then None."""
        while True:
            try:
                item = self._queue.get(block=not self._ended.is_set())
            except queue.Empty:
                last, self._last = self._last, None
                return last
            if item is not None:
                return item

    def _say(self, problem: str) -> None:
        self._said = True
        try:
            self.tell(self.name, problem)
        except Exception:  # the job has ended, or is another attempt's
            log.warning("exporter's trouble could not be recorded", exporter=self.name, problem=problem)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_number, value))
