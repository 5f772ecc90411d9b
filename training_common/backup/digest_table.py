"""Digests and sizes, in a temporary file of SQLite's own: memory stays flat however many they are."""

from __future__ import annotations

import sqlite3
import threading


class DigestTable:
    """Sizes by digest. It is gone when it is closed, and with its process."""

    def __init__(self) -> None:
        # An empty name is a private file without a name; it needs no durability.
        self._lock = threading.Lock()
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=OFF")
        self._connection.execute("CREATE TABLE sizes (digest BLOB PRIMARY KEY, size INTEGER NOT NULL) WITHOUT ROWID")

    def add(self, digest: str, size_bytes: int) -> bool:
        """Add a digest, and return whether it is new."""
        insert = "INSERT OR IGNORE INTO sizes VALUES (?, ?)"
        with self._lock:
            return self._connection.execute(insert, (_raw(digest), size_bytes)).rowcount == 1

    def size(self, digest: str) -> int | None:
        """Return the size of a digest, None where it is not here."""
        with self._lock:
            found = self._connection.execute("SELECT size FROM sizes WHERE digest = ?", (_raw(digest),)).fetchone()
        return None if found is None else int(found[0])

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))
