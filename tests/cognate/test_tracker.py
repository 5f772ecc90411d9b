"""The progress tracker: FLOPs against torch's counter, rates over a span, and what validation is worth."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cognate_server.construct import CognateModelConstructor
from cognate_server.flops import peak_flops_per_s, step_flops
from cognate_server.tracker import CognateProgressTracker, StepOutcome, validation_metrics
from cognate_server.validation import ValidationReport
from training_common.models.cognate_v1 import CognateV1, CognateV1Config

CONFIG = CognateV1Config(
    vocabulary_size=400, width=64, heads=4, feed_forward_width=160, memory_slots=8, memory_chunk=16
)


def model() -> CognateV1:
    built = CognateModelConstructor(CONFIG).construct(CONFIG, seed=0, unigram_counts=torch.ones(400))
    with torch.no_grad():
        built.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return built


def outcome(built: CognateV1, tokens_BT: torch.Tensor) -> StepOutcome:
    output = built(tokens_BT)
    losses_BT = F.cross_entropy(built.logits(output.hidden_BTD).transpose(1, 2), tokens_BT, reduction="none")
    loss = output.recall.mixed_losses(losses_BT, tokens_BT).mean()
    loss.backward()
    return StepOutcome(
        loss=float(loss.detach()),
        divergence=0.0,
        allotment=0.0,
        targets=tokens_BT.numel(),
        rows=len(tokens_BT),
        taken_N=torch.bincount(output.steps_BT.reshape(-1), minlength=CONFIG.max_steps + 1),
        use=None,
        memory=output.memory,
    )


def core_steps(found: StepOutcome) -> int:
    return int(found.taken_N @ torch.arange(len(found.taken_N)))


@pytest.mark.parametrize("halting_bias", [-9.0, 9.0])
def test_step_flops_are_those_that_torch_counts(halting_bias: float) -> None:
    """All tokens taking the most steps, and all taking one. Torch counts the masked half of attention too."""
    built = model()
    with torch.no_grad():
        built.halting.bias.fill_(halting_bias)
    tokens_BT = torch.randint(0, 400, (3, 32), generator=torch.Generator().manual_seed(2))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = outcome(built, tokens_BT)
    steps = core_steps(found)
    assert steps == 96 * (4 if halting_bias < 0 else 1)
    masked = 3 * 2 * 64 * 31 * (3 * 96 + 2 * steps)  # 31 half-keys each in three outer blocks and two of the core
    expected = step_flops(CONFIG, rows=3, tokens=96, targets=96, core_steps=steps) + masked
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_rates_are_those_of_the_span_between_two_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in four seconds: half a step's tokens and FLOPs in each; without a span nothing is claimed."""
    now_s = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    found = outcome(model(), torch.zeros(1, 32, dtype=torch.int64))
    tracker = CognateProgressTracker(CONFIG, total_steps=10, batch_tokens=32, peak_flops_per_s=1e9)
    absent = tracker.step_metrics(found, None, step=0, learning_rate=1e-3)
    assert absent.keys() & {"tokens_per_s", "model_flops_per_s", "mfu_ratio", "seconds_left", "gradient_norm"} == set()
    for _ in range(2):
        tracker.count(found)
    now_s = 104.0
    metrics = tracker.step_metrics(found, None, step=2, learning_rate=1e-3)
    steps = core_steps(found)
    flops = step_flops(CONFIG, rows=1, tokens=32, targets=32, core_steps=steps)
    expected = {"tokens_per_s": 16, "seconds_left": 16, "model_flops_per_s": flops / 2, "mfu_ratio": flops / 2 / 1e9}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_utilization_is_absent_without_a_measured_peak() -> None:
    """A rate is reported, its share of an unknown peak is not."""
    found = outcome(model(), torch.zeros(1, 32, dtype=torch.int64))
    tracker = CognateProgressTracker(CONFIG, total_steps=10, batch_tokens=32)
    tracker.count(found)
    metrics = tracker.step_metrics(found, None, step=1, learning_rate=1e-3)
    assert "model_flops_per_s" in metrics
    assert "mfu_ratio" not in metrics


def test_the_peak_is_measured_and_leaves_the_random_state_alone() -> None:
    """A number above any scalar loop's, and a resumed run draws what it would have drawn."""
    state = torch.get_rng_state()
    peak_flops_per_s.cache_clear()
    assert peak_flops_per_s("cpu", torch.float32) > 1e8
    assert torch.equal(state, torch.get_rng_state())


def test_validation_reports_what_memory_and_pondering_are_worth() -> None:
    """Gains are differences of losses on the same rows, beside their standard errors."""
    report = ValidationReport(
        rows=4,
        tokens=100,
        loss=3.0,
        loss_memory_off=3.25,
        loss_one_step=2.75,
        memory_gain_error=0.1,
        pondering_gain_error=0.2,
        unigram_loss=5.0,
        mean_ponder_steps=2.0,
        halting_histogram=(0.5, 0.0, 0.5, 0.0),
    )
    expected = {
        "validation_loss": 3.0,
        "validation_loss_memory_off": 3.25,
        "validation_loss_one_step": 2.75,
        "memory_gain_nats": 0.25,
        "memory_gain_error_nats": 0.1,
        "pondering_gain_nats": -0.25,
        "pondering_gain_error_nats": 0.2,
    }
    assert expected == validation_metrics(report)
