"""Lines in compressed segments that are named by their digest.

Where a segment ends is decided by the lines themselves, so that rows that come, go or change leave all segments but
their own as they were: the next backup does not keep those again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.exceptions import ArtifactCorruptError
from training_common.artifacts.places import at_path
from training_common.backup.destination import Destination, object_key, read_object
from training_common.digests import sha256_bytes

# One key in so many ends a segment.
_LINES = 4096
# What bounds the memory that a segment takes: so much text, beyond its last line.
_BYTES = 8 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# zlib's usual one: a higher one takes twice the time for a few per cent.
_LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some lines. size_bytes: of its compressed bytes, as digest is."""

    digest: str
    size_bytes: int
    lines: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Lines in their order. digest: of all of them, not compressed."""

    lines: int
    digest: str
    segments: tuple[Segment, ...]


class SegmentWriter:
    """Writes lines into segments in a folder. Nothing larger than one segment is held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: list[bytes] = []
        self._size = 0
        self._segments: list[Segment] = []
        self._sha256 = hashlib.sha256()

    def add(self, line: bytes, key: bytes) -> None:
        """Add a line. key: what of it stays the same while the rest of it may change."""
        self._lines.append(line)
        self._size += len(line)
        self._sha256.update(line)
        if zlib.crc32(key) % _LINES == 0 or self._size >= _BYTES:
            self._cut()

    def _cut(self) -> None:
        data = gzip.compress(b"".join(self._lines), _LEVEL, mtime=0)
        digest = sha256_bytes(data)
        with at_path(self._folder):
            staged(self._folder, digest).write_bytes(data)
        self._segments.append(Segment(digest=digest, size_bytes=len(data), lines=len(self._lines)))
        self._lines, self._size = [], 0

    def close(self) -> Listing:
        """Write what is left, and return what was written."""
        if self._lines:
            self._cut()
        return Listing(
            lines=sum(segment.lines for segment in self._segments),
            digest=f"sha256:{self._sha256.hexdigest()}",
            segments=tuple(self._segments),
        )


def staged(folder: Path, digest: str) -> Path:
    """Return where a segment lies in a folder of segments."""
    return folder / digest.removeprefix("sha256:")


def staged_lines(folder: Path, listing: Listing) -> Iterator[Any]:
    """Yield the parsed lines of segments that were written into a folder."""
    for segment in listing.segments:
        for line in gzip.decompress(staged(folder, segment.digest).read_bytes()).split(b"\n")[:-1]:
            yield json.loads(line)


def kept_files(
    destination: Destination, listing: Listing, *, what: str, kept: Callable[[int], object] = lambda _size: None
) -> Iterator[tuple[str, int, str, str]]:
    """Yield digest, size, version and path of each file of a list of files, as `kept_lines` does."""
    for line in kept_lines(destination, listing, what=what, kept=kept):
        match line:
            case [str(digest), int(size_bytes), str(version), str(path)] if _DIGEST.fullmatch(digest):
                yield digest, size_bytes, version, path
            case _:
                raise ArtifactCorruptError(f"{what}: {str(line)[:200]} is none of its lines")


def kept_checkpoints(
    destination: Destination, listing: Listing, *, what: str, kept: Callable[[int], object] = lambda _size: None
) -> Iterator[tuple[str, str, int]]:
    """Yield path, digest and size of each file of a list of checkpoints, as `kept_lines` does."""
    for line in kept_lines(destination, listing, what=what, kept=kept):
        match line:
            case [str(path), str(digest), int(size_bytes)] if _DIGEST.fullmatch(digest) and "\0" not in path:
                yield path, digest, size_bytes
            case _:
                raise ArtifactCorruptError(f"{what}: {str(line)[:200]} is none of its lines")


def kept_lines(
    destination: Destination, listing: Listing, *, what: str, kept: Callable[[int], object] = lambda _size: None
) -> Iterator[Any]:
    """Yield the parsed lines of a backup, one segment after the other.

    kept: is told of each segment's size.
    Errors: ArtifactCorruptError, naming `what` and the object; for all lines together at the end.
    """
    sha256, count = hashlib.sha256(), 0
    for segment in listing.segments:
        data = b"".join(read_object(destination, segment.digest, segment.size_bytes, what=what))
        kept(segment.size_bytes)
        try:
            text = gzip.decompress(data)
            # Not splitlines: JSON's texts may hold other ends of lines than this one.
            lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
            raise ArtifactCorruptError(f"{what}: {object_key(segment.digest)} holds no lines of a backup") from error
        sha256.update(text)
        count += len(lines)
        yield from lines
    if (count, f"sha256:{sha256.hexdigest()}") != (listing.lines, listing.digest):
        raise ArtifactCorruptError(f"{what}: its {count} rows are not the {listing.lines} that the backup tells of")
