"""What each recovery action does to a run, within its bounds; None where a bound leaves nothing to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from cognate_server.construct import HALTING_START, HALTING_STD
from cognate_server.detectors import Detector
from cognate_server.grokfast import LAMBDA, LAMBDA_FLOOR
from cognate_server.losses import PONDER_WEIGHT
from cognate_server.recovery import Action
from cognate_server.run import PretrainingRun
from cognate_server.tracker import contents_rms
from training_common.recovery import Change, Finding
from training_common.team import whole

# A halved learning rate is the usual answer to divergence; an eighth of the plan's hardly trains any more.
LR_CUT = 0.5
LR_FACTOR_FLOOR = 0.125
# With eight times its weight the prior is worth about as much as the cross-entropy's own progress in the late run.
PONDER_WEIGHT_MOST = 8 * PONDER_WEIGHT


def apply(action: Action, run: PretrainingRun, finding: Finding) -> Change | None:
    """Change the run, and return what was changed; None when the action has reached its bound."""
    return _ACTIONS[action](run, finding)


def go_back_to_mandate(run: PretrainingRun) -> Change | None:
    """Return lambda and the ponder prior's weight to what is mandated; None when they are there.

    The learning rate stays: it is the plan's and not mandated, and the plan's was too high.
    """
    limit = _lambda_limit(run)
    if limit >= LAMBDA and run.ponder_weight == PONDER_WEIGHT:
        return None
    before = {"lambda_limit": limit, "ponder_weight": run.ponder_weight}
    if limit < LAMBDA:
        run.optimizer.restore_lambda()
    run.ponder_weight = PONDER_WEIGHT
    return Change(before=before, after={"lambda_limit": _lambda_limit(run), "ponder_weight": run.ponder_weight})


def _lambda_limit(run: PretrainingRun) -> float:
    limit: float = run.optimizer.param_groups[0]["lambda_limit"]
    return limit


def _skip_batch(run: PretrainingRun, finding: Finding) -> Change | None:
    """The batch is passed over already; start the EMA anew, in case it took in what made the batch fail."""
    before = {"grokfast_lambda": run.optimizer.grokfast_lambda}
    run.optimizer.reset_slow_gradient()
    run.recovery.restarted_slow_gradient()
    return Change(before=before, after={"grokfast_lambda": run.optimizer.grokfast_lambda})


def _lower_lambda(run: PretrainingRun, finding: Finding) -> Change | None:
    """Halve the lambda that is in use, not below its floor."""
    limit = _lambda_limit(run)
    value = max(LAMBDA_FLOOR, min(limit, run.optimizer.grokfast_lambda) / 2)
    if value >= limit:
        return None
    run.optimizer.lower_lambda(value)
    return Change(before={"lambda_limit": limit}, after={"lambda_limit": value})


def _roll_back(run: PretrainingRun, finding: Finding) -> Change | None:
    if run.good is None:
        return _cut_learning_rate(run) if finding.detector is Detector.LOSS_TREND else None
    before = {"weights_of_step": float(run.step), "learning_rate_factor": run.lr_factor}
    run.go_back_to(run.good)
    run.lr_factor = max(LR_FACTOR_FLOOR, run.lr_factor * LR_CUT)
    return Change(before=before, after={"weights_of_step": float(run.good.step), "learning_rate_factor": run.lr_factor})


def _cut_learning_rate(run: PretrainingRun) -> Change | None:
    """Without a checkpoint to go back to, weights that are finite may still come round at a lower rate."""
    before = run.lr_factor
    run.lr_factor = max(LR_FACTOR_FLOOR, before * LR_CUT)
    if run.lr_factor == before:
        return None
    return Change(before={"learning_rate_factor": before}, after={"learning_rate_factor": run.lr_factor})


def _adjust_pondering(run: PretrainingRun, finding: Finding) -> Change | None:
    """Double the prior's weight; where all tokens halt at once, start the halting unit anew as well.

    A token that halts in its first step gives it all the weight whatever its probability was, so the prior has no
    gradient there: no weight alone brings such a model back.
    """
    before = {"ponder_weight": run.ponder_weight, "halting_bias": _halting_bias(run)}
    if run.ponder_weight >= PONDER_WEIGHT_MOST:
        return None
    run.ponder_weight *= 2
    if finding.evidence.get("steps") == 1.0:
        _restart_halting(run)
    after = {"ponder_weight": run.ponder_weight, "halting_bias": _halting_bias(run)}
    return Change(before=before, after=after)


def _halting_bias(run: PretrainingRun) -> float:
    return float(whole(run.model.halting.bias.detach()))


@torch.no_grad()
def _restart_halting(run: PretrainingRun) -> None:
    """Give the halting unit its first bias, and its weights their first length in the direction they have learnt."""
    halting = run.model.halting
    halting.bias.fill_(math.log(HALTING_START / (1 - HALTING_START)))
    length = HALTING_STD * math.sqrt(halting.weight.numel())
    halting.weight.mul_(min(1.0, length / max(float(whole(halting.weight.norm())), 1e-12)))


def _reset_memory(run: PretrainingRun, finding: Finding) -> Change | None:
    """Let every row start with an empty memory; parameters stay."""
    if run.memory is None:
        return None
    before = {"contents_rms": contents_rms(run.memory, run.team)}
    run.memory = None
    return Change(before=before, after={"contents_rms": 0.0})


_ACTIONS: Mapping[Action, Callable[[PretrainingRun, Finding], Change | None]] = {
    Action.SKIP_BATCH: _skip_batch,
    Action.LOWER_LAMBDA: _lower_lambda,
    Action.ROLL_BACK: _roll_back,
    Action.ADJUST_PONDERING: _adjust_pondering,
    Action.RESET_MEMORY: _reset_memory,
}
