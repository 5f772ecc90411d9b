"""Asks a process of its own about code of others, which may hang, print, exit or start what outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile


def ask(module: str, question: str, *, patience_s: float, most_bytes: int) -> tuple[bytes, str]:
    """Run `python -m module question`, and return what it wrote to its standard output, and how it ended in words.

    most_bytes: of its answer, what is longer is cut.
    What else it prints goes nowhere, and all that it has started ends with it.
    Errors: TimeoutError, after `patience_s`.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-P", "-m", module, question],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer.seek(0)
        text = answer.read(most_bytes)
    return text, f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
