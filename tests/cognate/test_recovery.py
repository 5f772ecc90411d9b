"""Recoveries in small real runs: each trouble is done to the run itself, and what helps is seen in its numbers."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cognate_server import losses as losses_module
from cognate_server import run as run_module
from cognate_server.detectors import DETECTORS, Detector, History, Measurement, RecoveryLimits
from cognate_server.losses import Predictions, summed_cross_entropy
from cognate_server.recovery import BUDGET, LADDER, Action, CognateRecoveryManager
from cognate_server.run import PretrainConfig, PretrainingRun
from cognate_server.stream import TokenStream
from cognate_server.tracker import StepOutcome
from cognate_server.trainer import PretrainResult, Scorer, TrainingDivergedError, pretrain
from cognate_server.validation import row_losses
from tests.cognate._support import CONFIG, CountingStream, MemoryAttempt, weights
from training_common.attempt import AttemptStopped, StopKind
from training_common.models.cognate_v1 import CognateV1
from training_common.recovery import Change, Finding

LIMITS = RecoveryLimits(
    measure_interval_steps=2,
    loss_window_steps=5,
    loss_sustained_steps=5,
    warmup_steps=20,
    slow_ratio_reports=2,
    collapse_reports=2,
    contents_reports=1,
    stable_steps=30,
)
RUN = dataclasses.replace(
    CONFIG,
    total_steps=60,
    peak_lr=5e-3,
    checkpoint_interval_steps=10,
    validation_interval_steps=5,
    recovery=LIMITS,
)
Sabotage = Mapping[int, Callable[[PretrainingRun], None]]


def sabotage(monkeypatch: pytest.MonkeyPatch, deeds: Sabotage) -> None:
    """Do something to the run right before the step that would be finished under the given number."""
    train_step = PretrainingRun.train_step

    def sabotaged(self: PretrainingRun, *, measure: bool) -> StepOutcome:
        deed = deeds.get(self.step + 1)
        if deed is not None:
            deed(self)
        return train_step(self, measure=measure)

    monkeypatch.setattr(PretrainingRun, "train_step", sabotaged)


def train(
    folder: Path,
    config: PretrainConfig = RUN,
    stream: TokenStream | None = None,
    *,
    score: Scorer | None = None,
) -> tuple[PretrainResult, MemoryAttempt]:
    attempt = MemoryAttempt(folder)
    return pretrain(config, stream or CountingStream(), attempt, score=score), attempt


def told(attempt: MemoryAttempt) -> list[tuple[int, str, str]]:
    return [(event["step"], event["detector"], event["action"]) for event in attempt.events]


def losses(attempt: MemoryAttempt) -> list[float]:
    return [metrics["loss"] for _, metrics in attempt.rows if "loss" in metrics]


def accuracy(model: CognateV1) -> tuple[float, int]:
    """Return the share of right next tokens over 100 rows that are not trained on."""
    tokens = torch.cat([CountingStream().row(20_000 + index) for index in range(100)])
    with torch.no_grad():
        found = model.logits(model(tokens[:, :-1]).hidden_BTD).argmax(-1)
    return float((found == tokens[:, 1:]).double().mean()), len(tokens)


class InfiniteGradient:
    """Makes the gradient of the next backward pass infinite: a finite loss, as an overflow in a kernel would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._armed = False
        monkeypatch.setattr(losses_module, "summed_cross_entropy", self._poisoned)

    def arm(self, run: PretrainingRun) -> None:
        self._armed = True

    def _poisoned(self, model: CognateV1, found: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        mean, losses_X = summed_cross_entropy(model, found)
        if self._armed:
            mean.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
            self._armed = False
        return mean, losses_X


@pytest.mark.parametrize("limits", [LIMITS, RecoveryLimits()])
def test_a_healthy_run_is_left_alone(limits: RecoveryLimits, tmp_path: Path) -> None:
    """Memory carried, validated and scored, 200 steps of learning: no detector says a word."""
    config = dataclasses.replace(RUN, total_steps=200, recovery=limits)
    result, attempt = train(tmp_path, config, CountingStream(packed=True, carried=True), score=accuracy)
    assert told(attempt) == []
    assert result.recovery == ()
    assert result.last_loss < result.first_loss - 1


def test_a_batch_with_an_infinite_gradient_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step passes without an update, the EMA starts anew with its ramp, and all losses after it are finite."""
    poison = InfiniteGradient(monkeypatch)
    before: dict[str, Any] = {}

    def remember(run: PretrainingRun) -> None:
        before["weights"] = run.model.head.weight.detach().clone()
        poison.arm(run)

    def compare(run: PretrainingRun) -> None:
        assert torch.equal(before["weights"], run.model.head.weight)
        assert run.optimizer.grokfast_lambda == 0
        assert all("slow_gradient" not in state for state in run.optimizer.state.values())

    sabotage(monkeypatch, {30: remember, 31: compare})
    result, attempt = train(tmp_path, dataclasses.replace(RUN, progress_interval_steps=1))
    assert told(attempt) == [(30, "not_finite", "skip_batch")]
    assert "gradient's norm is" in json.loads(attempt.events[0]["evidence"])["found"]
    assert attempt.events[0]["budget_left"] == BUDGET[Action.SKIP_BATCH] - 1
    assert json.loads(attempt.events[0]["after"]) == {"grokfast_lambda": 0}
    assert len(losses(attempt)) == 59, "the skipped step has no loss, and none is made up"
    assert result.last_loss < result.first_loss - 1


def test_an_ema_that_is_not_finite_ends_in_a_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has reached the weights when it is seen: skipping does not help, the good checkpoint does."""

    def poison(run: PretrainingRun) -> None:
        run.optimizer.state[run.model.head.weight]["slow_gradient"].fill_(math.nan)

    sabotage(monkeypatch, {36: poison})
    result, attempt = train(tmp_path)
    actions = [(detector, action) for _, detector, action in told(attempt)]
    assert actions == [("not_finite", "skip_batch"), ("not_finite", "skip_batch"), ("not_finite", "roll_back")]
    assert json.loads(attempt.events[-1]["after"]) == {"weights_of_step": 30, "learning_rate_factor": 0.5}
    assert math.isfinite(result.validation.loss)
    assert result.last_loss < result.first_loss - 1


def test_a_learning_rate_far_too_high_is_cut_and_the_run_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The loss trend is answered by a lower lambda, then by good weights at half the rate; it ends lower than else."""
    # A run as wild as this goes another way where sums are split among threads otherwise.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    monkeypatch.setattr(run_module, "MAX_PEAK_LR", 10.0)
    wild = dataclasses.replace(RUN, total_steps=120, warmup_steps=100, peak_lr=0.5)
    deaf = dataclasses.replace(wild, recovery=dataclasses.replace(LIMITS, loss_margin_nats=1e9, contents_multiple=1e9))
    helped, attempt = train(tmp_path / "a", wild)
    alone, silent = train(tmp_path / "b", deaf)
    assert "loss_trend" not in {detector for _, detector, _ in told(silent)}
    trend = [action for _, detector, action in told(attempt) if detector == "loss_trend"]
    assert trend[:2] == ["lower_lambda", "roll_back"]
    assert helped.last_loss < alone.last_loss - 0.5
    evidence = json.loads(attempt.events[0]["evidence"])
    assert evidence["mean_loss"] > evidence["best_mean_loss"] + LIMITS.loss_margin_nats


def test_a_stale_slow_gradient_lowers_lambda_which_returns_when_stable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EMA that points uphill and outweighs the gradient: lambda is lowered, and 2.0 again after 30 quiet steps."""

    def turn(run: PretrainingRun) -> None:
        for state in run.optimizer.state.values():
            state["slow_gradient"].mul_(-60)

    sabotage(monkeypatch, {32: turn})
    config = dataclasses.replace(RUN, total_steps=150, recovery=dataclasses.replace(LIMITS, loss_margin_nats=1e9))
    result, attempt = train(tmp_path, config)
    first, last = attempt.events[0], attempt.events[-1]
    assert (first["detector"], first["action"]) == ("slow_gradient", "lower_lambda")
    assert json.loads(first["evidence"])["smallest_ratio"] > 1
    assert json.loads(first["after"])["lambda_limit"] < json.loads(first["before"])["lambda_limit"] == 2.0
    assert last["action"] == "return"
    assert json.loads(last["after"])["lambda_limit"] == 2.0
    assert [departure.after for departure in result.lambda_departures][-1] == 2.0
    assert result.lambda_departures[0].after >= 0.5


def test_tokens_that_all_halt_at_once_get_their_spread_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior has no gradient there, so the halting unit starts anew; the prior's weight returns when stable."""

    def collapse(run: PretrainingRun) -> None:
        with torch.no_grad():
            run.model.halting.bias.fill_(12.0)

    sabotage(monkeypatch, {30: collapse})
    result, attempt = train(tmp_path, dataclasses.replace(RUN, total_steps=100, progress_interval_steps=1))
    assert told(attempt)[0][1:] == ("halting_collapse", "adjust_pondering")
    assert told(attempt)[-1][1:] == ("", "return")
    assert json.loads(attempt.events[0]["evidence"])["steps"] == 1
    assert json.loads(attempt.events[0]["after"])["ponder_weight"] == pytest.approx(0.2)
    assert json.loads(attempt.events[-1]["after"])["ponder_weight"] == pytest.approx(0.1)
    shares = [metrics["halting_histogram"][0] for _, metrics in attempt.rows if "halting_histogram" in metrics]
    assert max(shares[29:32]) == 1
    assert result.validation.halting_histogram[0] < 0.5


def test_tokens_that_never_halt_get_a_heavier_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens take the most steps; the prior has a gradient there, and twice the weight."""

    def saturate(run: PretrainingRun) -> None:
        with torch.no_grad():
            run.model.halting.bias.fill_(-5.0)

    sabotage(monkeypatch, {30: saturate})
    _, attempt = train(tmp_path)
    assert told(attempt)[0][1:] == ("halting_collapse", "adjust_pondering")
    assert json.loads(attempt.events[0]["evidence"])["steps"] == 4
    bias = (
        json.loads(attempt.events[0]["before"])["halting_bias"],
        json.loads(attempt.events[0]["after"])["halting_bias"],
    )
    assert bias[0] == bias[1] < -4


def test_memory_that_overflows_ends_in_a_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values a hundred times too large: the good weights write what they wrote before."""

    def inflate(run: PretrainingRun) -> None:
        with torch.no_grad():
            run.model.memory.write_value.weight.mul_(100)

    sabotage(monkeypatch, {32: inflate})
    _, attempt = train(tmp_path, dataclasses.replace(RUN, progress_interval_steps=1), CountingStream(endless=True))
    assert told(attempt) == [(32, "memory_overflow", "roll_back")]
    assert json.loads(attempt.events[0]["after"])["weights_of_step"] == 30
    rms = {step: metrics["memory_contents_rms"] for step, metrics in attempt.rows if "loss" in metrics}
    assert rms[32] > LIMITS.contents_multiple * rms[31]
    assert max(rms[step] for step in range(33, 61)) < 2 * rms[31]


def test_reads_that_all_go_to_one_slot_reset_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot stronger than all others together, for ever: the entropy of reads is near 0, then it is not."""
    config = dataclasses.replace(RUN, progress_interval_steps=2)

    def collapse(run: PretrainingRun) -> None:
        assert run.memory is not None
        run.memory.strength_BM[:, 0] = 1_000.0

    calm = dataclasses.replace(LIMITS, contents_multiple=1e9, loss_margin_nats=1e9, collapse_reports=1)
    sabotage(monkeypatch, {30: collapse})
    _, attempt = train(tmp_path, dataclasses.replace(config, recovery=calm), CountingStream(endless=True))
    assert (30, "read_collapse", "reset_memory") in told(attempt)
    entropy = {step: metrics["memory_read_entropy_nats"] for step, metrics in attempt.rows if "loss" in metrics}
    assert entropy[28] > 0.5 * math.log(6)
    assert entropy[30] < 0.1 * math.log(6)
    assert entropy[32] > entropy[30] + 0.2


def test_reasoning_that_is_lost_goes_back_to_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of right answers falls beyond chance between two validations, and is there again at the next."""
    scores: list[float] = []

    def score(model: CognateV1) -> tuple[float, int]:
        found = accuracy(model)
        scores.append(found[0])
        return found

    def confuse(run: PretrainingRun) -> None:
        with torch.no_grad():
            run.model.head.weight.copy_(-run.model.head.weight)

    sabotage(monkeypatch, {45: confuse})
    calm = dataclasses.replace(LIMITS, loss_margin_nats=1e9)
    _, attempt = train(tmp_path, dataclasses.replace(RUN, recovery=calm), score=score)
    assert told(attempt) == [(45, "reasoning_loss", "roll_back")]
    best, lost, again = scores[7], scores[8], scores[9]
    assert lost < best - 0.1
    assert again > lost + 0.1


def test_scores_wait_for_their_interval(tmp_path: Path) -> None:
    """The first validation at or after each multiple of it asks, those between do not."""
    asked: list[int] = []

    def score(model: CognateV1) -> tuple[float, int]:
        asked.append(1)
        return 0.0, 1

    config = dataclasses.replace(RUN, total_steps=20, validation_interval_steps=3, score_interval_steps=8)
    _, attempt = train(tmp_path, config, score=score)
    validated = [step for step, metrics in attempt.rows if "validation_loss" in metrics]
    assert validated == [3, 6, 9, 12, 15, 18, 20]
    assert len(asked) == 2  # after steps 9 and 18


def test_trouble_beyond_the_budget_fails_with_its_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite gradient every fourth step: ten batches are skipped, three roll-backs made, then it is over."""
    poison = InfiniteGradient(monkeypatch)
    sabotage(monkeypatch, dict.fromkeys(range(24, 200, 4), poison.arm))
    attempt = MemoryAttempt(tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"not_finite at step 76 .*gradient's norm.* 13 recovery actions"):
        pretrain(dataclasses.replace(RUN, total_steps=200), CountingStream(), attempt)
    assert [action for _, _, action in told(attempt)] == ["skip_batch"] * 10 + ["roll_back"] * 3
    assert attempt.events[-1]["budget_left"] == 0


@pytest.mark.parametrize("pauses", [(37,), (38, 41, 42), (43, 44, 45)])
def test_a_resumed_run_recovers_as_the_uninterrupted_one(
    pauses: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused before, between and after its recoveries, with only two checkpoints kept, it goes back to the same one."""

    def poison(run: PretrainingRun) -> None:
        run.optimizer.state[run.model.head.weight]["slow_gradient"].fill_(math.nan)

    sabotage(monkeypatch, {42: poison})
    config = dataclasses.replace(RUN, checkpoint_interval_steps=12)
    whole, attempt = train(tmp_path / "whole", config, CountingStream(packed=True, carried=True))
    assert told(attempt)[-1][1:] == ("not_finite", "roll_back")
    step = 0
    for pause in pauses:
        stopped = MemoryAttempt(tmp_path / "cut", stop=(pause - step + 1, StopKind.PAUSE))
        with pytest.raises(AttemptStopped):
            pretrain(config, CountingStream(packed=True, carried=True), stopped)
        step = stopped.saved[-1]
        assert step == pause
    resumed = pretrain(config, CountingStream(packed=True, carried=True), MemoryAttempt(tmp_path / "cut"))
    assert weights(resumed) == weights(whole)
    assert dataclasses.replace(resumed, model_dir=whole.model_dir) == whole


def test_noise_of_a_healthy_loss_is_no_trend() -> None:
    """Losses that fall by a nat in 10,000 steps and vary by 0.4, as measured with Cognate-25M: silent throughout."""
    limits, history = RecoveryLimits(), History()
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.4
    for step, offset in enumerate(noise.tolist()):
        history.add_loss(5 - step / 10_000 + offset, limits)
        assert DETECTORS[Detector.LOSS_TREND](history, limits) is None


def test_the_loss_of_the_stale_ema_is_a_trend() -> None:
    """From 6.6 to 8.5 nats within 15 steps, as docs/adr/0002 tells, then level: seen within 45 steps of its start."""
    limits, history = RecoveryLimits(), History()
    for _ in range(50):
        history.add_loss(6.6, limits)
    for step in range(45):
        history.add_loss(min(8.5, 6.6 + 1.9 * step / 15), limits)
    assert DETECTORS[Detector.LOSS_TREND](history, limits) is not None


def test_a_fall_within_chance_is_no_loss_of_reasoning() -> None:
    """Six fewer of a hundred right answers may be chance; of ten thousand they are not."""
    few, many = History(), History()
    for history, rows in ((few, 100), (many, 10_000)):
        history.add_validation(1.0, (0.26, rows))
        history.add_validation(1.0, (0.2, rows))
    look, limits = DETECTORS[Detector.REASONING_LOSS], RecoveryLimits()
    assert look(few, limits) is None
    assert look(many, limits) is not None


def test_a_matter_of_quality_is_left_to_the_gate_once() -> None:
    """When no action mends it the job goes on; the detector is not asked again before training is stable."""
    manager = CognateRecoveryManager(RecoveryLimits(warmup_steps=1, collapse_reports=1, stable_steps=50))
    collapsed = Measurement(
        halting_shares=(1.0, 0, 0, 0), slow_gradient_norm_ratio=0.3, read_entropy_share=0.9, contents_rms=1.0
    )
    actions: list[str] = []
    for step in range(1, 400):
        finding = manager.observe_step(step, 3.0, collapsed)
        if finding is not None:
            action = (*manager.choices(finding), Action.LEAVE_TO_GATE)[0]
            manager.record(finding, action, Change(before={}, after={}))
            actions.append(action)
        assert not manager.stable, "trouble that nothing mends is no stability"
    assert actions == [*LADDER[Detector.HALTING_COLLAPSE], Action.LEAVE_TO_GATE]


def test_state_survives_json() -> None:
    """What a checkpoint holds of the manager makes another one like it, before the first loss too."""
    fresh, used = CognateRecoveryManager(RecoveryLimits()), CognateRecoveryManager(RecoveryLimits())
    for step in range(1, 60):
        measurement = Measurement(
            halting_shares=(0.5, 0.5), slow_gradient_norm_ratio=None, read_entropy_share=0.5, contents_rms=1.0
        )
        used.observe_step(step, 4.0, measurement)
    used.observe_validation(4.0, (0.1, 50))
    used.record(
        Finding(detector=Detector.LOSS_TREND, evidence={"x": 1.0}), Action.LOWER_LAMBDA, Change(before={}, after={})
    )
    for manager in (fresh, used):
        other = CognateRecoveryManager(RecoveryLimits())
        other.load_state_dict(json.loads(json.dumps(manager.state_dict(), allow_nan=False)))
        assert other.state_dict() == manager.state_dict()
        assert other.events == manager.events


def test_weights_that_are_not_finite_are_never_good(tmp_path: Path) -> None:
    """A checkpoint of them holds the good one of before, so that there is a way back."""
    attempt = MemoryAttempt(tmp_path)
    run = PretrainingRun(RUN, CountingStream())
    for step in range(1, 11):
        outcome = run.train_step(measure=True)
        run.recovery.observe_step(
            step,
            outcome.loss,
            Measurement(
                halting_shares=(0.5, 0.5), slow_gradient_norm_ratio=0.3, read_entropy_share=0.9, contents_rms=1.0
            ),
        )
    run.save(attempt, planned=True)
    assert run.good is not None
    expected = row_losses(run.model, list(CountingStream().validation_batches())).mean
    with torch.no_grad():
        run.model.head.weight[0, 0] = math.nan
    for step in (11, 12, 13):
        run.step = step
        run.save(attempt, planned=True)
        assert run.good is not None
        assert run.good.step == 10
    run.go_back_to(run.good)
    assert row_losses(run.model, list(CountingStream().validation_batches())).mean == expected
