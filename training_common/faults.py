"""Which errors of the operating system speak of the machine and not of the job, and which of those of its storage."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# How libraries of Rust and of C++ tell of it.
_TOLD_AS_FULL = tuple(words for number in _FULL for words in (os.strerror(number).lower(), f"os error {number})"))
# A disk with less space than this after a failed write was full: a writer's last block was larger.
FULL_BYTES = 1 << 20
# Full, read-only, damaged, or gone for the moment.
_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO})
# What another attempt, later or elsewhere, need not meet again.
_MACHINE = _STORAGE | {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ETIMEDOUT}


def of_storage(error: OSError) -> bool:
    """Whether an error tells that nothing can be read or written now, whatever file it is about."""
    return error.errno in _STORAGE


def of_machine(error: OSError) -> bool:
    """Whether an error is the machine's.

    A file that is missing or may not be read is no such fault: it would be missing for the next attempt too.
    """
    return error.errno in _MACHINE


def of_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether what was written below a folder failed for lack of room.

    Libraries tell of it in words of their own or in none, and what they had half written may be gone again.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    text = str(error).lower()
    return any(words in text for words in _TOLD_AS_FULL) or shutil.disk_usage(folder).free < FULL_BYTES
