"""What the trainer reads its tokens from: the `TokenStream` protocol and its `Batch`.

The real stream (tokenized documents, packed into rows) is in `cognate_server.data`; a test can hand the trainer any
object of this shape. Shapes: B rows, T tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from training_common.attempt import Json
from training_common.team import Team


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of tokens: position t is read, position t + 1 is its target.

    tokens: int64, (B, T + 1).
    segment_ids: int64, (B, T + 1), or None. Tokens of one row that share an id are one document; attention stays
        within it. A negative id is padding, which is neither trained on nor written to the memory. A target whose
        segment differs from its input's is not trained on. None: every row is one document without padding.
    fresh_rows: bool, (B,), or None. False says that the row goes on where the same row of the batch before it ended, so
        the long-term memory is carried over (detached). None: every row starts with the memory's initial contents.
    """

    tokens: Tensor
    segment_ids: Tensor | None = None
    fresh_rows: Tensor | None = None


class TokenStream(Protocol):
    """An endless, resumable source of training batches, with fixed validation data beside it."""

    def next_batch(self) -> Batch:
        """Return the next training batch; every one has the same shape."""

    def state_dict(self) -> Mapping[str, Json]:
        """Return the position as JSON: what `load_state_dict` needs to give the same batches from here on."""

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position that `state_dict` returned."""

    def validation_batches(self) -> Iterable[Batch]:
        """Return the validation batches: the same ones in the same order at every call, none of them trained on."""

    def unigram_counts(self) -> Tensor:
        """Return how often each token of the vocabulary occurs in the training data: int64, (vocabulary size,)."""


class DealtStream:
    """A stream that one process reads, whose batches all processes of a team share row by row.

    The stream's position is that of whole batches, so it is the same for any number of processes.

    stream: on the first process. rows, length: B and T of a whole batch.
    """

    def __init__(self, stream: TokenStream | None, team: Team, *, rows: int, length: int) -> None:
        self._stream, self._team = stream, team
        self._shape = (rows, length + 1)

    def next_batch(self) -> Batch:
        """Return this process's rows of the next batch. Errors: ValueError, when the stream has another shape."""
        dealt = self._team.deal(self._read)
        return Batch(**{name: self._team.mine(part) for name, part in dealt.items()})

    def _read(self) -> dict[str, Tensor]:
        batch = self._read_stream().next_batch()
        if tuple(batch.tokens.shape) != self._shape:
            raise ValueError(f"the stream's batches are {tuple(batch.tokens.shape)}, the config asks for {self._shape}")
        return {name: part for name, part in vars(batch).items() if part is not None}

    def unigram_counts(self) -> Tensor:
        """Return the stream's counts, on every process."""
        return self._team.deal(lambda: {"counts_V": self._read_stream().unigram_counts()})["counts_V"]

    def state_dict(self) -> Mapping[str, Json]:
        """Return the stream's position, and nothing on processes that do not read it."""
        return {} if self._stream is None else self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position, where this process reads the stream."""
        if self._stream is not None:
            self._stream.load_state_dict(state)

    def _read_stream(self) -> TokenStream:
        if self._stream is None:
            raise RuntimeError("only the team's first process reads the stream")
        return self._stream
