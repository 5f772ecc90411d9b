"""The audit log: one JSON object a line for every mutation, whatever came of it, and for every refused call.

It is a file of its own, audit/audit.jsonl in the data folder, and is rotated by size. A record that cannot be written
goes to the service's log with its whole content, and health says NOT_SERVING until records can be written again.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Any

import structlog

from training_common.settings import AuditSettings

log = structlog.get_logger(__name__)

FILE = "audit.jsonl"
# Callers choose these texts; a record stays a line that people can read.
_MAX_TEXT_CHARS = 255


class AuditLog:
    """Writes records, each complete at once. One server writes into one folder: the data folder's lock sees to it."""

    def __init__(self, folder: Path, settings: AuditSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._lost = 0
        self._handler = _Handler(
            self.path, maxBytes=settings.max_file_bytes, backupCount=settings.keep_files, encoding="utf-8", delay=True
        )

    def check(self) -> bool:
        """Return whether records can be written. After a failure it tries with a record that tells of the gap."""
        if not self._handler.writable:
            self.write(outcome="AUDIT_RESUMED", lost=self._lost)
        return self._handler.writable

    def write(self, **record: Any) -> None:
        """Write one record. Never raises: what it tells of has happened."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        values = {key: _bounded(value) for key, value in record.items() if value not in ("", None)}
        text = json.dumps({"time": now, **values}, ensure_ascii=False)
        self._handler.emit(logging.makeLogRecord({"msg": text}))
        self._lost = 0 if self._handler.writable else self._lost + 1

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _Handler(logging.handlers.RotatingFileHandler):
    """The standard library's rotation, with its own word on errors: it would print them and go on in silence."""

    writable = True
    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.writable:
            record.msg = f"\n{record.msg}"  # the line before may be half there
        self._failed = False
        super().emit(record)
        self.writable = not self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed = True
        log.error("audit record not written", record=record.getMessage(), detail=str(sys.exc_info()[1]))


def _bounded(value: Any) -> Any:
    return value[:_MAX_TEXT_CHARS].encode(errors="replace").decode() if isinstance(value, str) else value
