"""Names a plugin of an architecture where its code raises in a worker."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from agent_server.architectures.factory import BUILT_IN
from cognateforge.exceptions import ForgeError, IncompatibleError
from training_common import faults
from training_common.attempt import AttemptStopped, AttemptWaits, FencedOutError, PartDone, TeamBrokenError

# Of what a plugin raised, so much is told.
_TOLD_CHARS = 200
# What is no fault of anybody's code.
_PASSED = (
    ForgeError,
    AttemptStopped,
    AttemptWaits,
    FencedOutError,
    PartDone,
    TeamBrokenError,
    MemoryError,
    sa.exc.OperationalError,
)


@contextlib.contextmanager
def plugin_blamed(architecture: str, *, doing: str, folder: Path) -> Iterator[None]:
    """Turn what is raised in the body, SystemExit included, into an error that names the plugin.

    doing: what cannot be done, after "an agent of the plugin ... cannot be". folder: where files are written: what is
    raised while its disk is full is no fault of the plugin. Built-in architectures are not blamed.
    Errors: IncompatibleError.
    """
    try:
        yield
    except _PASSED:
        raise
    except (Exception, SystemExit) as error:
        full = faults.of_full_disk(error, folder)
        if architecture in BUILT_IN or full or (isinstance(error, OSError) and faults.of_machine(error)):
            raise
        traceback.print_exc()  # into the worker's log
        first = "".join(c if c.isprintable() else " " for c in str(error).strip().partition("\n")[0])[:_TOLD_CHARS]
        raise IncompatibleError(
            f"an agent of the plugin {architecture} cannot be {doing}: {type(error).__name__}: {first}; correct the "
            "plugin"
        ) from error
