"""The chunked cross-entropy against torch's own, and training steps whose products are in bfloat16."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server import cross_entropy
from cognate_server.cross_entropy import head_cross_entropy
from cognate_server.precision import Precision
from cognate_server.trainer import PretrainConfig, PretrainingRun
from tests.cognate._support import CONFIG, CountingStream


def problem(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weights, bias and targets."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_XD, weight_VD = (torch.randn(rows, 8, generator=generator) for rows in (tokens, 30))
    bias_V = torch.randn(30, generator=generator)
    for leaf in (hidden_XD, weight_VD, bias_V):
        leaf.requires_grad_()
    return hidden_XD, weight_VD, bias_V, torch.randint(0, 30, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [0, 1, 4, 7, 12])
def test_pieces_give_the_whole_cross_entropy_and_its_gradients(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pieces, a rest, and no token at all."""
    monkeypatch.setattr(cross_entropy, "CPU_PIECE", 4)
    hidden_XD, weight_VD, bias_V, targets_X = problem(tokens)
    leaves = (hidden_XD, weight_VD, bias_V)
    expected = F.cross_entropy(F.linear(hidden_XD, weight_VD, bias_V), targets_X, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, leaves)
    actual, losses_X = head_cross_entropy(hidden_XD, weight_VD, bias_V, targets_X)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(losses_X.sum(), expected)
    assert not losses_X.requires_grad
    for got, want in zip(torch.autograd.grad(3 * actual, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_mixture_s_losses_and_gradients_are_those_of_its_formula(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the head's weights and through both parts of the mixture; a part of nothing is no part."""
    monkeypatch.setattr(cross_entropy, "CPU_PIECE", 4)
    hidden_XD, weight_VD, bias_V, targets_X = problem(tokens)
    gate_X = torch.linspace(-2, 2, tokens).requires_grad_()
    hit_X = torch.linspace(-5, 0, tokens).requires_grad_()
    leaves = (hidden_XD, weight_VD, bias_V, gate_X, hit_X)

    def other_X() -> Tensor:
        nothing_X = torch.arange(tokens) % 3 == 2
        return (F.logsigmoid(gate_X) + hit_X).masked_fill(nothing_X, -1e4)

    log_p_X = F.linear(hidden_XD, weight_VD, bias_V).log_softmax(-1).gather(1, targets_X[:, None]).squeeze(1)
    expected_X = -((F.logsigmoid(-gate_X) + log_p_X).exp() + other_X().exp()).log()
    wanted = torch.autograd.grad(3 * expected_X.sum(), leaves)
    mixture = (F.logsigmoid(-gate_X), other_X())
    total, losses_X = head_cross_entropy(hidden_XD, weight_VD, bias_V, targets_X, mixture)
    torch.testing.assert_close(losses_X, expected_X.detach())
    for got, want in zip(torch.autograd.grad(3 * total, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_changes_the_products_alone() -> None:
    """The loss is within bfloat16's rounding, and loss and gradients are float32."""
    hidden_XD, weight_VD, bias_V, targets_X = problem(16)
    expected, _ = head_cross_entropy(hidden_XD, weight_VD, bias_V, targets_X)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = head_cross_entropy(hidden_XD, weight_VD, bias_V, targets_X)
    assert float(actual.detach()) != float(expected.detach())
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    assert {torch.float32} == {
        gradient.dtype for gradient in torch.autograd.grad(actual, (hidden_XD, weight_VD, bias_V))
    }


def gradient(config: PretrainConfig) -> Tensor:
    """Return the gradient of a step, flat; the head is filled, since behind zeros there is none."""
    run = PretrainingRun(config, CountingStream())
    with torch.no_grad():
        run.model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    run.backward(run.data.next_batch(), measure=False)
    return torch.cat([p.grad.reshape(-1) for p in run.model.parameters() if p.grad is not None])


def test_a_step_in_bfloat16_has_the_gradient_of_one_in_float32() -> None:
    """Rounding turns the gradient by less than a tenth of a right angle, and nothing is stored in bfloat16."""
    wide = gradient(CONFIG)
    narrow = gradient(dataclasses.replace(CONFIG, precision=Precision.BFLOAT16))
    assert torch.float32 == narrow.dtype
    assert not torch.equal(wide, narrow)
    assert float(F.cosine_similarity(wide, narrow, dim=0)) > 0.99
