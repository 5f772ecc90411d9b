"""Continuing texts with a Cognate, one token at a time, over kept keys and values: `generate`.

What comes out equals the full forward pass on every prefix (up to the order of sums), at the price of the new tokens
alone. Three things are kept for each row, and follow from how `cognate_v1` works:

- keys and values of every block's every application: the core's blocks have one table for each ponder step. A token
  that halted at an earlier step is in the later tables as it left them, because later tokens attend to it there.
- the memory's slots after the last whole chunk, which is all that tokens of the present chunk may read.
- the present chunk's tokens and the prelude's output for them, until it is whole and can be written.

Rows may have prompts of different lengths; a row that has ended leaves the batch.
"""

# B rows, L new tokens of each, all within one chunk, X = B * L, A of them active, S kept positions; H, K, D, N as in
# `cognate_v1`.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training_common.models import cognate_v1 as v1
from training_common.models.cognate_v1 import CognateV1, MemoryState, Recall


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a row was continued with: new tokens, the stop token among them if it came, and each one's core steps.

    steps: of the token that each new one was predicted from.
    """

    tokens: tuple[int, ...]
    steps: tuple[int, ...]


@torch.no_grad()
def generate(
    model: CognateV1,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token: int | None = None,
    fixed_steps: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    memory: MemoryState | None = None,
) -> list[Continuation]:
    """Continue every prompt until `stop_token` or for `max_new_tokens`.

    memory: what the rows' memories hold at the start, one for each prompt; None: nothing.
    fixed_steps: every token takes so many core steps, as in the forward pass. None: adaptive.
    temperature: 0 takes the likeliest token; otherwise one is drawn from `generator`.
    Errors: ValueError, when a prompt is empty or an argument is out of its range.
    """
    _check(model, prompts, max_new_tokens, fixed_steps, temperature)
    if not prompts or max_new_tokens == 0:
        return [Continuation(tokens=(), steps=()) for _ in prompts]
    memory = memory or model.memory.start(len(prompts))
    texts = _Texts(model, prompts, memory, max_new_tokens=max_new_tokens, fixed_steps=fixed_steps)
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in prompts]
    ends = texts.read_prompts()
    while True:
        next_B = _choose(model.log_probabilities(ends.hidden_BD, ends.recall_B), temperature, generator)
        for row, token, steps in zip(texts.rows, next_B.tolist(), ends.steps_B.tolist(), strict=True):
            found[row][0].append(token)
            found[row][1].append(steps)
        ends_B = [len(found[row][0]) == max_new_tokens or found[row][0][-1] == stop_token for row in texts.rows]
        if all(ends_B):
            return [Continuation(tokens=tuple(tokens), steps=tuple(steps)) for tokens, steps in found]
        if any(ends_B):
            going = torch.tensor([not ends for ends in ends_B], device=next_B.device).nonzero().squeeze(1)
            texts.keep_rows(going)
            next_B = next_B[going]
        ends = texts.read(next_B.unsqueeze(1))


def _check(
    model: CognateV1,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    fixed_steps: int | None,
    temperature: float,
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty: give it one token at least, for instance the one that begins")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if fixed_steps is not None and not 1 <= fixed_steps <= model.config.max_steps:
        raise ValueError(f"fixed_steps must be within 1 and {model.config.max_steps}, got {fixed_steps}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")


def _choose(log_p_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return log_p_BV.argmax(-1)
    return torch.multinomial((log_p_BV / temperature).softmax(-1), 1, generator=generator).squeeze(1)


class _Table:
    """Keys and values of one block application, for every position of every row: (B, S, H, K) each."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.key, self.value = like.new_zeros(shape), like.new_zeros(shape)

    def put(self, places: _Places, key_AHK: Tensor, value_AHK: Tensor) -> None:
        self.key[places.row_A, places.position_A] = key_AHK
        self.value[places.row_A, places.position_A] = value_AHK

    def copy_from(self, other: _Table, places: _Places) -> None:
        self.put(
            places,
            other.key[places.row_A, places.position_A],
            other.value[places.row_A, places.position_A],
        )

    def keep_rows(self, going: Tensor) -> None:
        self.key, self.value = self.key[going], self.value[going]


@dataclass(frozen=True)
class _Places:
    """Where tokens stand: their row and position, and their index among the X new ones."""

    row_A: Tensor
    position_A: Tensor
    new_A: Tensor

    def __getitem__(self, kept_A: Tensor) -> _Places:
        return _Places(self.row_A[kept_A], self.position_A[kept_A], self.new_A[kept_A])


@dataclass(frozen=True)
class _Ends:
    """What the newest token of every row gives: its state, what it recalls and its core steps."""

    hidden_BD: Tensor
    recall_B: Recall
    steps_B: Tensor

    def where(self, chosen_B: Tensor, other: _Ends) -> _Ends:
        """Return these where chosen, and the other's elsewhere."""
        return _Ends(
            v1.choose_rows(chosen_B, self.hidden_BD, other.hidden_BD),
            self.recall_B.where(chosen_B, other.recall_B),
            v1.choose_rows(chosen_B, self.steps_B, other.steps_B),
        )


class _Texts:
    """The rows that are being continued, and all that is kept of them."""

    def __init__(
        self,
        model: CognateV1,
        prompts: Sequence[Sequence[int]],
        memory: MemoryState,
        *,
        max_new_tokens: int,
        fixed_steps: int | None,
    ) -> None:
        self.rows = list(range(len(prompts)))
        self._model, self._prompts, self._fixed_steps = model, prompts, fixed_steps
        weight = model.embedding.weight
        config, B = model.config, len(prompts)
        S = max(len(prompt) for prompt in prompts) + max_new_tokens
        shape = (B, S, config.heads, config.width // config.heads)
        self._prelude = [_Table(shape, weight) for _ in model.prelude]
        self._core = [[_Table(shape, weight) for _ in model.core] for _ in range(config.max_steps)]
        self._coda = [_Table(shape, weight) for _ in model.coda]
        self._memory = memory
        self._surprise_V = model.surprises()
        self._readable = model.memory.readable([memory])
        self._chunk_BLD = weight.new_zeros(B, config.memory_chunk, config.width)
        self._chunk_BL = torch.zeros(B, config.memory_chunk, dtype=torch.int64, device=weight.device)
        self._length_B = torch.zeros(B, dtype=torch.int64, device=weight.device)
        angle = v1.rotary_angles(S, shape[-1], weight.device)
        self._cosine_SK, self._sine_SK = angle.cos(), angle.sin()

    def keep_rows(self, going: Tensor) -> None:
        """Let the other rows go."""
        self.rows = [self.rows[index] for index in going.tolist()]
        for table in (*self._prelude, *(table for step in self._core for table in step), *self._coda):
            table.keep_rows(going)
        self._memory = self._memory.map(lambda part: part[going])
        self._chunk_BLD, self._chunk_BL = self._chunk_BLD[going], self._chunk_BL[going]
        self._readable = self._model.memory.readable([self._memory])
        self._length_B = self._length_B[going]

    def read_prompts(self) -> _Ends:
        """Read the prompts, chunk by chunk, to the end of each."""
        chunk, device = self._model.config.memory_chunk, self._length_B.device
        longest = max(len(prompt) for prompt in self._prompts)
        tokens_BT = torch.zeros(len(self._prompts), longest, dtype=torch.int64, device=device)
        for row, prompt in enumerate(self._prompts):
            tokens_BT[row, : len(prompt)] = torch.tensor(prompt, device=device)
        lengths_B = torch.tensor([len(prompt) for prompt in self._prompts], device=device)
        ends: list[_Ends] = []
        for start in range(0, longest, chunk):
            tokens_BL = tokens_BT[:, start : start + chunk]
            valid_BL = torch.arange(start, start + tokens_BL.shape[1], device=device) < lengths_B.unsqueeze(1)
            last_B = (lengths_B - 1 - start).clamp(max=tokens_BL.shape[1] - 1)
            now = self._advance(tokens_BL, valid_BL, last_B.clamp(min=0))
            ends = [now.where(last_B >= 0, before) for before in ends] or [now]
        return ends[0]

    def read(self, tokens_B1: Tensor) -> _Ends:
        """Read one more token of every row."""
        valid_B1 = torch.ones_like(tokens_B1, dtype=torch.bool)
        return self._advance(tokens_B1, valid_B1, torch.zeros_like(self._length_B))

    def _advance(self, tokens_BL: Tensor, valid_BL: Tensor, last_B: Tensor) -> _Ends:
        """Read the valid ones of L tokens of every row, which lie in one chunk; return what the last of each gives."""
        model = self._model
        B, L = tokens_BL.shape
        positions_BL = self._length_B.unsqueeze(1) + torch.arange(L, device=tokens_BL.device)
        every = _Places(
            torch.arange(B, device=tokens_BL.device).repeat_interleave(L),
            positions_BL.reshape(-1),
            torch.arange(B * L, device=tokens_BL.device),
        )
        places = every[valid_BL.reshape(-1).nonzero().squeeze(1)]
        x_AD = v1.normalize(model.embedding(tokens_BL.reshape(-1)[places.new_A]))
        for block, table in zip(model.prelude, self._prelude, strict=True):
            x_AD = self._block(block, x_AD, places, table, (B, L))
        output_AD, steps_A = self._ponder(x_AD, places, (B, L))
        for block, table in zip(model.coda, self._coda, strict=True):
            output_AD = self._block(block, output_AD, places, table, (B, L))
        hidden_XD = output_AD.new_zeros(B * L, output_AD.shape[1])
        hidden_XD[places.new_A] = model.final_norm(output_AD)
        steps_X = torch.zeros(B * L, dtype=torch.int64, device=tokens_BL.device)
        steps_X[places.new_A] = steps_A
        ends_B = torch.arange(B, device=tokens_BL.device) * L + last_B
        hidden_BD = hidden_XD[ends_B]
        # Before the write: a token reads what earlier chunks left, and may be the last of its own.
        recall = model.memory.recall(hidden_BD.unsqueeze(1), self._readable).map(lambda part: part[:, 0])
        self._write(tokens_BL, x_AD, places, valid_BL.sum(1))
        return _Ends(hidden_BD, recall, steps_X[ends_B])

    def _block(self, block: Any, x_AD: Tensor, places: _Places, table: _Table, shape: tuple[int, int]) -> Tensor:
        attention = block.attention
        A, D = x_AD.shape
        heads = (A, 3, attention.heads, D // attention.heads)
        query_AHK, key_AHK, value_AHK = attention.query_key_value(block.attention_norm(x_AD)).view(heads).unbind(1)
        query_AHK, key_AHK = (self._rotate(v1.normalize(part), places) for part in (query_AHK, key_AHK))
        table.put(places, key_AHK, value_AHK)
        x_AD = x_AD + attention.output(self._attend(query_AHK, places, table, shape))
        fed_AD: Tensor = block.feed_forward(block.feed_forward_norm(x_AD))
        return x_AD + fed_AD

    def _rotate(self, x_AHK: Tensor, places: _Places) -> Tensor:
        cosine, sine = (angles[places.position_A].unsqueeze(1) for angles in (self._cosine_SK, self._sine_SK))
        return v1.rotate(x_AHK, cosine, sine)

    def _attend(self, query_AHK: Tensor, places: _Places, table: _Table, shape: tuple[int, int]) -> Tensor:
        """Attend from active tokens to all positions of their rows up to their own."""
        (B, L), (A, H, K) = shape, query_AHK.shape
        end = int(places.position_A.max()) + 1
        if L == 1:  # one token of each of A rows
            rows_A = places.row_A
            key, value = (kept[rows_A, :end] if A < B else kept[:, :end] for kept in (table.key, table.value))
            seen = torch.arange(end, device=rows_A.device) <= places.position_A.unsqueeze(1)
            query = query_AHK.unsqueeze(2)
            mixed = F.scaled_dot_product_attention(
                query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen[:, None, None]
            )
            return mixed.reshape(A, H * K)
        query_XHK = query_AHK.new_zeros(B * L, H, K)
        query_XHK[places.new_A] = query_AHK
        first_B = self._length_B.unsqueeze(1) + torch.arange(L, device=query_AHK.device)
        seen_BLS = torch.arange(end, device=query_AHK.device) <= first_B.unsqueeze(2)
        mixed = F.scaled_dot_product_attention(
            query_XHK.view(B, L, H, K).transpose(1, 2),
            table.key[:, :end].transpose(1, 2),
            table.value[:, :end].transpose(1, 2),
            attn_mask=seen_BLS.unsqueeze(1),
        )
        return mixed.transpose(1, 2).reshape(B * L, H * K)[places.new_A]

    def _ponder(self, prelude_AD: Tensor, places: _Places, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Apply the core to the tokens that go on, and leave every step's table complete for later tokens."""
        model, everywhere = self._model, places
        A = prelude_AD.shape[0]
        limit = self._fixed_steps or model.config.max_steps
        output_AD, steps_A = torch.zeros_like(prelude_AD), torch.zeros(A, dtype=torch.int64, device=prelude_AD.device)
        going = torch.arange(A, device=prelude_AD.device)
        state, spent = prelude_AD, prelude_AD.new_zeros(A)
        for step in range(limit):
            if step:
                for table, before in zip(self._core[step], self._core[step - 1], strict=True):
                    table.copy_from(before, everywhere)
            if not len(going):
                continue
            state = self._core_step(step, state, prelude_AD[going], everywhere[going], shape)
            last = step == limit - 1
            if self._fixed_steps is None:
                weight, spent, halts = model.halt(state, spent, last=last)
            else:
                weight, halts = torch.full_like(spent, float(last)), torch.full_like(spent, last, dtype=torch.bool)
            output_AD.index_add_(0, going, weight.unsqueeze(1) * state)
            steps_A[going] = step + 1
            kept = (~halts).nonzero().squeeze(1)
            going, state, spent = going[kept], state[kept], spent[kept]
        return output_AD, steps_A

    def _core_step(
        self, step: int, state_AD: Tensor, prelude_AD: Tensor, places: _Places, shape: tuple[int, int]
    ) -> Tensor:
        model = self._model
        x_AD = torch.addcmul(state_AD + model.step_vectors_ND[step], model.inject_D, prelude_AD)
        x_AD = x_AD + self._read_memory(x_AD, places, shape)
        for block, table in zip(model.core, self._core[step], strict=True):
            x_AD = self._block(block, x_AD, places, table, shape)
        return x_AD

    def _read_memory(self, x_AD: Tensor, places: _Places, shape: tuple[int, int]) -> Tensor:
        memory, (B, L), rows_A = self._model.memory, shape, places.row_A
        query_AHK = memory.queries(x_AD)
        key_BHMK, value_BHMK = self._readable.key_XHMK, self._readable.value_XHMK
        if L == 1:
            mixed = F.scaled_dot_product_attention(query_AHK.unsqueeze(2), key_BHMK[rows_A], value_BHMK[rows_A])
            return memory.let_through(mixed.squeeze(2), x_AD)
        query_XHK = query_AHK.new_zeros(B * L, *query_AHK.shape[1:])
        query_XHK[places.new_A] = query_AHK
        mixed = F.scaled_dot_product_attention(
            query_XHK.view(B, L, *query_XHK.shape[1:]).transpose(1, 2), key_BHMK, value_BHMK
        )
        return memory.let_through(mixed.transpose(1, 2).flatten(0, 1)[places.new_A], x_AD)

    def _write(self, tokens_BL: Tensor, prelude_AD: Tensor, places: _Places, added_B: Tensor) -> None:
        """Keep the tokens and the prelude's output, and write the rows' chunks that they make whole."""
        chunk = self._model.config.memory_chunk
        self._chunk_BLD[places.row_A, places.position_A % chunk] = prelude_AD
        self._chunk_BL[places.row_A, places.position_A % chunk] = tokens_BL.reshape(-1)[places.new_A]
        self._length_B = self._length_B + added_B
        whole = ((self._length_B % chunk == 0) & (added_B > 0)).nonzero().squeeze(1)
        if len(whole):
            held = self._memory.map(lambda part: part[whole])
            written = self._model.memory.write(
                self._chunk_BL[whole], self._chunk_BLD[whole], self._surprise_V, held, None
            )
            self._memory = self._memory.put(whole, written.after)
            self._readable = self._model.memory.readable([self._memory])
