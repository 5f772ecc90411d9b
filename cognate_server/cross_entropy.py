"""The head's cross-entropy, a piece of the batch at a time: the logits of all tokens never exist together."""

# X tokens that have a target, L tokens of a piece, D model width, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server import fused

# 128 rows of 15,616 float32 logits are 8 MB, which stay in a shared third-level cache between the operations on them.
# A GPU has no use for such small pieces; its products want thousands of rows.
CPU_PIECE = 128
GPU_PIECE = 4_096
# Rows whose gradients are multiplied with the hidden states together: each such product goes through the whole gradient
# of the weights, 32 MB, which cost a tenth of the head's time in bfloat16 when every piece had one of its own.
ROWS_TOGETHER = 1_024


class _HeadCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients as well, since they are made of the same probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_XD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_X: Tensor,
        log_own_X: Tensor,
        log_other_X: Tensor,
        embedded: fused.Embedded | None,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        kind = hidden_XD.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        with torch.autocast(kind, enabled=False):
            losses_X, *gradients = _losses_and_gradients(
                hidden_XD, weight_VD, bias_V, targets_X, (log_own_X.float(), log_other_X.float()), product, factor
            )
        ctx.factor = torch.tensor(factor)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_X)
        ctx.embedded = embedded
        return losses_X.sum(), losses_X

    @staticmethod
    def backward(
        ctx: Any, scale: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None, Tensor, Tensor, None, None]:
        hidden_XD, weight_VD, bias_V, own_X = ctx.saved_tensors
        rest = scale / ctx.factor
        if float(rest) != 1:
            # In place, as there is one pass: 32 MB less to fill. torch refuses a second one.
            weight_VD.mul_(rest)
        of_weight_VD: Tensor | None = weight_VD
        if ctx.embedded is not None:
            # The embedding adds its own part and returns the whole: 32 MB less to fill, and to add.
            ctx.embedded.add(weight_VD)
            of_weight_VD = None
        return hidden_XD * rest, of_weight_VD, bias_V * rest, None, -own_X * scale, (own_X - 1) * scale, None, None


def _losses_and_gradients(
    hidden_XD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_X: Tensor,
    mixture: tuple[Tensor, Tensor],
    product: torch.dtype,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return every loss, the gradients of so many times their sum, and the head's own share of each target's p."""
    on_cpu = hidden_XD.device.type == "cpu"
    compiled = on_cpu and weight_VD.dtype == torch.float32 and fused.is_available()
    piece = CPU_PIECE if on_cpu else GPU_PIECE
    together = max(piece, ROWS_TOGETHER)
    of_hidden_XD, of_weight_VD = torch.empty_like(hidden_XD), torch.empty_like(weight_VD)
    of_bias_V = torch.zeros_like(bias_V)
    losses_X = hidden_XD.new_empty(len(targets_X), dtype=torch.float32)
    owns_X = torch.empty_like(losses_X)
    hidden_XD, narrow_VD = hidden_XD.to(product), weight_VD.to(product)
    of_logits_XV = hidden_XD.new_empty(min(len(targets_X), together), len(weight_VD))
    wholes = (hidden_XD, targets_X, *mixture, of_hidden_XD, losses_X, owns_X)
    for number, rows in enumerate(zip(*(torch.split(whole, together) for whole in wholes), strict=True)):
        of_logits_RV = of_logits_XV[: len(rows[0])]
        if compiled:
            counted_RD = rows[0]
            of_bias_V += _compiled_group(rows, narrow_VD, bias_V, of_logits_RV, factor)
        else:
            counted_RD = torch.empty_like(rows[0])
            of_bias_V += _group(rows, narrow_VD, bias_V, of_logits_RV, counted_RD, piece, factor)
        _multiply(of_logits_RV.t(), counted_RD, of_weight_VD, add=number > 0)
    return losses_X, of_hidden_XD, of_weight_VD, of_bias_V, owns_X


def _compiled_group(
    rows: tuple[Tensor, ...], narrow_VD: Tensor, bias_V: Tensor, of_logits_RV: Tensor, factor: float
) -> Tensor:
    """Fill in what rows of the batch give, with one pass over the logits; return their part of the bias's gradient."""
    hidden_RD, targets_R, log_own_R, log_other_R, out_RD, losses_R, owns_R = rows
    torch.mm(hidden_RD, narrow_VD.t(), out=of_logits_RV)
    losses, owns, of_bias_V = fused.head_gradients(of_logits_RV, bias_V, targets_R, log_own_R, log_other_R, factor)
    losses_R.copy_(losses)
    owns_R.copy_(owns)
    _multiply(of_logits_RV, narrow_VD, out_RD, add=False)
    return of_bias_V


def _group(
    rows: tuple[Tensor, ...],
    narrow_VD: Tensor,
    bias_V: Tensor,
    of_logits_RV: Tensor,
    counted_RD: Tensor,
    piece: int,
    factor: float,
) -> Tensor:
    """Do the same in torch, a piece at a time.

    What is filled in lacks each row's factor, its target's share, which its hidden state has in `counted_RD`.
    """
    wide = of_logits_RV.dtype == torch.float32
    of_bias_V = torch.zeros_like(bias_V)
    pieces = zip(*(torch.split(part, piece) for part in (*rows, of_logits_RV, counted_RD)), strict=True)
    for hidden_LD, targets_L, log_own_L, log_other_L, out_LD, losses_L, owns_L, of_logits_LV, counted_LD in pieces:
        logits_LV = F.linear(hidden_LD, narrow_VD).float().add_(bias_V)
        log_p_LV = torch.log_softmax(logits_LV, -1, out=of_logits_LV if wide else None)
        places_L1 = targets_L.unsqueeze(1)
        log_part_L = log_own_L + log_p_LV.gather(1, places_L1).squeeze(1)
        log_whole_L = torch.logaddexp(log_part_L, log_other_L)
        torch.exp(log_part_L - log_whole_L, out=owns_L)
        torch.neg(log_whole_L, out=losses_L)
        # Of the sum of the head's own losses; a row of it counts as much as its target's probability is the head's.
        p_LV = log_p_LV.exp_().scatter_add_(1, places_L1, log_p_LV.new_full(places_L1.shape, -1.0))
        counts_L = owns_L * factor
        of_bias_V += counts_L @ p_LV
        if not wide:
            of_logits_LV.copy_(p_LV)
        counts_L1 = counts_L.unsqueeze(1)
        out_LD.copy_((of_logits_LV @ narrow_VD) * counts_L1)
        counted_LD.copy_(hidden_LD * counts_L1)
    return of_bias_V


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Put a product into a float32 result, or add it: sums in bfloat16 would lose what is small."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(add))
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)


def head_cross_entropy(
    hidden_XD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_X: Tensor,
    mixture: tuple[Tensor, Tensor] | None = None,
    *,
    embedded: fused.Embedded | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the sum of -log p(target) over all X tokens, differentiable once, and its parts without a gradient: (X,).

    p is softmax(hidden weight' + bias), or a mixture with another distribution: p(target) = exp(log_own) * softmax
    (...)[target] + exp(log_other). Under autocast the products run in its type, and everything else in float32, which
    is the results' type too.

    mixture: log_own_X and log_other_X, the head's part of the prediction and what the other one gives to the targets.
    embedded: where the weight's gradient is left for the embedding to return, whose output the hidden states rest on.
    factor: of the sum, of which the gradient is likely to be asked for; another one costs a pass over the weights.
    """
    if mixture is None:
        none_X = torch.zeros(targets_X.shape, device=hidden_XD.device)
        mixture = none_X, none_X - torch.inf
    total: Tensor
    losses_X: Tensor
    total, losses_X = _HeadCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_XD, weight_VD, bias_V, targets_X, *mixture, embedded, factor
    )
    return total, losses_X
