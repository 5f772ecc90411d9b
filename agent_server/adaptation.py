"""How much of a base model an agent trains, and by what: every parameter, or little that is put beside frozen ones.

    full        every parameter of the base
    lora        low-rank updates of its linear layers; weight_decomposed: of their directions, beside magnitudes (DoRA)
    head        nothing of the base
    freezing    its last blocks
    bottleneck  small two-layer maps behind its blocks

The task head is trained in every case. The settings are free of torch; `peft` is imported only where low-rank updates
are asked for, since its import takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cognateforge.exceptions import FieldViolation, IncompatibleError, IntegrityCheckFailedError

if TYPE_CHECKING:
    from torch import Tensor, nn

# The contract's bounds.
_MAX_RANK = 256
_MAX_DROPOUT = 0.9
_MAX_BLOCKS = 1024
_MAX_WIDTH = 4096
# Merging adds B A to W once and in float32, where the adapter adds B (A x) to W x. On logits of about 10 the two orders
# of rounding differ by some 1e-5; ten times that is far below what a wrong scale or a lost layer does.
MERGE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates, W + (alpha / rank) B A. Source: Hu et al. 2021, arXiv:2106.09685.

    alpha: 0 means twice the rank.
    weight_decomposed: m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, with a trained magnitude m for each output
        and its norm. Source: Liu et al. 2024, arXiv:2402.09353.
    """

    rank: int = 8
    alpha: float = 0.0
    dropout: float = 0.0
    weight_decomposed: bool = False

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default filled in."""
        return self.alpha or 2.0 * self.rank


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """All of the base is frozen but its last `trained_blocks` blocks."""

    trained_blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Maps x + U gelu(D x) behind every block; `width` is D's output. Source: Houlsby et al. 2019, arXiv:1902.00751."""

    width: int = 32


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Which parameters of the base are trained. The task head always is.

    lora, head, freezing, bottleneck: at most one of them; none trains every parameter of the base.
    unfreeze_act_ltm: train the halting unit and the long-term memory too. They are frozen otherwise, and they never
        get low-rank updates: unfrozen, they are trained as they are.
    """

    lora: Lora | None = None
    head: bool = False
    freezing: Freezing | None = None
    bottleneck: Bottleneck | None = None
    unfreeze_act_ltm: bool = False

    @property
    def method(self) -> str:
        """Name of the method, as the contract's field has it."""
        return next(iter(self._asked()), "full")

    def _asked(self) -> list[str]:
        return [name for name in ("lora", "head", "freezing", "bottleneck") if getattr(self, name)]

    def violations(self, prefix: str) -> list[FieldViolation]:
        """Return what is wrong with the values, by field name."""
        rules: list[tuple[str, bool, str, object]] = []
        asked = self._asked()
        if len(asked) > 1:
            rules.append(("method", False, "must be one method", " and ".join(asked)))
        if (lora := self.lora) is not None:
            rules += [
                ("lora.rank", 1 <= lora.rank <= _MAX_RANK, f"must be 1 to {_MAX_RANK}", lora.rank),
                ("lora.alpha", 0 <= lora.alpha <= 1024, "must be 0 to 1024", lora.alpha),
                ("lora.dropout", 0 <= lora.dropout <= _MAX_DROPOUT, f"must be 0 to {_MAX_DROPOUT}", lora.dropout),
            ]
        if (freezing := self.freezing) is not None:
            blocks = freezing.trained_blocks
            rules.append(("freezing.trained_blocks", 1 <= blocks <= _MAX_BLOCKS, f"must be 1 to {_MAX_BLOCKS}", blocks))
        if (bottleneck := self.bottleneck) is not None:
            width = bottleneck.width
            rules.append(("bottleneck.width", 1 <= width <= _MAX_WIDTH, f"must be 1 to {_MAX_WIDTH}", width))
        return [
            FieldViolation(field=f"{prefix}{field}", description=f"{rule}, not {value}")
            for field, holds, rule, value in rules
            if not holds
        ]

    def describe(self) -> str:
        """Return the method in a few words, for people."""
        if (lora := self.lora) is not None:
            kind = "DoRA" if lora.weight_decomposed else "LoRA"
            return f"{kind} of rank {lora.rank}, alpha {lora.effective_alpha:g}"
        if self.freezing is not None:
            count = self.freezing.trained_blocks
            return "the last block" if count == 1 else f"the last {count} blocks"
        if self.bottleneck is not None:
            return f"bottlenecks of width {self.bottleneck.width} behind every block"
        return "the task head alone" if self.head else "full"


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters that are trained, and parameters in all, adapters included."""

    trainable: int
    total: int


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """The parameters of a base, to count those of an adapted one without building it.

    total: in all. unused: that no task reads. adaptive: of ACT and LTM.
    linear_inputs, linear_outputs: of the layers that get low-rank updates, summed up.
    blocks: of each block, in order. features: width of what a block gives.
    """

    total: int
    unused: int = 0
    adaptive: int = 0
    linear_inputs: int = 0
    linear_outputs: int = 0
    blocks: Sequence[int] = ()
    features: int = 0

    def adapted(self, adaptation: Adaptation) -> ParameterCount:
        """Return the parameters of the adapted base, without a task head."""
        added = trained = 0
        if adaptation.lora is not None:
            added = adaptation.lora.rank * (self.linear_inputs + self.linear_outputs)
            added += self.linear_outputs if adaptation.lora.weight_decomposed else 0
        elif adaptation.bottleneck is not None:
            width = adaptation.bottleneck.width
            added = len(self.blocks) * (2 * self.features * width + width + self.features)
        elif adaptation.freezing is not None:
            trained = sum(self.blocks[-adaptation.freezing.trained_blocks :])
        elif not adaptation.head:
            trained = self.total - self.unused - self.adaptive
        if adaptation.unfreeze_act_ltm:
            trained += self.adaptive
        return ParameterCount(trainable=trained + added, total=self.total + added)


def adapt(
    base: nn.Module,
    adaptation: Adaptation,
    *,
    linear_layers: Sequence[str],
    blocks: Sequence[nn.Module] = (),
    features: int = 0,
    adaptive_prefixes: Iterable[str] = (),
    unused_prefixes: Iterable[str] = (),
    seed: int,
) -> None:
    """Set up a base in place: mark what is trained, and put in what the method adds.

    linear_layers: full names of those that get low-rank updates.
    blocks: in the order of the forward pass, which may run them several times; embeddings stand before them, the rest
        behind. features: width of what they give.
    adaptive_prefixes: starts of the names of ACT's and LTM's parameters.
    unused_prefixes: starts of the names of parameters that the task never reads; they stay frozen.
    Errors: IncompatibleError, where the base has not what the method needs.
    """
    adaptive, unused = tuple(adaptive_prefixes), tuple(unused_prefixes)
    chosen = _chosen(base, adaptation, blocks)
    for name, parameter in base.named_parameters():
        trained = adaptation.unfreeze_act_ltm if name.startswith(adaptive) else id(parameter) in chosen
        parameter.requires_grad_(trained and not name.startswith(unused))
    if adaptation.lora is not None:
        _inject_lora(base, adaptation.lora, linear_layers, seed)
    if adaptation.bottleneck is not None:
        _add_bottlenecks(adaptation.bottleneck, blocks, features, seed)


def _chosen(base: nn.Module, adaptation: Adaptation, blocks: Sequence[nn.Module]) -> set[int]:
    """Return the identities of the base's own parameters that are trained, adaptive ones aside."""
    if adaptation.method == "full":
        return {id(parameter) for parameter in base.parameters()}
    if adaptation.freezing is None:
        return set()
    count = adaptation.freezing.trained_blocks
    if count > len(blocks):
        raise IncompatibleError(
            f"adaptation.freezing.trained_blocks is {count} and the base has {len(blocks)} blocks; ask for no more"
        )
    return {id(parameter) for block in blocks[-count:] for parameter in block.parameters()}


def _inject_lora(base: nn.Module, lora: Lora, linear_layers: Sequence[str], seed: int) -> None:
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    from agent_server.bottlenecks import is_bottleneck

    layers = [name for name in linear_layers if not is_bottleneck(name)]
    if not layers:
        raise IncompatibleError("adaptation.lora needs linear layers in the base's blocks, and there are none")
    trained_before = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    alpha: Any = lora.effective_alpha  # peft declares an int; it computes alpha / rank, which fractions suit as well
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.weight_decomposed,
        # A pattern is held against whole names; peft takes a list's entries for their ends.
        target_modules="|".join(map(re.escape, layers)),
        # GPT-2 keeps its weights the other way round, in a class of transformers' own.
        fan_in_fan_out=not any(isinstance(base.get_submodule(name), nn.Linear) for name in layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, base)
    # peft freezes whatever is not an adapter.
    for name, parameter in base.named_parameters():
        if name in trained_before:
            parameter.requires_grad_(True)


def _add_bottlenecks(bottleneck: Bottleneck, blocks: Sequence[nn.Module], features: int, seed: int) -> None:
    import torch

    from agent_server.bottlenecks import bottleneck_width, bottlenecks, install_bottlenecks

    if not blocks or not features:
        raise IncompatibleError("adaptation.bottleneck needs blocks to stand behind, and the architecture names none")
    present = bottleneck_width(blocks)
    if present and present != bottleneck.width:
        raise IncompatibleError(
            f"adaptation.bottleneck.width is {bottleneck.width}, and the agent to go on with has bottlenecks of width "
            f"{present}; ask for these, or for another method"
        )
    if not present:
        generator = torch.Generator().manual_seed(seed)
        install_bottlenecks(blocks, bottleneck.width, features=features, generator=generator)
    for module in bottlenecks(blocks):
        module.requires_grad_(True)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return how many parameters a model has and trains."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(
        trainable=sum(size for size, trained in sizes if trained), total=sum(size for size, _ in sizes)
    )


def merge_lora(base: nn.Module) -> int:
    """Add every low-rank update to the weights of its layer, in place, and put the plain layer back; return how many.

    Bottlenecks stay: between their two maps stands an activation.
    """
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
