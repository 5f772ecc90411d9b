"""Where backups are kept: a folder, or a bucket of an object store by its URL.

Keys are paths. What is put is there whole or not at all, and in a folder it is on the disk before `put` returns.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cognateforge.exceptions import ArtifactCorruptError, InvalidRequestError, LocalStorageError
from training_common.artifacts.places import at_path

if TYPE_CHECKING:
    from obstore.store import ObjectStore

OBJECTS, MANIFESTS, LOCKS = "objects", "backups", "locks"
_TEMPORARY = ".tmp-"
_READ_BYTES = 1 << 20
# What is larger goes to an object store in parts: below S3's smallest part there is only one anyway.
_ONE_PUT_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something that is kept. modified_s: when it was put, in seconds since 1970 by the clock of who keeps it."""

    key: str
    size_bytes: int
    modified_s: float


class Destination(Protocol):
    """A place for backups."""

    def entries(self, below: str) -> Iterator[Entry]:
        """Yield everything whose key begins with `below` and a slash."""

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of a key. Errors: FileNotFoundError."""

    def put(self, key: str, pieces: Iterator[bytes], size_bytes: int) -> None:
        """Keep what is yielded, in place of what is there. An exception out of `pieces` leaves all as it was."""

    def put_once(self, key: str, data: bytes) -> None:
        """Keep bytes under a key that is not there yet. Errors: FileExistsError."""

    def delete(self, key: str) -> None:
        """Let go of a key. One that is not there is no error."""


# What backups write below OBJECTS: whole objects, and beside them what a writer that is gone has left half-written.
_OBJECT = re.compile(rf"{OBJECTS}/sha256/([0-9a-f]{{2}})/(?P<digits>\1[0-9a-f]{{62}})")
_HALF_WRITTEN = re.compile(rf"{OBJECTS}/sha256/[0-9a-f]{{2}}/{re.escape(_TEMPORARY)}[^/]*")


def object_key(digest: str) -> str:
    """Return under which key bytes of a digest are kept."""
    hexadecimal = digest.removeprefix("sha256:")
    return f"{OBJECTS}/sha256/{hexadecimal[:2]}/{hexadecimal}"


def object_digits(key: str) -> str:
    """Return the hex digits of the digest whose object a key is, "" for anything else that lies there."""
    found = _OBJECT.fullmatch(key)
    return "" if found is None else found["digits"]


def is_half_written(key: str) -> bool:
    """Whether a key is that of an object which nobody has come to the end of writing."""
    return _HALF_WRITTEN.fullmatch(key) is not None


def checked(pieces: Iterator[bytes], *, digest: str, size_bytes: int, what: str) -> Iterator[bytes]:
    """Yield the pieces, and at their end compare their digest. Errors: ArtifactCorruptError, naming `what`."""
    sha256, count = hashlib.sha256(), 0
    for piece in pieces:
        sha256.update(piece)
        count += len(piece)
        yield piece
    if (found := f"sha256:{sha256.hexdigest()}") != digest:
        raise ArtifactCorruptError(f"{what}: its {count} bytes have digest {found}, not {digest} of {size_bytes} bytes")


def read_object(destination: Destination, digest: str, size_bytes: int, *, what: str) -> Iterator[bytes]:
    """Yield an object's bytes, compared with its digest at the end. Errors: ArtifactCorruptError, naming `what`."""
    key = object_key(digest)
    try:
        yield from checked(destination.pieces(key), digest=digest, size_bytes=size_bytes, what=f"{what} ({key})")
    except FileNotFoundError:
        raise ArtifactCorruptError(f"{what}: {key} is missing from the backup's objects") from None


class FolderDestination:
    """Backups in a folder of this machine, readable by its owner alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def entries(self, below: str) -> Iterator[Entry]:
        for folder, _, names in os.walk(self._root / below):
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    found = path.stat()
                except FileNotFoundError:  # another process's
                    continue
                key = path.relative_to(self._root).as_posix()
                yield Entry(key=key, size_bytes=found.st_size, modified_s=found.st_mtime)

    def pieces(self, key: str) -> Iterator[bytes]:
        path = self._root / key
        with at_path(path), path.open("rb", buffering=0) as file:
            while piece := file.read(_READ_BYTES):
                yield piece

    def put(self, key: str, pieces: Iterator[bytes], size_bytes: int) -> None:
        with self._written(key, pieces) as (temporary, target):
            temporary.replace(target)

    def put_once(self, key: str, data: bytes) -> None:
        with self._written(key, iter([data])) as (temporary, target):
            os.link(temporary, target)

    @contextmanager
    def _written(self, key: str, pieces: Iterator[bytes]) -> Iterator[tuple[Path, Path]]:
        """Yield a file with the bytes, flushed to the disk, for the caller to give it its name."""
        target = self._root / key
        _make_private(target.parent)
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)  # with mode 0600
        temporary = Path(name)
        try:
            with at_path(target.parent), open(descriptor, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Make a folder and those above it that are not there, each for its owner alone, and flush them to the disk."""
    if folder.is_dir():
        return
    _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectDestination:
    """Backups in an object store. Who can read them is the bucket's matter."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def entries(self, below: str) -> Iterator[Entry]:
        import obstore

        for page in obstore.list(self._store, f"{below}/"):
            for found in page:
                modified_s = found["last_modified"].timestamp()
                yield Entry(key=found["path"], size_bytes=found["size"], modified_s=modified_s)

    def pieces(self, key: str) -> Iterator[bytes]:
        import obstore

        for piece in obstore.get(self._store, key).stream():
            yield bytes(piece)

    def put(self, key: str, pieces: Iterator[bytes], size_bytes: int) -> None:
        import obstore

        if size_bytes <= _ONE_PUT_BYTES:
            obstore.put(self._store, key, b"".join(pieces), use_multipart=False)
        else:
            obstore.put(self._store, key, pieces)

    def put_once(self, key: str, data: bytes) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            raise FileExistsError(key) from None

    def delete(self, key: str) -> None:
        import obstore

        obstore.delete(self._store, key)


@contextmanager
def open_destination(place: str, *, make: bool = False) -> Iterator[Destination]:
    """Yield the place for backups that is named by a folder or a URL such as s3://BUCKET/PREFIX.

    make: whether a folder may be made; otherwise it has to be there. An object store takes its endpoint, region and
    keys from the environment, as its other clients do.
    Errors: InvalidRequestError, for a name of neither kind; LocalStorageError, when the place fails, also later.
    """
    from obstore.exceptions import BaseError

    try:
        yield _open(place, make)
    except OSError as error:
        raise LocalStorageError(f"{error.filename or place}: {error.strerror or error}") from error
    except BaseError as error:
        raise LocalStorageError(f"{place}: {_in_short(error)}") from error


def _open(place: str, make: bool) -> Destination:
    from obstore.store import from_url

    if "://" in place:
        try:
            return ObjectDestination(from_url(place))
        except Exception as error:
            raise InvalidRequestError(f"{place}: is no place for backups: {_in_short(error)}") from error
    root = Path(place)
    if root.exists() and not root.is_dir():
        raise InvalidRequestError(f"{place}: is no folder; name a folder, or a URL such as s3://BUCKET/PREFIX")
    if not root.exists() and not make:
        raise InvalidRequestError(f"{place}: there is no such folder; name the one that backups were written to")
    return FolderDestination(root)


def _in_short(error: Exception) -> str:
    return str(error).partition("\n")[0]  # the rest is its insides
