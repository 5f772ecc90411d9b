"""Cognate, version 1: the frozen forward pass that both services run.

    tokens -> embedding -> prelude -> core, 1 to N times under ACT, reading the LTM -> coda -> norm -> tied head
                              |         ^ weight-shared; halted tokens are dropped from the batch
                              +-> LTM: one delta-rule write per chunk, seen by later chunks only

- ACT (adaptive computation time, Graves 2016): every token takes its own number of core steps. A token that has halted
  is gathered out of the batch; its keys and values stay where later tokens find them.
- LTM (long-term memory): slots of contents under learned addresses. A chunk is written from the prelude's output, so
  all writes of a sequence are known before the core runs, and a ponder step reads what earlier chunks left.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class MemoryState:
    """What the long-term memory holds for each row: contents_BMD."""

    contents_BMD: Tensor

    def detach(self) -> MemoryState:
        """Return the same contents without their history, for the next sequence."""
        return MemoryState(self.contents_BMD.detach())


@dataclass(frozen=True, kw_only=True)
class MemoryStatistics:
    """How the memory was used in one forward pass; scalars without gradient.

    write_rate: mean write gate of the valid tokens, 0 to 1.
    slot_utilization: share of slots that got at least half of an even share of the writes, 0 to 1.
    read_entropy_nats: mean entropy of the read attention over slots in the first ponder step; at most ln(slots).
        None when the memory was not read.
    """

    write_rate: Tensor
    slot_utilization: Tensor
    read_entropy_nats: Tensor | None


@dataclass(frozen=True, kw_only=True)
class CognateOutput:
    """The result of a forward pass.

    hidden_BTD: after the final norm, before the head; `CognateV1.logits` takes it.
    halting_BTN: the weight of each ponder step's state in the output; sums to 1 for valid tokens, 0 for padding.
    steps_BT: int64, ponder steps taken; 0 for padding.
    memory: after the last chunk, whole or not. Detach it before it is given to another sequence.
    memory_statistics: only where `statistics=True` asked for them.
    """

    hidden_BTD: Tensor
    halting_BTN: Tensor
    steps_BT: Tensor
    memory: MemoryState
    memory_statistics: MemoryStatistics | None


class _Linear(nn.Linear):
    """A linear map that starts as zeros: values come from a file or from the pretraining service."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_D = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale_D, NORM_EPSILON)


def normalize(x: Tensor) -> Tensor:
    """Bring the last dimension to a root mean square of 1, without parameters."""
    return F.rms_norm(x, (x.shape[-1],), None, NORM_EPSILON)


def rotary_angles(positions: int, head_width: int, device: torch.device) -> Tensor:
    """Return the angle of every position and pair of a head: (positions, head_width / 2), float32."""
    frequency_K = ROPE_BASE ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    return torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequency_K)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs of the last dimension, first half with second half."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


@dataclass(frozen=True)
class _Layout:
    """Where the active tokens sit in the batch, and whom they may attend to.

    active_A: their places in the flattened (B * T) batch, ascending; None when all of it is active.
    mask_B1TT: True where a query may see a key; None for plain causal attention.
    """

    B: int
    T: int
    cosine_TK: Tensor
    sine_TK: Tensor
    mask_B1TT: Tensor | None
    active_A: Tensor | None = None

    def keep(self, kept_A: Tensor) -> _Layout:
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


def _layout(tokens_BT: Tensor, segment_ids_BT: Tensor | None, head_width: int) -> _Layout:
    B, T = tokens_BT.shape
    angle_TK = rotary_angles(T, head_width, tokens_BT.device)
    mask_B1TT = None
    if segment_ids_BT is not None:
        same_BTT = segment_ids_BT.unsqueeze(2) == segment_ids_BT.unsqueeze(1)
        mask_B1TT = same_BTT.tril().unsqueeze(1)
    return _Layout(B, T, angle_TK.cos(), angle_TK.sin(), mask_B1TT)


def _wide_on_cpu(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast away from attention on a CPU: its bfloat16 kernels take two to four times as long as float32's."""
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else contextlib.nullcontext()


# Keys and values of every token of the batch, (B * T, H, K) each: a halted token's stay as it left them.
_KeyValue = tuple[Tensor, Tensor]


class _Attention(nn.Module):
    """Causal self-attention with rotary positions and RMS-normalized queries and keys."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = _Linear(config.width, 3 * config.width, bias=False)
        self.output = _Linear(config.width, config.width, bias=False)

    def forward(self, x_AD: Tensor, layout: _Layout, kept: _KeyValue | None) -> tuple[Tensor, _KeyValue]:
        """Attend from the active tokens to all; return their output and everyone's keys and values."""
        A, D = x_AD.shape
        query, key, value = self.query_key_value(x_AD).view(A, 3, self.heads, D // self.heads).unbind(1)
        query = layout.rotate(normalize(query))
        key = layout.rotate(normalize(key))
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


class _Block(nn.Module):
    """A pre-norm transformer block over the active tokens."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.attention_norm = _RMSNorm(config.width)
        self.attention = _Attention(config)
        self.feed_forward_norm = _RMSNorm(config.width)
        self.feed_forward = _SwiGLU(config)

    def forward(self, x_AD: Tensor, layout: _Layout, kept: _KeyValue | None = None) -> tuple[Tensor, _KeyValue]:
        mixed_AD, kept = self.attention(self.attention_norm(x_AD), layout, kept)
        x_AD = x_AD + mixed_AD
        return x_AD + self.feed_forward(self.feed_forward_norm(x_AD)), kept


@dataclass(frozen=True)
class _Readable:
    """The keys and values that each chunk of each row may read: (B * C, H, M, K)."""

    key_XHMK: Tensor
    value_XHMK: Tensor
    C: int


class LongTermMemory(nn.Module):
    """Slots that are written once per chunk by the delta rule, and read in every ponder step.

    Write, for the tokens t of a chunk, with contents S at its start and S0 the learned initial contents:
        a_t = softmax over slots of <norm(K x_t), norm(address)> / sqrt(D)
        e_t = V x_t - a_t S                                   what the memory gets wrong
        u_t = |e_t| / (|V x_t| + |a_t S|)                     surprise, 0 to 1
        g_t = sigmoid(gate(x_t) + surprise_scale * u_t)       0 for padding
        S  <- S0 + r (S - S0) + sum_t a_t g_t e_t / max(1, sum_t a_t)      r = sigmoid(mean of retention(x_t))
    The normalizer keeps the eigenvalues of the correction between 0 and 1, so that contents cannot blow up. A chunk
    that is all padding changes nothing.

    Read: heads of attention from x over the slots; keys from address + contents, values from contents; each head has a
    gate, sigmoid(read_gate(x)).
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
        self.retention = _Linear(D, 1)
        self.surprise_scale = nn.Parameter(torch.zeros(()))
        self.read_query = _Linear(D, D, bias=False)
        self.read_key = _Linear(D, D, bias=False)
        self.read_value = _Linear(D, D, bias=False)
        self.read_output = _Linear(D, D, bias=False)
        self.read_gate = _Linear(D, config.heads)

    def start(self, rows: int) -> MemoryState:
        """Return the initial contents for so many rows."""
        return MemoryState(self.initial_MD.expand(rows, -1, -1))

    def write(self, source_BTD: Tensor, state: MemoryState, valid_BT: Tensor | None) -> _Written:
        """Write all chunks in order; return the contents before each of them, and after the last."""
        x_BTD = normalize(source_BTD)
        scale = 1 / math.sqrt(x_BTD.shape[-1])
        address_BTM = F.linear(normalize(self.write_key(x_BTD)), normalize(self.addresses_MD) * scale).softmax(-1)
        if valid_BT is None:
            valid_BT = torch.ones_like(x_BTD[..., 0], dtype=torch.bool)
        valid_BT1 = valid_BT.unsqueeze(-1).to(x_BTD.dtype)
        address_BTM = address_BTM * valid_BT1
        per_chunk = zip(
            *(
                torch.split(per_token, self.chunk, dim=1)
                for per_token in (
                    address_BTM,
                    self.write_value(x_BTD),
                    self.write_gate(x_BTD),
                    self.retention(x_BTD),
                    valid_BT1,
                )
            ),
            strict=True,
        )
        contents_BMD, before, gates = state.contents_BMD, [], []
        for chunk in per_chunk:
            before.append(contents_BMD)
            contents_BMD, gate_BL1 = self._write_chunk(contents_BMD, *chunk)
            gates.append(gate_BL1)
        return _Written(before, MemoryState(contents_BMD), address_BTM, torch.cat(gates, 1), valid_BT1)

    def _write_chunk(
        self,
        contents_BMD: Tensor,
        address_BLM: Tensor,
        value_BLD: Tensor,
        gate_BL1: Tensor,
        retention_BL1: Tensor,
        valid_BL1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        predicted_BLD = address_BLM @ contents_BMD
        error_BLD = value_BLD - predicted_BLD
        size_BL1 = _length(value_BLD) + _length(predicted_BLD)
        surprise_BL1 = _length(error_BLD) / size_BL1
        gate_BL1 = torch.sigmoid(gate_BL1 + self.surprise_scale * surprise_BL1) * valid_BL1
        tokens_B11 = valid_BL1.sum(1, keepdim=True)
        mean_retention_B11 = (retention_BL1 * valid_BL1).sum(1, keepdim=True) / tokens_B11.clamp(min=1)
        # A chunk of nothing but padding forgets nothing.
        kept_B11 = torch.where(tokens_B11 > 0, torch.sigmoid(mean_retention_B11), 1.0)
        correction_BMD = (address_BLM * gate_BL1).transpose(1, 2) @ error_BLD
        share_BM1 = address_BLM.sum(1).clamp(min=1).unsqueeze(-1)
        # torch.lerp(a, b, r) = a + r (b - a)
        retained_BMD = torch.lerp(self.initial_MD, contents_BMD, kept_B11)
        return retained_BMD + correction_BMD / share_BM1, gate_BL1

    def readable(self, before: list[Tensor]) -> _Readable:
        """Project the contents that each chunk may read, once for all ponder steps."""
        contents_BCMD = torch.stack(before, 1)
        B, C, M, D = contents_BCMD.shape
        heads = (B * C, M, self.heads, D // self.heads)
        key = normalize(self.read_key(contents_BCMD + self.addresses_MD).view(heads)).transpose(1, 2)
        value = self.read_value(contents_BCMD).view(heads).transpose(1, 2)
        return _Readable(key, value, C)

    def read(self, x_AD: Tensor, layout: _Layout, readable: _Readable) -> Tensor:
        """Return what every active token reads from the memory that its chunk may see."""
        A, D = x_AD.shape
        query_XHLK = self._queries(x_AD, layout, readable.C)
        with _wide_on_cpu(x_AD.device):
            mixed_XHLK = F.scaled_dot_product_attention(
                query_XHLK, readable.key_XHMK.to(query_XHLK.dtype), readable.value_XHMK.to(query_XHLK.dtype)
            )
        mixed_BTD = mixed_XHLK.transpose(1, 2).reshape(layout.B, readable.C * self.chunk, D)[:, : layout.T]
        return self.let_through(layout.gather(mixed_BTD.reshape(layout.B * layout.T, D)).view(A, self.heads, -1), x_AD)

    def queries(self, x_AD: Tensor) -> Tensor:
        """Return what every token asks the memory for: (A, H, K)."""
        return normalize(self.read_query(normalize(x_AD)).view(len(x_AD), self.heads, -1))

    def let_through(self, mixed_AHK: Tensor, x_AD: Tensor) -> Tensor:
        """Gate each head's find and map all of them to the model's width: (A, D)."""
        gated_AHK = mixed_AHK * torch.sigmoid(self.read_gate(normalize(x_AD))).unsqueeze(-1)
        read_AD: Tensor = self.read_output(gated_AHK.flatten(1))
        return read_AD

    def _queries(self, x_AD: Tensor, layout: _Layout, C: int) -> Tensor:
        D = x_AD.shape[1]
        query_BTD = layout.scatter(self.queries(x_AD).flatten(1)).view(layout.B, layout.T, D)
        missing = C * self.chunk - layout.T
        if missing:
            query_BTD = F.pad(query_BTD, (0, 0, 0, missing))
        return query_BTD.reshape(layout.B * C, self.chunk, self.heads, -1).transpose(1, 2)

    @torch.no_grad()
    def statistics(
        self, x_AD: Tensor, layout: _Layout, written: _Written, readable: _Readable | None
    ) -> MemoryStatistics:
        """Measure the writes of a pass, and the reads that `x_AD` would make."""
        tokens = written.valid_BT1.sum().clamp(min=1)
        shares_M = (written.address_BTM * written.gate_BT1).sum((0, 1))
        even = shares_M.mean()
        entropy = None
        if readable is not None:
            query_XHLK = self._queries(x_AD, layout, readable.C)
            score_XHLM = query_XHLK @ readable.key_XHMK.transpose(-1, -2) / math.sqrt(query_XHLK.shape[-1])
            entropy_XHL = torch.special.entr(score_XHLM.softmax(-1)).sum(-1)
            entropy_BCL = entropy_XHL.mean(1).view(layout.B, readable.C * self.chunk)[:, : layout.T]
            entropy = (entropy_BCL.unsqueeze(-1) * written.valid_BT1).sum() / tokens
        return MemoryStatistics(
            write_rate=written.gate_BT1.sum() / tokens,
            slot_utilization=(shares_M >= 0.5 * even).float().mean(),
            read_entropy_nats=entropy,
        )


@dataclass(frozen=True)
class _Written:
    """The result of `LongTermMemory.write`; `before` has one (B, M, D) per chunk."""

    before: list[Tensor]
    after: MemoryState
    address_BTM: Tensor
    gate_BT1: Tensor
    valid_BT1: Tensor


def _length(x: Tensor) -> Tensor:
    """Euclidean length of the last dimension, kept; never 0, so that its gradient exists."""
    return (x.square().sum(-1, keepdim=True) + NORM_EPSILON).sqrt()


class CognateV1(nn.Module):
    """Cognate, version 1. Holds zeros until its values are loaded; see the file's head for the whole picture."""

    def __init__(self, config: CognateV1Config) -> None:
        super().__init__()
        self.config = config
        V, D = config.vocabulary_size, config.width
        self.embedding = nn.Embedding(V, D, _weight=torch.zeros(V, D))
        self.prelude = nn.ModuleList(_Block(config) for _ in range(config.prelude_blocks))
        self.core = nn.ModuleList(_Block(config) for _ in range(config.core_blocks))
        self.coda = nn.ModuleList(_Block(config) for _ in range(config.coda_blocks))
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

        memory: contents to start from; None starts with the initial ones.
        valid_BT: bool, False for padding; None when there is none.
        segment_ids_BT: integers; attention stays among equal ids. None: each row is one document.
        fixed_steps: switch ACT off; every token takes so many steps and the last one's state is the output.
        read_memory: False ablates the memory's reads (it is still written).
        Errors: ValueError, when fixed_steps is not within 1 and max_steps.
        """
        if fixed_steps is not None and not 1 <= fixed_steps <= self.config.max_steps:
            raise ValueError(f"fixed_steps must be within 1 and {self.config.max_steps}, got {fixed_steps}")
        B, T = tokens_BT.shape
        layout = _layout(tokens_BT, segment_ids_BT, self.config.width // self.config.heads)
        x_AD = normalize(self.embedding(tokens_BT)).view(B * T, -1)
        for block in self.prelude:
            x_AD, _ = block(x_AD, layout)
        written = self.memory.write(x_AD.view(B, T, -1), memory or self.memory.start(B), valid_BT)
        readable = self.memory.readable(written.before) if read_memory else None
        measured = self.memory.statistics(x_AD, layout, written, readable) if statistics else None
        x_AD, halting_BTN, steps_BT = self._ponder(x_AD, layout, readable, valid_BT, fixed_steps)
        for block in self.coda:
            x_AD, _ = block(x_AD, layout)
        return CognateOutput(
            hidden_BTD=self.final_norm(x_AD).view(B, T, -1),
            halting_BTN=halting_BTN,
            steps_BT=steps_BT,
            memory=written.after,
            memory_statistics=measured,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits: (..., D) -> (..., V)."""
        return F.linear(self.head(hidden), self.embedding.weight, self.head_bias_V)

    def _ponder(
        self,
        prelude_XD: Tensor,
        layout: _Layout,
        readable: _Readable | None,
        valid_BT: Tensor | None,
        fixed_steps: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the core until every token has halted; X = B * T. Steps without an active token are not run."""
        B, T = layout.B, layout.T
        if valid_BT is not None and not bool(valid_BT.all()):
            layout = layout.keep(valid_BT.reshape(-1).nonzero().squeeze(1))
        state_AD = layout.gather(prelude_XD)
        spent_A = state_AD.new_zeros(state_AD.shape[0])
        output_XD = torch.zeros_like(prelude_XD)
        halting_NX: list[Tensor] = []
        steps_X = torch.zeros(B * T, dtype=torch.int64, device=prelude_XD.device)
        kept: list[_KeyValue | None] = [None] * len(self.core)
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
        layout: _Layout,
        readable: _Readable | None,
        kept: list[_KeyValue | None],
    ) -> tuple[Tensor, list[_KeyValue | None]]:
        x_AD = torch.addcmul(state_AD + self.step_vectors_ND[step], self.inject_D, prelude_AD)
        if readable is not None:
            x_AD = x_AD + self.memory.read(x_AD, layout, readable)
        now_kept: list[_KeyValue | None] = []
        for block, before in zip(self.core, kept, strict=True):
            x_AD, key_value = block(x_AD, layout, before)
            now_kept.append(key_value)
        return x_AD, now_kept

    def halt(self, state_AD: Tensor, spent_A: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's weight of this step, the halting probability it has spent, and whether it halts.

        A token halts when it has spent 1 - epsilon, or at the last step; that step gets the remainder to 1.
        """
        # Under autocast the logit is bfloat16; sums that are compared with 1 - epsilon need finer steps.
        logit_A = self.halting(normalize(state_AD)).to(state_AD.dtype).squeeze(1)
        probability_A = torch.sigmoid(logit_A)
        sum_A = spent_A + probability_A
        halts_A = torch.full_like(sum_A, True, dtype=torch.bool) if last else sum_A >= 1 - self.config.halting_epsilon
        return torch.where(halts_A, 1 - spent_A, probability_A), sum_A, halts_A

    @staticmethod
    def _accumulate(output_XD: Tensor, share_AD: Tensor, layout: _Layout) -> Tensor:
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
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"architecture": architecture_fingerprint(model.config)})


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
