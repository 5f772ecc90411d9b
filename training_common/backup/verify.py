"""Reading a backup again: every object against its digest, every table against its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from cognateforge.exceptions import ArtifactCorruptError
from training_common.backup.destination import Destination, read_object
from training_common.backup.manifest import Backup
from training_common.backup.parallel import in_parallel
from training_common.backup.segments import kept_checkpoints, kept_files, kept_lines

# Of so many it is told what is wrong; of the others, that there are more.
_TOLD = 20
T = TypeVar("T")


@dataclass(kw_only=True)
class Checked:
    """What was read. problems: what does not hold, in words, the first of them."""

    objects: int = 0
    size_bytes: int = 0
    damaged: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, size_bytes: int) -> None:
        """Count an object."""
        self.objects += 1
        self.size_bytes += size_bytes

    def note(self, problem: str) -> None:
        """Count what does not hold."""
        self.damaged += 1
        if len(self.problems) < _TOLD:
            self.problems.append(problem)


def verify(destination: Destination, backup: Backup) -> Checked:
    """Read everything in a backup, and return what is wrong with it."""
    found, manifest = Checked(), backup.manifest
    for table in manifest.tables:
        rows = kept_lines(destination, table.rows, what=f"table {table.name}", kept=found.add)
        for _ in _noting(rows, found):
            pass
    files = kept_files(destination, manifest.blobs, what="list of files", kept=found.add)
    kept = kept_checkpoints(destination, manifest.checkpoints, what="list of checkpoints", kept=found.add)
    missing = {one.digest for one in manifest.missing}
    blobs = (
        (digest, size_bytes, f"{name}: {path}")
        for digest, size_bytes, name, path in _noting(files, found)
        if digest not in missing
    )
    checkpoints = ((digest, size_bytes, path) for path, digest, size_bytes in _noting(kept, found))
    for size_bytes, problem in in_parallel(partial(_read, destination), itertools.chain(blobs, checkpoints)):
        if problem:
            found.note(problem)
        else:
            found.add(size_bytes)
    return found


def _noting(lines: Iterator[T], found: Checked) -> Iterator[T]:
    """Yield lines, and note what ends them."""
    try:
        yield from lines
    except ArtifactCorruptError as error:
        found.note(error.message)


def _read(destination: Destination, file: tuple[str, int, str]) -> tuple[int, str]:
    """Read an object, and return its size, and what is wrong with it, "" where nothing is."""
    digest, size_bytes, what = file
    try:
        for _ in read_object(destination, digest, size_bytes, what=what):
            pass
    except ArtifactCorruptError as error:
        return size_bytes, error.message
    return size_bytes, ""
