"""The audit log: one JSON object a line for every mutation, whatever came of it, and for every refused call.

It is a file of its own, audit/audit.jsonl in the data folder, and is rotated by size. A record that cannot be written
goes to the service's log with its whole content, and health says NOT_SERVING until records can be written again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any

import structlog

from training_common.settings import AuditSettings

log = structlog.get_logger(__name__)

FILE = "audit.jsonl"
# Callers choose these texts; a record stays a line that people can read.
_MAX_TEXT_CHARS = 255


class AuditLog:
    """Writes records, each by one write. One server writes into one folder: the data folder's lock sees to it.

    Not the standard library's handlers: they keep what could not be written and write it later, beside what was told.
    """

    def __init__(self, folder: Path, settings: AuditSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / FILE
        self._settings = settings
        self._descriptor: int | None = None
        self._size_bytes = 0
        # The file may end in half a line: after a crash, or a disk that took a part.
        self._torn = True
        self._lost = 0
        # Records that could not be written, since the start.
        self.failures = 0

    def check(self) -> bool:
        """Return whether records can be written. After a failure it tries with a record that tells of the gap."""
        if self._lost:
            lost = self._lost
            if not self._try({"outcome": "AUDIT_RESUMED", "lost": lost}):
                return False
            self._lost = 0
        elif self._descriptor is not None and not self._is_in_place(self._descriptor):
            self.close()  # it was moved or removed: the next record begins a new one
        return True

    def write(self, **record: Any) -> None:
        """Write one record. Never raises: what it tells of has happened."""
        values = {key: _bounded(value) for key, value in record.items() if value not in ("", None)}
        if not self._try(values):
            self._lost += 1
            self.failures += 1
            log.error("audit record not written", record=values)

    def close(self) -> None:
        """Close the file. The next record opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self, values: dict[str, Any]) -> bool:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        # In plain ASCII: other line ends, and what a terminal obeys, stay escaped.
        line = json.dumps({"time": now, **values}).encode("ascii") + b"\n"
        try:
            if self._size_bytes and self._size_bytes + len(line) > self._settings.max_file_bytes:
                self._rotate()
            descriptor = self._open() if self._descriptor is None else self._descriptor
            if self._torn:
                line = b"\n" + line
            written = os.write(descriptor, line)
        except OSError as error:
            log.warning("audit log cannot be written", path=str(self.path), detail=error.strerror)
            self.close()
            return False
        self._size_bytes += written
        self._torn = written < len(line)
        return not self._torn

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._descriptor = descriptor = os.open(self.path, flags, 0o600)
        self._size_bytes = os.fstat(descriptor).st_size
        self._torn = self._size_bytes > 0 and os.pread(descriptor, 1, self._size_bytes - 1) != b"\n"
        return descriptor

    def _rotate(self) -> None:
        """Move the file to .1, that one to .2 and so on; the oldest goes."""
        self.close()
        for number in range(self._settings.keep_files, 0, -1):
            older = self.path if number == 1 else self.path.with_name(f"{FILE}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                older.replace(self.path.with_name(f"{FILE}.{number}"))
        self._size_bytes = 0

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except OSError:
            return False


def _bounded(value: Any) -> Any:
    return value[:_MAX_TEXT_CHARS] if isinstance(value, str) else value
