"""Commands as processes, on terminals and pipes of all kinds: they end as they should, and leave a terminal usable."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.client.fakes import JOB, Fake

FORGE = (sys.executable, "-m", "cognateforge.cli")
SHOWN_AGAIN, SCREEN_LEFT = b"\x1b[?25h", b"\x1b[?1049l"
FULL = Path("/dev/full")


def environment(fake: Fake, **more: str) -> dict[str, str]:
    return {**os.environ, "TERM": "xterm", "FORGE_COGNATE": fake.address, "FORGE_AGENT": fake.address, **more}


def on_terminal(args: Sequence[str], env: Mapping[str, str], *, until: bytes, signum: int) -> tuple[int, bytes]:
    """Run on a terminal of its own, send a signal once something stands there, and return the end and all of it."""
    control, terminal = pty.openpty()
    # What a test run itself ignores, as under nohup, the program would inherit.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen((*FORGE, *args), env=env, stdin=terminal, stdout=terminal, stderr=terminal)
    signal.signal(signal.SIGHUP, before)
    os.close(terminal)
    written, told, ends_s = b"", False, time.monotonic() + 60
    try:
        while time.monotonic() < ends_s:
            if select.select([control], [], [], 0.1)[0]:
                try:
                    written += os.read(control, 65_536)
                except OSError:  # the last of its holders has gone
                    break
            if until in written and not told:
                told = True
                process.send_signal(signum)
        return process.wait(10), written
    finally:
        process.kill()
        os.close(control)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("args", "left"), [(("top", "--interval", "0.2"), SCREEN_LEFT), (("watch", JOB), SHOWN_AGAIN)])
def test_what_ends_a_display_leaves_the_terminal_usable(
    fake: Fake, signum: int, args: tuple[str, ...], left: bytes
) -> None:
    """Also while the display begins: the cursor is seen, the other screen is gone. It ends by the signal."""
    fake.history.pause_before_end = threading.Event()
    code, written = on_terminal(args, environment(fake), until=b"20", signum=signum)
    fake.history.pause_before_end.set()
    assert -signum == code
    assert SHOWN_AGAIN in written[-60:]
    assert left in written[-60:]


def test_a_terminal_without_a_cursor_gets_lines(fake: Fake) -> None:
    """One picture of `top`, as a pipe gets it, and a line for each event of `watch`; nothing was seen there before."""
    env = environment(fake, TERM="dumb")
    code, written = on_terminal(["top"], env, until=b"never sent", signum=signal.SIGINT)
    assert 0 == code
    assert b"cognate: SERVING" in written
    assert b"\x1b" not in written
    code, written = on_terminal(["watch", JOB], env, until=b"never sent", signum=signal.SIGINT)
    assert 0 == code
    assert b"step 2/20 loss 2.5" in written
    assert b"\x1b" not in written


@pytest.mark.parametrize("args", [("top", "--once"), ("jobs",), ("jobs", "--json"), ("watch", JOB, "--progress")])
def test_a_reader_that_has_left_is_no_failure(fake: Fake, args: tuple[str, ...]) -> None:
    """1 would say that the watched job failed."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run((*FORGE, *args), env=environment(fake), stdout=write, stderr=write)
    os.close(write)
    assert 0 == process.returncode


@pytest.mark.parametrize("args", [("top", "--once"), ("jobs",), ("jobs", "--json")])
def test_a_closed_stdout_is_no_failure(fake: Fake, args: tuple[str, ...]) -> None:
    """As `>&-` closes it."""
    command = (*("sh", "-c", 'exec "$@" >&-', "sh"), *FORGE, *args)
    process = subprocess.run(command, env=environment(fake), stderr=subprocess.PIPE, text=True)
    assert (0, "") == (process.returncode, process.stderr)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("args", [("top", "--once"), ("jobs",), ("jobs", "--json"), ("watch", JOB, "--json")])
def test_a_full_disk_is_told_without_a_traceback(fake: Fake, args: tuple[str, ...]) -> None:
    """It is this machine's side."""
    with FULL.open("wb") as full:
        process = subprocess.run((*FORGE, *args), env=environment(fake), stdout=full, stderr=subprocess.PIPE, text=True)
    assert 13 == process.returncode
    assert "No space left on device" in process.stderr
    assert "Traceback" not in process.stderr
