"""Documents packed into rows without padding: `Corpus` and the resumable `Packer`.

Each of a batch's rows reads its own line of documents and goes on in the next batch where it stopped, so that a long
document runs through several rows and its long-term memory goes with it. The token on the border is read twice: as the
last target of one row and the first input of the next. B rows, T tokens that are trained on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cognate_server.stream import Batch
from training_common.attempt import Json

_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents end to end: document n is `tokens[offsets[n] : offsets[n + 1]]`. uint16 holds 15,616."""

    name: str
    tokens: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.uint16]:
        """Return one document's tokens."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass
class _Lane:
    """Where one row reads: the n-th document drawn from a corpus, and the token that its next row starts with."""

    corpus: int
    draw: int
    offset: int


class Packer:
    """An endless source of batches from weighted corpora, exactly resumable.

    Every corpus is read in a new shuffled order each time round; the corpus that lags most behind its weight is drawn
    from next. Everything follows from the seed and the position.
    """

    def __init__(
        self, corpora: Sequence[Corpus], *, weights: Sequence[float], batch_size: int, sequence_length: int, seed: int
    ) -> None:
        if not corpora or len(weights) != len(corpora) or any(corpus.documents == 0 for corpus in corpora):
            raise ValueError("every corpus needs a document and a weight")
        if batch_size < 1 or sequence_length < 1:
            raise ValueError(f"batch_size and sequence_length must be positive, got {batch_size} and {sequence_length}")
        self._corpora = tuple(corpora)
        self._shares = [weight / sum(weights) for weight in weights]
        self._length = sequence_length
        self._seed = seed
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._drawn = [0] * len(corpora)
        self._lanes = [self._draw() for _ in range(batch_size)]

    def next_batch(self) -> Batch:
        """Return the next batch, with a segment for each document and a mark on rows that start one."""
        shape = (len(self._lanes), self._length + 1)
        tokens_BT, segments_BT = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        fresh_B = [self._fill(row, tokens_BT[row], segments_BT[row]) for row in range(len(self._lanes))]
        return Batch(
            tokens=torch.from_numpy(tokens_BT),
            segment_ids=torch.from_numpy(segments_BT),
            fresh_rows=torch.tensor(fresh_B),
        )

    def state_dict(self) -> dict[str, Json]:
        """Return the position."""
        return {
            "format": _FORMAT,
            "drawn": list(self._drawn),
            "lanes": [[lane.corpus, lane.draw, lane.offset] for lane in self._lanes],
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position. Errors: ValueError when it is none of this data."""
        drawn, lanes = state.get("drawn"), state.get("lanes")
        if state.get("format") != _FORMAT or not _all_numbers(drawn, len(self._corpora)) or not isinstance(lanes, list):
            raise ValueError("the position has another format")
        if len(lanes) != len(self._lanes) or not all(_all_numbers(lane, 3) for lane in lanes):
            raise ValueError(f"the position has {len(lanes)} rows, the batches have {len(self._lanes)}")
        found = [_Lane(*lane) for lane in lanes]  # type: ignore[misc]
        for lane in found:
            if lane.corpus >= len(self._corpora) or lane.offset >= len(self._document(lane)):
                raise ValueError("the position lies outside the data")
        self._drawn, self._lanes = list(drawn), found  # type: ignore[arg-type]

    def _fill(self, row: int, tokens_T: npt.NDArray[np.int64], segments_T: npt.NDArray[np.int64]) -> bool:
        """Write one row, move its lane, and tell whether the row starts a document."""
        lane = self._lanes[row]
        if lane.offset == len(self._document(lane)) - 1:  # its last token was the last target
            lane = self._draw()
        fresh, filled, segment = lane.offset == 0, 0, 0
        while True:
            part = self._document(lane)[lane.offset : lane.offset + len(tokens_T) - filled]
            tokens_T[filled : filled + len(part)] = part
            segments_T[filled : filled + len(part)] = segment
            filled += len(part)
            if filled == len(tokens_T):
                self._lanes[row] = _Lane(lane.corpus, lane.draw, lane.offset + len(part) - 1)
                return fresh
            lane, segment = self._draw(), segment + 1

    def _draw(self) -> _Lane:
        total = sum(self._drawn) + 1
        lag = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        corpus = max(range(len(lag)), key=lag.__getitem__)
        self._drawn[corpus] += 1
        return _Lane(corpus, self._drawn[corpus] - 1, 0)

    def _document(self, lane: _Lane) -> npt.NDArray[np.uint16]:
        corpus = self._corpora[lane.corpus]
        epoch, place = divmod(lane.draw, corpus.documents)
        return corpus.document(self._order(lane.corpus, epoch)[place])

    def _order(self, corpus: int, epoch: int) -> list[int]:
        key = (corpus, epoch)
        if key not in self._orders:
            for old in [other for other in self._orders if other[0] == corpus and other[1] < epoch - 1]:
                del self._orders[old]  # rows may still be in the epoch before, hardly in older ones
            order = list(range(self._corpora[corpus].documents))
            random.Random(f"{self._seed}/{self._corpora[corpus].name}/{epoch}").shuffle(order)  # noqa: S311
            self._orders[key] = order
        return self._orders[key]


def _all_numbers(value: Json, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value)
    )
