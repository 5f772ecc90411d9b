"""A Cognate's larger parts on a CPU: what lies between matrix products takes one pass over memory, both ways.

torch's single operations go through memory a dozen times for the gradient of one norm, and a processor that has just
streamed through it takes tens of microseconds for every call of Python. So a block is one function with its gradient,
loops are compiled, and sums of gradients are taken by the products themselves. Values and gradients are those of the
frozen model's own operations but for rounding.
"""

# A active tokens, B batch rows, T tokens of a row, D width, H heads, K width of a head, X rows of the batch times
# chunks of a row, M memory slots, V vocabulary, W width of a gate. Lines are heads of rows: (B * H, T, K).

from __future__ import annotations

import contextlib
import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cognate_server import native
from cognate_server.native import threads
from training_common.models.cognate_v1 import (
    NORM_EPSILON,
    Block,
    KeyValue,
    Layout,
    LongTermMemory,
    Operations,
    Readable,
)

# Tokens of a row up to which the weights of all queries and keys are kept for the gradient: 64 KB a head and row of
# 128, sixteen times as much of 512. Products of so few are faster than torch's attention, which keeps none.
LONGEST = 256
# Heads up to which the exponentials of all scores are within float32's range, without looking for the highest score.
WIDEST = 1_024
# Rows whose part of a vector's gradient is summed before it is added to the others', as in the kernels.
_ROWS = 32
# Numbers of a line of the caches, or more.
_LINE = 32
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def is_available() -> bool:
    """Say whether this installation has the kernels, for tensors on a CPU."""
    return native.is_available() and threads.is_available()


def choose() -> Operations:
    """Return the fastest operations that this installation has for tensors on a CPU."""
    return FusedOperations() if is_available() else Operations()


@functools.cache
def _kernel(name: str, kind: torch.dtype = torch.float32) -> int:
    """Return a kernel's address: compile it, or load what an earlier process has compiled."""
    from cognate_server.fused import kernels

    return kernels.address(name, _KINDS[kind])


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return where tensors begin; 0 for none."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _bits(number: float) -> int:
    """Return a float32 as a kernel's word."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


_EPSILON = _bits(NORM_EPSILON)


@functools.cache
def _ones(D: int) -> Tensor:
    return torch.ones(D, dtype=torch.float32, device="cpu")


def _product_type() -> torch.dtype:
    """Return the type of products: autocast's, or float32."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _without_autocast() -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def _empty(kind: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return tensors in one piece of memory, whose allocation takes as long as many a loop."""
    sizes = [math.prod(shape) for shape in shapes]
    # Each begins with a line of the caches.
    steps = [-(-size // _LINE) * _LINE for size in sizes]
    pieces = torch.split(torch.empty(sum(steps), dtype=kind), steps)
    return [piece[:size].view(shape) for piece, size, shape in zip(pieces, sizes, shapes, strict=True)]


# Norms


def _norm(x: Tensor, scale_D: Tensor | None, y: Tensor, inverses: Tensor) -> None:
    """Fill in the scaled rows, and the inverses of their root mean squares."""
    D = x.shape[-1]
    addresses = _addresses(x, _ones(D) if scale_D is None else scale_D, y, inverses)
    threads.run(_kernel("norm", x.dtype), x.numel(), inverses.numel(), D, _EPSILON, *addresses)


def _norm_back(
    x: Tensor, scale_D: Tensor | None, inverses: Tensor, g: Tensor, of_x: Tensor, *, beside: Tensor | None = None
) -> Tensor | None:
    """Fill in the gradient of x, added to what it has `beside`; return that of the scale, where there is one."""
    rows, D = inverses.numel(), x.shape[-1]
    of_scale = None if scale_D is None else torch.empty(-(-rows // _ROWS), D, dtype=torch.float32)
    scale = _ones(D) if scale_D is None else scale_D
    addresses = _addresses(x, scale, inverses, g, of_x, of_scale, beside)
    threads.run(_kernel("norm_back", x.dtype), x.numel(), rows, D, *addresses)
    return None if of_scale is None else of_scale.sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_D: Tensor | None) -> Tensor:
        x = x.contiguous()
        y, inverses = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        _norm(x, scale_D, y, inverses)
        ctx.save_for_backward(x, scale_D, inverses)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scale_D, inverses = ctx.saved_tensors
        of_x = torch.empty_like(x)
        return of_x, _norm_back(x, scale_D, inverses, g.contiguous(), of_x)


# Attention


def _places(layout: Layout) -> int:
    """Return where the active tokens' places are; 0 for all of them."""
    return 0 if layout.active_A is None else layout.active_A.data_ptr()


def _filled(layout: Layout, new: Tensor) -> Tensor:
    """Fill a tensor with zeros where not all of it is about to be written: halted tokens ask for nothing."""
    return new if layout.active_A is None else new.zero_()


def _to_heads(x_AD: Tensor, layout: Layout, lines: Tensor) -> None:
    """Bring active tokens to their heads and positions; lines may be those of rows or of chunks."""
    length, K = lines.shape[1:]
    x_AD = x_AD.float().contiguous()
    _filled(layout, lines)
    words = (len(x_AD), x_AD.shape[1] // K, K, 1, _places(layout), length, *_addresses(lines, x_AD))
    threads.run(_kernel("by_token"), x_AD.numel(), *words)


def _from_heads(lines: Tensor, layout: Layout, x_AD: Tensor) -> None:
    """Bring them back."""
    length, K = lines.shape[1:]
    words = (len(x_AD), x_AD.shape[1] // K, K, 0, _places(layout), length, *_addresses(lines, x_AD))
    threads.run(_kernel("by_token"), x_AD.numel(), *words)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    found: Tensor,
    *,
    heads: int,
    causal: bool,
    mask: Tensor | None = None,
) -> None:
    """Fill in the weights of queries and keys, which have a root mean square of 1, and what was found.

    query, key, value, found: lines, float32. weights: (lines, queries, keys). mask: bool, (rows, 1, queries, keys).
    """
    (lines, T, K), S = query.shape, key.shape[1]
    torch.bmm(query, key.mT, out=weights)
    mask = None if mask is None else mask.contiguous()
    # No scaled score is above the root of the heads' width.
    numbers = (lines // heads, heads, T, S, int(causal), _bits(K**-0.5), _bits(K**0.5 + 1))
    threads.run(_kernel("softmax"), weights.numel(), *numbers, *_addresses(weights, mask))
    torch.bmm(weights, value, out=found)


def _attend_back(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, g_found: Tensor, *, causal: bool
) -> list[Tensor]:
    """Return the gradients of queries, keys and values."""
    (lines, T, K), S = query.shape, key.shape[1]
    of_query, of_key, of_value, g_scores = _empty(query.dtype, query.shape, key.shape, key.shape, weights.shape)
    torch.bmm(g_found, value.mT, out=g_scores)
    words = (lines * T, T, S, int(causal), _bits(K**-0.5), *_addresses(weights, g_scores))
    threads.run(_kernel("softmax_back"), g_scores.numel(), *words)
    torch.bmm(g_scores, key, out=of_query)
    torch.bmm(g_scores.mT, query, out=of_key)
    torch.bmm(weights.mT, g_found, out=of_value)
    return [of_query, of_key, of_value]


# Blocks


@dataclass(frozen=True)
class _Weight:
    """One use of a weight, by the weight that the forward pass had: a gradient may be given another object for it."""

    key: int
    first: bool


class Shared:
    """What the uses of the same weights have in common during a forward pass and its gradient."""

    def __init__(self) -> None:
        self._weights: dict[int, Tensor] = {}  # which have to live as long as their keys
        self._narrow: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}

    def use(self, weight: Tensor) -> _Weight:
        """Tell one use from another."""
        first = id(weight) not in self._weights
        self._weights[id(weight)] = weight
        return _Weight(id(weight), first)

    def narrow(self, use: _Weight, weight: Tensor, kind: torch.dtype) -> Tensor:
        """Return a weight in the products' type."""
        if weight.dtype == kind:
            return weight
        if use.key not in self._narrow:
            self._narrow[use.key] = weight.to(kind)
        return self._narrow[use.key]

    def add(self, use: _Weight, kind: torch.dtype, g: Tensor, x: Tensor) -> Tensor | None:
        """Add one use's part of a weight's gradient, g' x; return all of it for the first use, whose turn is last."""
        sums = self._sums
        if use.key not in sums:
            sums[use.key] = (g.t() @ x).to(kind)
        elif g.dtype == kind:
            sums[use.key].addmm_(g.t(), x)
        else:
            sums[use.key] += g.t() @ x
        return sums.pop(use.key) if use.first else None


@dataclass(frozen=True)
class _Use:
    """How a block is applied, or the memory read: the latter has a chunk, and slots of a shape, (X, H, M, K)."""

    heads: int
    layout: Layout
    shared: Shared
    continues: bool = False
    chunk: int = 0
    slots: tuple[int, ...] = ()


def _through(x: Tensor, weight: Tensor, y: Tensor, *, beside: Tensor | None = None) -> None:
    """Fill in x weight', added to what is `beside`."""
    if beside is None and x.dtype == y.dtype:
        torch.mm(x, weight.t(), out=y)
    elif beside is None:
        y.copy_(torch.mm(x, weight.t()))
    elif x.dtype == y.dtype:
        torch.addmm(beside, x, weight.t(), out=y)
    else:
        torch.add(beside, torch.mm(x, weight.t()), out=y)


class _Block(torch.autograd.Function):
    """x + output(attention(norm(x))), and then x + down(gated(gate_up(norm(x)))): see the frozen model's `Block`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept_key: Tensor | None, kept_value: Tensor | None, use: _Use, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, layout, heads = _product_type(), use.layout, use.heads
        scale_1, in_1, out_1, scale_2, in_2, out_2 = weights
        products = (in_1, out_1, in_2, out_2)
        ctx.use, ctx.weights = use, [use.shared.use(weight) for weight in products]
        narrow = [use.shared.narrow(*pair, kind) for pair in zip(ctx.weights, products, strict=True)]
        x = x.contiguous()
        (A, D), T, W = x.shape, layout.T, out_2.shape[1]
        K, lines = D // heads, (layout.B * heads, T, D // heads)
        normal_1, normal_2, inverses_1, inverses_2, turned, mixed, between, query, key, value, shares, found = _empty(
            torch.float32,
            *[(A, D), (A, D), (A,), (A,), (2, A, heads), (A, D), (A, D), lines, lines, lines, (lines[0], T, T), lines],
        )
        projected, gate_up, gated = _empty(kind, (A, 3 * D), (A, 2 * W), (A, W))
        y = torch.empty_like(x)
        with _without_autocast():
            _norm(x, scale_1, normal_1, inverses_1)
            normal_1 = normal_1.to(kind)
            _through(normal_1, narrow[0], projected)
            _filled(layout, query)
            # A halted token's stay as it left them; padding has none.
            for new, old in ((key, kept_key), (value, kept_value)):
                _filled(layout, new) if old is None else new.copy_(old)
            addresses = _addresses(projected, layout.cosine_TK, layout.sine_TK, query, key, value, *turned)
            words = (A, heads, K, _EPSILON, _places(layout), T, *addresses)
            threads.run(_kernel("turn", kind), projected.numel(), *words)
            _attend(query, key, value, shares, found, heads=heads, causal=True, mask=layout.mask_B1TT)
            _from_heads(found, layout, mixed)
            mixed = mixed.to(kind)
            _through(mixed, narrow[1], between, beside=x)
            _norm(between, scale_2, normal_2, inverses_2)
            normal_2 = normal_2.to(kind)
            _through(normal_2, narrow[2], gate_up)
            threads.run(_kernel("gated", kind), gate_up.numel(), A, W, *_addresses(gate_up, gated))
            _through(gated, narrow[3], y, beside=between)
        ctx.set_materialize_grads(False)  # zeros for keys and values that no later step has gone on with
        ctx.save_for_backward(
            *weights, x, normal_1, inverses_1, projected, turned, query, key, value, shares, mixed,
            between, normal_2, inverses_2, gate_up, gated,
        )  # fmt: skip
        return y, key, value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_y: Tensor | None, g_key: Tensor | None, g_value: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        scale_1, in_1, out_1, scale_2, in_2, out_2, *rest = ctx.saved_tensors
        x, normal_1, inverses_1, projected, turned, query, key, value, shares, mixed, *rest = rest
        between, normal_2, inverses_2, gate_up, gated = rest
        use, layout, kind = ctx.use, ctx.use.layout, projected.dtype
        pairs = zip(ctx.weights, (in_1, out_1, in_2, out_2), strict=True)
        narrow = [use.shared.narrow(*pair, kind) for pair in pairs]
        uses, wide = ctx.weights, in_1.dtype
        (A, D), heads, T, K, W = x.shape, use.heads, layout.T, query.shape[2], gated.shape[1]
        g_between, g_found = _empty(torch.float32, (A, D), query.shape)
        of_projected, of_gate_up, g_gated, g_normal = _empty(kind, (A, 3 * D), (A, 2 * W), (A, W), (A, D))

        g_y = torch.zeros_like(x) if g_y is None else g_y.contiguous()
        g_narrow = g_y.to(kind)
        of_out_2 = use.shared.add(uses[3], wide, g_narrow, gated)
        torch.mm(g_narrow, narrow[3], out=g_gated)
        threads.run(_kernel("gated_back", kind), gate_up.numel(), A, W, *_addresses(gate_up, g_gated, of_gate_up))
        of_in_2 = use.shared.add(uses[2], wide, of_gate_up, normal_2)
        torch.mm(of_gate_up, narrow[2], out=g_normal)
        of_scale_2 = _norm_back(between, scale_2, inverses_2, g_normal.to(x.dtype), g_between, beside=g_y)

        g_narrow = g_between.to(kind)
        of_out_1 = use.shared.add(uses[1], wide, g_narrow, mixed)
        torch.mm(g_narrow, narrow[1], out=g_normal)
        _to_heads(g_normal, layout, g_found)
        of_query, of_key, of_value = _attend_back(query, key, value, shares, g_found, causal=True)
        for part, later in ((of_key, g_key), (of_value, g_value)):
            if later is not None:
                part += later
        addresses = _addresses(projected, layout.cosine_TK, layout.sine_TK, of_query, of_key, of_value, *turned)
        words = (A, heads, K, int(use.continues), _places(layout), T, *addresses, of_projected.data_ptr())
        threads.run(_kernel("turn_back", kind), projected.numel(), *words)
        of_in_1 = use.shared.add(uses[0], wide, of_projected, normal_1)
        torch.mm(of_projected, narrow[0], out=g_normal)
        of_x = torch.empty_like(x)
        of_scale_1 = _norm_back(x, scale_1, inverses_1, g_normal.to(x.dtype), of_x, beside=g_between)
        kept = (of_key, of_value) if use.continues else (None, None)
        return of_x, *kept, None, of_scale_1, of_in_1, of_out_1, of_scale_2, of_in_2, of_out_2


# The memory


class _Read(torch.autograd.Function):
    """x + output(gate * attention(query)), of norm(x), to the slots: see the frozen model's `LongTermMemory.read`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key_XHMK: Tensor, value_XHMK: Tensor, use: _Use, *weights: Tensor) -> Tensor:
        kind, layout, chunk = _product_type(), use.layout, use.chunk
        ask, gate_weight, gate_bias, out = weights
        products = (ask, gate_weight, out)
        ctx.use, ctx.weights = use, [use.shared.use(weight) for weight in products]
        narrow = [use.shared.narrow(*pair, kind) for pair in zip(ctx.weights, products, strict=True)]
        x = x.contiguous()
        (A, D), (X, H, M, K) = x.shape, key_XHMK.shape
        lines = (X * H, chunk, K)
        normal, inverses, asked, query_AD, turned, query, weights_XM, found, mixed, gated = _empty(
            torch.float32,
            *[(A, D), (A,), (A, D), (A, D), (A, H), lines, (X * H, chunk, M), lines, (A, D), (A, D)],
        )
        y = torch.empty_like(x)
        with _without_autocast():
            _norm(x, None, normal, inverses)
            normal = normal.to(kind)
            _through(normal, narrow[0], asked)
            _norm(asked.view(A, H, K), None, query_AD, turned)
            key, value = (part.float().flatten(0, 1).contiguous() for part in (key_XHMK, value_XHMK))
            _to_heads(query_AD, layout, query)
            _attend(query, key, value, weights_XM, found, heads=H, causal=False)
            _from_heads(found, layout, mixed)
            gate = torch.mm(normal, narrow[1].t()).float().add_(gate_bias).sigmoid_()
            torch.mul(mixed.view(A, H, K), gate.unsqueeze(2), out=gated.view(A, H, K))
            gated = gated.to(kind)
            _through(gated, narrow[2], y, beside=x)
        ctx.types = (key_XHMK.dtype, value_XHMK.dtype)
        ctx.save_for_backward(
            *weights, x, normal, inverses, asked, turned, query, key, value, weights_XM, mixed, gate, gated
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor) -> tuple[Tensor | None, ...]:
        ask, gate_weight, _, out, x, normal, inverses, asked, turned, *rest = ctx.saved_tensors
        query, key, value, weights_XM, mixed, gate, gated = rest
        use, kind, (A, H), D = ctx.use, normal.dtype, gate.shape, x.shape[1]
        pairs = zip(ctx.weights, (ask, gate_weight, out), strict=True)
        narrow = [use.shared.narrow(*pair, kind) for pair in pairs]
        uses, wide = ctx.weights, ask.dtype
        g_mixed, of_query_AD, of_asked, of_x, g_found = _empty(torch.float32, *[(A, D)] * 4, query.shape)

        g_y = g_y.contiguous()
        g_narrow = g_y.to(kind)
        of_out = use.shared.add(uses[2], wide, g_narrow, gated)
        g_gated = torch.mm(g_narrow, narrow[2]).float().view(A, H, -1)
        torch.mul(g_gated, gate.unsqueeze(2), out=g_mixed.view(A, H, -1))
        g_gate = g_gated.mul_(mixed.view(A, H, -1)).sum(2).mul_(gate).mul_(1 - gate)
        _to_heads(g_mixed, use.layout, g_found)
        of_query, of_key, of_value = _attend_back(query, key, value, weights_XM, g_found, causal=False)
        _from_heads(of_query, use.layout, of_query_AD)
        heads = (A, H, D // H)
        _norm_back(asked.view(heads), None, turned, of_query_AD.view(heads), of_asked.view(heads))
        asked_narrow, gate_narrow = of_asked.to(kind), g_gate.to(kind)
        of_ask = use.shared.add(uses[0], wide, asked_narrow, normal)
        of_gate = use.shared.add(uses[1], wide, gate_narrow, normal)
        g_normal = torch.addmm(torch.mm(gate_narrow, narrow[1]), asked_narrow, narrow[0]).to(x.dtype)
        _norm_back(x, None, inverses, g_normal, of_x, beside=g_y)
        slots = [part.view(use.slots).to(kind_) for part, kind_ in zip((of_key, of_value), ctx.types, strict=True)]
        return of_x, *slots, None, of_ask, of_gate, g_gate.sum(0), of_out


# The tied table


class Embedded:
    """Where the head's loss leaves its gradient of the table that it shares with the embedding."""

    gradient_VD: Tensor | None = None

    def add(self, gradient_VD: Tensor) -> None:
        """Leave one loss's part, which is not used otherwise."""
        self.gradient_VD = gradient_VD if self.gradient_VD is None else self.gradient_VD.add_(gradient_VD)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor, embedded: Embedded) -> Tensor:
        ctx.embedded, ctx.rows = embedded, len(weight_VD)
        ctx.save_for_backward(tokens_BT)
        return F.embedding(tokens_BT, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BTD: Tensor) -> tuple[Tensor, None, None]:
        (tokens_BT,) = ctx.saved_tensors
        of_weight_VD, ctx.embedded.gradient_VD = ctx.embedded.gradient_VD, None
        if of_weight_VD is None:
            of_weight_VD = g_BTD.new_zeros(ctx.rows, g_BTD.shape[-1])
        return of_weight_VD.index_add_(0, tokens_BT.reshape(-1), g_BTD.reshape(-1, g_BTD.shape[-1])), None, None


def head_gradients(
    logits_XV: Tensor,
    bias_V: Tensor,
    targets_X: Tensor,
    log_own_X: Tensor,
    log_other_X: Tensor,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits, in place, into the gradients of so many times the sum of the losses of `head_cross_entropy`.

    Returns losses and own shares, (X,), and the bias's gradient, (V,).
    Errors: IndexError, when a target is no token of the vocabulary.
    """
    rows, V = logits_XV.shape
    if rows and not 0 <= int(targets_X.min()) <= int(targets_X.max()) < V:
        raise IndexError(f"targets must be within 0 and {V - 1}, got {targets_X.min()} to {targets_X.max()}")
    losses_X, owns_X = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    of_bias = torch.zeros(-(-rows // _ROWS), V, dtype=torch.float32)
    targets_X = targets_X.long().contiguous()
    floats = [one.float().contiguous() for one in (bias_V, log_own_X, log_other_X)]
    addresses = _addresses(logits_XV, floats[0], targets_X, floats[1], floats[2], losses_X, owns_X, of_bias)
    threads.run(_kernel("head", logits_XV.dtype), logits_XV.numel(), rows, V, *addresses, _bits(factor))
    return losses_X, owns_X, of_bias.sum(0)


def _takes(x: Tensor, *kinds: torch.dtype) -> bool:
    return x.device.type == "cpu" and x.dtype in (kinds or (torch.float32,))


class FusedOperations(Operations):
    """Kernels that numba compiles, on the memory of torch's tensors and on torch's threads.

    What they do not take (other devices and types, long rows, wide heads) is computed by torch's operations.
    """

    def embed(self, embedding: nn.Embedding, tokens_BT: Tensor) -> tuple[Tensor, object]:
        """See Operations."""
        if not _takes(embedding.weight):
            return super().embed(embedding, tokens_BT)
        embedded = Embedded()
        x: Tensor = _Embed.apply(embedding.weight, tokens_BT, embedded)  # type: ignore[no-untyped-call]
        return x, embedded

    def normalize(self, x: Tensor, scale_D: Tensor | None = None) -> Tensor:
        """See Operations."""
        fits = scale_D is None or (_takes(scale_D) and scale_D.is_contiguous())
        if not fits or not _takes(x, *_KINDS):
            return super().normalize(x, scale_D)
        y: Tensor = _Norm.apply(x, scale_D)  # type: ignore[no-untyped-call]
        return y

    def share(self) -> object:
        """See Operations."""
        return Shared()

    def block(self, block: Block, x_AD: Tensor, layout: Layout, kept: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """See Operations."""
        attention, feed_forward = block.attention, block.feed_forward
        if not _takes(x_AD) or layout.T > LONGEST or x_AD.shape[1] // attention.heads > WIDEST:
            return super().block(block, x_AD, layout, kept)
        if layout.active_A is None:
            kept = None  # all are about to have keys and values of their own
        use = _Use(attention.heads, layout, _shared(layout), continues=kept is not None)
        weights = (
            block.attention_norm.scale_D, attention.query_key_value.weight, attention.output.weight,
            block.feed_forward_norm.scale_D, feed_forward.gate_up.weight, feed_forward.down.weight,
        )  # fmt: skip
        y, key, value = _Block.apply(x_AD, *(kept or (None, None)), use, *weights)  # type: ignore[no-untyped-call]
        return y, (key, value)

    def read(self, memory: LongTermMemory, x_AD: Tensor, layout: Layout, readable: Readable) -> Tensor:
        """See Operations."""
        key, value = readable.key_XHMK, readable.value_XHMK
        if not _takes(x_AD) or layout.T % memory.chunk or key.shape[-1] > WIDEST:
            return super().read(memory, x_AD, layout, readable)
        use = _Use(memory.heads, layout, _shared(layout), chunk=memory.chunk, slots=tuple(key.shape))
        gate = memory.read_gate
        weights = (memory.read_query.weight, gate.weight, gate.bias, memory.read_output.weight)
        y: Tensor = _Read.apply(x_AD, key, value, use, *weights)  # type: ignore[no-untyped-call]
        return y


def _shared(layout: Layout) -> Shared:
    return layout.shared if isinstance(layout.shared, Shared) else Shared()
