"""One GrokFast update as arithmetic, and what an implementation of it has to offer.

For every element, with the scalars of `Factors`, each operation rounded to float32 once:

    x <- scale * g
    h <- alpha * h + (1 - alpha) * x            (h <- x where h is fresh)
    x <- x + lamb * h
    m <- beta1 * m + (1 - beta1) * x
    v <- beta2 * v + (1 - beta2) * (x * x)
    p <- shrink * p - size * (m / (sqrt(v) * root + eps))

`scale` holds the clip and, under a gradient scaler, the unscaling, so gradients are read and never written. `native`
does this in one pass over memory on a CPU, `foreach` with torch's operations, and compiled from those on a GPU. On one
CPU all three give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The scalars of one update of one parameter.

    count: the number of this update, from 1.
    fresh: h is to become a copy of the scaled gradient.
    """

    scale: float
    alpha: float
    lamb: float
    lr: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    count: int
    fresh: bool

    def numbers(self) -> tuple[float, ...]:
        """Return what the arithmetic multiplies with, in the order of NUMBERS."""
        beta1, beta2 = self.betas
        alpha = 0.0 if self.fresh else self.alpha
        return (
            self.scale,
            alpha,
            1 - alpha,
            self.lamb,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            1 - self.lr * self.weight_decay,
            self.lr / (1 - beta1**self.count),
            1 / math.sqrt(1 - beta2**self.count),
            self.epsilon,
        )


NUMBERS = (
    "scale",
    "alpha",
    "one_minus_alpha",
    "lamb",
    "beta1",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "shrink",
    "size",
    "root",
    "eps",
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Parameters that are updated with the same factors: local tensors of one device, element for element.

    parameters, gradients: of any floating type; computed in float32 and rounded back once.
    slow, mean, mean_square: h, m and v, float32 and contiguous; a fresh h holds zeros.
    """

    factors: Factors
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    slow: Sequence[Tensor]
    mean: Sequence[Tensor]
    mean_square: Sequence[Tensor]


class Update(Protocol):
    """An implementation of the arithmetic."""

    @property
    def name(self) -> str:
        """What logs, manifests and checkpoints call it."""

    def squares(self, gradients: Sequence[Tensor]) -> float:
        """Return the sum of the squares, accumulated in float64."""

    def apply(self, shares: Sequence[Share], *, measure: bool) -> list[tuple[float, float]]:
        """Update the shares in place; with `measure`, return <h, x> and <h, h> of each, h being that before the update.

        x is the scaled gradient. Without `measure` the list is empty.
        """

    def states_like(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return h, m and v of zeros for each parameter, placed where this implementation reads fastest."""


def choose(device: torch.device) -> Update:
    """Return the implementation for parameters on a device, by what is declared to be there.

    One that is there and fails is an error, never a reason for the next.
    """
    from cognate_server import native
    from cognate_server.grokfast import foreach
    from cognate_server.grokfast.native import NativeUpdate

    if device.type == "cpu" and native.is_available():
        return NativeUpdate()
    if device.type == "cuda" and foreach.is_compiler_available():
        return foreach.ForeachUpdate(compiled=True)
    return foreach.ForeachUpdate()
