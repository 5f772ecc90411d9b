"""What a person sees of a watched job: its state, how far it is, curves of chosen metrics and the newest values."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cognateforge.cli.curve import Curve, span
from cognateforge.cli.plain import enum_word
from cognateforge.cli.terminal import printable
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from cognateforge.job.v1.job_pb2 import Job, JobEvent, Progress

SECONDS_LEFT = "seconds_left"
# Progress events that the speed is told from: as few as follow a change of it, as many as smooth a single slow step.
_SPEED_EVENTS = 20
# Silence that is told: shorter ones are usual between two reports.
_QUIET_S = 15.0
# Lines of a screen that belong to others: events above, the bar, the curves' space.
_KEPT_LINES = 6


class Pace:
    """Steps a second of a job, by the times at which its server recorded its newest progress."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SPEED_EVENTS)

    def add(self, at_s: float, step: int) -> None:
        """Take a finished step. One that lies before the newest began a new attempt, or went back."""
        if self._seen and (step < self._seen[-1][1] or at_s < self._seen[-1][0]):
            self._seen.clear()
        if not self._seen or step > self._seen[-1][1]:  # a step may be told of twice, the second time with a validation
            self._seen.append((at_s, step))

    def forget(self) -> None:
        """Begin anew: what follows is another worker's."""
        self._seen.clear()

    @property
    def steps_per_s(self) -> float | None:
        """The speed; None before two different moments are known."""
        if len(self._seen) < 2:
            return None
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s and last > first else None


class Board:
    """A watched job. It is fed with events and drawn by rich.

    metrics: what is drawn as curves.
    """

    def __init__(self, job: Job, metrics: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = enum_word(job_pb2.JobState.DESCRIPTOR, job.state)
        self.name, self.attempt = job.name, job.attempt
        self.step, self.total_steps = job.step, job.total_steps
        self.curves = {name: Curve() for name in dict.fromkeys(["loss", *metrics])}
        self.newest: dict[str, job_pb2.Metric] = {}
        self.pace = Pace()
        self._clock = clock
        self._heard_s = clock()
        self._left: tuple[float, float] | None = None

    def take(self, event: JobEvent) -> None:
        """Take an event in."""
        self._heard_s = self._clock()
        if event.HasField("progress"):
            self._progress(event.progress, event.time.ToMicroseconds() / 1e6)
        elif event.HasField("state_change"):
            self.state = enum_word(job_pb2.JobState.DESCRIPTOR, event.state_change.to)
            self._left = None
        elif event.HasField("attempt_started"):
            self.attempt = event.attempt_started.attempt
            self.pace.forget()

    def _progress(self, progress: Progress, at_s: float) -> None:
        if progress.step < self.step:
            for curve in self.curves.values():
                curve.back_to(progress.step - 1)
        self.step, self.total_steps = progress.step, progress.total_steps
        if at_s:
            self.pace.add(at_s, progress.step)
        for metric in progress.metrics:
            if not metric.HasField("value"):
                continue
            self.newest[metric.name] = metric
            if metric.name == SECONDS_LEFT:
                self._left = (metric.value, self._clock())
            if metric.name in self.curves:
                self.curves[metric.name].add(progress.step, metric.value)

    @property
    def seconds_left(self) -> float | None:
        """Until the last step: as the trainer expects, or by the pace; None where neither is known."""
        if self._left is not None:
            value, told_s = self._left
            return max(0.0, value - (self._clock() - told_s))
        speed = self.pace.steps_per_s
        return (self.total_steps - self.step) / speed if speed and self.total_steps else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width
        yield Text(self._head(), overflow="ellipsis", no_wrap=True)
        if self.total_steps:
            # A bar alone ends no line.
            yield Padding(ProgressBar(total=self.total_steps, completed=self.step, width=min(width, 80)), 0)
        label = max(map(len, self.curves))
        for name, curve in self.curves.items():
            if curve.last is None:
                continue
            ends = f" {curve.last:.4g}  ({curve.lowest:.4g} to {curve.highest:.4g})"
            line = f"{name:{label}} {curve.line(width - label - len(ends) - 1)}{ends}"
            yield Text(printable(line), overflow="ellipsis", no_wrap=True)
        lines = max(3, options.size.height - _KEPT_LINES - len(self.curves))
        pairs = 2 if width >= 100 else 1
        table = Table(box=None, pad_edge=False, show_header=False)
        cells = [self._cell(metric) for name, metric in sorted(self.newest.items()) if name != SECONDS_LEFT]
        for index in range(0, min(len(cells), lines * pairs), pairs):
            table.add_row(*(part for cell in cells[index : index + pairs] for part in cell))
        if cells:
            yield table
        if len(cells) > lines * pairs:
            yield Text(f"and {len(cells) - lines * pairs} more: forge metrics {self.name}")

    def _head(self) -> str:
        parts = [self.state]
        if self.attempt > 1:
            parts.append(f"attempt {self.attempt}")
        if self.total_steps:
            parts.append(f"step {self.step}/{self.total_steps} ({self.step / self.total_steps:.0%})")
        if speed := self.pace.steps_per_s:
            parts.append(f"{speed:.3g} steps/s")
        if (left := self.seconds_left) is not None and self.step < self.total_steps:
            parts.append(f"{span(left)} left")
        if (quiet := self._clock() - self._heard_s) >= _QUIET_S:
            parts.append(f"nothing new for {span(quiet)}")
        return "  ".join(parts)

    @staticmethod
    def _cell(metric: job_pb2.Metric) -> tuple[str, str, str]:
        unit = "" if metric.unit == "1" else metric.unit
        return printable(metric.name), f"{metric.value:.5g}", printable(unit)
