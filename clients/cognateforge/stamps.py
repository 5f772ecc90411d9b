"""What changes when files are written or replaced: for what is read again then."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Time of the last write in nanoseconds, size in bytes and inode of each file.
Stamp = tuple[tuple[int, int, int], ...]


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """Return the stamp of files as they are now. Errors: OSError, when one is not there."""
    found = [path.stat() for path in paths]
    return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)
