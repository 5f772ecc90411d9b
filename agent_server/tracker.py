"""The agents' progress tracker (ADR 0006): steps and validations into metrics; absent is what was not measured.

How well a task is done is the objective's matter. What is here holds for every task: speed, convergence, the gap
between training and validation, what training has gained, and whether an agent is ready to be deployed.
"""

from __future__ import annotations

import collections
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training_common.attempt import Json

# Weight of the newest step in the running mean of a step's time, which `seconds_left` is told from.
_TIME_SMOOTHING = 0.1
# Steps that the loss's slope is fitted to: as many as the recovery manager's window of losses.
_SLOPE_STEPS = 20
# A score that is better by chance in one case of forty: the upper 2.5 % of a normal distribution.
_ERRORS = 1.96


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step did: its loss, what was counted on the way, its gradient norm before clipping, its learning rate."""

    loss: float
    units: float
    counts: Mapping[str, float]
    rows: int
    norm: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job's workers cost.

    worker_hour: price of all of them for an hour, in the server's currency; None where there is none.
    earlier_seconds: how long attempts before this one ran.
    """

    worker_hour: float | None = None
    earlier_seconds: float = 0.0


NO_COST = Cost()


class AgentProgressTracker:
    """Metrics of training steps since the last report.

    worker_hour: price of this job's workers for an hour, in the server's currency; None where there is none.
    earlier_seconds: time that attempts before this one have spent on the job's steps.
    """

    def __init__(self, total_steps: int, *, worker_hour: float | None = None, earlier_seconds: float = 0.0) -> None:
        self.total_steps = total_steps
        self.step_seconds = 0.0
        self.spent_seconds = earlier_seconds
        self._worker_hour = worker_hour
        self._losses: collections.deque[float] = collections.deque(maxlen=_SLOPE_STEPS)
        self._reset()

    def _reset(self) -> None:
        self._loss, self._units, self._rows, self._seconds = 0.0, 0.0, 0, 0.0
        self._counts: dict[str, float] = {}

    def add(self, step: StepReport, *, seconds: float) -> None:
        """Add a finished step."""
        self._loss += step.loss * step.units
        self._units += step.units
        self._rows += step.rows
        self._seconds += seconds
        self._losses.append(step.loss)
        for name, count in step.counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count
        weight = _TIME_SMOOTHING if self.step_seconds else 1.0
        self.step_seconds += weight * (seconds - self.step_seconds)
        self.spent_seconds += seconds

    @property
    def counted(self) -> tuple[Mapping[str, float], float]:
        """What was counted since the last report, and over how many units."""
        return self._counts, self._units

    def take(self, step: int) -> dict[str, Json]:
        """Return the metrics since the last report, and begin the next one."""
        metrics: dict[str, Json] = {
            "samples_per_s": self._rows / max(self._seconds, 1e-9),
            "seconds_left": self.step_seconds * (self.total_steps - step),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self._units:
            metrics["loss"] = self._loss / self._units
        if self._worker_hour is not None:
            metrics["cost_so_far"] = self._worker_hour * self.spent_seconds / 3600
        slope = loss_slope(self._losses)
        if slope is not None:
            metrics["loss_slope"] = slope
        self._reset()
        return metrics


def loss_slope(losses: Sequence[float]) -> float | None:
    """Return the slope of a straight line through the newest losses, by least squares, per 100 steps.

    Convergence: below 0 the loss still falls, near 0 it has settled, above 0 it rises. None for fewer losses than that
    line is fitted to. Source: ordinary least squares, b = sum((t - mean t) (l - mean l)) / sum((t - mean t)^2).
    """
    if len(losses) < _SLOPE_STEPS:
        return None
    middle, mean = (len(losses) - 1) / 2, sum(losses) / len(losses)
    moved = sum((t - middle) * (loss - mean) for t, loss in enumerate(losses))
    return 100 * moved / sum((t - middle) ** 2 for t in range(len(losses)))


def generalization_gap(training_loss: float, validation_loss: float) -> float:
    """Return by how much the loss on rows that were not trained on is higher, in the loss's unit.

    Source: Goodfellow, Bengio & Courville 2016, Deep Learning, section 5.2. Training losses are of the steps since the
    last report, with dropout where there is some, which makes the gap smaller than that of one moment's model.
    """
    return validation_loss - training_loss


def normalized_gain(before: float, after: float) -> float | None:
    """Return the share of what was left to gain that training has gained: (after - before) / (1 - before).

    For scores whose best value is 1: behavioural adaptation, for instance, is the gain in the accuracy of actions.
    Source: Hake 1998, American Journal of Physics 66, 64. None where nothing was left to gain.
    """
    return None if before >= 1 else (after - before) / (1 - before)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A named check of readiness. value must be above floor, or below it where `below`."""

    name: str
    value: float
    floor: float
    below: bool = False

    @property
    def passed(self) -> bool:
        """Whether it holds. What is not a number does not."""
        return self.value < self.floor if self.below else self.value > self.floor


def beats(name: str, score: float, floor: float, rows: int) -> Check:
    """Return the check that a share of right answers beats a floor by more than chance explains.

    The floor is raised by 1.96 standard errors of a share of so many rows, sqrt(p (1 - p) / n). Source: the normal
    approximation of the binomial distribution, without correction.
    """
    error = math.sqrt(max(0.0, floor * (1 - floor)) / max(1, rows))
    return Check(name=name, value=score, floor=floor + _ERRORS * error)


def readiness(checks: Sequence[Check]) -> float | None:
    """Return the share of checks that pass: deployment readiness. 1 means all. None where none could be made."""
    return sum(check.passed for check in checks) / len(checks) if checks else None


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
