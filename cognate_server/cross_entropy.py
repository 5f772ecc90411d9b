"""The head's cross-entropy, a piece of the batch at a time: the logits of all tokens never exist together."""

# X tokens that have a target, L tokens of a piece, D model width, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# 128 rows of 15,616 float32 logits are 8 MB, which stay in a shared third-level cache between the operations on them.
# A GPU has no use for such small pieces; its products want thousands of rows.
CPU_PIECE = 128
GPU_PIECE = 4_096


class _HeadCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients as well, since they are made of the same probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden_XD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_X: Tensor) -> Tensor:
        kind = hidden_XD.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        with torch.autocast(kind, enabled=False):
            total, *gradients = _sum_and_gradients(hidden_XD, weight_VD, bias_V, targets_X, product)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden_XD, weight_VD, bias_V = ctx.saved_tensors
        return hidden_XD * scale, weight_VD * scale, bias_V * scale, None


def _sum_and_gradients(
    hidden_XD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_X: Tensor, product: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.zeros((), dtype=torch.float32, device=hidden_XD.device)
    of_hidden_XD = torch.empty_like(hidden_XD)
    of_weight_VD = torch.zeros_like(weight_VD)
    of_bias_V = torch.zeros_like(bias_V)
    weight_VD = weight_VD.to(product)
    piece = CPU_PIECE if hidden_XD.device.type == "cpu" else GPU_PIECE
    for hidden_LD, targets_L, out_LD in zip(
        *(torch.split(whole, piece) for whole in (hidden_XD.to(product), targets_X, of_hidden_XD)), strict=True
    ):
        logits_LV = F.linear(hidden_LD, weight_VD).float().add_(bias_V)
        log_p_LV = F.log_softmax(logits_LV, -1)
        places_L1 = targets_L.unsqueeze(1)
        total -= log_p_LV.gather(1, places_L1).sum()
        gradient_LV = log_p_LV.exp_().scatter_add_(1, places_L1, log_p_LV.new_full(places_L1.shape, -1.0))
        of_bias_V += gradient_LV.sum(0)
        narrow_LV = gradient_LV.to(product)
        out_LD.copy_(narrow_LV @ weight_VD)
        _accumulate(of_weight_VD, narrow_LV, hidden_LD)
    return total, of_hidden_XD, of_weight_VD, of_bias_V


def _accumulate(sum_VD: Tensor, gradient_LV: Tensor, hidden_LD: Tensor) -> None:
    """Add a piece's product in the sum's own precision: many pieces rounded to bfloat16 would lose the small ones."""
    if sum_VD.dtype == gradient_LV.dtype:
        sum_VD.addmm_(gradient_LV.t(), hidden_LD)
    else:
        sum_VD += gradient_LV.t() @ hidden_LD


def head_cross_entropy(hidden_XD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_X: Tensor) -> Tensor:
    """Return the sum of -log softmax(hidden weight' + bias)[target] over all X tokens, float32, differentiable once.

    Under autocast the products run in its type, and everything else in float32.
    """
    total: Tensor = _HeadCrossEntropy.apply(hidden_XD, weight_VD, bias_V, targets_X)  # type: ignore[no-untyped-call]
    return total
