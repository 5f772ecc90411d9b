"""The compiled operations against torch's: values, gradients, and what they leave to torch."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server import cross_entropy, fused
from cognate_server.fused import operations
from cognate_server.losses import Objective, forward, objective, summed_cross_entropy, truncated_geometric
from cognate_server.native import threads as native_threads
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from tests.cognate.test_model import TINY, make_model, make_tokens
from training_common.models.cognate_v1 import CognateV1, Operations

pytestmark = pytest.mark.skipif(
    not fused.is_available(), reason="the kernels need numba, and a torch whose threads are GNU's"
)
PRIOR = truncated_geometric(TINY.max_steps, 2.0)
NOTHING: dict[str, Any] = {}


@pytest.fixture
def threads() -> Iterator[None]:
    """Set torch's threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of those kernels that were used."""
    used: set[str] = set()
    find = operations._kernel

    def note(name: str, kind: torch.dtype = torch.float32) -> int:
        used.add(name)
        return int(find(name, kind))

    monkeypatch.setattr(operations, "_kernel", note)
    return used


def spread(model: CognateV1) -> CognateV1:
    """Let tokens take different numbers of steps."""
    with torch.no_grad():
        model.halting.weight.normal_(0, 1.5, generator=torch.Generator().manual_seed(5))
    return model


def make_batch(length: int, *, segments: bool = False, padding: bool = False, carried: bool = False) -> Batch:
    """Three rows; documents that end within them, padding at the end of the second, two that go on."""
    tokens = make_tokens(3, length + 1, seed=3)
    ids = (torch.arange(length + 1) // 7 if segments else torch.zeros(length + 1, dtype=torch.int64)).repeat(3, 1)
    if padding:
        ids[1, length // 2 :] = -1
    fresh = torch.tensor([True, False, False]) if carried else None
    return Batch(tokens=tokens, segment_ids=ids if segments or padding else None, fresh_rows=fresh)


def learn(
    model: CognateV1, computing: Operations, batch: Batch, precision: Precision = Precision.FLOAT32
) -> tuple[Objective, dict[str, Tensor]]:
    """Return what training minimizes, and its gradients, all of it by these operations."""
    model.compute_with(computing)
    model.zero_grad()
    memory = None
    if batch.fresh_rows is not None:
        memory = make_model(seed=9)(batch.tokens[:, :16].flip(1)).memory.detach()
    with mock.patch.object(fused, "is_available", return_value=isinstance(computing, fused.FusedOperations)):
        found = objective(model, batch, memory, PRIOR, ponder_weight=0.1, precision=precision)
        found.total.backward()  # type: ignore[no-untyped-call]
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensors by their own size: the gradient of a sum is as exact as the sum's largest part."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((actual[name] - value).norm() / value.norm().clamp(min=1e-6))
        assert difference < tolerance, f"{name} differs by {difference:.1e} of its size"


@pytest.mark.parametrize(
    ("length", "kinds"),
    [
        pytest.param(16, NOTHING, id="plain"),
        pytest.param(16, {"segments": True}, id="documents"),
        pytest.param(16, {"padding": True}, id="padding"),
        pytest.param(24, {"segments": True, "padding": True}, id="both"),
        pytest.param(24, {"carried": True}, id="memory"),
        pytest.param(32, {"segments": True, "padding": True, "carried": True}, id="all-of-it"),
        pytest.param(21, NOTHING, id="a-chunk-that-is-not-full"),
        pytest.param(1, NOTHING, id="one-token"),
    ],
)
def test_a_step_has_the_values_and_gradients_of_torchs_operations(
    length: int, kinds: dict[str, bool], kernels: set[str]
) -> None:
    """Whatever the batch is made of, halted tokens included."""
    model, batch = spread(make_model()), make_batch(length, **kinds)
    expected, gradients = learn(model, Operations(), batch)
    assert not kernels
    actual, computed = learn(model, fused.FusedOperations(), batch)
    assert {"norm", "norm_back", "turn", "turn_back", "gated", "gated_back", "softmax", "softmax_back"} <= kernels
    assert {"by_token", "head"} <= kernels
    assert actual.taken_N.tolist() == expected.taken_N.tolist()
    if length > 1:
        assert (expected.taken_N[1:] > 0).sum() > 1, "tokens must halt at different steps for this test to see them"
    torch.testing.assert_close(actual.total, expected.total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.output.hidden_BTD, expected.output.hidden_BTD, rtol=1e-4, atol=1e-5)
    assert_near(computed, gradients, 1e-3)


def test_bfloat16_rounds_no_more_than_torchs_operations(kernels: set[str]) -> None:
    """Against float32. One step for all and no reads: a halting or a slot that flips says nothing of rounding."""
    model = make_model()
    tokens = make_tokens(3, 24)
    sought = torch.randn(3, 24, TINY.width, generator=torch.Generator().manual_seed(1))

    def gradients(computing: Operations, *, narrow: bool) -> dict[str, Tensor]:
        model.compute_with(computing)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            output = model(tokens, fixed_steps=3, read_memory=False)
        (output.hidden_BTD * sought).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients(Operations(), narrow=False)
    plain, compiled = gradients(Operations(), narrow=True), gradients(fused.FusedOperations(), narrow=True)
    assert kernels

    def errors(found: dict[str, Tensor]) -> Tensor:
        return torch.stack([(found[name] - value).norm() / value.norm() for name, value in exact.items()])

    assert 0 < errors(compiled).mean() < 1.25 * errors(plain).mean()
    assert errors(compiled).max() < 0.05


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, sums over rows too."""
    monkeypatch.setattr("cognate_server.native.threads.GRAIN", 1)
    generator = torch.Generator().manual_seed(2)
    x, g = (torch.randn(77, 96, generator=generator) for _ in range(2))
    scale, bias = (torch.randn(size, generator=generator) for size in (96, 50))
    logits = torch.randn(77, 50, generator=generator)
    targets, none = torch.randint(0, 50, (77,), generator=generator), torch.zeros(77)

    def compute() -> list[Tensor]:
        row, weight = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = fused.FusedOperations().normalize(row, weight)
        y.backward(g)  # type: ignore[no-untyped-call]
        changed = logits.clone()
        found = fused.head_gradients(changed, bias, targets, none, none - torch.inf)
        assert row.grad is not None
        assert weight.grad is not None
        return [y.detach(), row.grad, weight.grad, changed, *found]

    torch.set_num_threads(1)
    alone = compute()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(one, other) for one, other in zip(alone, compute(), strict=True))


def test_the_head_gives_each_logit_its_gradient() -> None:
    """Of plain cross-entropy, over logits that reach far beyond what a float32 exponential can hold."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(40, 70, generator=generator) * 60).requires_grad_()
    bias = torch.randn(70, generator=generator).requires_grad_()
    targets = torch.randint(0, 70, (40,), generator=generator)
    losses = F.cross_entropy(logits + bias, targets, reduction="none")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    changed, none = logits.detach().clone(), torch.zeros(40)
    found, own, of_bias = fused.head_gradients(changed, bias.detach(), targets, none, none - torch.inf)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(own, torch.ones(40))
    torch.testing.assert_close(changed, logits.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(of_bias, bias.grad, atol=1e-5, rtol=1e-5)


def test_the_head_takes_no_target_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of padding has none, and a large one is taken in groups whose gradients are added up."""
    monkeypatch.setattr(cross_entropy, "ROWS_TOGETHER", 40)
    generator = torch.Generator().manual_seed(6)
    weight, bias = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
    for rows in (0, 33, 97):
        hidden, targets = torch.randn(rows, 16, generator=generator), torch.randint(0, 50, (rows,), generator=generator)
        found: list[list[Tensor]] = []
        for available in (True, False):
            inputs = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
            with mock.patch.object(fused, "is_available", return_value=available):
                total, losses = cross_entropy.head_cross_entropy(inputs[0], inputs[1], inputs[2], targets)
                total.backward()  # type: ignore[no-untyped-call]
            found.append([total.detach(), losses, *(one.grad for one in inputs if one.grad is not None)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_sure_head_has_its_gradient_in_bfloat16_too() -> None:
    """Where p is nearly 1, bfloat16 has steps of 1/256, so p - 1 is rounded after the difference."""
    logits, none = torch.zeros(3, 50), torch.zeros(3)
    logits[:, 0] = torch.tensor([8.5, 10.5, 12.0])
    exact, narrow = logits.clone(), logits.to(torch.bfloat16)
    for one in (exact, narrow):
        fused.head_gradients(one, torch.zeros(50), torch.zeros(3, dtype=torch.int32), none, none - torch.inf)
    assert (exact[:, 0] < 0).all()
    torch.testing.assert_close(narrow.float(), exact, rtol=1 / 128, atol=1e-9)


def test_weights_are_told_apart_whatever_a_gradient_is_given_for_them() -> None:
    """What saved tensors are replaced by has other addresses, such as copies of a hook."""
    model = make_model()
    tokens, sought = make_tokens(2, 16), torch.randn(2, 16, TINY.width)

    def gradients(computing: Operations) -> dict[str, Tensor]:
        model.compute_with(computing)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            output = model(tokens, fixed_steps=3)
        (output.hidden_BTD * sought).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_near(gradients(fused.FusedOperations()), gradients(Operations()), 1e-3)


def test_two_losses_of_one_pass_add_up() -> None:
    """The tied table's gradient is left for the embedding by both."""
    model, batch = make_model(), make_batch(16)
    found: list[dict[str, Tensor]] = []
    for computing in (fused.FusedOperations(), Operations()):
        model.compute_with(computing)
        model.zero_grad()
        predictions = forward(model, batch, None)
        total = summed_cross_entropy(model, predictions)[0] + 2 * summed_cross_entropy(model, predictions)[0]
        total.backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_near(found[0], found[1], 1e-3)


def test_scales_of_other_types_are_left_to_torch(kernels: set[str]) -> None:
    """A kernel reads float32, one after the other."""
    x = torch.randn(4, 64)
    for scale in (torch.rand(64, dtype=torch.bfloat16), torch.rand(64, 2)[:, 0]):
        expected = Operations().normalize(x, scale)
        assert torch.equal(fused.FusedOperations().normalize(x, scale), expected)
    assert not kernels


def test_what_was_compiled_is_named_by_the_code_in_it() -> None:
    """A changed helper must not find the machine code of the one before: the compiler looks at one file only."""
    numba = pytest.importorskip("numba")
    from cognate_server.fused import kernels as loops
    from cognate_server.native import jit

    digest = hashlib.sha256(Path(jit.__file__).read_bytes()).hexdigest()[:12]
    loops.address("gated", "float32")
    folder = Path(loops.__file__).parent / "__pycache__"
    assert loops._gated_float32.__qualname__.endswith(f"_{digest}")
    assert loops.ROWS == operations._ROWS, "the caller makes room for the sums of so many rows"
    if not numba.config.CACHE_DIR and os.access(folder, os.W_OK):
        assert list(folder.glob(f"kernels._gated_float32_{digest}-*.nbi"))


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_that_is_no_token_is_refused(target: int) -> None:
    """Kernels write where they are told to: nothing outside of the row."""
    with pytest.raises(IndexError, match="targets must be within 0 and 49"):
        fused.head_gradients(*(torch.zeros(1, 50), torch.zeros(50), torch.tensor([target])), *torch.zeros(2, 1))
    with pytest.raises(IndexError):
        fused.FusedOperations().embed(torch.nn.Embedding(50, 4), torch.tensor([[target]]))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(wrong: float) -> None:
    """A run that diverges has to be seen: nowhere does a kernel turn NaN into a number."""
    model, batch = make_model(), make_batch(16)
    with torch.no_grad():
        model.get_parameter("prelude.0.feed_forward.down.weight")[0, 0] = wrong
    found, _ = learn(model, fused.FusedOperations(), batch)
    assert not found.total.isfinite()
    logits, none = torch.randn(3, 50), torch.zeros(3)
    logits[1, 7] = wrong
    losses, _, _ = fused.head_gradients(logits, torch.zeros(50), torch.tensor([1, 2, 3]), none, none - torch.inf)
    assert losses.isfinite().tolist() == [True, False, True]


def test_sigmoids_are_exact_far_from_zero() -> None:
    """silu(z) of very large and very small z, and its gradient: no overflow in between."""
    z = torch.tensor([-1e4, -100.0, -50.0, -1e-30, 0.0, 1e-30, 50.0, 100.0, 1e4])
    gate_up, expected = (torch.stack([z, torch.full_like(z, 2.0)], 1).requires_grad_() for _ in range(2))
    y = torch.empty(len(z), 1)
    native_threads.run(operations._kernel("gated"), 18, 9, 1, gate_up.data_ptr(), y.data_ptr())
    reference = F.silu(expected[:, :1]) * expected[:, 1:]
    reference.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(y, reference.detach(), rtol=1e-6, atol=1e-30)
    ones, found = torch.ones(len(z), 1), torch.empty(len(z), 2)
    addresses = (gate_up.data_ptr(), ones.data_ptr(), found.data_ptr())
    native_threads.run(operations._kernel("gated_back"), 18, 9, 1, *addresses)
    torch.testing.assert_close(found, expected.grad, rtol=1e-5, atol=1e-30)


def test_long_rows_are_left_to_torchs_attention(monkeypatch: pytest.MonkeyPatch, kernels: set[str]) -> None:
    """With the same result; norms are compiled still."""
    monkeypatch.setattr(operations, "LONGEST", 8)
    model, batch = spread(make_model()), make_batch(16)
    _, expected = learn(model, Operations(), batch)
    _, actual = learn(model, fused.FusedOperations(), batch)
    assert "norm" in kernels
    assert "turn" not in kernels
    assert_near(actual, expected, 1e-3)


def test_other_types_are_left_to_torch(kernels: set[str]) -> None:
    """float64 is what references compute in."""
    model = make_model().double()
    tokens = make_tokens(2, 16)
    expected = model(tokens).hidden_BTD
    model.compute_with(fused.FusedOperations())
    assert torch.equal(model(tokens).hidden_BTD, expected)
    assert not kernels


def test_nothing_is_compiled_where_torch_has_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then torch's own operations do it."""
    monkeypatch.setattr("cognate_server.native.threads._library", lambda: None)
    assert type(fused.choose()) is Operations
    assert not fused.is_available()
    monkeypatch.undo()
    monkeypatch.setattr("cognate_server.native.is_available", lambda: False)
    assert type(fused.choose()) is Operations


def test_operations_are_a_models_own() -> None:
    """Another model goes on with the frozen definitions."""
    model, other = make_model(), make_model()
    model.compute_with(fused.FusedOperations())

    def computing(one: CognateV1) -> set[str]:
        return {type(part).__name__ for module in one.modules() if (part := getattr(module, "operations", None))}

    assert computing(model) == {"FusedOperations"}
    assert computing(other) == {"Operations"}
