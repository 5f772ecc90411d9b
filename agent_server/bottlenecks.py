"""Bottleneck adapters: small two-layer maps behind the blocks of a frozen base."""

# D width of what a block gives, W width of the bottleneck.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The block's child, under a name that no block of transformers has.
_CHILD = "bottleneck_adapter"
# As in the source: near nothing, so that the first steps do not shake what lies behind.
_DOWN_STD = 0.01


class Bottleneck(nn.Module):
    """x + U gelu(D x + d) + u, for each position of (..., D). With U and u at zero, as they begin, it changes nothing.

    Source: Houlsby et al. 2019, arXiv:1902.00751, with one map for each block, behind its last residual sum.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)

    def reset(self, generator: torch.Generator) -> None:
        """Take the values that training begins with."""
        nn.init.normal_(self.down.weight, std=_DOWN_STD, generator=generator)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what the bottleneck adds."""
        added: Tensor = self.up(F.gelu(self.down(x)))
        return x + added


def install_bottlenecks(
    blocks: Sequence[nn.Module], width: int, *, features: int, generator: torch.Generator | None = None
) -> None:
    """Put a bottleneck behind every block, as its child; a width of 0 does nothing.

    A block keeps its class, its parameters' names, its call and what it returns: a tensor, or a tuple that begins with
    one. features: width of that tensor. generator: draws the first values; those of a loaded model are overwritten.
    """
    if not width:
        return
    for block in blocks:
        bottleneck = Bottleneck(features, width)
        bottleneck.reset(generator or torch.Generator())
        block.add_module(_CHILD, bottleneck)
        block.register_forward_hook(_behind)


def _behind(block: nn.Module, _inputs: Any, output: Any) -> Any:
    bottleneck: Bottleneck = getattr(block, _CHILD)
    if isinstance(output, Tensor):
        return bottleneck(output)
    if isinstance(output, tuple) and isinstance(output[0], Tensor):
        return (bottleneck(output[0]), *output[1:])
    raise TypeError(f"{type(block).__name__} gives {type(output).__name__}, where bottlenecks need a tensor first")


def bottlenecks(blocks: Sequence[nn.Module]) -> list[Bottleneck]:
    """Return the bottlenecks behind the blocks, in order."""
    found = (getattr(block, _CHILD, None) for block in blocks)
    return [bottleneck for bottleneck in found if isinstance(bottleneck, Bottleneck)]


def bottleneck_width(blocks: Sequence[nn.Module]) -> int:
    """Return the width of the bottlenecks behind the blocks, or 0: what `install_bottlenecks` needs to load a model."""
    return next((bottleneck.down.out_features for bottleneck in bottlenecks(blocks)), 0)


def is_bottleneck(name: str) -> bool:
    """Whether a parameter or layer of this full name belongs to a bottleneck."""
    return _CHILD in name.split(".")
