"""What the recovery manager looks at, and how it tells trouble from the noise of healthy training.

A detector is a pure function of what was observed; it returns the evidence, or None. Figures called "measured" are of
the first 300 steps of Cognate-25M on GSM8K and HotpotQA rows, 512 tokens each; on them every detector is silent.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from training_common.recovery import Evidence, RunHistory


class Detector(enum.StrEnum):
    """The kinds of trouble that are looked for."""

    NOT_FINITE = "not_finite"
    LOSS_TREND = "loss_trend"
    SLOW_GRADIENT = "slow_gradient"
    MEMORY_OVERFLOW = "memory_overflow"
    HALTING_COLLAPSE = "halting_collapse"
    READ_COLLAPSE = "read_collapse"
    REASONING_LOSS = "reasoning_loss"


@dataclass(frozen=True, kw_only=True)
class RecoveryLimits:
    """The detectors' numbers. They are not in any request; tests use shorter windows.

    measure_interval_steps: ten steps are a fifth of the EMA's memory of 50, and cost below one per cent.
    loss_window_steps, loss_margin_nats, loss_sustained_steps: single losses vary by 0.4 nats (measured), means of 20 by
        0.09; a mean above the best one by 8 times that, 20 steps long, is no noise. A stale EMA raised it by 1.9.
    warmup_steps: three memories of GrokFast's EMA: until then the EMA is still in part a copy of one
        gradient, its ratio is near 1 (measured: 0.9 in the first 20 steps), and halting has barely learnt.
    slow_ratio: the EMA outweighs the gradient itself; independent gradients give 0.1, measured are 0.06 to 0.5.
    validation_margin_nats: the rows are the same each time, so their choice adds no noise.
    collapse_share: the gate's: fewer than one token in fifty differs.
    read_entropy_share: of ln(slots). Measured: 0.85 to 0.96; below a tenth nearly all that is recalled comes from one
        slot.
    contents_multiple: of the mean of the first reports (measured: 1.0, and up to 1.1 later). What is written is
        normalized, so only a map of values that has grown tenfold can do it.
    score_drop, score_errors: a fall of a share of right answers by both, in shares and in standard errors. Three of
        them, because the best of many scores was a lucky one.
    stable_steps: without trouble for so long, an action has worked: several windows of every detector.
    """

    measure_interval_steps: int = 10
    loss_window_steps: int = 20
    loss_margin_nats: float = 0.75
    loss_sustained_steps: int = 20
    warmup_steps: int = 150
    slow_ratio: float = 1.0
    slow_ratio_reports: int = 3
    validation_margin_nats: float = 0.02
    collapse_share: float = 0.98
    collapse_reports: int = 5
    read_entropy_share: float = 0.1
    contents_multiple: float = 10.0
    contents_reports: int = 2
    reference_reports: int = 5
    score_drop: float = 0.05
    score_errors: float = 3.0
    stable_steps: int = 200

    def strict(self) -> RecoveryLimits:
        """Return limits under which the first sign of trouble counts: what a good checkpoint must show nothing of."""
        return dataclasses.replace(
            self,
            loss_margin_nats=self.loss_margin_nats / 2,
            loss_sustained_steps=1,
            slow_ratio_reports=1,
            collapse_reports=1,
            contents_reports=1,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a measured step showed.

    halting_shares: of tokens that took 1, 2, ... steps. read_entropy_share: of ln(slots).
    slow_gradient_norm_ratio: as in `StepReport`. Both are None where they were not measured.
    """

    halting_shares: tuple[float, ...]
    slow_gradient_norm_ratio: float | None
    read_entropy_share: float | None
    contents_rms: float


@dataclass(kw_only=True)
class History(RunHistory):
    """What was observed, as far back as a detector looks.

    not_finite: what the newest step found that is not finite; empty when there is nothing.
    slow_gradient_start: the step whose gradient the EMA began with.
    losses: of the newest steps. best_loss: the lowest mean of a window so far.
    reference_rms: of the memory's contents in the first reports.
    validations: the two newest losses. scores: the best and the newest (share of right answers, rows).
    """

    step: int = 0
    not_finite: str = ""
    slow_gradient_start: int = 0
    losses: list[float] = field(default_factory=list)
    best_loss: float = math.inf
    measurements: list[Measurement] = field(default_factory=list)
    reference_rms: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    scores: list[tuple[float, int]] = field(default_factory=list)

    def add_loss(self, loss: float, limits: RecoveryLimits) -> None:
        """Add a finished step's loss."""
        kept = limits.loss_window_steps + limits.loss_sustained_steps - 1
        self.losses = [*self.losses, loss][-kept:]
        if len(self.losses) >= limits.loss_window_steps:
            self.best_loss = min(self.best_loss, _mean(self.losses[-limits.loss_window_steps :]))

    def add_measurement(self, measurement: Measurement, limits: RecoveryLimits) -> None:
        """Add what a measured step showed."""
        if len(self.reference_rms) < limits.reference_reports:
            self.reference_rms.append(measurement.contents_rms)
        kept = max(limits.collapse_reports, limits.slow_ratio_reports, limits.contents_reports)
        self.measurements = [*self.measurements, measurement][-kept:]

    def add_validation(self, loss: float, score: tuple[float, int] | None) -> None:
        """Add a validation's loss, and its score where one was measured."""
        self.validations = [*self.validations, loss][-2:]
        if score is not None:
            self.scores = [max([*self.scores[:1], score], key=lambda one: one[0]), score]

    def forget_signs(self) -> None:
        """Drop what led to an action: the next one needs its whole evidence anew. The bests stay."""
        self.losses, self.measurements, self.validations = [], [], self.validations[-1:]
        self.scores = self.scores[:1]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` needs; JSON has no infinity."""
        return {**dataclasses.asdict(self), "best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """Read what `to_json` returned."""
        measurements = [
            Measurement(**{**one, "halting_shares": tuple(one["halting_shares"])}) for one in value["measurements"]
        ]
        best = math.inf if value["best_loss"] is None else value["best_loss"]
        scores = [(score, rows) for score, rows in value["scores"]]
        return cls(**{**value, "best_loss": best, "measurements": measurements, "scores": scores})


def not_finite(history: History, limits: RecoveryLimits) -> Evidence | None:
    """A loss, gradient or EMA that is not finite: one such update would be the end of the weights."""
    return {"found": history.not_finite} if history.not_finite else None


def loss_trend(history: History, limits: RecoveryLimits) -> Evidence | None:
    """The mean loss of a window stayed above the best such mean by a margin, step after step."""
    window, ends = limits.loss_window_steps, range(limits.loss_sustained_steps)
    if len(history.losses) < window + limits.loss_sustained_steps - 1:
        return None
    length = len(history.losses)
    means = [_mean(history.losses[length - window - end : length - end]) for end in ends]
    if min(means) <= history.best_loss + limits.loss_margin_nats:
        return None
    return {"mean_loss": means[0], "best_mean_loss": history.best_loss, "margin_nats": limits.loss_margin_nats}


def slow_gradient(history: History, limits: RecoveryLimits) -> Evidence | None:
    """The EMA is larger than the gradient in report after report, and validation got worse meanwhile."""
    if history.step - history.slow_gradient_start < limits.warmup_steps or len(history.validations) < 2:
        return None
    ratios = [one.slow_gradient_norm_ratio for one in _newest(history, limits.slow_ratio_reports)]
    before, now = history.validations
    if not _all_above(ratios, limits.slow_ratio) or now <= before + limits.validation_margin_nats:
        return None
    return {"smallest_ratio": min(filter(None, ratios)), "validation_loss": now, "validation_loss_before": before}


def halting_collapse(history: History, limits: RecoveryLimits) -> Evidence | None:
    """Nearly all tokens take one step, or nearly all take the most: pondering decides nothing any more."""
    newest = _newest(history, limits.collapse_reports)
    if history.step < limits.warmup_steps or not newest:
        return None
    for steps, place in ((1, 0), (len(newest[0].halting_shares), -1)):
        share = min(one.halting_shares[place] for one in newest)
        if share > limits.collapse_share:
            return {"steps": float(steps), "smallest_share": share}
    return None


def read_collapse(history: History, limits: RecoveryLimits) -> Evidence | None:
    """What nearly every token recalls comes from a single slot: the memory has become one token.

    A memory whose tokens each recall one right slot would look the same; bounded scores keep it less sharp than that.
    """
    shares = [one.read_entropy_share for one in _newest(history, limits.collapse_reports)]
    found = [share for share in shares if share is not None and share < limits.read_entropy_share]
    if history.step < limits.warmup_steps or not shares or len(found) < len(shares):
        return None
    return {"largest_entropy_share": max(found), "limit": limits.read_entropy_share}


def memory_overflow(history: History, limits: RecoveryLimits) -> Evidence | None:
    """What the memory's slots hold has grown to many times what the first reports showed."""
    newest = _newest(history, limits.contents_reports)
    if not newest or len(history.reference_rms) < limits.reference_reports:
        return None
    reference, smallest = _mean(history.reference_rms), min(one.contents_rms for one in newest)
    if smallest <= limits.contents_multiple * reference:
        return None
    return {"contents_rms": smallest, "reference_rms": reference, "multiple": limits.contents_multiple}


def reasoning_loss(history: History, limits: RecoveryLimits) -> Evidence | None:
    """The share of right answers fell below the best one by more than a margin and more than chance explains."""
    if len(history.scores) < 2:
        return None
    (best, best_rows), (now, rows) = history.scores
    error = math.sqrt(best * (1 - best) / best_rows + now * (1 - now) / rows)
    if best - now <= max(limits.score_drop, limits.score_errors * error):
        return None
    return {"score": now, "best_score": best, "standard_error": error}


# In the order in which they are asked: what endangers the weights first.
DETECTORS: Mapping[Detector, Callable[[History, RecoveryLimits], Evidence | None]] = {
    Detector.NOT_FINITE: not_finite,
    Detector.LOSS_TREND: loss_trend,
    Detector.SLOW_GRADIENT: slow_gradient,
    Detector.MEMORY_OVERFLOW: memory_overflow,
    Detector.HALTING_COLLAPSE: halting_collapse,
    Detector.READ_COLLAPSE: read_collapse,
    Detector.REASONING_LOSS: reasoning_loss,
}


def _newest(history: History, count: int) -> list[Measurement]:
    """Return the newest measurements, or none while there are fewer."""
    return history.measurements[-count:] if len(history.measurements) >= count else []


def _all_above(values: list[float | None], limit: float) -> bool:
    return bool(values) and all(value is not None and value > limit for value in values)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
