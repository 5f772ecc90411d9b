"""Where bytes can lie: what a folder and a bucket have in common, and the errors of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cognateforge.exceptions import UnavailableError

# Half of what artifact.v1.Chunk.data may hold: copies of less stay in the cache, many small frames cost more again.
CHUNK_BYTES = 1 << 19


class StoreAwayError(UnavailableError):
    """The place of the bytes does not answer, or refuses to: that tells nothing of the bytes themselves."""


class ChangedError(Exception):
    """Bytes on their way into a place are not those that were announced; nothing of them was kept."""


@dataclass(frozen=True)
class Entry:
    """Something that is stored: its key, its size, and when it was put."""

    key: str
    size_bytes: int
    modified_us: int


@dataclass(frozen=True)
class Added:
    """A file that is stored. created: it was not there before."""

    digest: str
    size_bytes: int
    created: bool


@contextmanager
def at_path(path: Path) -> Iterator[None]:
    """Let an OSError name a path where it names none, as one of writing: a disk that is full is told by its place."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class Place(Protocol):
    """Bytes by key. Nothing that is there is ever overwritten by other bytes, and nothing is visible in part.

    Every method may raise StoreAwayError, or OSError where the place is this machine's own.
    """

    # Whether a read may take long, so that an event loop is kept out of it.
    far: bool

    def probe(self) -> None:
        """Put, put again, read and remove an object. Errors: ValueError, with what is wrong and the remedy."""

    def add(self, path: Path, key_of: Callable[[str], str]) -> Added:
        """Store a file under the key of its digest, durably, unless something is there."""

    def put(self, key: str, data: bytes) -> bool:
        """Store bytes durably and return True, or return False where something is there."""

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size_bytes: int, digest: str) -> bool:
        """Store what the pieces are together, as `put` does. Errors: ChangedError, unless they have the digest."""

    def read(self, key: str, begin: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `begin` to before `end`, in pieces of at most CHUNK_BYTES; fewer where there are fewer.

        Errors: FileNotFoundError.
        """

    def size(self, key: str) -> int | None:
        """Return how many bytes are stored, or None where nothing is."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield what is stored under a prefix that ends with a slash, in no order."""

    def delete(self, key: str) -> None:
        """Remove what is stored, if anything is."""
