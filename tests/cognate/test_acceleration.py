"""The learning-rate-matched control: a yardstick beside a run that changes none of its bits."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import cognate_server
from cognate_server import fused
from cognate_server.acceleration import AccelerationControl, _Control
from cognate_server.construct import CognateModelConstructor
from cognate_server.grokfast import parameter_groups
from cognate_server.losses import PONDER_WEIGHT, objective, truncated_geometric
from cognate_server.plan import with_defaults
from cognate_server.precision import Precision
from cognate_server.trainer import PretrainResult, pretrain
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.cognate._support import CONFIG, TINY, CountingStream, MemoryAttempt, weights
from training_common.attempt import AttemptStopped, StopKind

RUN = dataclasses.replace(
    CONFIG,
    total_steps=24,
    peak_lr=3e-3,
    checkpoint_interval_steps=6,
    validation_interval_steps=3,
    control_rates=(1.0, 3.0),
)
PRIOR = truncated_geometric(TINY.max_steps, 2.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PretrainResult:
    """A run that nothing cuts."""
    return pretrain(RUN, CountingStream(carried=True), MemoryAttempt(tmp_path_factory.mktemp("whole")))


def control(*rates: float) -> AccelerationControl:
    counts = CountingStream().unigram_counts()
    return AccelerationControl(
        TINY, seed=7, unigram_counts=counts, prior_N=PRIOR, rates=rates, precision=Precision.FLOAT32
    )


def test_a_control_changes_no_bit_of_the_model(tmp_path: Path) -> None:
    """The published weights are those of the run without it; both curves are reported and the factor follows."""
    attempt = MemoryAttempt(tmp_path / "a")
    result = pretrain(RUN, CountingStream(packed=True, carried=True), attempt)
    alone = pretrain(
        dataclasses.replace(RUN, control_rates=()),
        CountingStream(packed=True, carried=True),
        MemoryAttempt(tmp_path / "b"),
    )
    assert weights(result) == weights(alone)
    assert alone.acceleration is None
    report = result.acceleration
    assert report is not None
    curves = {
        name: [(step, metrics[metric]) for step, metrics in attempt.rows if metric in metrics]
        for name, metric in (("grokfast", "validation_loss"), ("control", "control_validation_loss"))
    }
    assert curves == {name: list(curve) for name, curve in report.curves.items()}
    assert [step for step, _ in curves["control"]] == list(range(3, 25, 3))
    assert report.target_loss == max(curves["grokfast"][-1][1], curves["control"][-1][1])
    assert attempt.rows[-1][1]["acceleration_factor"] == report.factor == report.control_steps / report.grokfast_steps
    assert sorted(path.name for path in result.model_dir.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("kind", "at"), [(StopKind.PAUSE, 14), (StopKind.REVOKED, 14), (StopKind.REVOKED, 12)])
def test_a_resumed_run_reports_the_same_acceleration(
    kind: StopKind, at: int, whole: PretrainResult, tmp_path: Path
) -> None:
    """Cut with and without a new checkpoint, and right after a validation: the curves have every point once."""
    with pytest.raises(AttemptStopped):
        pretrain(RUN, CountingStream(carried=True), MemoryAttempt(tmp_path / "cut", stop=(at + 1, kind)))
    resumed = pretrain(RUN, CountingStream(carried=True), MemoryAttempt(tmp_path / "cut"))
    assert resumed.acceleration == whole.acceleration
    assert weights(resumed) == weights(whole)


def test_the_control_is_clipped_adamw_and_nothing_else() -> None:
    """Five steps against torch's own parts, with GrokFast's betas and decay and the control's own rate."""
    stream = CountingStream()
    beside = control(2.0)
    model = CognateModelConstructor(TINY).construct(TINY, seed=7, unigram_counts=stream.unigram_counts())
    model.compute_with(fused.choose())
    plain = torch.optim.AdamW(parameter_groups(model), lr=2e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _ in range(5):
        batch = stream.next_batch()
        beside.train_step(batch, lr=1e-2)
        plain.zero_grad()
        found = objective(model, batch, None, PRIOR, ponder_weight=PONDER_WEIGHT, precision=Precision.FLOAT32)
        found.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
    trained = beside.state_dict()["controls"][0]["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, msg=name)


def test_the_factor_is_steps_to_the_worse_final_loss() -> None:
    """The control's lowest rate ends at 3.0 and GrokFast at 2.0: 3.0 is the target, reached at steps 20 and 40."""
    state = control(1.0).state_dict()
    beside = control(1.0)
    state["grokfast"] = [(10, 4.0), (20, 2.9), (30, 3.1), (40, 2.0)]
    state["control"] = [(10, 5.0), (20, 4.0), (30, 3.5), (40, 3.0)]
    beside.load_state_dict(state)
    report = beside.report(unigram_loss=5.5)
    assert report is not None
    assert (report.target_loss, report.grokfast_steps, report.control_steps, report.factor) == (3.0, 20, 40, 2.0)


def test_without_learning_there_is_no_factor() -> None:
    """A target that token frequencies alone reach says nothing about training."""
    beside = control(1.0)
    state = {**beside.state_dict(), "grokfast": [(10, 4.0)], "control": [(10, 5.0)]}
    beside.load_state_dict(state)
    assert beside.report(unigram_loss=5.0) is None
    assert beside.report(unigram_loss=5.1) is not None


def test_a_diverged_control_counts_no_longer() -> None:
    """The other rate's loss is the curve; when all have diverged the curve ends and there is no factor."""
    beside, stream = control(1.0, 3.0), CountingStream()
    batches = list(stream.validation_batches())

    def diverge(one: _Control) -> None:
        with torch.no_grad():
            one.model.head_bias_V.fill_(math.nan)
        beside.train_step(stream.next_batch(), lr=1e-3)

    diverge(beside._controls[1])
    left = beside.validate(1, 3.0, batches)
    assert left is not None
    assert math.isfinite(left)
    diverge(beside._controls[0])
    assert beside.validate(2, 3.0, batches) is None
    assert beside.report(unigram_loss=100.0) is None


def test_only_the_yardstick_uses_another_optimizer() -> None:
    """ADR 0002: no other module builds a torch optimizer, and this one has no way to write a model or to publish."""
    package = Path(cognate_server.__path__[0])
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "torch.optim" in path.read_text(encoding="utf-8")
    }
    assert users == {"grokfast/optimizer.py", "acceleration.py"}
    yardstick = (package / "acceleration.py").read_text(encoding="utf-8")
    assert [word for word in ("save_state", "safetensors", "artifacts", "Path", "open(") if word in yardstick] == []


def test_an_empty_list_of_rates_means_the_stated_ones() -> None:
    """Asked for without rates the control has three; not asked for it stays absent."""
    asked = pb.PretrainingPlan(total_steps=10, acceleration_control=pb.AccelerationControl())
    assert list(with_defaults(asked).acceleration_control.learning_rate_factors) == [1, 2, 3]
    assert not with_defaults(pb.PretrainingPlan(total_steps=10)).HasField("acceleration_control")


@pytest.mark.parametrize("rates", [(0.0,), (9.0,), (1.0,) * 5])
def test_rates_out_of_bounds_are_refused(rates: tuple[float, ...]) -> None:
    """The operator learns which field to change."""
    with pytest.raises(ValueError, match=r"^control_rates must"):
        dataclasses.replace(CONFIG, control_rates=rates)
