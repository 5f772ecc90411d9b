"""The update with torch's operations: as they stand anywhere, or compiled to kernels of one pass on a GPU.

The compiled form has been run on a CPU only; on CUDA it is written, not measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cognate_server.grokfast.update import Share

# A number, or a tensor without dimensions on the same device.
Scalar: TypeAlias = Any


def is_compiler_available() -> bool:
    """Say whether torch can compile for CUDA here."""
    return importlib.util.find_spec("triton") is not None


def amplify(x: list[Tensor], slow: list[Tensor], alpha: Scalar, rest: Scalar, lamb: Scalar) -> None:
    """Run GrokFast's filter in place: h <- alpha * h + rest * x, then x <- x + lamb * h; rest is 1 - alpha."""
    torch._foreach_mul_(slow, alpha)
    torch._foreach_add_(slow, torch._foreach_mul(x, rest))
    torch._foreach_add_(x, torch._foreach_mul(slow, lamb))


def _update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    slow: list[Tensor],
    mean: list[Tensor],
    mean_square: list[Tensor],
    numbers: list[Tensor],
    round_roots: bool,
) -> None:
    """Run the arithmetic of `update` on float32 tensors; numbers are zero-dimensional, so that none is compiled in.

    round_roots: torch's single sqrt on a CPU is off by one bit now and then; by way of float64 it is not.
    """
    scale, alpha, rest, lamb, beta1, rest1, beta2, rest2, shrink, size, root, eps = numbers
    x = list(torch._foreach_mul(gradients, scale))
    amplify(x, slow, alpha, rest, lamb)
    torch._foreach_mul_(mean, beta1)
    torch._foreach_add_(mean, torch._foreach_mul(x, rest1))
    torch._foreach_mul_(x, x)
    torch._foreach_mul_(x, rest2)
    torch._foreach_mul_(mean_square, beta2)
    torch._foreach_add_(mean_square, x)
    if round_roots:
        divisor = [square.double().sqrt().float() for square in mean_square]
    else:
        divisor = list(torch._foreach_sqrt(mean_square))
    torch._foreach_mul_(divisor, root)
    torch._foreach_add_(divisor, eps)
    change = torch._foreach_div(mean, divisor)
    torch._foreach_mul_(change, size)
    torch._foreach_mul_(parameters, shrink)
    torch._foreach_sub_(parameters, change)


class ForeachUpdate:
    """Torch's foreach operations, optionally compiled."""

    def __init__(self, *, compiled: bool = False) -> None:
        self.name = "compiled" if compiled else "foreach"
        # fullgraph: what cannot be compiled is an error, not a silent way back to single operations.
        self._run = torch.compile(_update, fullgraph=True, dynamic=False) if compiled else _update

    def squares(self, gradients: Sequence[Tensor]) -> float:
        """See Update."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        return float(torch.stack(norms).square().sum()) if norms else 0.0

    def states_like(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """See Update."""

        def zeros(parameter: Tensor) -> Tensor:
            return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)

        return [(zeros(p), zeros(p), zeros(p)) for p in parameters]

    def apply(self, shares: Sequence[Share], *, measure: bool) -> list[tuple[float, float]]:
        """See Update."""
        products = [_products(share) for share in shares] if measure else []
        for share in shares:
            parameters = [parameter.float() for parameter in share.parameters]
            numbers = torch.tensor(share.factors.numbers(), dtype=torch.float32).to(parameters[0].device)
            self._run(
                parameters,
                [gradient.float() for gradient in share.gradients],
                list(share.slow),
                list(share.mean),
                list(share.mean_square),
                list(numbers.unbind()),
                self.name == "foreach" and numbers.device.type == "cpu",
            )
            for parameter, computed in zip(share.parameters, parameters, strict=True):
                if computed is not parameter:
                    parameter.copy_(computed)
        return products


def _products(share: Share) -> tuple[float, float]:
    scale = share.factors.scale
    along, squares = 0.0, 0.0
    for slow, gradient in zip(share.slow, share.gradients, strict=True):
        h = slow.double()
        along += float((h * (gradient.float() * scale)).sum())
        squares += float(h.square().sum())
    return along, squares
