"""Which keys were seen already: `SeenKeys`, a set on disk."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path
from types import TracebackType

# 8 MiB of pages hold the keys of about 200,000 rows; more are looked up on the disk.
_CACHE_KIB = 8 * 1024


class SeenKeys:
    """A set of keys whose memory does not grow with their number. Use it in a `with` block.

    folder: on whose disk it lies; None means the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            for statement in (
                f"PRAGMA cache_size = -{_CACHE_KIB}",
                "PRAGMA locking_mode = EXCLUSIVE",
                "PRAGMA journal_mode = OFF",  # nobody reads it after a crash
                "PRAGMA synchronous = OFF",
                "CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID",
                "BEGIN",
            ):
                self._database.execute(statement)
        finally:
            os.unlink(path)  # open, but without a name: nothing is left behind when the process is killed

    def __enter__(self) -> SeenKeys:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def add(self, key: bytes) -> bool:
        """Add a key, and tell whether it is new."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1
