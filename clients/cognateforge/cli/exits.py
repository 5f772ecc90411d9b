"""Exit codes of every command. Scripts may rely on them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cognateforge.exceptions import ForgeError


class Exit(enum.IntEnum):
    """One number per kind of outcome."""

    OK = 0
    JOB_FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    PRECONDITION = 5
    DEADLINE = 6
    PERMISSION = 7
    CORRUPT = 8
    CONFLICT = 9
    EXHAUSTED = 10
    NOT_IMPLEMENTED = 11
    INTERNAL = 12
    LOCAL = 13
    INTERRUPTED = 130


MEANING: Mapping[Exit, str] = {
    Exit.OK: "done; for a watched job: it succeeded",
    Exit.JOB_FAILED: "the watched job failed or was cancelled",
    Exit.USAGE: "wrong usage, or the server refused an argument",
    Exit.NOT_FOUND: "no such job, model or agent",
    Exit.UNAVAILABLE: "the service cannot be reached or cannot answer now, or the circuit is open",
    Exit.PRECONDITION: "the state of things does not allow it",
    Exit.DEADLINE: "the deadline passed",
    Exit.PERMISSION: "the caller may not do this",
    Exit.CORRUPT: "bytes do not have the digest that the manifest states",
    Exit.CONFLICT: "the request id was used for something else",
    Exit.EXHAUSTED: "too much at once: slow down",
    Exit.NOT_IMPLEMENTED: "the server does not serve this call",
    Exit.INTERNAL: "a fault inside the server",
    Exit.LOCAL: "this machine's side: the disk, or plaintext to another machine",
    Exit.INTERRUPTED: "interrupted; a submitted job goes on",
}


def exit_for(error: ForgeError) -> Exit:
    """Return the exit code of an error."""
    from cognateforge import exceptions

    table: tuple[tuple[type[ForgeError], Exit], ...] = (
        (exceptions.JobFailedError, Exit.JOB_FAILED),
        (exceptions.InvalidRequestError, Exit.USAGE),
        (exceptions.OutOfRangeError, Exit.USAGE),
        (exceptions.NotFoundError, Exit.NOT_FOUND),
        (exceptions.UnavailableError, Exit.UNAVAILABLE),
        (exceptions.PreconditionError, Exit.PRECONDITION),
        (exceptions.DeadlineExceededError, Exit.DEADLINE),
        (exceptions.ForbiddenError, Exit.PERMISSION),
        (exceptions.ArtifactCorruptError, Exit.CORRUPT),
        (exceptions.ConflictError, Exit.CONFLICT),
        (exceptions.ResourceExhaustedError, Exit.EXHAUSTED),
        (exceptions.NotImplementedByServerError, Exit.NOT_IMPLEMENTED),
        (exceptions.LocalError, Exit.LOCAL),
    )
    return next((code for cls, code in table if isinstance(error, cls)), Exit.INTERNAL)


def epilog() -> str:
    """Return the table for `forge --help`."""
    # After \b lines stay as they are.
    return "\b\nExit codes:\n" + "\n".join(f"{code.value:3d}  {meaning}" for code, meaning in MEANING.items())
