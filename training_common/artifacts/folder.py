"""Bytes in a folder of this machine, or of one that it mounts.

A file is written beside the others, flushed, and linked to its name, so that a name has all of its bytes or none,
whatever dies meanwhile, and a link never replaces what is there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from cognateforge.flush import EarlyFlush
from training_common.artifacts.places import CHUNK_BYTES, Added, ChangedError, Entry, at_path

_STAGED = "staged"
# What a process that was killed has left. None writes for so long.
_STAGED_S = 86_400.0
# 1 MiB: large enough that Python's overhead per block vanishes beside sha256.
_BLOCK_BYTES = 1 << 20


class Folder:
    """A place in a folder, which is made when something is stored. Its file system has to have hard links."""

    far = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def probe(self) -> None:
        key = f"probe-{uuid.uuid4().hex}"
        try:
            self.put(key, b"probe")
            self.delete(key)
        except OSError as error:
            raise ValueError(
                f"{self.root} cannot be written: {error.strerror}; give a folder that this server may write to, on a "
                "file system with hard links"
            ) from error

    def add(self, path: Path, key_of: Callable[[str], str]) -> Added:
        with path.open("rb", buffering=0) as source, self._staged() as (staged, write):
            while block := source.read(_BLOCK_BYTES):
                write(block)
            digest, size_bytes = write.digest, write.size_bytes
            write.flush()
            return Added(digest, size_bytes, self._link(staged, key_of(digest)))

    def put(self, key: str, data: bytes) -> bool:
        with self._staged() as (staged, write):
            write(data)
            write.flush()
            return self._link(staged, key)

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size_bytes: int, digest: str) -> bool:
        with self._staged() as (staged, write):
            for piece in pieces:
                write(piece)
            if (write.digest, write.size_bytes) != (digest, size_bytes):
                raise ChangedError(key)
            write.flush()
            return self._link(staged, key)

    def read(self, key: str, begin: int, end: int) -> Iterator[bytes]:
        path = self._path(key)
        try:
            # Without waiting: what stands there may be a pipe that nobody writes to. And no link is followed: it would
            # hand out what this server can read and its reader cannot.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
        try:
            _require_file(os.fstat(descriptor), path)
            # pread is several times faster than an object store's own stream.
            while begin < end and (piece := os.pread(descriptor, min(CHUNK_BYTES, end - begin), begin)):
                yield piece
                begin += len(piece)
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        _require_file(found, path)
        return found.st_size

    def list(self, prefix: str) -> Iterator[Entry]:
        for path in (self.root / prefix).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # removed while it is looked at
                found = path.lstat()
                if S_ISREG(found.st_mode):
                    key = path.relative_to(self.root).as_posix()
                    yield Entry(key, found.st_size, found.st_mtime_ns // 1000)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not all(parts) or {".", ".."} & set(parts):
            raise ValueError(f"{key!r} leads out of its folder, or is no key")
        return self.root.joinpath(*parts)

    @contextlib.contextmanager
    def _staged(self) -> Iterator[tuple[Path, _Writer]]:
        """Yield a new file and what writes it; it is removed at the end, but for what was linked to it."""
        folder = self.root / _STAGED
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep(folder)
        staged = folder / uuid.uuid4().hex
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        writer = _Writer(descriptor)
        try:
            with at_path(folder):
                yield staged, writer
        finally:
            writer.stop()
            os.close(descriptor)
            staged.unlink(missing_ok=True)

    @staticmethod
    def _sweep(folder: Path) -> None:
        for left in folder.iterdir():
            # Gone meanwhile; or a folder that somebody made here, and no reason to refuse a publication.
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < time.time() - _STAGED_S:
                    left.unlink()

    def _link(self, staged: Path, key: str) -> bool:
        """Give a flushed file its name, and flush the name. Return False where there is one of that name."""
        target = self._path(key)
        missing = [target.parent]
        while not missing[-1].exists():
            missing.append(missing[-1].parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(staged, target)
            created = True
        except FileExistsError:
            created = False
        for folder in missing:
            _flush(folder)
        return created


def _require_file(found: os.stat_result, path: Path) -> None:
    """Refuse what a store never holds: a folder, a link, a pipe. Errors: OSError."""
    if S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


class _Writer:
    """Writes whole blocks into a file, and knows the digest of what it wrote."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self._flush = EarlyFlush(descriptor)
        self.size_bytes = 0

    def __call__(self, block: bytes) -> None:
        self._sha256.update(block)
        self.size_bytes += len(block)
        left = memoryview(block)
        while left:  # a disk that fills up takes a part
            left = left[os.write(self._descriptor, left) :]
        self._flush.wrote(len(block))

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha256.hexdigest()}"

    def flush(self) -> None:
        """Wait until all of the file is on the disk. Errors: OSError."""
        self._flush.finish()

    def stop(self) -> None:
        """Leave the file alone, whatever of it is on the disk."""
        self._flush.stop()


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
