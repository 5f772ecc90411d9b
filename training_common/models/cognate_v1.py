"""Cognate, version 1: the frozen forward pass that both services run.

    tokens -> embedding -> prelude -> core, 1 to N times under ACT, reading the LTM -> coda -> norm -> tied head + LTM
                              |         ^ weight-shared; halted tokens are dropped from the batch
                              +-> LTM: the most surprising tokens, one write per chunk, seen by later chunks only

- ACT (adaptive computation time, Graves 2016): every token takes its own number of core steps. A token that has halted
  is gathered out of the batch; its keys and values stay where later tokens find them.
- LTM (long-term memory): slots that keep the most surprising tokens of earlier chunks. A chunk is written from the
  prelude's output, so all writes of a sequence are known before the core runs. Ponder steps read what earlier chunks
  left, and the head takes part of its prediction from it.
- Causal throughout: no output moves when a later token changes.
- Padding: `valid_BT` marks real tokens. Right padding needs nothing else, since attention is causal; padding is never
  written to the memory, never ponders, and has a zero halting distribution and zero steps.
- Packing: `segment_ids_BT` keeps attention within a document. The memory crosses documents: that is what it is for.

A module holds zeros until `load_state` fills it: training from random values belongs to the pretraining service alone.
Semantics are frozen: a change that moves an output is a new version with a new file, not an edit.
"""


# B batch rows, T tokens of a row, A active tokens of the whole batch, D model width, H heads, K head width,
# N ponder steps, C chunks of a row, L tokens of a chunk, M memory slots, V vocabulary.

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILY = "cognate"
SEMANTICS_VERSION = 1
ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-6
# Parameters of the adaptive parts, by the start of their names: agents freeze them unless asked otherwise.
ACT_PREFIXES = ("halting.", "step_vectors_ND", "inject_D")
LTM_PREFIXES = ("memory.",)
# A slot that holds no token, and the log strength of nothing: finite, since a softmax of minus infinities has no
# gradient, and so low that its exponential is 0 in every type.
EMPTY = -1
NOTHING = -1e4
# What is held loses half of its strength per chunk. Of 0.5, 0.9 and 1, 0.5 was best for a cache of the same tokens.
FORGETTING = math.log(2)


class ArchitectureMismatchError(ValueError):
    """Stored weights are not those of this architecture."""


@dataclass(frozen=True, kw_only=True)
class CognateV1Config:
    """The sizes of a Cognate; the defaults are Cognate-25M, other values are for tests and benches.

    Errors: ValueError, naming the field.
    """

    vocabulary_size: int = 15_616
    width: int = 512
    heads: int = 8
    feed_forward_width: int = 1_280
    prelude_blocks: int = 2
    core_blocks: int = 2
    coda_blocks: int = 1
    max_steps: int = 4
    memory_slots: int = 64
    memory_chunk: int = 64
    halting_epsilon: float = 0.01

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice heads ({self.heads}), for rotary pairs")
        if self.halting_epsilon >= 1:
            raise ValueError(f"halting_epsilon must be below 1, got {self.halting_epsilon}")


class _Parts:
    """A dataclass of tensors that share their leading dimensions, and change together."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, as the constructor takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same change of every part."""
        return type(self)(**{name: change(part) for name, part in self.tensors().items()})

    def where(self, chosen_B: Tensor, other: Self) -> Self:
        """Return these rows where chosen, and the other's elsewhere."""
        others = other.tensors()
        return type(self)(**{name: choose_rows(chosen_B, part, others[name]) for name, part in self.tensors().items()})


def choose_rows(chosen_B: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Return the rows of `own` where chosen, and the other's elsewhere: (B, ...)."""
    return torch.where(chosen_B.view(-1, *[1] * (own.ndim - 1)), own, other)


@dataclass(frozen=True, kw_only=True)
class MemoryState(_Parts):
    """What the long-term memory holds for each row, the strongest slot first.

    tokens_BM: int64, the token of each slot; `EMPTY` where there is none.
    strength_BM: log of its write gate, less what it lost since; `NOTHING` where the slot is empty.
    trace_BMD, key_BMD: what ponder steps see of it, and what the head finds it by.
    """

    tokens_BM: Tensor
    strength_BM: Tensor
    trace_BMD: Tensor
    key_BMD: Tensor

    def detach(self) -> MemoryState:
        """Return the same without its history, for the next sequence."""
        return self.map(Tensor.detach)

    def take(self, places_BM: Tensor) -> MemoryState:
        """Return the slots at the given places of each row."""

        rows_B1 = torch.arange(len(places_BM), device=places_BM.device).unsqueeze(1) * self.tokens_BM.shape[1]
        rows = (rows_B1 + places_BM).reshape(-1)
        return self.map(lambda part: part.flatten(0, 1).index_select(0, rows).view(*places_BM.shape, *part.shape[2:]))

    def put(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """Return these with some rows replaced by the other's, in order."""
        others = other.tensors()
        return MemoryState(**{name: part.index_copy(0, rows, others[name]) for name, part in self.tensors().items()})

    def split(self, slots: int) -> list[MemoryState]:
        """Return pieces of so many slots."""
        pieces = zip(*(torch.split(part, slots, 1) for part in self.tensors().values()), strict=True)
        return [MemoryState(**dict(zip(self.tensors(), piece, strict=True))) for piece in pieces]

    @staticmethod
    def together(states: Sequence[MemoryState], dim: int = 0) -> MemoryState:
        """Return the rows (dim 0) or the slots (dim 1) of all of them, one after the other."""
        names = states[0].tensors()
        return MemoryState(**{name: torch.cat([getattr(one, name) for one in states], dim) for name in names})

    @staticmethod
    def stacked(states: Sequence[MemoryState]) -> MemoryState:
        """Return C states of B rows as one of B * C rows: each row's states follow one another."""
        names = states[0].tensors()
        return MemoryState(
            **{name: torch.stack([getattr(one, name) for one in states], 1).flatten(0, 1) for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class Recall(_Parts):
    """What the memory says the next token is, and how far it is trusted, at positions of any leading dimensions.

    tokens: int64, (..., M), those that the slots hold. log_shares: (..., M), of each slot; they sum to 1 together.
    log_own, log_recalled: (...), the head's and the memory's parts of the prediction, which sum to 1; 0 and `NOTHING`
        where the memory is empty.
    """

    tokens: Tensor
    log_shares: Tensor
    log_own: Tensor
    log_recalled: Tensor

    def log_part_of(self, targets: Tensor) -> Tensor:
        """Return the log probability that the memory alone adds to each target: (...)."""
        hits = torch.where(self.tokens == targets.unsqueeze(-1), self.log_shares, NOTHING)
        return self.log_recalled + hits.logsumexp(-1)

    def mixed_losses(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Return the targets' cross-entropies under the mixture, from those under the head alone: (...)."""
        return -torch.logaddexp(self.log_own - losses, self.log_part_of(targets))

    def mixed(self, log_probabilities: Tensor) -> Tensor:
        """Mix the head's log probabilities with what is recalled: (..., V). Not for gradients."""
        recalled = (self.log_shares + self.log_recalled.unsqueeze(-1)).exp()
        recalled = recalled.masked_fill(self.tokens == EMPTY, 0)
        sums = torch.zeros_like(log_probabilities).scatter_add_(-1, self.tokens.clamp(min=0), recalled)
        return torch.logaddexp(log_probabilities + self.log_own.unsqueeze(-1), sums.log())


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """How the memory was used in one forward pass; scalars without gradient.

    write_rate: mean write gate of the valid tokens, 0 to 1.
    slot_utilization: share of slots that hold a token after the pass, 0 to 1.
    read_entropy_nats: mean entropy of the slots' shares in what the head recalls, over the tokens whose memory is not
        empty; at most ln(slots). reads: how many those are. head_share: mean share of the prediction that the memory
        makes, 0 to 1. All three are None when the memory was not read.
    """

    write_rate: Tensor
    slot_utilization: Tensor
    read_entropy_nats: Tensor | None
    reads: Tensor | None
    head_share: Tensor | None


@dataclass(frozen=True, kw_only=True)
class CognateOutput:
    """The result of a forward pass.

    hidden_BTD: after the final norm, before the head; `CognateV1.logits` takes it.
    recall: what the memory adds to the head's prediction; `CognateV1.log_probabilities` takes it. None when its reads
        are off.
    halting_BTN: the weight of each ponder step's state in the output; sums to 1 for valid tokens, 0 for padding.
    steps_BT: int64, ponder steps taken; 0 for padding.
    memory: after the last chunk, whole or not. Detach it before it is given to another sequence.
    memory_statistics: only where `statistics=True` asked for them.
    embedded: what the operations that embedded the tokens have to say to the head's loss, which is tied to them.
    """

    hidden_BTD: Tensor
    recall: Recall | None
    halting_BTN: Tensor
    steps_BT: Tensor
    memory: MemoryState
    memory_statistics: MemoryStatistics | None
    embedded: object = None


class _Linear(nn.Linear):
    """A linear map that starts as zeros: values come from a file or from the pretraining service."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def normalize(x: Tensor, scale_D: Tensor | None = None) -> Tensor:
    """Bring the last dimension to a root mean square of 1, and scale it."""
    return F.rms_norm(x, (x.shape[-1],), scale_D, NORM_EPSILON)


def rotary_angles(positions: int, head_width: int, device: torch.device) -> Tensor:
    """Return the angle of every position and pair of a head: (positions, head_width / 2), float32."""
    frequency_K = ROPE_BASE ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    return torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequency_K)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs of the last dimension, first half with second half."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


@dataclass(frozen=True)
class Layout:
    """Where the active tokens sit in the batch, and whom they may attend to.

    active_A: their places in the flattened (B * T) batch, ascending; None when all of it is active.
    mask_B1TT: True where a query may see a key; None for plain causal attention.
    shared: what `Operations.share` returned, where several steps use the same weights.
    """

    B: int
    T: int
    cosine_TK: Tensor
    sine_TK: Tensor
    mask_B1TT: Tensor | None
    active_A: Tensor | None = None
    shared: object = None

    def keep(self, kept_A: Tensor) -> Layout:
        """Return the layout of those active tokens whose indices are in `kept_A`."""
        return dataclasses.replace(self, active_A=kept_A if self.active_A is None else self.active_A[kept_A])

    def gather(self, flat: Tensor) -> Tensor:
        """Take the active tokens' rows out of (B * T, ...)."""
        return flat if self.active_A is None else flat.index_select(0, self.active_A)

    def scatter(self, values: Tensor, base: Tensor | None = None) -> Tensor:
        """Put the active tokens' rows into `base`, or into zeros: (A, ...) -> (B * T, ...)."""
        if self.active_A is None:
            return values
        if base is None:
            base = values.new_zeros(self.B * self.T, *values.shape[1:])
        return base.index_copy(0, self.active_A, values)

    def rotate(self, x_AHK: Tensor) -> Tensor:
        """Apply the rotary embedding of every active token's position to its heads."""
        places_A = torch.arange(self.B * self.T, device=x_AHK.device) if self.active_A is None else self.active_A
        positions_A = places_A % self.T
        return rotate(x_AHK, self.cosine_TK[positions_A].unsqueeze(1), self.sine_TK[positions_A].unsqueeze(1))


def _layout(tokens_BT: Tensor, segment_ids_BT: Tensor | None, head_width: int) -> Layout:
    B, T = tokens_BT.shape
    angle_TK = rotary_angles(T, head_width, tokens_BT.device)
    mask_B1TT = None
    if segment_ids_BT is not None:
        same_BTT = segment_ids_BT.unsqueeze(2) == segment_ids_BT.unsqueeze(1)
        mask_B1TT = same_BTT.tril().unsqueeze(1)
    return Layout(B, T, angle_TK.cos(), angle_TK.sin(), mask_B1TT)


def _wide_on_cpu(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast away from attention on a CPU: its bfloat16 kernels take two to four times as long as float32's."""
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else contextlib.nullcontext()


# Keys and values of every token of the batch, (B * T, H, K) each: a halted token's stay as it left them.
KeyValue = tuple[Tensor, Tensor]


class Operations:
    """How a model computes its larger parts; these are the frozen definitions.

    A service may give a model others (`CognateV1.compute_with`) that differ by rounding alone.
    """

    def embed(self, embedding: nn.Embedding, tokens_BT: Tensor) -> tuple[Tensor, object]:
        """Return the tokens' rows of the table, and `CognateOutput.embedded`."""
        return embedding(tokens_BT), None

    def normalize(self, x: Tensor, scale_D: Tensor | None = None) -> Tensor:
        """See `normalize`."""
        return normalize(x, scale_D)

    def share(self) -> object:
        """Return what the layouts of all steps of a forward pass carry, since they use the same weights."""
        return None

    def block(self, block: Block, x_AD: Tensor, layout: Layout, kept: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Apply a block to the active tokens; return their states, and everyone's keys and values.

        kept: keys and values that halted tokens have left, in the form that these operations returned them in.
        """
        return block.apply_to(x_AD, layout, kept)

    def read(self, memory: LongTermMemory, x_AD: Tensor, layout: Layout, readable: Readable) -> Tensor:
        """Return the active tokens' states with what they read from the memory."""
        return x_AD + memory.read(x_AD, layout, readable)


class _Computed(nn.Module):
    """A part of the model that computes with the operations it was given."""

    operations = Operations()

    def _normalize(self, x: Tensor) -> Tensor:
        return self.operations.normalize(x)


class _RMSNorm(_Computed):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.operations.normalize(x, self.scale_D)


class _Attention(_Computed):
    """Causal self-attention with rotary positions and RMS-normalized queries and keys."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = _Linear(config.width, 3 * config.width, bias=False)
        self.output = _Linear(config.width, config.width, bias=False)

    def forward(self, x_AD: Tensor, layout: Layout, kept: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Attend from the active tokens to all; return their output and everyone's keys and values."""
        A, D = x_AD.shape
        query, key, value = self.query_key_value(x_AD).view(A, 3, self.heads, D // self.heads).unbind(1)
        query = layout.rotate(self._normalize(query))
        key = layout.rotate(self._normalize(key))
        kept_key, kept_value = kept if kept is not None else (None, None)
        key, value = layout.scatter(key, kept_key), layout.scatter(value, kept_value)
        query_BHTK, key_BHTK, value_BHTK = (
            flat.view(layout.B, layout.T, self.heads, -1).transpose(1, 2)
            for flat in (layout.scatter(query), key, value)
        )
        with _wide_on_cpu(x_AD.device):
            mixed_BHTK = F.scaled_dot_product_attention(
                query_BHTK,
                key_BHTK,
                value_BHTK.to(query_BHTK.dtype),
                attn_mask=layout.mask_B1TT,
                is_causal=layout.mask_B1TT is None,
            )
        mixed_AD = layout.gather(mixed_BHTK.transpose(1, 2).reshape(layout.B * layout.T, D))
        return self.output(mixed_AD), (key, value)


class _SwiGLU(nn.Module):
    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.gate_up = _Linear(config.width, 2 * config.feed_forward_width, bias=False)
        self.down = _Linear(config.feed_forward_width, config.width, bias=False)

    def forward(self, x_AD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_AD).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


class Block(_Computed):
    """A pre-norm transformer block over the active tokens."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.attention_norm = _RMSNorm(config.width)
        self.attention = _Attention(config)
        self.feed_forward_norm = _RMSNorm(config.width)
        self.feed_forward = _SwiGLU(config)

    def forward(self, x_AD: Tensor, layout: Layout, kept: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        return self.operations.block(self, x_AD, layout, kept)

    def apply_to(self, x_AD: Tensor, layout: Layout, kept: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Apply the block; see `Operations.block`."""
        mixed_AD, kept = self.attention(self.attention_norm(x_AD), layout, kept)
        x_AD = x_AD + mixed_AD
        return x_AD + self.feed_forward(self.feed_forward_norm(x_AD)), kept


@dataclass(frozen=True)
class Readable:
    """What the tokens of each chunk of each row may read, X = B * C: the slots, and their keys and values per head."""

    slots: MemoryState
    key_XHMK: Tensor
    value_XHMK: Tensor
    C: int


class LongTermMemory(_Computed):
    """Slots that keep the most surprising tokens of the past, one each; read in every ponder step and by the head.

    Write, once per chunk, for its tokens t with the prelude's output x_t:
        u_t = -ln p(token t) by the frequencies in the head's bias         surprise, in nats
        g_t = sigmoid(write_gate(x_t) + surprise_scale * u_t)              strength, 0 to 1; none for padding
    A slot holds a token, ln g, a trace (write_value x) and a key (write_key x, each head's part normalized). What was
    held loses `FORGETTING` nats of strength per chunk; then the M strongest of old and new stay, strongest first, the
    older one of two equals.

    Read in a ponder step: heads of attention from the state over the slots; keys from address of the rank + trace,
    values from the trace, and an empty slot shows its initial trace. Each head has a gate, sigmoid(read_gate(state)).

    Read by the head: a slot's share is softmax over the held ones of <query, key> + ln g. Its token gets that share of
    head_gate's part of the prediction, and the tied head keeps the rest (a pointer mixture: Merity et al. 2017,
    arXiv:1609.07843; Grave et al. 2017, arXiv:1612.04426). While nothing is held, the head keeps all.
    """

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        D, M = config.width, config.memory_slots
        self.heads = config.heads
        self.chunk = config.memory_chunk
        self.addresses_MD = nn.Parameter(torch.zeros(M, D))
        self.initial_MD = nn.Parameter(torch.zeros(M, D))
        self.write_key = _Linear(D, D, bias=False)
        self.write_value = _Linear(D, D, bias=False)
        self.write_gate = _Linear(D, 1)
        self.surprise_scale = nn.Parameter(torch.zeros(()))
        self.read_query = _Linear(D, D, bias=False)
        self.read_key = _Linear(D, D, bias=False)
        self.read_value = _Linear(D, D, bias=False)
        self.read_output = _Linear(D, D, bias=False)
        self.read_gate = _Linear(D, config.heads)
        self.head_gate = _Linear(D, 1)

    def start(self, rows: int) -> MemoryState:
        """Return empty slots for so many rows."""
        like = self.initial_MD.detach()
        M, D = like.shape
        return MemoryState(
            tokens_BM=torch.full((rows, M), EMPTY, device=like.device),
            strength_BM=like.new_full((rows, M), NOTHING),
            trace_BMD=like.new_zeros(rows, M, D),
            key_BMD=like.new_zeros(rows, M, D),
        )

    def write(
        self,
        tokens_BT: Tensor,
        source_BTD: Tensor,
        surprise_V: Tensor,
        state: MemoryState,
        valid_BT: Tensor | None,
    ) -> _Written:
        """Write all chunks in order; return what was held before each of them, and after the last.

        surprise_V: of every token of the vocabulary, in nats.
        """
        x_BTD = self._normalize(source_BTD)
        gate_BT = self.write_gate(x_BTD).squeeze(-1).to(x_BTD.dtype) + self.surprise_scale * surprise_V[tokens_BT]
        strength_BT = F.logsigmoid(gate_BT)
        if valid_BT is not None:
            strength_BT = strength_BT.masked_fill(~valid_BT, 2 * NOTHING)  # below an empty slot
        new = MemoryState(
            tokens_BM=tokens_BT,
            strength_BM=strength_BT,
            trace_BMD=self.write_value(x_BTD).to(x_BTD.dtype),
            key_BMD=self._normalize(self._per_head(self.write_key(x_BTD).to(x_BTD.dtype))).flatten(-2),
        )
        before: list[MemoryState] = []
        for chunk in new.split(self.chunk):
            before.append(state)
            state = self._write_chunk(state, chunk)
        return _Written(before, state, torch.sigmoid(gate_BT.detach()), valid_BT)

    def _write_chunk(self, state: MemoryState, chunk: MemoryState) -> MemoryState:
        held_BM = state.tokens_BM != EMPTY
        written_B1 = (chunk.strength_BM > NOTHING).any(1, keepdim=True)  # a chunk of padding makes nothing older
        aged_BM = torch.where(held_BM & written_B1, state.strength_BM - FORGETTING, state.strength_BM)
        both = MemoryState.together([dataclasses.replace(state, strength_BM=aged_BM), chunk], dim=1)
        order_BM = both.strength_BM.detach().sort(stable=True, dim=1, descending=True).indices[:, : held_BM.shape[1]]
        return both.take(order_BM)

    def readable(self, before: list[MemoryState]) -> Readable:
        """Project what each chunk may read, once for all ponder steps."""
        slots = MemoryState.stacked(before)
        held_XM1 = (slots.tokens_BM != EMPTY).unsqueeze(-1)
        shown_XMD = torch.where(held_XM1, slots.trace_BMD, self.initial_MD)
        key = self._normalize(self._per_head(self.read_key(shown_XMD + self.addresses_MD)))
        value = self._per_head(self.read_value(shown_XMD))
        return Readable(slots, key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous(), len(before))

    def _per_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    def read(self, x_AD: Tensor, layout: Layout, readable: Readable) -> Tensor:
        """Return what every active token reads in a ponder step."""
        query_XLD = self._by_chunk(layout.scatter(self.queries(x_AD).flatten(1)), layout, readable.C)
        query_XHLK = self._per_head(query_XLD).transpose(1, 2)
        with _wide_on_cpu(x_AD.device):
            mixed_XHLK = F.scaled_dot_product_attention(
                query_XHLK, readable.key_XHMK.to(query_XHLK.dtype), readable.value_XHMK.to(query_XHLK.dtype)
            )
        mixed_BTD = mixed_XHLK.transpose(1, 2).reshape(layout.B, readable.C * self.chunk, -1)[:, : layout.T]
        flat_AD = layout.gather(mixed_BTD.reshape(layout.B * layout.T, -1))
        return self.let_through(self._per_head(flat_AD), x_AD)

    def queries(self, x: Tensor) -> Tensor:
        """Return what states ask the memory for: (..., D) -> (..., H, K)."""
        return self._normalize(self._per_head(self.read_query(self._normalize(x))))

    def let_through(self, mixed_AHK: Tensor, x_AD: Tensor) -> Tensor:
        """Gate each head's find and map all of them to the model's width: (A, D)."""
        gated_AHK = mixed_AHK * torch.sigmoid(self.read_gate(self._normalize(x_AD))).unsqueeze(-1)
        read_AD: Tensor = self.read_output(gated_AHK.flatten(1))
        return read_AD

    def _by_chunk(self, flat: Tensor, layout: Layout, C: int) -> Tensor:
        """Order (B * T, D) by chunks, the last one filled up with zeros: (B * C, L, D)."""
        whole_BTD = flat.view(layout.B, layout.T, -1)
        missing = C * self.chunk - layout.T
        if missing:
            whole_BTD = F.pad(whole_BTD, (0, 0, 0, missing))
        return whole_BTD.reshape(layout.B * C, self.chunk, -1)

    def recall_all(self, hidden_XD: Tensor, layout: Layout, readable: Readable) -> Recall:
        """Return what the memory predicts at every position of the batch: leading dimensions (B, T)."""
        found = self.recall(self._by_chunk(hidden_XD, layout, readable.C), readable)

        def by_row(x: Tensor) -> Tensor:
            return x.reshape(layout.B, readable.C * self.chunk, *x.shape[2:])[:, : layout.T]

        return found.map(by_row)

    def recall(self, hidden_XLD: Tensor, readable: Readable) -> Recall:
        """Return what the slots of X chunks predict for their L positions each: leading dimensions (X, L)."""
        L = hidden_XLD.shape[1]
        slots = readable.slots
        query_XLD = self.queries(hidden_XLD).flatten(-2).to(slots.key_BMD.dtype)
        # As if the heads of an attention with keys of unit root mean square voted together.
        scale = 1 / math.sqrt(self.heads * query_XLD.shape[-1])
        strength_X1M = slots.strength_BM.unsqueeze(1)
        with torch.autocast(hidden_XLD.device.type, enabled=False):
            score_XLM = torch.baddbmm(strength_X1M.expand(-1, L, -1), query_XLD, slots.key_BMD.mT, alpha=scale)
            gate_XL = self.head_gate(self._normalize(hidden_XLD).to(score_XLM.dtype)).squeeze(-1)
        holds_X1 = (slots.tokens_BM != EMPTY).any(1, keepdim=True)
        return Recall(
            tokens=slots.tokens_BM.unsqueeze(1).expand(-1, L, -1),
            log_shares=score_XLM.log_softmax(-1),
            log_own=torch.where(holds_X1, F.logsigmoid(-gate_XL), 0.0),
            log_recalled=torch.where(holds_X1, F.logsigmoid(gate_XL), NOTHING),
        )

    @torch.no_grad()
    def statistics(self, written: _Written, recall: Recall | None) -> MemoryStatistics:
        """Measure the writes of a pass, and what the head read."""
        gate_BT = written.gate_BT
        valid_BT = torch.ones_like(gate_BT, dtype=torch.bool) if written.valid_BT is None else written.valid_BT
        entropy = reads = share = None
        if recall is not None:
            reads_BT = valid_BT & (recall.log_recalled > NOTHING)
            reads = reads_BT.sum()
            entropy_BT = torch.special.entr(recall.log_shares.exp()).sum(-1)
            entropy = (entropy_BT * reads_BT).sum() / reads.clamp(min=1)
            share = (recall.log_recalled.exp() * valid_BT).sum() / valid_BT.sum().clamp(min=1)
        return MemoryStatistics(
            write_rate=(gate_BT * valid_BT).sum() / valid_BT.sum().clamp(min=1),
            slot_utilization=(written.after.tokens_BM != EMPTY).to(gate_BT.dtype).mean(),
            read_entropy_nats=entropy,
            reads=reads,
            head_share=share,
        )


@dataclass(frozen=True)
class _Written:
    """The result of `LongTermMemory.write`; `before` has one state per chunk."""

    before: list[MemoryState]
    after: MemoryState
    gate_BT: Tensor
    valid_BT: Tensor | None


class CognateV1(_Computed):
    """Cognate, version 1. Holds zeros until its values are loaded; see the file's head for the whole picture."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.config = config
        V, D = config.vocabulary_size, config.width
        self.embedding = nn.Embedding(V, D, _weight=torch.zeros(V, D))
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.prelude_blocks))
        self.core = nn.ModuleList(Block(config) for _ in range(config.core_blocks))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.coda_blocks))
        self.inject_D = nn.Parameter(torch.zeros(D))
        self.step_vectors_ND = nn.Parameter(torch.zeros(config.max_steps, D))
        self.halting = _Linear(D, 1)
        self.memory = LongTermMemory(config)
        self.final_norm = _RMSNorm(D)
        self.head = _Linear(D, D, bias=False)
        self.head_bias_V = nn.Parameter(torch.zeros(V))

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        memory: MemoryState | None = None,
        valid_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        fixed_steps: int | None = None,
        read_memory: bool = True,
        statistics: bool = False,
    ) -> CognateOutput:
        """Run the model; `logits` turns the hidden states into next-token logits.

        memory: slots to start from; None starts with empty ones.
        valid_BT: bool, False for padding; None when there is none.
        segment_ids_BT: integers; attention stays among equal ids. None: each row is one document.
        fixed_steps: switch ACT off; every token takes so many steps and the last one's state is the output.
        read_memory: False ablates the memory's reads, by ponder steps and head (it is still written).
        Errors: ValueError, when fixed_steps is not within 1 and max_steps.
        """
        if fixed_steps is not None and not 1 <= fixed_steps <= self.config.max_steps:
            raise ValueError(f"fixed_steps must be within 1 and {self.config.max_steps}, got {fixed_steps}")
        B, T = tokens_BT.shape
        layout = _layout(tokens_BT, segment_ids_BT, self.config.width // self.config.heads)
        embedded_BTD, embedded = self.operations.embed(self.embedding, tokens_BT)
        x_AD = self._normalize(embedded_BTD).view(B * T, -1)
        for block in self.prelude:
            x_AD, _ = block(x_AD, layout)
        written = self.memory.write(
            tokens_BT, x_AD.view(B, T, -1), self.surprises(), memory or self.memory.start(B), valid_BT
        )
        readable = self.memory.readable(written.before) if read_memory else None
        x_AD, halting_BTN, steps_BT = self._ponder(x_AD, layout, readable, valid_BT, fixed_steps)
        for block in self.coda:
            x_AD, _ = block(x_AD, layout)
        hidden_AD = self.final_norm(x_AD)
        recall = None if readable is None else self.memory.recall_all(hidden_AD, layout, readable)
        return CognateOutput(
            hidden_BTD=hidden_AD.view(B, T, -1),
            embedded=embedded,
            recall=recall,
            halting_BTN=halting_BTN,
            steps_BT=steps_BT,
            memory=written.after,
            memory_statistics=self.memory.statistics(written, recall) if statistics else None,
        )

    def compute_with(self, operations: Operations) -> None:
        """Compute with these operations from now on."""
        for module in self.modules():
            if isinstance(module, _Computed):
                module.operations = operations

    def surprises(self) -> Tensor:
        """Return every token's surprise by the frequencies that the head's bias stands for, in nats: (V,)."""
        return -self.head_bias_V.detach().log_softmax(-1)

    def log_probabilities(self, hidden: Tensor, recall: Recall | None) -> Tensor:
        """Return the next token's log probabilities, head and memory together: (..., D) -> (..., V). No gradients."""
        own = self.logits(hidden).log_softmax(-1)
        return own if recall is None else recall.mixed(own)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits of the head alone, without what is recalled: (..., D) -> (..., V)."""
        return F.linear(self.head(hidden), self.embedding.weight, self.head_bias_V)

    def _ponder(
        self,
        prelude_XD: Tensor,
        layout: Layout,
        readable: Readable | None,
        valid_BT: Tensor | None,
        fixed_steps: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the core until every token has halted; X = B * T. Steps without an active token are not run."""
        B, T = layout.B, layout.T
        if valid_BT is not None and not bool(valid_BT.all()):
            layout = layout.keep(valid_BT.reshape(-1).nonzero().squeeze(1))
        layout = dataclasses.replace(layout, shared=self.operations.share())
        state_AD = layout.gather(prelude_XD)
        spent_A = state_AD.new_zeros(state_AD.shape[0])
        output_XD = torch.zeros_like(prelude_XD)
        halting_NX: list[Tensor] = []
        steps_X = torch.zeros(B * T, dtype=torch.int64, device=prelude_XD.device)
        kept: list[KeyValue | None] = [None] * len(self.core)
        limit = fixed_steps or self.config.max_steps
        for step in range(limit):
            if state_AD.shape[0] == 0:
                break
            state_AD, kept = self._core_step(step, state_AD, layout.gather(prelude_XD), layout, readable, kept)
            last = step == limit - 1
            if fixed_steps is None:
                weight_A, spent_A, halts_A = self.halt(state_AD, spent_A, last=last)
            else:
                weight_A = torch.full_like(spent_A, float(last))
                halts_A = torch.full_like(spent_A, last, dtype=torch.bool)
            output_XD = self._accumulate(output_XD, weight_A.unsqueeze(1) * state_AD, layout)
            halting_NX.append(layout.scatter(weight_A))
            steps_X = layout.scatter(torch.full_like(halts_A, step + 1, dtype=torch.int64), steps_X)
            if bool(halts_A.any()):
                going_A = (~halts_A).nonzero().squeeze(1)
                layout = layout.keep(going_A)
                state_AD, spent_A = state_AD.index_select(0, going_A), spent_A.index_select(0, going_A)
        while len(halting_NX) < self.config.max_steps:
            halting_NX.append(prelude_XD.new_zeros(B * T))
        return output_XD, torch.stack(halting_NX, -1).view(B, T, -1), steps_X.view(B, T)

    def _core_step(
        self,
        step: int,
        state_AD: Tensor,
        prelude_AD: Tensor,
        layout: Layout,
        readable: Readable | None,
        kept: list[KeyValue | None],
    ) -> tuple[Tensor, list[KeyValue | None]]:
        x_AD = torch.addcmul(state_AD + self.step_vectors_ND[step], self.inject_D, prelude_AD)
        if readable is not None:
            x_AD = self.operations.read(self.memory, x_AD, layout, readable)
        now_kept: list[KeyValue | None] = []
        for block, before in zip(self.core, kept, strict=True):
            x_AD, key_value = block(x_AD, layout, before)
            now_kept.append(key_value)
        return x_AD, now_kept

    def halt(self, state_AD: Tensor, spent_A: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's weight of this step, the halting probability it has spent, and whether it halts.

        A token halts when it has spent 1 - epsilon, or at the last step; that step gets the remainder to 1.
        """
        # Under autocast the logit is bfloat16; sums that are compared with 1 - epsilon need finer steps.
        logit_A = self.halting(self._normalize(state_AD)).to(state_AD.dtype).squeeze(1)
        probability_A = torch.sigmoid(logit_A)
        sum_A = spent_A + probability_A
        halts_A = torch.full_like(sum_A, True, dtype=torch.bool) if last else sum_A >= 1 - self.config.halting_epsilon
        return torch.where(halts_A, 1 - spent_A, probability_A), sum_A, halts_A

    @staticmethod
    def _accumulate(output_XD: Tensor, share_AD: Tensor, layout: Layout) -> Tensor:
        if layout.active_A is None:
            return output_XD + share_AD
        return output_XD.index_add(0, layout.active_A, share_AD)


def count_parameters(config: CognateV1Config) -> int:
    """Return the number of trainable parameters, memory slots' initial values included, by arithmetic alone."""
    V, D, M = config.vocabulary_size, config.width, config.memory_slots
    block = 4 * D * D + 3 * D * config.feed_forward_width + 2 * D
    blocks = (config.prelude_blocks + config.core_blocks + config.coda_blocks) * block
    embedding_and_head = V * D + D * D + V
    ponder = D + config.max_steps * D + (D + 1)
    memory = 2 * M * D + 6 * D * D + 2 * (D + 1) + 1 + (D * config.heads + config.heads)
    return embedding_and_head + blocks + ponder + memory + D


def architecture_fingerprint(config: CognateV1Config) -> str:
    """Return a sha256 that two models share when, and only when, their weights are interchangeable."""
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in CognateV1(config).state_dict().items()}
    description = {
        "family": FAMILY,
        "semantics_version": SEMANTICS_VERSION,
        "rope_base": ROPE_BASE,
        "norm_epsilon": NORM_EPSILON,
        "config": dataclasses.asdict(config),
        "parameters": shapes,
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_to_json(config: CognateV1Config) -> dict[str, int | float | str]:
    """Return what `config.json` beside a model's weights holds."""
    return {"family": FAMILY, "semantics_version": SEMANTICS_VERSION, **dataclasses.asdict(config)}


def config_from_json(value: Mapping[str, object]) -> CognateV1Config:
    """Read what `config_to_json` wrote.

    Errors: ArchitectureMismatchError, when it describes another family, version or set of fields.
    """
    fields = {name: item for name, item in value.items() if name not in ("family", "semantics_version")}
    if (value.get("family"), value.get("semantics_version")) != (FAMILY, SEMANTICS_VERSION):
        found = f"{value.get('family')} v{value.get('semantics_version')}"
        raise ArchitectureMismatchError(f"config.json is of {found}; this is {FAMILY} v{SEMANTICS_VERSION}")
    expected = {field.name for field in dataclasses.fields(CognateV1Config)}
    if set(fields) != expected:
        raise ArchitectureMismatchError(f"config.json differs in the fields {sorted(set(fields) ^ expected)}")
    try:
        return CognateV1Config(**fields)  # type: ignore[arg-type]  # checked by __post_init__
    except (TypeError, ValueError) as error:
        raise ArchitectureMismatchError(f"config.json: {error}") from error


def save_state(model: CognateV1, path: Path) -> None:
    """Write the weights as safetensors, with the architecture's fingerprint in the header."""
    save_tensors(model.state_dict(), model.config, path)


def save_tensors(state: Mapping[str, Tensor], config: CognateV1Config, path: Path) -> None:
    """Write what `state_dict` of a model returned, or a copy of it, as `save_state` does."""
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={"architecture": architecture_fingerprint(config)})


def load_state(model: CognateV1, path: Path) -> None:
    """Fill the model with weights that `save_state` wrote. No code in the file is ever run: it holds none.

    Errors: ArchitectureMismatchError, when fingerprint, names, shapes or types differ.
    """
    expected = architecture_fingerprint(model.config)
    with safetensors.safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get("architecture")
        if found != expected:
            raise ArchitectureMismatchError(f"{path.name} is of architecture {found}, this model is {expected}")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(stored))
    wrong += [
        name
        for name in own.keys() & stored.keys()
        if (own[name].shape, own[name].dtype) != (stored[name].shape, stored[name].dtype)
    ]
    if wrong:
        raise ArchitectureMismatchError(f"{path.name}: missing, unexpected or of another shape: {', '.join(wrong)}")
    model.load_state_dict(stored)
