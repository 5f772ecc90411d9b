"""A real Cognate service in a process of its own, over a temporary folder, for the benches that need one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 30


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end the bench like Ctrl-C does: through its `with` blocks, which end processes and remove folders."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def cognate_process(data_dir: Path, settings: Path | None = None) -> Iterator[str]:
    """Yield the address of a service over `data_dir` whose jobs stay QUEUED. Its log goes to a file, as a unit's does.

    settings: a TOML file with more than that.
    Errors: RuntimeError with the log, when it does not come up.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    address_file, log_file = data_dir / "address", data_dir / "server.log"
    environment = {
        **os.environ,
        "COGNATE_SERVER_ADDRESS": "127.0.0.1:0",
        "COGNATE_SERVER_DATA_DIR": str(data_dir),
        "COGNATE_SERVER_WORKERS__SLOTS": "0",
        "COGNATE_SERVER_DRAIN_GRACE_S": "0.5",
    }
    with log_file.open("wb") as log:
        command = [sys.executable, "-m", "cognate_server", "--address-file", str(address_file)]
        if settings is not None:
            command += ["--settings", str(settings)]
        server = subprocess.Popen(command, env=environment, stderr=log)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not address_file.exists():
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the service did not come up:\n{log_file.read_text()}")
            time.sleep(0.05)
        yield address_file.read_text()
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
