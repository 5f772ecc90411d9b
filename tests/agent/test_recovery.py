"""Agents recover: every failure is done to a real run, and every action is bounded, told and resumable."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from agent_server import trainer
from agent_server.adaptation import Adaptation
from agent_server.architectures.model import AgentModel
from agent_server.data.examples import texts_of
from agent_server.objectives.base import Batch, Loss
from agent_server.objectives.classification import ClassificationObjective
from agent_server.optim import EarlyStopping, Optimization, Schedule
from agent_server.recovery import (
    BUDGET,
    LADDER,
    Action,
    AgentRecoveryManager,
    Correction,
    Detector,
    History,
    RecoveryLimits,
)
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.exceptions import TrainingDivergedError
from tests.agent._support import MemoryAttempt, ToldAttempt, factory, toy_rows, write_foundation
from training_common.attempt import AttemptStopped
from training_common.recovery import Change, Finding

DATA = toy_rows()
LIMITS = RecoveryLimits(loss_window_steps=4, loss_sustained_steps=2, patience=2, stable_steps=12)
CONFIG = AgentTrainConfig(
    agent="toy-router",
    total_steps=40,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(),
    optimization=Optimization(lr=5e-3, schedule=Schedule.CONSTANT),
    checkpoint_interval_steps=5,
    validation_interval_steps=4,
    progress_interval_steps=4,
    recovery=LIMITS,
)


Harm = Callable[[int, Loss], Loss]


@pytest.fixture
def harm(monkeypatch: pytest.MonkeyPatch) -> Callable[[Harm], None]:
    """Return a function that lets the losses of training steps be harmed: what it gets is the number of the loss."""

    def with_harm(done: Harm) -> None:
        class Harmed(ClassificationObjective):
            taken = 0

            def loss(self, model: AgentModel, batch: Batch) -> Loss:
                self.taken += 1
                return done(self.taken, super().loss(model, batch))

        monkeypatch.setattr(trainer, "objective_for", lambda config: Harmed())

    return with_harm


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(tmp_path_factory.mktemp("recovery") / "foundation", list(texts_of(DATA.train)))


def run(foundation: Path, attempt: MemoryAttempt, config: AgentTrainConfig = CONFIG) -> AgentResult:
    return train_agent(config, foundation, DATA, attempt, factory=factory())


def broken(loss: Loss) -> Loss:
    return dataclasses.replace(loss, mean=loss.mean * math.nan)


def test_a_healthy_run_needs_no_recovery(foundation: Path, tmp_path: Path) -> None:
    """Nothing is detected where nothing is wrong, with windows that are shorter than the real ones."""
    attempt = ToldAttempt(tmp_path)
    assert run(foundation, attempt).recovery == ()
    assert attempt.told == []


def test_one_bad_batch_is_passed_over(foundation: Path, tmp_path: Path, harm: Callable[[Harm], None]) -> None:
    """A loss that is not finite changes no weight; the step counts, and training goes on."""
    harm(lambda number, loss: broken(loss) if number == 7 else loss)
    attempt = ToldAttempt(tmp_path)
    result = run(foundation, attempt)
    assert attempt.told == [(7, Detector.NOT_FINITE, Action.SKIP_BATCH)]
    assert (result.steps, len(result.recovery)) == (CONFIG.total_steps, 1)
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert [event["action"] for event in config["recovery"]] == [Action.SKIP_BATCH]


def test_bad_batches_in_a_row_go_back_to_the_good_checkpoint(
    foundation: Path, tmp_path: Path, harm: Callable[[Harm], None]
) -> None:
    """After two skips the weights of the newest good checkpoint return, with half the learning rate."""
    harm(lambda number, loss: broken(loss) if number in (12, 13, 14) else loss)
    attempt = ToldAttempt(tmp_path)
    result = run(foundation, attempt)
    assert [action for _, _, action in attempt.told] == [Action.SKIP_BATCH, Action.SKIP_BATCH, Action.ROLL_BACK]
    last = result.recovery[-1]
    assert last.after == {"lr_factor": 0.5, "weights_of_step": 10.0}
    rates = {step: metrics.get("learning_rate") for step, metrics in attempt.rows}
    assert (rates[8], rates[12], rates[16]) == (5e-3, None, 2.5e-3)


def test_without_end_the_run_fails_with_its_evidence(
    foundation: Path, tmp_path: Path, harm: Callable[[Harm], None]
) -> None:
    """When no action is left the job fails, and says what was seen and what was tried."""
    harm(lambda number, loss: broken(loss) if number > 3 else loss)
    with pytest.raises(TrainingDivergedError, match=r"not_finite at step 6 \(found the loss of step 6 is nan.*2 recov"):
        run(foundation, ToldAttempt(tmp_path))
    assert not (tmp_path / "agent").exists()


def test_a_rising_loss_is_met_step_by_step(foundation: Path, tmp_path: Path, harm: Callable[[Harm], None]) -> None:
    """A loss far above its own trend tightens the clipping first, then goes back."""
    harm(lambda number, loss: dataclasses.replace(loss, mean=loss.mean + 8 * (16 <= number <= 26)))
    attempt = ToldAttempt(tmp_path)
    run(foundation, attempt)
    assert [told[1:] for told in attempt.told[:2]] == [
        (Detector.LOSS_TREND, Action.TIGHTEN_CLIP),
        (Detector.LOSS_TREND, Action.ROLL_BACK),
    ]
    # Once it was quiet for long enough, the clipping is the plan's again.
    assert attempt.told[-1][2] == "return"


@pytest.mark.parametrize(("found", "fails"), [(1.0, False), (8.0, True)])
def test_what_is_left_when_no_action_has_helped(
    foundation: Path, tmp_path: Path, harm: Callable[[Harm], None], found: float, fails: bool
) -> None:
    """A loss that wanders below where it began is left to the evaluation; one that is back there fails the job."""

    # About 1.1 at first and 0.5 after 24 steps.
    def wander(number: int, loss: Loss) -> Loss:
        return dataclasses.replace(loss, mean=loss.mean - loss.mean.detach() + found) if number > 24 else loss

    harm(wander)
    attempt = ToldAttempt(tmp_path)
    config = dataclasses.replace(CONFIG, total_steps=120)
    if fails:
        with pytest.raises(TrainingDivergedError, match=r"loss_trend at step .* first_mean_loss"):
            run(foundation, attempt, config)
    else:
        assert run(foundation, attempt, config).steps == 120
    actions = [told[2] for told in attempt.told if told[1] == Detector.LOSS_TREND]
    # The rate cannot fall below an eighth, so that the last rung is passed over.
    assert actions == [*LADDER[Detector.LOSS_TREND][:-1], *([] if fails else [Action.LEAVE])]


def test_validation_that_only_gets_worse_slows_training_down(
    foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores below the best for as long as patience lasts: a lower rate, then the good weights, then the head alone."""

    class Worse(ClassificationObjective):
        measured = 0

        def measure(self, *arguments: Any, **options: Any) -> list[Any]:
            self.measured += 1
            found = super().measure(*arguments, **options)
            if not 3 < self.measured <= 9:
                return found
            return [dataclasses.replace(one, value=one.value * 0.3) for one in found]

    monkeypatch.setattr(trainer, "objective_for", lambda config: Worse())
    attempt = ToldAttempt(tmp_path)
    result = run(foundation, attempt)
    assert [told[1:] for told in attempt.told[:3]] == [
        (Detector.VALIDATION, Action.LOWER_RATE),
        (Detector.VALIDATION, Action.ROLL_BACK),
        (Detector.VALIDATION, Action.FREEZE_BASE),
    ]
    assert result.steps == CONFIG.total_steps


def test_a_plan_that_stops_early_is_left_to_it(
    foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where early stopping watches validation, the recovery manager does not."""
    stopping = dataclasses.replace(CONFIG.optimization, early_stopping=EarlyStopping(patience=1))
    manager = AgentRecoveryManager(LIMITS, looks_at_validation=False)
    assert all(manager.observe_validation(score) is None for score in (0.9, 0.1, 0.1, 0.1))
    result = run(foundation, ToldAttempt(tmp_path), dataclasses.replace(CONFIG, optimization=stopping))
    assert result.recovery == ()


def test_a_frozen_base_stays_as_it_is(foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the action on only the head moves."""
    monkeypatch.setattr(trainer, "Correction", lambda **values: Correction(**{**values, "base_frozen": True}))
    result = run(foundation, ToldAttempt(tmp_path))
    base = safetensors.torch.load_file(foundation / "model.safetensors")
    agent = safetensors.torch.load_file(result.folder / "model.safetensors")
    assert all(torch.equal(value, agent[f"foundation.{name}"]) for name, value in base.items())


@pytest.mark.parametrize("stop_at", [12, 20])
def test_a_resumed_run_recovers_as_the_uninterrupted_one(
    foundation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """What was observed, changed and spent is in the checkpoint: the same actions, the same bits."""

    class Harmed(ClassificationObjective):
        def loss(self, model: AgentModel, batch: Batch) -> Loss:
            # A matter of the batch alone, so that an interrupted run meets it at the same steps.
            loss = super().loss(model, batch)
            return broken(loss) if int(batch["tokens_BT"].sum()) % 5 == 0 else loss

    monkeypatch.setattr(trainer, "objective_for", lambda config: Harmed())
    whole_attempt = ToldAttempt(tmp_path / "whole")
    whole = run(foundation, whole_attempt)
    assert len(whole.recovery) >= 3
    cut = ToldAttempt(tmp_path / "cut", stop_at=stop_at)
    with pytest.raises(AttemptStopped):
        run(foundation, cut)
    resumed = run(foundation, dataclasses.replace(cut, stop_at=None))
    assert resumed.recovery == whole.recovery
    expected, got = (safetensors.torch.load_file(r.folder / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_every_action_has_bounds() -> None:
    """No correction grows without end, and every action on a ladder has a budget."""
    correction = Correction()
    changes = [correction.apply(Action.ROLL_BACK) for _ in range(5)]
    assert [change is None for change in changes] == [False, False, False, True, True]
    assert correction.lr_factor == 0.125
    for action, value in ((Action.ENLARGE_BATCH, "batch_factor"), (Action.PENALIZE, "penalty")):
        while correction.apply(action) is not None:
            pass
        assert getattr(correction, value) == {"batch_factor": 4, "penalty": 1.6}[value]
    assert {action for rungs in LADDER.values() for action in rungs} == set(BUDGET)
    assert correction.go_back_to_plan() == Change(
        before={"clip_factor": 1.0, "batch_factor": 4.0}, after={"clip_factor": 1.0, "batch_factor": 1.0}
    )
    assert correction.go_back_to_plan() is None


def test_violations_are_penalized_then_enforced() -> None:
    """A share of forbidden actions above its limit is answered twice by the penalty, then by leaving them out."""
    manager, actions = AgentRecoveryManager(LIMITS), []
    for step in range(1, 6):
        manager.observe_step(step, 1.0)
        finding = manager.observe_validation(0.5, (0.2, 0.05))
        if finding is None:
            break
        action = (*manager.choices(finding), Action.LEAVE)[0]
        manager.record(finding, action, Change(before={}, after={}))
        actions.append(action)
    assert actions == [*LADDER[Detector.VIOLATIONS], Action.LEAVE]
    assert AgentRecoveryManager(LIMITS).observe_validation(0.5, (0.05, 0.05)) is None


def test_state_survives_json() -> None:
    """A manager that was stored and read decides as before."""
    manager = AgentRecoveryManager(LIMITS)
    for step in range(1, 4):
        manager.observe_step(step, 1.0)
    manager.observe_validation(0.5, (0.2, 0.05))
    manager.record(
        Finding(detector=Detector.VIOLATIONS, evidence={"violation_share": 0.2}),
        Action.PENALIZE,
        Change(before={}, after={}),
    )
    again = AgentRecoveryManager(LIMITS)
    again.load_state_dict(json.loads(json.dumps(manager.state_dict())))
    assert again.state_dict() == manager.state_dict()
    assert again.events == manager.events
    assert History.from_json(json.loads(json.dumps(History().to_json()))) == History()
