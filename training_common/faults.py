"""Which errors of the operating system speak of the machine and not of the job, and which of those of its storage."""

from __future__ import annotations

import errno

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
