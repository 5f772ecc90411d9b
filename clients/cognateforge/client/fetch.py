"""Bringing an artifact to this machine: whole, with every digest checked, or not at all.

The bytes land in `.partial-<digest>` beside the destination. A fetch that was cut goes on from its offset, also in a
new process, which hashes again what lies there. Only a complete folder is renamed to the destination.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from cognateforge.client.deadline import remaining_budget_s
from cognateforge.client.frames import Frame, Header, Piece, Unknown
from cognateforge.client.manifest import MANIFEST_NAME, Manifest, ManifestFile, check_digest, parse_manifest
from cognateforge.client.patience import BREAKS, STREAM_LIFE_S, Patience
from cognateforge.exceptions import (
    ArtifactCorruptError,
    DeadlineExceededError,
    ForgeError,
    LocalStorageError,
    UnavailableError,
)
from cognateforge.flush import EarlyFlush
from cognateforge.layout import SIGNATURE_NAME

OnProgress = Callable[[int, int], None]

# As much as a chunk of the contract: what is read at once when files on disk are hashed again.
READ_BYTES = 1 << 20
# How often a fetch asks whether another one of the same artifact has finished.
LOCK_POLL_S = 0.05

StepT = TypeVar("StepT")


@dataclass(frozen=True, kw_only=True)
class FetchedArtifact:
    """An artifact on this machine whose every digest was checked.

    bytes_received: payload bytes that this fetch transferred; 0 when the destination had them already.
    """

    path: Path
    manifest: dict[str, Any]
    digest: str
    name: str
    size_bytes: int
    bytes_received: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One immutable version: its exact name and the digest of its manifest."""

    name: str
    digest: str


class Landing:
    """The folder in which one artifact arrives. One process at a time holds it; others wait, then find it done.

    Errors: ArtifactCorruptError, when bytes are not what the manifest says; LocalStorageError, when the disk refuses.
    """

    def __init__(self, wanted: Wanted, destination: Path) -> None:
        check_digest(wanted.digest)
        self.wanted = wanted
        self.destination = Path(os.path.abspath(destination))
        self.partial = self.destination.parent / f".partial-{wanted.digest.removeprefix('sha256:')}"
        self.offset_bytes = 0
        self.bytes_received = 0
        # Bytes of an earlier process are trusted only as far as their digests go, so they may be worth a second try.
        self.resumed_from_disk = False
        self._manifest: Manifest | None = None
        self._index = 0
        self._file: BinaryIO | None = None
        # Whole files, by their index, until they are on the disk: many are flushed at once in little more than one is.
        self._whole: dict[int, tuple[BinaryIO, EarlyFlush]] = {}
        self._hash = hashlib.sha256()
        self._lock: int | None = None
        self._given_up = False

    def open(self) -> FetchedArtifact | None:
        """Take the folder with what an earlier fetch left in it, or return the artifact where nothing is left to do.

        Errors: LocalStorageError, when the destination holds anything else than this artifact, whole and undamaged.
        """
        with self._storage():
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._take()
            done = self._already_there()
            if done is None:
                self._resume()
        return done

    def _already_there(self) -> FetchedArtifact | None:
        if not self.destination.exists() or (self.destination.is_dir() and not any(self.destination.iterdir())):
            return None
        path = self.destination / MANIFEST_NAME
        raw = path.read_bytes() if path.is_file() else b""
        try:
            manifest = parse_manifest(raw, self.wanted.digest)
        except ArtifactCorruptError:
            raise LocalStorageError(
                f"{self.destination} exists and is not {self.wanted.name}: remove it, or choose another folder"
            ) from None
        for file in manifest.files:
            if not self._holds(self.destination, file):
                raise LocalStorageError(
                    f"{self.destination / file.path} is not as {self.wanted.name} was published: "
                    f"remove {self.destination} and fetch again"
                )
        return self._fetched(manifest)

    @property
    def size_bytes(self) -> int | None:
        """Size of the payload, known with the manifest."""
        return None if self._manifest is None else self._manifest.size_bytes

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived and every digest holds."""
        return self._manifest is not None and self._index == len(self._manifest.files)

    def accept_header(self, header: Header) -> None:
        """Check the header, and on the first one prepare the folder."""
        if header.digest != self.wanted.digest:
            raise ArtifactCorruptError(f"{self.wanted.name} has digest {header.digest}, expected {self.wanted.digest}")
        manifest = parse_manifest(header.manifest, self.wanted.digest)
        with self._storage():
            self._write_signature(header.signature)
            if self._manifest is None:
                self._require_space(manifest.size_bytes)
                _write_durably(self.partial / MANIFEST_NAME, manifest.raw)
                self._begin(manifest)

    def _write_signature(self, signature: bytes) -> None:
        """Put the signature beside the files, or nothing where there is none.

        Before the manifest: a folder with a manifest may be gone on with, and may need no further header.
        """
        path = self.partial / SIGNATURE_NAME
        if not signature:
            path.unlink(missing_ok=True)
        elif path.is_symlink() or not path.is_file() or path.read_bytes() != signature:
            path.unlink(missing_ok=True)
            _write_durably(path, signature)

    def accept_piece(self, piece: Piece) -> None:
        """Write and hash a piece. It must start where the last one ended; it may span files."""
        if self._manifest is None:
            raise ArtifactCorruptError(f"the stream of {self.wanted.name} starts without its header")
        if piece.offset_bytes != self.offset_bytes:
            raise ArtifactCorruptError(f"a chunk starts at byte {piece.offset_bytes}, expected {self.offset_bytes}")
        data = piece.data
        self.bytes_received += len(data)
        with self._storage():
            while data:
                if self._file is None:
                    raise ArtifactCorruptError(f"{len(data)} bytes arrived after the end of {self.wanted.name}")
                file = self._manifest.files[self._index]
                part = data[: file.offset_bytes + file.size_bytes - self.offset_bytes]
                # A disk that fills up takes a part and says so: what it took is what is hashed, and the next says why.
                part = part[: self._file.write(part)]
                self._flush.wrote(len(part))
                self._hash.update(part)
                self.offset_bytes += len(part)
                data = data[len(part) :]
                self._close_finished_files()

    def finish(self) -> FetchedArtifact:
        """Make the folder durable and give it its name."""
        if self._manifest is None or not self.complete:
            raise AssertionError("finish() before the last byte")
        with self._storage():
            for index, file in enumerate(self._manifest.files):
                if index in self._whole:
                    self._whole[index][1].finish()
                else:  # an earlier process's, which need not have come this far
                    _sync(self._path(file))
            self._drop_whole_files()
            for folder in {self.partial, *(path.parent for path in map(self._path, self._manifest.files))}:
                _sync(folder)
            os.rename(self.partial, self.destination)
            _sync(self.destination.parent)
        return self._fetched(self._manifest)

    def discard(self) -> None:
        """Throw away what arrived, and be ready to start again at byte 0."""
        self._drop_file()
        with self._storage():
            _empty(self.partial)
        self._manifest, self._index, self.offset_bytes = None, 0, 0
        self.resumed_from_disk = False

    def remove(self) -> None:
        """Remove the partial folder: nothing of a damaged artifact stays."""
        self._drop_file()
        shutil.rmtree(self.partial, ignore_errors=True)

    def give_up(self) -> None:
        """Stop waiting for another fetch. Thread-safe."""
        self._given_up = True

    def close(self) -> None:
        """Let go of the folder. What arrived stays for the next fetch."""
        self._drop_file()
        if self._lock is not None:
            with suppress(OSError):
                os.rmdir(self.partial)  # only if nothing arrived
            os.close(self._lock)
            self._lock = None

    def _take(self) -> None:
        while self._lock is None:
            # Not exist_ok: that looks again at what exists, which whoever held it may have removed in between.
            with suppress(FileExistsError):
                self.partial.mkdir()
            try:
                lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue  # whoever held it has renamed or removed it since
            try:
                self._wait_for(lock)
            except BaseException:
                os.close(lock)
                raise
            # Whoever held it before may have renamed or removed it meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(self.partial)):
                    self._lock = lock
            if self._lock is None:
                os.close(lock)

    def _wait_for(self, lock: int) -> None:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                left_s = remaining_budget_s()
                if self._given_up or (left_s is not None and left_s <= 0):
                    raise DeadlineExceededError(f"another fetch of {self.wanted.name} is still busy") from None
            time.sleep(LOCK_POLL_S)

    def _resume(self) -> None:
        path = self.partial / MANIFEST_NAME
        try:
            manifest = parse_manifest(path.read_bytes() if path.is_file() else b"", self.wanted.digest)
        except ArtifactCorruptError:
            _empty(self.partial)
            return
        self._begin(manifest)
        self.resumed_from_disk = self.offset_bytes > 0

    def _begin(self, manifest: Manifest) -> None:
        """Stand after the last byte that can be trusted: complete files by digest, then one piece of a file."""
        self._manifest = manifest
        while self._index < len(manifest.files) and self._holds(self.partial, manifest.files[self._index]):
            self._index += 1
        if self.complete:
            self.offset_bytes = manifest.size_bytes
            return
        file = manifest.files[self._index]
        self.offset_bytes = file.offset_bytes
        path = self._path(file)
        if path.is_symlink() or (path.is_file() and path.stat().st_size >= file.size_bytes):
            path.unlink()
        self._open(file)
        self._close_finished_files()

    def _open(self, file: ManifestFile) -> None:
        path = self._path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._hash = hashlib.sha256()
        if path.exists():
            with path.open("rb") as handle:
                while block := handle.read(READ_BYTES):
                    self._hash.update(block)
                    self.offset_bytes += len(block)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o644), "wb", buffering=0)
        self._flush = EarlyFlush(self._file.fileno())

    def _close_finished_files(self) -> None:
        """Check and close the file that is full, open the next; files of no bytes are passed on the way."""
        if self._manifest is None or self._file is None:
            return
        while self._file is not None:
            file = self._manifest.files[self._index]
            if self.offset_bytes < file.offset_bytes + file.size_bytes:
                return
            found = f"sha256:{self._hash.hexdigest()}"
            if found != file.digest:
                raise ArtifactCorruptError(f"{file.path} of {self.wanted.name} has digest {found}, not {file.digest}")
            self._whole[self._index], self._file = (self._file, self._flush), None
            self._index += 1
            if not self.complete:
                self._path(self._manifest.files[self._index]).unlink(missing_ok=True)
                self._open(self._manifest.files[self._index])

    def _path(self, file: ManifestFile) -> Path:
        path = self.partial / file.path
        if not path.parent.resolve().is_relative_to(self.partial.resolve()):
            raise LocalStorageError(f"{path.parent} leads outside {self.partial}: remove {self.partial}")
        return path

    def _holds(self, folder: Path, file: ManifestFile) -> bool:
        path = folder / file.path
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
            return False
        with path.open("rb") as handle:
            return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}" == file.digest

    def _require_space(self, size_bytes: int) -> None:
        free = shutil.disk_usage(self.partial).free
        if free < size_bytes:
            raise LocalStorageError(f"{self.wanted.name} needs {size_bytes} bytes, {self.partial.parent} has {free}")

    def _fetched(self, manifest: Manifest) -> FetchedArtifact:
        return FetchedArtifact(
            path=self.destination,
            manifest=manifest.document,
            digest=self.wanted.digest,
            name=self.wanted.name,
            size_bytes=manifest.size_bytes,
            bytes_received=self.bytes_received,
        )

    def _drop_file(self) -> None:
        if self._file is not None:
            self._flush.stop()
            self._file.close()
            self._file = None
        self._drop_whole_files()

    def _drop_whole_files(self) -> None:
        for handle, flush in self._whole.values():
            flush.stop()
            handle.close()
        self._whole.clear()

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = "free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "choose another folder"
            raise LocalStorageError(
                f"{error.filename or self.partial} cannot be used for {self.wanted.name}: {error.strerror}; {remedy}"
            ) from error


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


class FetchStream(Iterable[Frame], Protocol):
    """A sync stream that can be ended from this side."""

    def cancel(self) -> bool:
        """End it."""


class AioFetchStream(Protocol):
    """An asyncio stream that can be ended from this side."""

    def __aiter__(self) -> AsyncIterator[Frame]:
        """Read it."""

    def cancel(self) -> bool:
        """End it."""


class Reader:
    """Feeds a stream's frames to a Landing, and tells what to do when the stream breaks."""

    def __init__(
        self,
        landing: Landing,
        on_progress: OnProgress | None,
        give_up_after_s: float,
    ) -> None:
        self._landing = landing
        self._on_progress = on_progress
        self._patience = Patience(give_up_after_s)

    def take(self, frame: Frame) -> None:
        """Take one frame. Only bytes count as progress: a header comes with every attempt."""
        if isinstance(frame, Unknown):
            return  # what the manifest names must come in pieces all the same
        if isinstance(frame, Header):
            self._landing.accept_header(frame)
            return
        self._landing.accept_piece(frame)
        if frame.data:
            self._patience.progress()
        if self._on_progress is not None and self._landing.size_bytes is not None:
            self._on_progress(self._landing.offset_bytes, self._landing.size_bytes)

    def broken(self, error: ForgeError | None) -> float:
        """Return the pause before the next attempt, or raise the error when the patience is spent."""
        return self._patience.pause_s(error or UnavailableError("the stream closed before the artifact's end"))

    def corrupt(self) -> bool:
        """Return whether a second try from byte 0 is worth it; otherwise nothing of the artifact stays."""
        again = self._landing.resumed_from_disk
        self._landing.discard() if again else self._landing.remove()
        return again


def fetch(landing: Landing, open_stream: Callable[[int, float], FetchStream], reader: Reader) -> FetchedArtifact:
    """Fetch an artifact. `open_stream` takes offset_bytes and a timeout."""
    try:
        if done := landing.open():
            return done
        while not landing.complete:
            error: ForgeError | None = None
            stream = open_stream(landing.offset_bytes, STREAM_LIFE_S)
            try:
                for frame in stream:
                    reader.take(frame)
            except BREAKS as broken:
                error = broken
            except ArtifactCorruptError as corrupt:
                if not reader.corrupt():
                    raise
                error = corrupt
            finally:
                stream.cancel()
            if not landing.complete:
                time.sleep(reader.broken(error))
        return landing.finish()
    finally:
        landing.close()


async def fetch_aio(
    landing: Landing, open_stream: Callable[[int, float], AioFetchStream], reader: Reader
) -> FetchedArtifact:
    """The same for asyncio. Hashing what lies on disk, and the last fsyncs, leave the event loop alone."""
    try:
        if done := await _in_thread(landing.open, landing):
            return done
        while not landing.complete:
            error: ForgeError | None = None
            stream = open_stream(landing.offset_bytes, STREAM_LIFE_S)
            try:
                async for frame in stream:
                    reader.take(frame)
            except BREAKS as broken:
                error = broken
            except ArtifactCorruptError as corrupt:
                if not reader.corrupt():
                    raise
                error = corrupt
            finally:
                stream.cancel()
            if not landing.complete:
                await asyncio.sleep(reader.broken(error))
        return await _in_thread(landing.finish, landing)
    finally:
        landing.close()


async def _in_thread(step: Callable[[], StepT], landing: Landing) -> StepT:
    """Run a step beside the event loop. A cancelled fetch lets go of its folder only when the step has ended."""
    task = asyncio.create_task(asyncio.to_thread(step))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        landing.give_up()
        await asyncio.wait({task})
        task.cancelled() or task.exception()  # looked at, so that asyncio does not complain about it
        raise
