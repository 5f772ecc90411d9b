"""Content-addressed bytes and create-only manifests, in a folder or a bucket, and in an archive beside it.

Nothing here is ever overwritten: a blob's name is its digest, and a manifest is put only where none is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cognateforge.exceptions import ArtifactCorruptError, IntegrityCheckFailedError
from training_common.artifacts.folder import Folder
from training_common.artifacts.places import CHUNK_BYTES, ChangedError, Place, StoreAwayError
from training_common.digests import sha256_bytes

__all__ = [
    "CHUNK_BYTES",
    "BlobStore",
    "ManifestExistsError",
    "StoreAwayError",
    "StoredBlob",
    "StoredFile",
    "StoredManifest",
]

# The contract's rule for File.path (artifact/v1/artifact.proto): a client refuses an artifact with any other.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_MAX_NAME_CHARS = 255
_BLOB_KEY = re.compile(r"blobs/sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_MANIFEST_KEY = re.compile(r"manifests/([^/]+)/([1-9][0-9]*)\.json")
# Far above what a manifest may have, so that a damaged one is read and told of.
_MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of an artifact: its path inside it, and where its bytes are."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class StoredBlob:
    """Bytes that are stored, whether a version names them or not. archived: they are in the archive."""

    digest: str
    size_bytes: int
    modified_us: int
    archived: bool


class StoredManifest(NamedTuple):
    """A manifest that is stored, whether it was published or not."""

    family: str
    version: int
    modified_us: int


class ManifestExistsError(Exception):
    """A manifest of that name is there already; it was not touched."""


class BlobStore:
    """The bytes of one service's artifacts.

    here: where new bytes go; a path is a folder. archive: what is not here is looked for there.
    Every method may raise StoreAwayError, which tells nothing of the bytes.
    """

    def __init__(self, here: Place | Path, archive: Place | Path | None = None) -> None:
        self._here = _place(here)
        self._archive = None if archive is None else _place(archive)

    @property
    def archives(self) -> bool:
        """Whether there is an archive."""
        return self._archive is not None

    @property
    def far(self) -> bool:
        """Whether reading may take long, so that an event loop is kept out of it."""
        return any(place.far for place in self._places())

    def probe(self) -> None:
        """Put, read and remove an object wherever bytes may go. Errors: ValueError, with what is wrong."""
        for place in self._places():
            place.probe()

    # --- blobs

    def put(self, path: Path, name: str) -> StoredFile:
        """Store a file's bytes under their digest and return it as `name`. Bytes that are there are not sent again.

        Errors: IntegrityCheckFailedError, for a name that no client would take; ArtifactCorruptError, when the bytes
        that are there have changed; OSError.
        """
        if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
            raise IntegrityCheckFailedError(f"{name[:300]!r} is no path of a file that can be published: rename it")
        try:
            added = self._here.add(path, _key)
        except ChangedError:
            raise IntegrityCheckFailedError(f"{name} was written to while it was published: publish again") from None
        file = StoredFile(path=name, size_bytes=added.size_bytes, digest=added.digest)
        if not added.created:
            self._require_whole(added.digest, name)
        return file

    def put_bytes(self, data: bytes) -> str:
        """Store bytes under their digest, which is returned. Errors: ArtifactCorruptError, as `put`; OSError."""
        digest = sha256_bytes(data)
        if not self._here.put(_key(digest), data):
            self._require_whole(digest, "bytes")
        return digest

    def has(self, digest: str) -> bool:
        """Return whether bytes are stored under a digest, here or in the archive. They are not read."""
        return self._size(digest) is not None

    def check(self, file: StoredFile) -> None:
        """Read all stored bytes of a file. Errors: ArtifactCorruptError, whose metadata has path, digest and problem.

        problem: MISSING, SIZE, DIGEST or UNREADABLE, as in artifact.v1.Problem.
        """
        try:
            size_bytes = self._size(file.digest)
            if size_bytes is None:
                raise _missing(file)
            if size_bytes != file.size_bytes:
                raise _corrupt(file, "SIZE", f"{size_bytes} bytes are stored, not {file.size_bytes}")
            found = _digest_of(self._pieces(file, 0))
        except FileNotFoundError:
            raise _missing(file) from None
        except OSError as error:
            raise _unreadable(file, error) from error
        if found != file.digest:
            raise _corrupt(file, "DIGEST", f"its stored bytes are {found}, not {file.digest}")

    def read(self, digest: str, limit_bytes: int) -> bytes:
        """Return the bytes of a digest, at most `limit_bytes` of them. Errors: ArtifactCorruptError, as `check`."""
        file = StoredFile(path=digest, size_bytes=limit_bytes, digest=digest)
        try:
            size_bytes = self._size(digest)
            if size_bytes is None:
                raise _missing(file)
            if size_bytes > limit_bytes:
                raise _corrupt(file, "SIZE", f"{size_bytes} bytes are stored, and at most {limit_bytes} are read")
            data = b"".join(self._pieces(replace(file, size_bytes=size_bytes), 0))
        except FileNotFoundError:
            raise _missing(file) from None
        except OSError as error:
            raise _unreadable(file, error) from error
        if (found := sha256_bytes(data)) != digest:
            raise _corrupt(file, "DIGEST", f"its stored bytes are {found}, not {digest}")
        return data

    def open_payload(self, files: tuple[StoredFile, ...], offset_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, piece) over the files' bytes, one file after the other, from `offset_bytes` on.

        Pieces hold at most CHUNK_BYTES.
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
            for piece in self._pieces(file, position):
                yield start + position, piece
                position += len(piece)
        except FileNotFoundError:
            raise _missing(file) from None
        except OSError as error:  # a folder stands there, or the disk has a bad block
            raise _unreadable(file, error) from error
        if position < file.size_bytes:
            raise _corrupt(file, "SIZE", f"stored bytes end at {position} of {file.size_bytes}")

    def _pieces(self, file: StoredFile, position: int) -> Iterator[bytes]:
        """Yield bytes from wherever they are; where they are moved under way, the rest comes from there."""
        for place in self._in_turn():
            try:
                for piece in place.read(_key(file.digest), position, file.size_bytes):
                    yield piece
                    position += len(piece)
            except FileNotFoundError:
                continue
            return
        raise FileNotFoundError(_key(file.digest))

    def blobs(self) -> Iterator[StoredBlob]:
        """Yield everything that is stored under a digest, in no order; twice what is in both places."""
        for place in self._places():
            for entry in place.list("blobs/"):
                if found := _BLOB_KEY.fullmatch(entry.key):
                    yield StoredBlob(
                        digest=f"sha256:{found[2]}",
                        size_bytes=entry.size_bytes,
                        modified_us=entry.modified_us,
                        archived=place is self._archive,
                    )

    def delete(self, digest: str) -> None:
        """Remove what is stored under a digest, here and in the archive."""
        for place in self._places():
            place.delete(_key(digest))

    def move(self, digest: str, to_archive: bool) -> None:
        """Bring stored bytes into the archive, or back: copied, the copy read and found whole, and only then removed.

        It may be cut off anywhere and called again. Bytes that are there already, or nowhere, are left as they are.
        Errors: ArtifactCorruptError, when the bytes have changed: they are not removed; OSError.
        """
        if self._archive is None:
            return
        source, target = (self._here, self._archive) if to_archive else (self._archive, self._here)
        size_bytes = source.size(_key(digest))
        if size_bytes is None:
            return
        self._copy(source, target, digest, size_bytes)
        if not self._is_whole(target, digest):
            # What is there was damaged before. Bytes that are whole take its place.
            target.delete(_key(digest))
            self._copy(source, target, digest, size_bytes)
            if not self._is_whole(target, digest):
                raise ArtifactCorruptError(f"the copy of {digest} cannot be read as it was written; it was not moved")
        source.delete(_key(digest))

    @staticmethod
    def _copy(source: Place, target: Place, digest: str, size_bytes: int) -> None:
        key = _key(digest)
        try:
            target.put_pieces(key, source.read(key, 0, size_bytes), size_bytes=size_bytes, digest=digest)
        except ChangedError:
            raise ArtifactCorruptError(f"stored bytes {digest} have changed; they were not moved") from None

    # --- manifests

    def put_manifest(self, family: str, version: int, manifest: bytes) -> None:
        """Store a manifest unless one is there. Errors: ManifestExistsError; OSError."""
        if not self._here.put(_manifest_key(family, version), manifest):
            raise ManifestExistsError(f"{family}@{version} has a manifest already")

    def manifests(self) -> Iterator[StoredManifest]:
        """Yield every manifest that is stored, in no order."""
        for entry in self._here.list("manifests/"):
            if found := _MANIFEST_KEY.fullmatch(entry.key):
                yield StoredManifest(found[1], int(found[2]), entry.modified_us)

    def read_manifest(self, family: str, version: int) -> bytes:
        """Return a stored manifest. Errors: FileNotFoundError; OSError."""
        key = _manifest_key(family, version)
        size_bytes = self._here.size(key)
        if size_bytes is None:
            raise FileNotFoundError(key)
        return b"".join(self._here.read(key, 0, min(size_bytes, _MAX_MANIFEST_BYTES)))

    def is_empty(self) -> bool:
        """Whether nothing at all is stored here, as in a folder that is not mounted, or is not the one written to.

        Manifests are never in the archive, so what that holds does not count.
        """
        return next(self.manifests(), None) is None and next(iter(self._here.list("blobs/")), None) is None

    def delete_manifest(self, family: str, version: int) -> None:
        """Remove a stored manifest, if there is one."""
        self._here.delete(_manifest_key(family, version))

    # ---

    def _places(self) -> Iterator[Place]:
        yield self._here
        if self._archive is not None:
            yield self._archive

    def _in_turn(self) -> Iterator[Place]:
        """Yield the places to look at: here once more at the end, for bytes that come back from the archive."""
        yield self._here
        if self._archive is not None:
            yield self._archive
            yield self._here

    def _size(self, digest: str) -> int | None:
        sizes = (place.size(_key(digest)) for place in self._in_turn())
        return next((size_bytes for size_bytes in sizes if size_bytes is not None), None)

    @staticmethod
    def _is_whole(place: Place, digest: str) -> bool:
        try:
            size_bytes = place.size(_key(digest))
            return size_bytes is not None and _digest_of(place.read(_key(digest), 0, size_bytes)) == digest
        except OSError:
            return False

    def _require_whole(self, digest: str, name: str) -> None:
        if not self._is_whole(self._here, digest):
            raise ArtifactCorruptError(f"stored bytes of {name} ({digest}) have changed")


def _place(at: Place | Path) -> Place:
    return Folder(at) if isinstance(at, Path) else at


def _digest_of(pieces: Iterable[bytes]) -> str:
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    return f"sha256:{sha256.hexdigest()}"


def _corrupt(file: StoredFile, problem: str, detail: str) -> ArtifactCorruptError:
    metadata = {"path": file.path, "digest": file.digest, "problem": problem}
    return ArtifactCorruptError(f"{file.path}: {detail}", metadata=metadata)


def _missing(file: StoredFile) -> ArtifactCorruptError:
    return _corrupt(file, "MISSING", f"its stored bytes ({file.digest}) are missing")


def _unreadable(file: StoredFile, error: OSError) -> ArtifactCorruptError:
    return _corrupt(file, "UNREADABLE", f"its stored bytes ({file.digest}) cannot be read: {error.strerror}")


def _key(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"


def _manifest_key(family: str, version: int) -> str:
    return f"manifests/{family}/{version}.json"
