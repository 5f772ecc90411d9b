"""The log of one attempt: what its worker writes on stdout and stderr, in a file of bounded size.

The worker's processes write into the file themselves, so their last words are there however they end. When the file
has grown beyond its bound, its middle is given back to the file system as a hole. What is left keeps its place, so a
position is a byte's place in all that was ever written, for good. A file beside the log tells where the hole lies; it
is written before the hole is made, and read after the bytes, so that nobody takes a hole for text.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cognateforge.exceptions import OffsetOutOfRangeError
from training_common.masking import LONGEST_BYTES, Mask
from training_common.settings import LogSettings

# From linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# A file system frees whole blocks; the largest common ones have this size.
_BLOCK_BYTES = 64 << 10
# What has grown by less is left alone: every cut is a write and a call to the file system.
_GROWTH_BYTES = 1 << 20
# The contract's bounds of one line and of the lines of one frame.
MAX_LINE_BYTES, MAX_LINES = 8192, 1000
_READ_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A line, or a part of a long one. continued: the line goes on in what follows."""

    position: int
    text: str
    continued: bool


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """What follows a position: lines, or a hole, or nothing. next_position: where to go on. size_bytes: of the log."""

    lines: tuple[LogLine, ...] = ()
    hole: bool = False
    next_position: int
    size_bytes: int = 0


def open_log(path: Path) -> int:
    """Open a log for a worker to write into, and return the descriptor. Errors: OSError, for what is no file too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without O_NONBLOCK a pipe in the log's place would keep the server waiting for a reader.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "its log is no regular file", str(path))
    return descriptor


class AttemptLog:
    """One attempt's log. Errors of every method: OSError, FileNotFoundError where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cut_path = path.with_suffix(".cut")

    def bound(self, settings: LogSettings) -> bool:
        """Keep the log's size on disk within the bound, as far as it is told now; call it now and then.

        Returns False when it is beyond the bound, and the file system cannot free a part of a file.
        """
        size = self._path.stat().st_size
        # A hole begins and ends with a block, or its edges would be zeros that take room.
        begin = -(-settings.keep_first_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        begin, before = self._cut() or (begin, begin)
        end = (size - settings.keep_last_bytes) // _BLOCK_BYTES * _BLOCK_BYTES
        if end - before < _GROWTH_BYTES:
            return True
        scratch = self._cut_path.with_suffix(f".{os.getpid()}")
        try:
            scratch.write_text(json.dumps([begin, end]))
            scratch.rename(self._cut_path)
        finally:
            scratch.unlink(missing_ok=True)
        with self._opened(os.O_RDWR) as descriptor:
            return _free(descriptor, begin, end - begin)

    def _cut(self) -> tuple[int, int] | None:
        try:
            begin, end = json.loads(self._cut_path.read_text())
        except FileNotFoundError:
            return None
        return int(begin), int(end)

    def read(self, position: int, *, mask: Mask, ended: bool, partial: bool) -> LogPart:
        """Return what follows `position`: at most MAX_LINES lines.

        ended: nobody writes into it any more. partial: the beginning of a line that is not yet whole counts too.
        Errors: OffsetOutOfRangeError.
        """
        with self._opened(os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            if position > size:
                raise OffsetOutOfRangeError(f"position {position} is beyond the log's end {size}")
            start = max(0, position - LONGEST_BYTES)
            data = os.pread(descriptor, position - start + _READ_BYTES + LONGEST_BYTES, start)
            cut = self._cut()
            if cut is not None and cut[0] <= position < cut[1]:
                return LogPart(hole=True, next_position=_next_line(descriptor, cut[1]), size_bytes=size)
        text = mask.data(data)[position - start :][:_READ_BYTES]
        at_end, broken_off = position + len(text) >= size, False
        if cut is not None and position < cut[0] <= position + len(text):
            text, at_end, broken_off = text[: cut[0] - position], False, True
        lines, read_bytes = _split(text, position)
        if len(lines) < MAX_LINES and (broken_off or (at_end and (ended or partial))):
            # What is left has no newline, and none is waited for.
            stop = len(text) if ended or broken_off else _whole_characters(text, len(text))
            if stop > read_bytes:
                lines.append(_line(text[read_bytes:stop], position + read_bytes, continued=not (at_end and ended)))
                read_bytes = stop
        return LogPart(lines=tuple(lines), next_position=position + read_bytes, size_bytes=size)

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        descriptor = os.open(self._path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def kept_bounded(path: Path, settings: LogSettings, *, interval_s: float = 1.0) -> Iterator[None]:
    """Keep this process's log within its bound, from a thread, while the body runs.

    Where the file system cannot free parts of a file, the process writes nowhere once its log is full.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(interval_s):
            try:
                if not AttemptLog(path).bound(settings):
                    _turn_off(path)
                    return
            except OSError:  # no log here, or a disk that is full: the next look tries again
                continue

    thread = threading.Thread(target=look, name="log-bound", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _turn_off(path: Path) -> None:
    """Send what this process writes into the log elsewhere, after a last word about it."""
    log = path.stat()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    last_words = b"the log is full: what follows is not kept, for this file system frees no part of a file\n"
    for descriptor in (1, 2):
        target = os.fstat(descriptor)
        if (target.st_dev, target.st_ino) == (log.st_dev, log.st_ino):
            os.write(descriptor, last_words)
            last_words = b""
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _free(descriptor: int, begin: int, length: int) -> bool:
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    sizes = (ctypes.c_int64(begin), ctypes.c_int64(length))
    if fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, *sizes) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))


def _next_line(descriptor: int, position: int) -> int:
    """Return where the first whole line behind a position begins, or the position itself where none does soon."""
    newline = os.pread(descriptor, _READ_BYTES, position).find(b"\n")
    return position + newline + 1


def _split(text: bytes, position: int) -> tuple[list[LogLine], int]:
    """Return the lines that are whole, long ones in parts, and how many bytes they were."""
    lines: list[LogLine] = []
    place = 0
    while len(lines) < MAX_LINES:
        newline = text.find(b"\n", place, place + MAX_LINE_BYTES + 1)
        if newline >= 0:
            lines.append(_line(text[place:newline], position + place, continued=False))
            place = newline + 1
        elif len(text) - place > MAX_LINE_BYTES:
            stop = _whole_characters(text, place + MAX_LINE_BYTES)
            lines.append(_line(text[place:stop], position + place, continued=True))
            place = stop
        else:
            break
    return lines, place


def _line(text: bytes, position: int, *, continued: bool) -> LogLine:
    return LogLine(position=position, text=text.decode("utf-8", "replace"), continued=continued)


def _whole_characters(text: bytes, stop: int) -> int:
    """Return the last place up to `stop` that divides no character of UTF-8."""
    for back in range(1, 4):
        byte = text[stop - back] if back <= stop else 0
        if byte & 0xC0 != 0x80:  # a character begins here: 1, 2, 3 or 4 bytes long
            length = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return stop if length <= back else stop - back
    return stop
