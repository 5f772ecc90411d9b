"""Content-addressed bytes and create-only manifests, in a local folder.

Nothing here is ever overwritten: a blob's name is its digest, and a manifest is put only where none is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore

from cognateforge.exceptions import ArtifactCorruptError, IntegrityCheckFailedError
from training_common.digests import sha256_file

# Half of what artifact.v1.Chunk.data may hold: copies of less stay in the cache, many small frames cost more again.
CHUNK_BYTES = 1 << 19
# The contract's rule for File.path (artifact/v1/artifact.proto): a client refuses an artifact with any other.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_MAX_NAME_CHARS = 255


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of an artifact: its path inside it, and where its bytes are."""

    path: str
    size_bytes: int
    digest: str


class ManifestExistsError(Exception):
    """A manifest of that name is there already; it was not touched."""


class BlobStore:
    """The bytes of one service's artifacts."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._store = LocalStore(root)

    def put(self, path: Path, name: str) -> StoredFile:
        """Store a file's bytes under their digest and return it as `name`. Bytes that are there are not sent again.

        Errors: IntegrityCheckFailedError, for a name that no client would take; ArtifactCorruptError, when the bytes
        that are there have changed.
        """
        if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
            raise IntegrityCheckFailedError(f"{name[:300]!r} is no path of a file that can be published: rename it")
        digest = sha256_file(path)
        size_bytes = path.stat().st_size
        try:
            obstore.put(self._store, _key(digest), path, mode="create", use_multipart=False)
        except AlreadyExistsError:
            if sha256_file(self._root / _key(digest)) != digest:
                raise ArtifactCorruptError(f"stored bytes of {name} ({digest}) have changed") from None
        return StoredFile(path=name, size_bytes=size_bytes, digest=digest)

    def put_manifest(self, family: str, version: int, manifest: bytes) -> None:
        """Store a manifest unless one is there. Errors: ManifestExistsError."""
        try:
            obstore.put(self._store, f"manifests/{family}/{version}.json", manifest, mode="create", use_multipart=False)
        except AlreadyExistsError:
            raise ManifestExistsError(f"{family}@{version} has a manifest already") from None

    def open_payload(self, files: tuple[StoredFile, ...], offset_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, piece) over the files' bytes, one file after the other, from `offset_bytes` on.

        Pieces hold at most CHUNK_BYTES. A local file is read with pread, which is several times faster than the
        object store's own stream.
        Errors: ArtifactCorruptError, when a file is missing, cannot be read, or is shorter than the manifest says.
        """
        start = 0
        for file in files:
            end = start + file.size_bytes
            if offset_bytes < end:
                yield from self._read(file, start, max(offset_bytes - start, 0))
            start = end

    def _read(self, file: StoredFile, start: int, position: int) -> Iterator[tuple[int, bytes]]:
        try:
            descriptor = os.open(self._root / _key(file.digest), os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            raise ArtifactCorruptError(f"{file.path}: its stored bytes ({file.digest}) are missing") from None
        try:
            while position < file.size_bytes:
                try:
                    piece = os.pread(descriptor, min(CHUNK_BYTES, file.size_bytes - position), position)
                except OSError as error:  # a folder stands there, or the disk has a bad block
                    problem = f"its stored bytes ({file.digest}) cannot be read: {error.strerror}"
                    raise ArtifactCorruptError(f"{file.path}: {problem}") from error
                if not piece:
                    raise ArtifactCorruptError(f"{file.path}: stored bytes end at {position} of {file.size_bytes}")
                yield start + position, piece
                position += len(piece)
        finally:
            os.close(descriptor)


def _key(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"
