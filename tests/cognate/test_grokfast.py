"""The optimizer against the authors' published algorithm, and the promises of its docstring."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cognate_server.grokfast.optimizer as optimizer_module
from cognate_server.grokfast import (
    ALPHA,
    BETAS,
    EPSILON,
    LAMBDA,
    LAMBDA_FLOOR,
    MAX_GRADIENT_NORM,
    WEIGHT_DECAY,
    GrokFastAdamW,
    GrokFastDiverged,
    LambdaDeparture,
    native,
    parameter_groups,
)
from cognate_server.grokfast.foreach import ForeachUpdate
from cognate_server.grokfast.update import Update
from cognate_server.native import is_available

Use = Callable[[Update], None]
needs_numba = pytest.mark.skipif(not is_available(), reason="numba is not installed")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)
IMPLEMENTATIONS = [
    pytest.param(ForeachUpdate, id="foreach"),
    pytest.param(native.NativeUpdate, id="native", marks=needs_numba),
    pytest.param(lambda: ForeachUpdate(compiled=True), id="compiled", marks=[needs_compiler, pytest.mark.slow]),
]
LR = 1e-2
RAMP_STEPS = 4
SHAPES = ((7, 5), (5,), (3, 2, 2))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Let optimizers be built on a given implementation."""
    return lambda update: monkeypatch.setattr(optimizer_module, "choose", lambda device: update)


def make_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make_gradients(steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Gradients with a common part, some of them longer than the clip."""
    generator = torch.Generator().manual_seed(seed)
    slow = [torch.randn(shape, generator=generator) * 0.05 for shape in SHAPES]
    return [
        [part + torch.randn(part.shape, generator=generator) * (0.02 + 0.2 * (step % 2)) for part in slow]
        for step in range(steps)
    ]


def train(optimizer: GrokFastAdamW, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def reference(parameters: Sequence[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Clip, then algorithm 2 of arXiv:2405.20233 as the authors' loop has it, then AdamW, each as plain arithmetic."""
    values = [p.detach().double().clone() for p in parameters]
    grads: dict[int, Tensor] | None = None
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    for step, raw in enumerate(gradients):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in raw))
        clipped = [g.double() * min(1.0, MAX_GRADIENT_NORM / (norm + 1e-6)) for g in raw]
        lamb = LAMBDA * min(1.0, step / RAMP_STEPS)
        if grads is None:
            grads = {i: g.clone() for i, g in enumerate(clipped)}
        for i, value in enumerate(values):
            grads[i] = grads[i] * ALPHA + clipped[i] * (1 - ALPHA)
            g = clipped[i] + grads[i] * lamb
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
            mean = first[i] / (1 - BETAS[0] ** (step + 1))
            variance = second[i] / (1 - BETAS[1] ** (step + 1))
            values[i] = value * (1 - LR * WEIGHT_DECAY) - LR * mean / (variance.sqrt() + EPSILON)
    return values


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_updates_equal_the_published_algorithm(implementation: Callable[[], Update], use: Use) -> None:
    """Twelve steps over ramp and clip equal the plain loop, by every implementation that this machine has."""
    use(implementation())
    parameters, gradients = make_parameters(), make_gradients(12)
    expected = reference(parameters, gradients)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients)
    assert optimizer.implementations == (implementation().name,)
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_all_implementations_give_the_same_bits_on_a_cpu(implementation: Callable[[], Update], use: Use) -> None:
    """One definition, each operation rounded once: a run may change the implementation and keep its numbers."""
    ends = []
    for update in (ForeachUpdate(), implementation()):
        use(update)
        parameters = make_parameters()
        train(GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS), parameters, make_gradients(12))
        ends.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_numba
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces, not threads, decide every result and the order of every sum."""
    monkeypatch.setattr(native, "PIECE", 64)
    monkeypatch.setattr(native, "RUN", 2)
    native._pieces.cache_clear()
    before = torch.get_num_threads()
    ends = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            parameter = nn.Parameter(torch.linspace(-1, 1, 5_000))
            optimizer = GrokFastAdamW([parameter], lr=LR, ramp_steps=RAMP_STEPS)
            for step in range(5):
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
                optimizer.measure_next_step()
                optimizer.step()
            ends.append((parameter.detach(), optimizer.report))
    finally:
        torch.set_num_threads(before)
        native._pieces.cache_clear()
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_lambda_ramps_while_the_ema_already_runs() -> None:
    """0 at the first step, 2.0 after the ramp; the EMA starts as a copy of the first, clipped gradient."""
    parameters, gradients = make_parameters(), make_gradients(8)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    seen = []
    for step in gradients:
        train(optimizer, parameters, [step])
        assert optimizer.report is not None
        seen.append(optimizer.report.grokfast_lambda)
        if len(seen) == 1:
            clip = min(1.0, MAX_GRADIENT_NORM / (optimizer.report.gradient_norm + 1e-6))
            for parameter, gradient in zip(parameters, step, strict=True):
                assert torch.equal(optimizer.state[parameter]["slow_gradient"], gradient * clip)
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Saved after 5 of 12 steps and loaded with weights_only, it ends where the uninterrupted one ends."""
    gradients = make_gradients(12)
    whole = make_parameters()
    train(GrokFastAdamW(whole, lr=LR, ramp_steps=RAMP_STEPS), whole, gradients)

    parameters = make_parameters()
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients[:5])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(resumed, parameters, gradients[5:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, whole, strict=True))


def test_the_ema_stays_float32_through_a_checkpoint() -> None:
    """torch would cast it to the parameter's type on load; its bits are kept instead."""
    parameters = [nn.Parameter(p.detach().to(torch.bfloat16)) for p in make_parameters()]
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, [[g.to(torch.bfloat16) for g in step] for step in make_gradients(3)])
    before = [optimizer.state[p]["slow_gradient"].clone() for p in parameters]
    resumed = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    resumed.load_state_dict(optimizer.state_dict())
    after = [resumed.state[p]["slow_gradient"] for p in parameters]
    assert [h.dtype for h in after] == [torch.float32] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """One bad number would poison the EMA for good, so the step is refused before anything is written."""
    parameters, gradients = make_parameters(), make_gradients(3)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients[:2])
    before = [p.detach().clone() for p in parameters]
    slow_before = [optimizer.state[p]["slow_gradient"].clone() for p in parameters]
    gradients[2][1][0] = bad
    with pytest.raises(GrokFastDiverged, match="nothing was updated"):
        train(optimizer, parameters, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    slow_after = [optimizer.state[p]["slow_gradient"] for p in parameters]
    assert all(torch.equal(a, b) for a, b in zip(slow_after, slow_before, strict=True))


def test_a_parameter_unfrozen_later_starts_its_own_ema() -> None:
    """Its first gradient, not another's step count, starts h."""
    parameters, gradients = make_parameters(), make_gradients(4)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    for step in gradients:
        for parameter, gradient in zip(parameters[:2], step[:2], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    late = torch.full(SHAPES[2], 0.01)
    for parameter in parameters:
        parameter.grad = None
    parameters[2].grad = late.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[parameters[2]]["slow_gradient"], late)


def test_telemetry_equals_its_definition() -> None:
    """Cosine and norm ratio of the EMA before the step and the clipped gradient; absent where there is no EMA."""
    parameters, gradients = make_parameters(), make_gradients(6)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    optimizer.measure_next_step()
    train(optimizer, parameters, gradients[:1])
    assert optimizer.report is not None
    assert optimizer.report.slow_gradient_cosine is None
    train(optimizer, parameters, gradients[1:5])
    slow = torch.cat([optimizer.state[p]["slow_gradient"].flatten() for p in parameters])
    raw = torch.cat([g.flatten() for g in gradients[5]])
    clipped = raw * min(1.0, MAX_GRADIENT_NORM / float(raw.norm() + 1e-6))
    optimizer.measure_next_step()
    train(optimizer, parameters, gradients[5:])
    report = optimizer.report
    assert report.gradient_norm == pytest.approx(float(raw.norm()), rel=1e-5)
    assert report.slow_gradient_norm_ratio == pytest.approx(float(slow.norm() / clipped.norm()), rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(slow, clipped, dim=0))
    assert report.slow_gradient_cosine == pytest.approx(cosine, abs=1e-5)


def test_telemetry_of_independent_gradients_is_what_theory_says() -> None:
    """|EMA| / |g| is about sqrt((1 - alpha) / (1 + alpha)) = 0.1005, and the cosine about 0."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(20_000))
    optimizer = GrokFastAdamW([parameter], lr=LR, ramp_steps=RAMP_STEPS)
    for step in range(400):
        parameter.grad = torch.randn(20_000, generator=generator) * 1e-3
        if step == 399:
            optimizer.measure_next_step()
        optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.slow_gradient_norm_ratio == pytest.approx(0.1005, abs=0.003)
    assert optimizer.report.slow_gradient_cosine == pytest.approx(0, abs=0.03)


def test_lambda_can_only_be_lowered_within_bounds_and_every_time_is_kept() -> None:
    """Each lowering is a departure that a checkpoint carries; raising and going below the floor are refused."""
    parameters, gradients = make_parameters(), make_gradients(6)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients)
    departure = optimizer.lower_lambda(1.0)
    assert departure == LambdaDeparture(step=6, before=LAMBDA, after=1.0, reason="lowered")
    assert optimizer.grokfast_lambda == 1.0
    for refused in (1.5, 1.0, LAMBDA_FLOOR / 2, math.nan):
        with pytest.raises(ValueError, match="may only be lowered"):
            optimizer.lower_lambda(refused)
    resumed = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    resumed.load_state_dict(optimizer.state_dict())
    assert (resumed.departures, resumed.grokfast_lambda) == ((departure,), 1.0)


def test_lambda_returns_to_the_mandated_value_as_a_departure() -> None:
    """In stages or at once, never above 2.0, and never without a record."""
    parameters, gradients = make_parameters(), make_gradients(6)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients)
    optimizer.lower_lambda(0.5)
    first, second = optimizer.restore_lambda(1.25), optimizer.restore_lambda()
    assert first == LambdaDeparture(step=6, before=0.5, after=1.25, reason="restored")
    assert second == LambdaDeparture(step=6, before=1.25, after=LAMBDA, reason="restored")
    assert (optimizer.grokfast_lambda, optimizer.departures[1:]) == (LAMBDA, (first, second))
    for refused in (2.5, LAMBDA, 1.0, math.nan):
        with pytest.raises(ValueError, match="may only be restored"):
            optimizer.restore_lambda(refused)


def test_a_reset_slow_gradient_starts_anew_and_ramps_again() -> None:
    """h becomes a copy of the next gradient, lambda goes up from 0, and AdamW's averages stay; a checkpoint agrees."""
    parameters, gradients = make_parameters(), make_gradients(10)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    train(optimizer, parameters, gradients[:6])
    means = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    departure = optimizer.reset_slow_gradient()
    assert departure == LambdaDeparture(step=6, before=LAMBDA, after=0.0, reason="slow gradient reset")
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(parameters, means, strict=True))
    resumed = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    resumed.load_state_dict(optimizer.state_dict())
    small = [[g * 1e-3 for g in step] for step in gradients[6:]]
    resumed.measure_next_step()
    train(resumed, parameters, small[:1])
    assert resumed.report is not None
    assert resumed.report.slow_gradient_cosine is None
    assert all(torch.equal(resumed.state[p]["slow_gradient"], g) for p, g in zip(parameters, small[0], strict=True))
    lambdas = [resumed.report.grokfast_lambda]
    for step in small[1:]:
        train(resumed, parameters, [step])
        lambdas.append(resumed.report.grokfast_lambda)
    assert lambdas == [0.0, 0.5, 1.0, 1.5]


def test_after_a_reset_lambda_is_soon_where_a_long_ramp_stands() -> None:
    """A new EMA is trusted after a hundred steps, however long the plan is; before, the plan's own ramp holds."""
    optimizer = GrokFastAdamW(make_parameters(), lr=LR, ramp_steps=1_000)

    def lambda_after(steps: int) -> float:
        for group in optimizer.param_groups:
            group["finished_steps"] = steps
        return optimizer.grokfast_lambda

    assert [lambda_after(steps) for steps in (0, 100, 500)] == [0.0, 0.2, 1.0]
    optimizer.reset_slow_gradient()
    assert [lambda_after(steps) for steps in (500, 550, 600, 1_000)] == pytest.approx([0.0, 1.0, 1.2, 2.0])


def test_gradients_are_read_and_never_written() -> None:
    """Whoever holds a gradient, as DDP's buckets do, still holds the raw one after the step."""
    parameters, gradients = make_parameters(), make_gradients(1)
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    for parameter, gradient in zip(parameters, gradients[0], strict=True):
        parameter.grad = gradient.clone()
    held = [p.grad for p in parameters]
    optimizer.step()
    assert all(p.grad is h for p, h in zip(parameters, held, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients[0], strict=True) if p.grad is not None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_bfloat16_parameters_have_float32_state_and_are_rounded_once(
    implementation: Callable[[], Update], use: Use
) -> None:
    """A step equals that of a float32 copy of the same values, rounded to nearest at its end."""
    use(implementation())
    parameters = [nn.Parameter(p.detach().bfloat16()) for p in make_parameters()]
    wide = [nn.Parameter(p.detach().float()) for p in parameters]
    gradients = [[g.bfloat16() for g in step] for step in make_gradients(1)]
    narrow_optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    wide_optimizer = GrokFastAdamW(wide, lr=LR, ramp_steps=RAMP_STEPS)
    train(narrow_optimizer, parameters, gradients)
    train(wide_optimizer, wide, [[g.float() for g in step] for step in gradients])
    for narrow, whole in zip(parameters, wide, strict=True):
        assert torch.equal(narrow, whole.bfloat16())
        for name in ("slow_gradient", "exp_avg", "exp_avg_sq"):
            assert torch.equal(narrow_optimizer.state[narrow][name], wide_optimizer.state[whole][name])


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_gradient_scaler_changes_nothing_but_the_scale(unscale_first: bool) -> None:
    """Scaled by a power of two and unscaled by whomever, 6 steps give the bits of the unscaled ones."""
    plain, scaled, gradients = make_parameters(), make_parameters(), make_gradients(6)
    train(GrokFastAdamW(plain, lr=LR, ramp_steps=RAMP_STEPS), plain, gradients)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = GrokFastAdamW(scaled, lr=LR, ramp_steps=RAMP_STEPS)
    for step in gradients:
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(scaled, step, strict=True))
        scaler.scale(loss).backward()  # type: ignore[arg-type, no-untyped-call]
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_a_gradient_scaler_that_found_infinity_changes_nothing() -> None:
    """The step is left out as with torch's own optimizers, and the scale goes down."""
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = GrokFastAdamW(parameters, lr=LR, ramp_steps=RAMP_STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameters[0].sum() * math.inf).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert (len(optimizer.state), optimizer.grokfast_lambda, optimizer.report) == (0, 0.0, None)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_parameters_of_any_layout_are_updated_in_place() -> None:
    """A transposed parameter, a gradient with another layout and a scalar give what plain ones give."""
    gradients = [[torch.arange(12.0).view(3, 4) / 20, torch.tensor(0.1)] for _ in range(3)]
    plain = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.tensor(1.0))]
    turned = [nn.Parameter(torch.ones(4, 3).T), nn.Parameter(torch.tensor(1.0))]
    train(GrokFastAdamW(plain, lr=LR, ramp_steps=RAMP_STEPS), plain, gradients)
    train(GrokFastAdamW(turned, lr=LR, ramp_steps=RAMP_STEPS), turned, gradients)
    assert not turned[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(plain, turned, strict=True))


@needs_numba
def test_a_slow_gradient_that_has_faded_becomes_zero() -> None:
    """Denormal numbers, which slow some processors down, do not stay in the state."""
    parameter = nn.Parameter(torch.ones(40))
    optimizer = GrokFastAdamW([parameter], lr=LR, ramp_steps=1)
    parameter.grad = torch.full((40,), 1e-37)
    optimizer.step()
    parameter.grad = torch.zeros(40)
    for _ in range(200):
        optimizer.step()
    assert 0 == int(torch.count_nonzero(optimizer.state[parameter]["slow_gradient"]))


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    """The message names the remedy."""
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2).to_sparse()
    optimizer = GrokFastAdamW([parameter], lr=LR, ramp_steps=1)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3, 2))


def test_the_implementation_is_chosen_by_what_is_declared_and_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With numba native, without it foreach; a run that went on with another one says so, in its checkpoint too."""
    parameters, gradients = make_parameters(), make_gradients(2)
    monkeypatch.setattr("cognate_server.native.is_available", lambda: False)
    plain = GrokFastAdamW(parameters, lr=LR, ramp_steps=1)
    train(plain, parameters, gradients)
    assert plain.implementations == ("foreach",)
    monkeypatch.setattr("cognate_server.native.is_available", lambda: True)
    resumed = GrokFastAdamW(parameters, lr=LR, ramp_steps=1)
    resumed.load_state_dict(plain.state_dict())
    assert resumed.implementations == ("foreach", "native")
    assert resumed.state_dict()["param_groups"][0]["implementations"] == ["foreach", "native"]


def test_grokfast_cannot_be_configured() -> None:
    """There is no argument for alpha or lambda, and none for leaving the filter out."""
    for name in ("alpha", "lamb", "lambda_limit", "enabled", "betas"):
        with pytest.raises(TypeError, match=name):
            GrokFastAdamW(make_parameters(), lr=LR, ramp_steps=1, **{name: 0.5})


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("ramp_steps", 0)])
def test_a_wrong_setting_is_named(field: str, value: float) -> None:
    """The message says which one."""
    settings: dict[str, Any] = {"lr": LR, "ramp_steps": 1, field: value}
    with pytest.raises(ValueError, match=field):
        GrokFastAdamW(make_parameters(), **settings)


def test_only_weights_of_linear_maps_and_embeddings_decay() -> None:
    """Norm scales, biases and frozen parameters do not."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    decayed, plain = parameter_groups(model)
    assert [p.shape for p in decayed["params"]] == [(4, 3), (2, 3)]
    assert len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (WEIGHT_DECAY, 0.0)
