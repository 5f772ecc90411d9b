"""`CognateTokenStream`: what the trainer reads, made of packed corpora."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cognate_server.data.corpus import Corpus
from cognate_server.data.curriculum import Curriculum
from cognate_server.data.packing import Packer
from cognate_server.data.processor import Document
from cognate_server.data.tokenizer import VOCABULARY, CognateTokenizer
from cognate_server.stream import Batch
from training_common.attempt import Json
from training_common.digests import canonical_json, sha256_bytes


class StreamMismatchError(ValueError):
    """A position was taken from other data, another tokenizer, other shapes or another seed."""


class CognateTokenStream:
    """Training batches without end, and validation batches that are always the same. Implements `TokenStream`.

    held_out: validation documents with prompt and answer, for scores on whole problems.
    curriculum: from which step on harder training documents are drawn; None draws from all of them at once.
    """

    def __init__(
        self,
        *,
        tokenizer: CognateTokenizer,
        train: Sequence[Corpus],
        validation: Sequence[Corpus],
        weights: Sequence[float],
        batch_size: int,
        sequence_length: int,
        seed: int,
        held_out: Sequence[Document] = (),
        curriculum: Curriculum | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.held_out = tuple(held_out)
        self._train, self._weights = tuple(train), tuple(weights)
        self._batch_size, self._length = batch_size, sequence_length
        self._packer = Packer(
            train,
            weights=weights,
            seed=seed,
            curriculum=curriculum,
            batch_size=batch_size,
            sequence_length=sequence_length,
        )
        kept = [(corpus, weight) for corpus, weight in zip(validation, weights, strict=True) if corpus.documents]
        self._validation = tuple(corpus for corpus, _ in kept)
        self._validation_weights = tuple(weight for _, weight in kept)
        self.digest = self._digest(seed, curriculum)

    def next_batch(self) -> Batch:
        """Return the next training batch."""
        return self._packer.next_batch()

    def state_dict(self) -> dict[str, Json]:
        """Return the position, with the digest of the data that it points into."""
        return {"digest": self.digest, **self._packer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go to a position. Errors: StreamMismatchError, before anything has moved."""
        if state.get("digest") != self.digest:
            raise StreamMismatchError(
                f"the position belongs to data {state.get('digest')}, this is {self.digest}; give the job the data, "
                "seed and batch shape it started with"
            )
        try:
            self._packer.load_state_dict(state)
        except ValueError as error:
            raise StreamMismatchError(str(error)) from error

    def validation_batches(self) -> Iterator[Batch]:
        """Yield the validation documents once, as far as they fill whole batches, and at least one batch."""
        if not self._validation:
            return
        packer = Packer(
            self._validation,
            weights=self._validation_weights,
            seed=0,
            batch_size=self._batch_size,
            sequence_length=self._length,
        )
        tokens = sum(len(corpus.tokens) for corpus in self._validation)
        for _ in range(max(1, tokens // (self._batch_size * self._length))):
            yield packer.next_batch()

    def unigram_counts(self) -> Tensor:
        """Return how often each token is read in one mean round of the data, at the weights given: int64, (15616,)."""
        documents = sum(corpus.documents for corpus in self._train)
        counts_V = np.zeros(VOCABULARY)
        for corpus, weight in zip(self._train, self._weights, strict=True):
            rounds = documents * weight / sum(self._weights) / corpus.documents
            counts_V += np.ceil(corpus.counts(VOCABULARY) * rounds)
        return torch.from_numpy(counts_V.astype(np.int64))

    def _digest(self, seed: int, curriculum: Curriculum | None) -> str:
        corpora = [
            [corpus.name, corpus.digest(), weight] for corpus, weight in zip(self._train, self._weights, strict=True)
        ]
        shape = {"batch_size": self._batch_size, "sequence_length": self._length}
        order = [seed, None if curriculum is None else curriculum.to_json()]
        return sha256_bytes(canonical_json([corpora, shape, order, self.tokenizer.digest]))
