"""Documents packed into rows without padding: the resumable `Packer`.

Each of a batch's rows reads its own line of documents and goes on in the next batch where it stopped, so that a long
document runs through several rows and its long-term memory goes with it. The token on the border is read twice: as the
last target of one row and the first input of the next. B rows, T tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cognate_server.data.corpus import Corpus
from cognate_server.data.curriculum import Curriculum
from cognate_server.data.difficulty import Admission
from cognate_server.data.permutation import Permutation
from cognate_server.stream import Batch
from training_common.attempt import Json

# 2: a row's place names its document, where 1 named the draw that led to it.
_FORMAT = 2


@dataclass
class _Lane:
    """Where one row reads: a document of a corpus, and the token that its next row starts with."""

    corpus: int
    document: int
    offset: int


class Packer:
    """An endless source of batches from weighted corpora, exactly resumable, in constant memory.

    Every corpus is read in a new shuffled order each time round; the corpus that lags most behind its weight is drawn
    from next. Under a curriculum a document that is still too hard is passed over, and waits for the next round.
    Everything follows from the seed and the position.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        weights: Sequence[float],
        batch_size: int,
        sequence_length: int,
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        if not corpora or len(weights) != len(corpora) or any(corpus.documents == 0 for corpus in corpora):
            raise ValueError("every corpus needs a document and a weight")
        if batch_size < 1 or sequence_length < 1:
            raise ValueError(f"batch_size and sequence_length must be positive, got {batch_size} and {sequence_length}")
        self._corpora = tuple(corpora)
        self._shares = [weight / sum(weights) for weight in weights]
        self._length = sequence_length
        self._seed = seed
        self._curriculum = curriculum
        self._admissions = [Admission(_difficulties(corpus)) for corpus in corpora] if curriculum else []
        self._orders: dict[int, tuple[int, Permutation]] = {}
        self._batches = 0
        self._drawn = [0] * len(corpora)
        self._passed = [0] * len(corpora)
        self._limits = self._current_limits()
        self._lanes = [self._draw() for _ in range(batch_size)]

    def next_batch(self) -> Batch:
        """Return the next batch, with a segment for each document and a mark on rows that start one."""
        self._limits = self._current_limits()
        shape = (len(self._lanes), self._length + 1)
        tokens_BT, segments_BT = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        fresh_B = [self._fill(row, tokens_BT[row], segments_BT[row]) for row in range(len(self._lanes))]
        self._batches += 1
        return Batch(
            tokens=torch.from_numpy(tokens_BT),
            segment_ids=torch.from_numpy(segments_BT),
            fresh_rows=torch.tensor(fresh_B),
        )

    def state_dict(self) -> dict[str, Json]:
        """Return the position.

        batches: how many were returned. drawn: documents drawn from each corpus. passed: documents that its shuffled
        orders have gone past, those too hard included. lanes: corpus, document and token of each row.
        """
        return {
            "format": _FORMAT,
            "batches": self._batches,
            "drawn": list(self._drawn),
            "passed": list(self._passed),
            "lanes": [[lane.corpus, lane.document, lane.offset] for lane in self._lanes],
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position. Errors: ValueError when it is none of this data."""
        if state.get("format") != _FORMAT:
            raise ValueError("the position has another format")
        (batches,) = _numbers([state.get("batches")], 1)
        drawn, passed = (_numbers(state.get(name), len(self._corpora)) for name in ("drawn", "passed"))
        lanes = state.get("lanes")
        if not isinstance(lanes, list) or len(lanes) != len(self._lanes):
            raise ValueError(f"the position's lanes are not those of {len(self._lanes)} rows")
        found = [_Lane(*_numbers(lane, 3)) for lane in lanes]
        for lane in found:
            if (
                lane.corpus >= len(self._corpora)
                or lane.document >= self._corpora[lane.corpus].documents
                or lane.offset >= len(self._document(lane))
            ):
                raise ValueError("the position lies outside the data")
        self._batches, self._drawn, self._passed, self._lanes = batches, drawn, passed, found

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
                self._lanes[row] = _Lane(lane.corpus, lane.document, lane.offset + len(part) - 1)
                return fresh
            lane, segment = self._draw(), segment + 1

    def _draw(self) -> _Lane:
        total = sum(self._drawn) + 1
        lag = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        corpus = max(range(len(lag)), key=lag.__getitem__)
        self._drawn[corpus] += 1
        return _Lane(corpus, self._next_document(corpus), 0)

    def _next_document(self, corpus: int) -> int:
        while True:
            epoch, place = divmod(self._passed[corpus], self._corpora[corpus].documents)
            document = self._order(corpus, epoch)[place]
            self._passed[corpus] += 1
            if not self._limits or self._admissions[corpus].admits(document, self._limits[corpus]):
                return document

    def _current_limits(self) -> list[int]:
        """Return the highest difficulty of each corpus that may be drawn; nothing once all may."""
        competence = self._curriculum.competence(self._batches) if self._curriculum else 1.0
        return [] if competence >= 1 else [admission.limit(competence) for admission in self._admissions]

    def _document(self, lane: _Lane) -> npt.NDArray[np.uint16]:
        return self._corpora[lane.corpus].document(lane.document)

    def _order(self, corpus: int, epoch: int) -> Permutation:
        known = self._orders.get(corpus)
        if known is None or known[0] != epoch:
            name, documents = self._corpora[corpus].name, self._corpora[corpus].documents
            known = self._orders[corpus] = (epoch, Permutation(documents, f"{self._seed}/{name}/{epoch}"))
        return known[1]


def _difficulties(corpus: Corpus) -> npt.NDArray[np.uint16]:
    if corpus.difficulties is None:
        raise ValueError(f"the curriculum needs difficulties, and the corpus {corpus.name} has none")
    return corpus.difficulties


def _numbers(value: Json, length: int) -> list[int]:
    """Return a list of so many numbers of at least 0. Errors: ValueError."""
    found = [number for number in value if isinstance(number, int)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(found) != len(value) or len(value) != length:
        raise ValueError(f"the position has a part that is not {length} numbers")
    if any(isinstance(number, bool) or number < 0 for number in found):
        raise ValueError("the position has a number below 0")
    return found
