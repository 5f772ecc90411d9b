"""Makes a file durable while it is still being written, so that little is left to wait for at its end."""

from __future__ import annotations

import os
import threading

# The disk works on one piece while the next arrives. Files below two pieces are flushed at their end alone.
PIECE_BYTES = 16 << 20


class EarlyFlush:
    """Flushes what was written to an open file, in a thread that starts with the first whole piece."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unflushed_bytes = 0
        self._wanted = threading.Event()
        self._ended = False
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def wrote(self, size_bytes: int) -> None:
        """Tell that so many bytes were written."""
        self._unflushed_bytes += size_bytes
        if self._unflushed_bytes < PIECE_BYTES:
            return
        self._unflushed_bytes = 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._flush, name="flush", daemon=True)
            self._thread.start()
        self._wanted.set()

    def stop(self) -> None:
        """End the thread. Call it before the file is closed: its number may be another file's a moment later."""
        self._ended = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait until all of the file is durable. Errors: OSError, also of an earlier piece: it is told only once."""
        self.stop()
        if self._error is not None:
            raise self._error
        os.fsync(self._descriptor)

    def _flush(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended:
                return
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._error = error
                return
