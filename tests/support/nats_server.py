"""A real NATS server with JetStream, in a process that can be killed and started again over the same files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

BINARY = Path(sys.executable).parent / "nats-server"
START_TIMEOUT_S = 20.0


class NatsServer:
    """One server on a free port, which it keeps over restarts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = -1
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"nats://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start, and wait until it listens. Errors: RuntimeError with the log, when it does not come up."""
        log = self._folder / "server.log"
        command = [str(BINARY), "-js", "-sd", str(self._folder / "store"), "-a", "127.0.0.1", "-p", str(self._port)]
        command += ["--ports_file_dir", str(self._folder)]
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out)
        ports = self._folder / f"nats-server_{self._process.pid}.ports"
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not (ports.exists() and ports.read_text().endswith("}")):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"nats-server did not come up:\n{log.read_text()}")
            time.sleep(0.01)
        self._port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
