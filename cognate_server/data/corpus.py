"""Tokenized documents in files that are mapped, not loaded: `Corpus` and its `CorpusWriter`.

The files have no name: they go with the last process that has them open, however it ends, and a later attempt writes
them anew. Pages that were read stay in the kernel's cache, which drops them when memory is short.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

# 64 Ki tokens: half a MiB while they are counted.
_PIECE_TOKENS = 1 << 16


@dataclass(frozen=True)
class Corpus:
    """Documents end to end: document n is `tokens[offsets[n] : offsets[n + 1]]`. uint16 holds a vocabulary of 15,616.

    difficulties: uint16, one for each document; None where no curriculum will ask.
    """

    name: str
    tokens: npt.NDArray[np.uint16]
    offsets: npt.NDArray[np.int64]
    difficulties: npt.NDArray[np.uint16] | None = None

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def document(self, index: int) -> npt.NDArray[np.uint16]:
        """Return one document's tokens."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def counts(self, vocabulary: int) -> npt.NDArray[np.int64]:
        """Return how often each token occurs: (vocabulary,)."""
        counts_V = np.zeros(vocabulary, dtype=np.int64)
        for start in range(0, len(self.tokens), _PIECE_TOKENS):
            counts_V += np.bincount(self.tokens[start : start + _PIECE_TOKENS], minlength=vocabulary)
        return counts_V

    def digest(self) -> str:
        """sha256 over the tokens, where documents end, and their difficulties."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.difficulties):
            if array is not None:
                digest.update(len(array).to_bytes(8, "big"))
                digest.update(np.ascontiguousarray(array).data)
        return f"sha256:{digest.hexdigest()}"


class CorpusWriter:
    """Writes documents one by one; memory does not grow with their number.

    folder: on whose disk the files lie; None means the system's folder for temporary files.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        self._name = name
        self._tokens, self._offsets, self._difficulties = (_unnamed(folder) for _ in range(3))
        self._length = 0
        self._offsets.write(np.int64(0).tobytes())

    def add(self, ids: Sequence[int], *, difficulty: int) -> None:
        """Append one document."""
        self._tokens.write(np.array(ids, dtype=np.uint16).tobytes())
        self._length += len(ids)
        self._offsets.write(np.int64(self._length).tobytes())
        self._difficulties.write(np.uint16(difficulty).tobytes())

    def corpus(self) -> Corpus:
        """Return what was written; nothing can be added afterwards."""
        return Corpus(
            self._name,
            _mapped(self._tokens, np.uint16),
            _mapped(self._offsets, np.int64),
            _mapped(self._difficulties, np.uint16),
        )


def _unnamed(folder: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


def _mapped(file: IO[bytes], dtype: type[Any]) -> npt.NDArray[Any]:
    """Close a file and return its contents as an array that cannot be written."""
    with file:
        file.flush()
        if not file.tell():
            return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
