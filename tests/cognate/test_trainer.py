"""Pretraining with a small model: bitwise resume, stopping, metrics and the loss's parts."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cognate_server import losses
from cognate_server.construct import CognateModelConstructor
from cognate_server.losses import Predictions, ponder_divergence, summed_cross_entropy, sums, truncated_geometric
from cognate_server.metrics import METRICS, checked
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from cognate_server.trainer import (
    CheckpointMismatchError,
    TrainingDivergedError,
    learning_rate,
    pretrain,
)
from cognate_server.validation import unigram_loss, validate
from tests.cognate._support import CONFIG, TINY, CountingStream, MemoryAttempt, weights
from training_common.attempt import AttemptStopped, StopKind
from training_common.models.cognate_v1 import (
    CognateOutput,
    CognateV1,
    config_from_json,
    load_state,
)


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("pause_at", [0, 3, 5, 9, 12])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    pause_at: int, precision: Precision, tmp_path: Path
) -> None:
    """Model, optimizer, EMA, carried memory, data position and the reported loss curve all go on as they were."""
    config = dataclasses.replace(CONFIG, precision=precision)
    whole = pretrain(config, CountingStream(packed=True, carried=True), MemoryAttempt(tmp_path / "whole"))
    stopped = MemoryAttempt(tmp_path / "cut", stop=(pause_at + 1, StopKind.PAUSE))
    with pytest.raises(AttemptStopped) as caught:
        pretrain(config, CountingStream(packed=True, carried=True), stopped)
    assert caught.value.kind is StopKind.PAUSE
    assert stopped.saved[-1] == pause_at
    resumed = pretrain(config, CountingStream(packed=True, carried=True), MemoryAttempt(tmp_path / "cut"))
    assert weights(resumed) == weights(whole)
    assert dataclasses.replace(resumed, model_dir=whole.model_dir) == whole


@pytest.mark.parametrize("kind", [StopKind.CANCEL, StopKind.REVOKED])
def test_cancel_and_revocation_write_nothing_more(kind: StopKind, tmp_path: Path) -> None:
    """The last checkpoint is the planned one of before; no model folder appears."""
    attempt = MemoryAttempt(tmp_path, stop=(9, kind))
    with pytest.raises(AttemptStopped) as caught:
        pretrain(CONFIG, CountingStream(), attempt)
    assert caught.value.kind is kind
    assert attempt.saved == [5]
    assert not (tmp_path / "final").exists()


def test_training_learns_and_leaves_a_model_that_loads(tmp_path: Path) -> None:
    """The loss falls, checkpoints come when planned and at the end, and the folder holds what was validated."""
    attempt = MemoryAttempt(tmp_path)
    result = pretrain(CONFIG, CountingStream(), attempt)
    assert attempt.saved == [5, 10, 12]
    assert result.step == 12
    assert result.last_loss < result.first_loss
    model = CognateV1(config_from_json(json.loads((result.model_dir / "config.json").read_text())))
    load_state(model, result.model_dir / "model.safetensors")
    batches = list(CountingStream().validation_batches())
    cut = [batches[0], Batch(tokens=batches[1].tokens[:1])]
    assert validate(model, cut, CountingStream().unigram_counts()) == result.validation
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_errors_of_the_gains_are_those_of_single_rows() -> None:
    """The standard error of a mean over rows, here from rows that are validated one by one."""
    counts = CountingStream().unigram_counts()
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=counts)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        model.memory.head_gate.bias.fill_(1.0)
    batches = list(CountingStream().validation_batches())
    together = validate(model, batches, counts)
    alone = [validate(model, [Batch(tokens=row[None])], counts) for batch in batches for row in batch.tokens]
    for error, gains in (
        (together.memory_gain_error, [one.loss_memory_off - one.loss for one in alone]),
        (together.pondering_gain_error, [one.loss_one_step - one.loss for one in alone]),
    ):
        assert error > 1e-6
        assert error == pytest.approx(statistics.stdev(gains) / math.sqrt(len(gains)), rel=1e-3)
    assert alone[0].memory_gain_error == pytest.approx(abs(alone[0].loss_memory_off - alone[0].loss))


def test_progress_carries_defined_finite_metrics(tmp_path: Path) -> None:
    """Every number has a definition; what is measured at the end only is absent before."""
    attempt = MemoryAttempt(tmp_path)
    # Fast enough for both to learn: an acceleration is reported of what has learnt something.
    fast = dataclasses.replace(CONFIG, control_rates=(1.0,), peak_lr=1e-2)
    result = pretrain(fast, CountingStream(), attempt)
    assert [step for step, _ in attempt.rows] == [1, 4, 8, 12, 12]
    # Reasoning is measured by the worker, on the model's files.
    in_training = {name for name in METRICS if not name.endswith(("_exact_match", "_f1"))}
    assert set().union(*(metrics for _, metrics in attempt.rows)) == in_training
    first, later, last = attempt.rows[0][1], attempt.rows[1][1], attempt.rows[-1][1]
    assert "slow_gradient_cosine" not in first, "there is no EMA before the first step"
    assert "slow_gradient_cosine" in later
    assert "validation_loss" not in later
    assert last["validation_loss"] == result.validation.loss
    assert first["grokfast_lambda"] == 0
    assert attempt.rows[-2][1]["grokfast_lambda"] == pytest.approx(2 * 11 / 100), "the ramp outlasts a short warm-up"
    assert sum(later["halting_histogram"]) == pytest.approx(1)
    assert later["compute_saved_ratio"] == pytest.approx(1 - later["mean_ponder_steps"] / TINY.max_steps)


def test_a_metric_without_definition_or_value_is_refused() -> None:
    """A misspelt name or a NaN is an error here, not a gap on a dashboard; None is left out."""
    assert checked({"loss": 1.0, "validation_loss": None}) == {"loss": 1.0}
    with pytest.raises(ValueError, match="los is not a metric"):
        checked({"los": 1.0})
    with pytest.raises(ValueError, match="loss must be finite"):
        checked({"loss": math.nan})


def test_validation_between_is_reported_when_asked_for(tmp_path: Path) -> None:
    """At every interval before the end, and it changes nothing in the weights."""
    attempt = MemoryAttempt(tmp_path / "a")
    result = pretrain(dataclasses.replace(CONFIG, validation_interval_steps=6), CountingStream(), attempt)
    assert [step for step, metrics in attempt.rows if "validation_loss" in metrics] == [6, 12]
    assert weights(result) == weights(pretrain(CONFIG, CountingStream(), MemoryAttempt(tmp_path / "b")))


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    """Going on under another learning rate would be another run; another progress interval is the same run."""
    with pytest.raises(AttemptStopped):
        pretrain(CONFIG, CountingStream(), MemoryAttempt(tmp_path, stop=(4, StopKind.PAUSE)))
    with pytest.raises(CheckpointMismatchError, match="step 3"):
        pretrain(dataclasses.replace(CONFIG, peak_lr=2e-3), CountingStream(), MemoryAttempt(tmp_path))
    pretrain(dataclasses.replace(CONFIG, progress_interval_steps=6), CountingStream(), MemoryAttempt(tmp_path))


def test_a_loss_that_is_never_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are skipped; the error names the step that none was left for, and no checkpoint is written."""

    def nan(model: CognateV1, found: Predictions) -> tuple[Tensor, Tensor]:
        mean, losses_X = summed_cross_entropy(model, found)
        return mean * math.nan, losses_X

    monkeypatch.setattr(losses, "summed_cross_entropy", nan)
    attempt = MemoryAttempt(tmp_path)
    with pytest.raises(
        TrainingDivergedError, match=r"not_finite at step 3 .*loss of step 3 is nan.* 2 recovery actions"
    ):
        pretrain(CONFIG, CountingStream(), attempt)
    assert attempt.saved == []


def test_a_gradient_that_is_never_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss can have an infinite gradient; the optimizer refuses it."""

    def explosive(model: CognateV1, found: Predictions) -> tuple[Tensor, Tensor]:
        mean, losses_X = summed_cross_entropy(model, found)
        mean.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return mean, losses_X

    monkeypatch.setattr(losses, "summed_cross_entropy", explosive)
    with pytest.raises(TrainingDivergedError, match="the gradient's norm is"):
        pretrain(CONFIG, CountingStream(), MemoryAttempt(tmp_path))


def test_targets_across_documents_and_padding_are_not_trained_on() -> None:
    """The unigram loss, and with it every loss, is over the targets that stay within a document."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1]])
    counts = torch.full((40,), 0.0)
    counts[[2, 3, 5]] = torch.tensor([1e9, 2e9, 5e9])
    loss = unigram_loss([Batch(tokens=tokens, segment_ids=segment_ids)], counts)
    assert loss == pytest.approx(-math.log(1 / 8 * 2 / 8 * 5 / 8) / 3, abs=1e-5), "targets 2, 3 and 5"


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    """Linear to the peak over the warm-up, cosine to its tenth at the end."""
    config = dataclasses.replace(CONFIG, total_steps=103, warmup_steps=3, peak_lr=2e-3)
    assert [learning_rate(config, step) for step in (0, 1, 2)] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    assert learning_rate(config, 3) == pytest.approx(2e-3)
    assert learning_rate(config, 53) == pytest.approx(1.1e-3)
    assert learning_rate(config, 103) == pytest.approx(2e-4)


def test_the_ponder_prior_is_geometric_with_mean_two() -> None:
    """Equal ratios of neighbours, and the mean after truncation is the one asked for."""
    prior = truncated_geometric(4, 2.0)
    ratios = prior[1:] / prior[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(3))
    assert float((prior * torch.arange(1, 5)).sum()) == pytest.approx(2.0)


def test_ponder_divergence_ignores_padding_and_vanishes_at_the_prior() -> None:
    """KL of the mean over real tokens: zero where that is the prior, by arithmetic elsewhere."""
    prior = truncated_geometric(4, 2.0)

    def divergence(*rows: Tensor) -> float:
        output = CognateOutput(
            hidden_BTD=torch.zeros(1, 3, 1),
            recall=None,
            halting_BTN=torch.stack([*rows, torch.zeros(4)]).unsqueeze(0),
            steps_BT=torch.tensor([[1, 2, 0]]),
            memory=CognateV1(TINY).memory.start(1),
            memory_statistics=None,
        )
        found = Predictions(output, torch.zeros(1, 1), None, torch.zeros(1), torch.tensor([[True, False, False]]))
        of = sums(found, torch.zeros(()), torch.zeros(1))
        return float(ponder_divergence(of.halting_N / of.tokens, prior.double()))

    assert divergence(prior, prior) == pytest.approx(0, abs=1e-6)
    one, two = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    expected = sum(0.5 * math.log(0.5 / float(prior[n])) for n in (0, 1))
    assert divergence(one, two) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_steps", 0),
        ("batch_tokens", 40),
        ("sequence_length", 0),
        ("peak_lr", 2e-2),
        ("warmup_steps", 13),
        ("checkpoint_interval_steps", 0),
        ("progress_interval_steps", -1),
        ("validation_rows", 0),
        ("validation_interval_steps", 0),
        ("seed", -1),
    ],
)
def test_a_config_error_names_its_field(name: str, value: float) -> None:
    """The operator learns which field to change."""
    change: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"^{name} must"):
        dataclasses.replace(CONFIG, **change)


def test_a_stream_of_another_shape_is_refused(tmp_path: Path) -> None:
    """The message has both shapes."""
    config = dataclasses.replace(CONFIG, batch_tokens=64)
    with pytest.raises(ValueError, match=r"\(2, 17\), the config asks for \(4, 17\)"):
        pretrain(config, CountingStream(), MemoryAttempt(tmp_path))
