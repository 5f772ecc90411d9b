"""How much of a base model an agent trains: all of it, or low-rank updates (LoRA) of its linear layers.

The settings are free of torch; `peft` is imported only where LoRA is asked for, since its import takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cognateforge.exceptions import FieldViolation, IntegrityCheckFailedError

if TYPE_CHECKING:
    from torch import Tensor, nn

_MAX_RANK = 256  # the contract's bound
_MAX_DROPOUT = 0.9  # the contract's bound
# Merging adds B A to W once and in float32, where the adapter adds B (A x) to W x. On logits of about 10 the two orders
# of rounding differ by some 1e-5; ten times that is far below what a wrong scale or a lost layer does.
MERGE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates, W + (alpha / rank) B A. Source: Hu et al. 2021, arXiv:2106.09685.

    alpha: 0 means twice the rank.
    """

    rank: int = 8
    alpha: float = 0.0
    dropout: float = 0.0

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default filled in."""
        return self.alpha or 2.0 * self.rank


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Which parameters of the base are trained. The task head always is.

    lora: None trains every parameter of the base.
    unfreeze_act_ltm: train the halting unit and the long-term memory too. They are frozen otherwise, and they never
        get low-rank updates: unfrozen, they are trained as they are.
    """

    lora: Lora | None = None
    unfreeze_act_ltm: bool = False

    def violations(self, prefix: str) -> list[FieldViolation]:
        """Return what is wrong with the values, by field name."""
        if self.lora is None:
            return []
        rules = (
            ("rank", 1 <= self.lora.rank <= _MAX_RANK, f"must be 1 to {_MAX_RANK}"),
            ("alpha", 0 <= self.lora.alpha <= 1024, "must be 0 to 1024"),
            ("dropout", 0 <= self.lora.dropout <= _MAX_DROPOUT, f"must be 0 to {_MAX_DROPOUT}"),
        )
        return [
            FieldViolation(field=f"{prefix}lora.{field}", description=f"{rule}, not {getattr(self.lora, field)}")
            for field, holds, rule in rules
            if not holds
        ]


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters that are trained, and parameters in all, adapters included."""

    trainable: int
    total: int


def adapt(
    base: nn.Module,
    adaptation: Adaptation,
    *,
    linear_layers: Sequence[str],
    adaptive_prefixes: Iterable[str],
    unused_prefixes: Iterable[str],
    seed: int,
) -> None:
    """Set up a base in place: mark what is trained, and put adapters into `linear_layers` for LoRA.

    adaptive_prefixes: starts of the names of ACT's and LTM's parameters.
    unused_prefixes: starts of the names of parameters that the task never reads; they stay frozen.
    """
    adaptive, unused = tuple(adaptive_prefixes), tuple(unused_prefixes)
    for name, parameter in base.named_parameters():
        trained = adaptation.unfreeze_act_ltm if name.startswith(adaptive) else adaptation.lora is None
        parameter.requires_grad_(trained and not name.startswith(unused))
    if adaptation.lora is not None:
        _inject_lora(base, adaptation.lora, linear_layers, seed)


def _inject_lora(base: nn.Module, lora: Lora, linear_layers: Sequence[str], seed: int) -> None:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    trained_before = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    alpha: Any = lora.effective_alpha  # peft declares an int; it computes alpha / rank, which fractions suit as well
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=list(linear_layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, base)
    # peft freezes whatever is not an adapter.
    for name, parameter in base.named_parameters():
        if name in trained_before:
            parameter.requires_grad_(True)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return how many parameters a model has and trains."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(
        trainable=sum(size for size, trained in sizes if trained), total=sum(size for size, _ in sizes)
    )


def merge_lora(base: nn.Module) -> int:
    """Add every adapter to the weights of its layer, in place, and put the plain layer back; return how many."""
    adapted = [(name, module) for name, module in base.named_modules() if hasattr(module, "base_layer")]
    for name, module in adapted:
        module.merge(safe_merge=True)  # refuses weights that are not finite
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module.base_layer)
    return len(adapted)


def merge_checked(base: nn.Module, logits: Callable[[], Tensor]) -> float:
    """Merge the adapters and return the largest change of a logit, relative to the largest logit (1 at least).

    Errors: IntegrityCheckFailedError, when that is above MERGE_TOLERANCE.
    """
    adapted = logits()
    if merge_lora(base) == 0:
        return 0.0
    change = float((logits() - adapted).abs().max() / adapted.abs().max().clamp(min=1))
    if not change <= MERGE_TOLERANCE:  # a NaN fails too
        raise IntegrityCheckFailedError(
            f"merging the low-rank updates moved the logits by {change:.2e}, which is above {MERGE_TOLERANCE:.0e}"
        )
    return change
