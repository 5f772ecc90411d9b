"""The agents' recovery manager (`training_common.recovery`): what it looks at, and what is done about it.

A detector is a pure function of what was observed; it returns the evidence, or None. What an action changes is a
`Correction`: it stands beside the plan, in the checkpoint and the manifest, and never in the plan itself.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training_common.recovery import Change, Evidence, Finding, Ladder, RecoveryManager, RunHistory


class Detector(enum.StrEnum):
    """The kinds of trouble that are looked for, the gravest first."""

    NOT_FINITE = "not_finite"
    LOSS_TREND = "loss_trend"
    VIOLATIONS = "violations"
    VALIDATION = "validation"


class Action(enum.StrEnum):
    """What may be done."""

    SKIP_BATCH = "skip_batch"
    TIGHTEN_CLIP = "tighten_clip"
    LOWER_RATE = "lower_rate"
    ENLARGE_BATCH = "enlarge_batch"
    ROLL_BACK = "roll_back"
    FREEZE_BASE = "freeze_base"
    PENALIZE = "penalize"
    ENFORCE = "enforce"
    # A matter of quality that no action has mended: training goes on, and whoever evaluates the agent judges it.
    LEAVE = "leave"


LADDER: Mapping[str, Sequence[str]] = {
    # Twice: one bad batch may be followed by its neighbour. Three in a row are not the data's fault.
    Detector.NOT_FINITE: (Action.SKIP_BATCH, Action.SKIP_BATCH, Action.ROLL_BACK, Action.ROLL_BACK),
    # A lower rate also where there is nothing to roll back to.
    Detector.LOSS_TREND: (
        Action.TIGHTEN_CLIP,
        Action.ROLL_BACK,
        Action.LOWER_RATE,
        Action.ENLARGE_BATCH,
        Action.ROLL_BACK,
        Action.LOWER_RATE,
    ),
    # Towards the base first, which costs the least; enforcing always works, and hides what was not learnt.
    Detector.VIOLATIONS: (Action.PENALIZE, Action.PENALIZE, Action.ENFORCE),
    # What learnt too fast goes back and on more slowly; then only the head learns, which can spoil least.
    Detector.VALIDATION: (Action.LOWER_RATE, Action.ROLL_BACK, Action.FREEZE_BASE),
}
# These make an agent worse, not void.
_QUALITY = (Detector.VIOLATIONS, Detector.VALIDATION)


def voids(finding: Finding) -> bool:
    """Whether a run in such trouble, which no action has mended, makes no agent.

    A loss that wanders makes none where it is back at the loss of the first steps: nothing that was learnt is left.
    Below that the agent has learnt, later steps with a lower rate may mend it, and its evaluations tell how good it is.
    """
    if finding.detector == Detector.LOSS_TREND:
        return not float(finding.evidence["mean_loss"]) < float(finding.evidence["first_mean_loss"])
    return finding.detector not in _QUALITY


# Of a whole job, over all its attempts. A run that needs more is another run than the one that was asked for.
BUDGET: Mapping[str, int] = {
    Action.SKIP_BATCH: 10,
    Action.TIGHTEN_CLIP: 3,
    Action.LOWER_RATE: 3,
    Action.ENLARGE_BATCH: 2,
    Action.ROLL_BACK: 3,
    Action.FREEZE_BASE: 1,
    Action.PENALIZE: 3,
    Action.ENFORCE: 1,
}
BUDGET_IN_ALL = 16


@dataclass(frozen=True, kw_only=True)
class RecoveryLimits:
    """The detectors' numbers. They are in no request, but for the limit on violations; tests use shorter windows.

    loss_window_steps, loss_sustained_steps: a trend is the mean of a window of losses; trouble lasts so many steps.
    loss_multiple, loss_margin: a mean above the best one by both is no noise of batches: classifiers' windows of 20
        batches of 32 rows vary by a tenth of their mean, and a loss that is near 0 may double for one hard row.
    patience: validations in a row that are worse than the best one by more than the margin.
    score_margin: in the score's own unit, times the best score's size where that is above 1, as losses and returns are.
    stable_steps: without trouble for so long, an action has worked.
    """

    loss_window_steps: int = 20
    loss_sustained_steps: int = 10
    loss_multiple: float = 1.5
    loss_margin: float = 0.5
    patience: int = 3
    score_margin: float = 0.02
    stable_steps: int = 200


@dataclass(kw_only=True)
class History(RunHistory):
    """What was observed. losses: of the newest steps. scores: of the newest validations, higher is better.

    first_loss: the mean of the first window, when nothing was learnt yet.
    violations: the newest share of actions that break the constraints, and its limit; none where none are measured.
    """

    step: int = 0
    not_finite: str = ""
    losses: list[float] = field(default_factory=list)
    first_loss: float = math.inf
    best_loss: float = math.inf
    scores: list[float] = field(default_factory=list)
    best_score: float = -math.inf
    violations: tuple[float, float] | None = None

    def add_loss(self, loss: float, limits: RecoveryLimits) -> None:
        """Add a finished step's loss."""
        kept = limits.loss_window_steps + limits.loss_sustained_steps - 1
        self.losses = [*self.losses, loss][-kept:]
        if len(self.losses) >= limits.loss_window_steps:
            mean = _mean(self.losses[-limits.loss_window_steps :])
            self.best_loss = min(self.best_loss, mean)
            if math.isinf(self.first_loss):
                self.first_loss = mean

    def add_score(self, score: float, limits: RecoveryLimits) -> None:
        """Add a validation's score."""
        self.scores = [*self.scores, score][-limits.patience :]
        self.best_score = max(self.best_score, score)

    def forget_signs(self) -> None:
        """Drop what led to an action; the bests stay."""
        self.losses, self.scores, self.violations = [], [], None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` needs; JSON has no infinity."""
        finite = {name: None if math.isinf(getattr(self, name)) else getattr(self, name) for name in _BESTS}
        return {**dataclasses.asdict(self), **finite}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """Read what `to_json` returned."""
        bests = {name: default if value[name] is None else value[name] for name, default in _BESTS.items()}
        found = value["violations"]
        return cls(**{**value, **bests, "violations": None if found is None else (found[0], found[1])})


_BESTS = {"first_loss": math.inf, "best_loss": math.inf, "best_score": -math.inf}


def not_finite(history: History, limits: RecoveryLimits) -> Evidence | None:
    """A loss or a gradient that is not finite: one such update would be the end of the weights."""
    return {"found": history.not_finite} if history.not_finite else None


def loss_trend(history: History, limits: RecoveryLimits) -> Evidence | None:
    """The mean loss of a window stayed above a multiple of the best such mean, step after step."""
    window, length = limits.loss_window_steps, len(history.losses)
    if length < window + limits.loss_sustained_steps - 1:
        return None
    means = [_mean(history.losses[length - window - end : length - end]) for end in range(limits.loss_sustained_steps)]
    limit = max(limits.loss_multiple * history.best_loss, history.best_loss + limits.loss_margin)
    if min(means) <= limit:
        return None
    return {
        "mean_loss": means[0],
        "best_mean_loss": history.best_loss,
        "first_mean_loss": history.first_loss,
        "limit": limit,
    }


def violations(history: History, limits: RecoveryLimits) -> Evidence | None:
    """More validation actions break the constraints than the plan allows."""
    if history.violations is None or history.violations[0] <= history.violations[1]:
        return None
    return {"violation_share": history.violations[0], "limit": history.violations[1]}


def validation(history: History, limits: RecoveryLimits) -> Evidence | None:
    """Validation after validation is worse than the best one."""
    best = history.best_score
    limit = best - limits.score_margin * max(1.0, abs(best))
    if len(history.scores) < limits.patience or max(history.scores) >= limit:
        return None
    return {"best_of_the_last": max(history.scores), "best": best, "limit": limit}


# In the order in which they are asked: what endangers the weights first.
DETECTORS: Mapping[Detector, Callable[[History, RecoveryLimits], Evidence | None]] = {
    Detector.NOT_FINITE: not_finite,
    Detector.LOSS_TREND: loss_trend,
    Detector.VIOLATIONS: violations,
    Detector.VALIDATION: validation,
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class AgentRecoveryManager(RecoveryManager[History]):
    """Watches the training of an agent.

    looks_at_validation: not where the plan stops early by itself.
    """

    def __init__(self, limits: RecoveryLimits, *, looks_at_validation: bool = True) -> None:
        ladder = Ladder(rungs=LADDER, budget=BUDGET, budget_in_all=BUDGET_IN_ALL, stable_steps=limits.stable_steps)
        super().__init__(ladder, History())
        self.limits = limits
        self._looks_at_validation = looks_at_validation

    def observe_step(self, step: int, loss: float) -> Finding | None:
        """Take in a finished step and return the gravest trouble that is seen after it."""
        self.history.step, self.history.not_finite = step, ""
        self.begin_ladder(Detector.NOT_FINITE)  # trouble in a row is what climbs this one
        self.history.add_loss(loss, self.limits)
        return self._look()

    def observe_not_finite(self, step: int, found: str) -> Finding | None:
        """Take in a step that could not be taken."""
        self.history.step, self.history.not_finite = step, found
        return self._look()

    def observe_validation(self, score: float, violations: tuple[float, float] | None = None) -> Finding | None:
        """Take in a validation between steps.

        score: higher is better. violations: the share of actions that break the constraints, and its limit.
        """
        self.history.not_finite = ""  # of the step before, and answered
        if self._looks_at_validation:
            self.history.add_score(score, self.limits)
        self.history.violations = violations
        return self._look()

    def _evidence(self) -> Iterator[tuple[str, Evidence | None]]:
        return ((detector, look(self.history, self.limits)) for detector, look in DETECTORS.items())

    def _restored(self, value: Mapping[str, Any]) -> History:
        return History.from_json(value)

    @property
    def healthy(self) -> bool:
        """Whether weights of this moment are worth going back to: no detector sees even a first sign."""
        strict = dataclasses.replace(
            self.limits,
            loss_sustained_steps=1,
            loss_multiple=1 + (self.limits.loss_multiple - 1) / 2,
            loss_margin=self.limits.loss_margin / 2,
            patience=1,
        )
        newest = dataclasses.replace(self.history, scores=self.history.scores[-1:])
        return all(look(newest, strict) is None for look in DETECTORS.values())


# A halved learning rate is the usual answer to divergence; an eighth of the plan's hardly trains any more.
_CUT, _FACTOR_FLOOR = 0.5, 0.125
# Rows of a step over the plan's: gradients of four times as many are half as noisy.
_BATCH_MOST = 4
# Of the penalty for leaving the base, in nats: at 1 it weighs as much as a nat of loss.
_PENALTY_FIRST, _PENALTY_MOST = 0.1, 1.6


@dataclass(kw_only=True)
class Correction:
    """What recoveries have changed of the plan.

    lr_factor, clip_factor: times the plan's rate and norm. batch_factor: times the plan's rows of a step.
    base_frozen: only the head learns. penalty: weight of the divergence from the base, in the loss.
    enforced: constraints are enforced in what the agent writes, by leaving out what breaks them.
    """

    lr_factor: float = 1.0
    clip_factor: float = 1.0
    batch_factor: int = 1
    base_frozen: bool = False
    penalty: float = 0.0
    enforced: bool = False

    def apply(self, action: Action) -> Change | None:
        """Change what the action says; None where a bound leaves nothing to do, or it is not about these values."""
        match action:
            case Action.LOWER_RATE | Action.ROLL_BACK:
                return self._cut("lr_factor")
            case Action.TIGHTEN_CLIP:
                return self._cut("clip_factor")
            case Action.ENLARGE_BATCH:
                return self._set("batch_factor", min(_BATCH_MOST, 2 * self.batch_factor))
            case Action.FREEZE_BASE:
                return self._set("base_frozen", True)
            case Action.PENALIZE:
                return self._set("penalty", min(_PENALTY_MOST, 4 * self.penalty or _PENALTY_FIRST))
            case Action.ENFORCE:
                return self._set("enforced", True)
            case Action.SKIP_BATCH | Action.LEAVE:
                return Change(before={}, after={})

    def _cut(self, name: str) -> Change | None:
        return self._set(name, max(_FACTOR_FLOOR, _CUT * getattr(self, name)))

    def _set(self, name: str, value: float | bool) -> Change | None:
        before = getattr(self, name)
        if before == value:
            return None
        setattr(self, name, value)
        return Change(before={name: float(before)}, after={name: float(value)})

    def go_back_to_plan(self) -> Change | None:
        """Return what may be the plan's again; None when it is. A lowered rate stays: the plan's was too high."""
        changed = {"clip_factor": 1.0, "batch_factor": 1.0}
        before = {name: float(getattr(self, name)) for name in changed}
        if before == changed:
            return None
        self.clip_factor, self.batch_factor = 1.0, 1
        return Change(before=before, after=changed)
