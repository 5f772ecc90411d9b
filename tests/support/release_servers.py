"""Server processes of either release, beside each other, over folders and stores that outlive them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.agent._support import write_foundation
from tests.support.previous import Release
from tests.support.published import MODEL_BODY
from training_common.models.fingerprints import COGNATE_V1_25M

_PUBLISH = Path(__file__).with_name("publish_files.py")
# A server takes one to three seconds; the machine may have other things to do.
_START_S, _STOP_S = 90.0, 60.0
# Jobs that tests wait for: one process each, looked at often.
QUICK = {
    "WORKERS__THREADS": "1",
    "WORKERS__HEARTBEAT_INTERVAL_S": "0.2",
    "DRAIN_GRACE_S": "1",
    "HEARTBEAT_FRAME_S": "1",
}


@dataclass
class ReleaseServer:
    """One server of a service: "cognate" or "agent". settings: keys as in the environment, without the prefix."""

    service: str
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def module(self) -> str:
        """The package of the service."""
        return f"{self.service}_server"

    @property
    def log(self) -> Path:
        """What its processes wrote."""
        return self.folder / "server.log"

    @property
    def store_url(self) -> str:
        """Its store."""
        return self.settings.get("STORE_URL", f"sqlite:///{self.folder / 'store.db'}")

    @property
    def files(self) -> Path:
        """Where artifacts and jobs' files lie."""
        return Path(self.settings.get("SHARED_DIR", self.folder))

    def launch(self, release: Release) -> None:
        """Start a process, and do not wait for it. One that was there before gets its address again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._address_file.unlink(missing_ok=True)
        values = {"ADDRESS": self.address or "127.0.0.1:0", "DATA_DIR": str(self.folder), **QUICK, **self.settings}
        environment = release.surroundings(**{f"{self.module.upper()}_{key}": value for key, value in values.items()})
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--address-file", str(self._address_file)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    def wait(self) -> str:
        """Wait until it serves, and return its address. Errors: RuntimeError, with the end of its log."""
        give_up = time.monotonic() + _START_S
        while not self._address_file.exists():
            if self.process is None or self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{self.module} did not start: {self.log.read_text()[-1500:]}")
            time.sleep(0.02)
        self.address = self._address_file.read_text()
        return self.address

    def start(self, release: Release) -> str:
        """Start a process and wait until it serves."""
        self.launch(release)
        return self.wait()

    def terminate(self) -> None:
        """Ask it to drain, and do not wait."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Drain it, and return its exit status. Its workers go on."""
        if self.process is None:
            return 0
        self.terminate()
        try:
            return self.process.wait(_STOP_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def publish(self, release: Release, files: Path) -> str:
        """Publish a Cognate model out of a folder by that release's code, and return its name."""
        body = {**MODEL_BODY, "architecture": {**MODEL_BODY["architecture"], "fingerprint": COGNATE_V1_25M}}
        return str(run_json(release, _PUBLISH, self.store_url, str(self.files / "artifacts"), files, json.dumps(body)))

    @property
    def _address_file(self) -> Path:
        return self.folder / "address"


def run_json(release: Release, script: Path, *arguments: str | Path) -> Any:
    """Run a script by a release's code, and return what its last line says. Errors: RuntimeError, with its stderr."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=release.surroundings(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script.name} by {release.name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_model(folder: Path) -> Path:
    """Write a small Cognate of random weights, which agents can be made of."""
    return write_foundation(folder, ["route this please", "hello there"])
