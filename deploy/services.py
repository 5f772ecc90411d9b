"""Start both services on this machine as child processes, for the demonstration and for `make up`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from training_common.folder_lock import holder
from training_common.rpc.address import require_free

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass
class Service:
    """One running service."""

    name: str
    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def stop(self) -> None:
        """Drain the service, and end it if that takes too long. Its workers, if any, go on."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Services:
    """Both services below one folder."""

    folder: Path
    running: list[Service] = field(default_factory=list)

    def start(self, name: str, *, address: str, settings: Mapping[str, str]) -> Service:
        """Start a service, again if it has ended, and return it once it serves.

        name: the package of the service, for instance "cognate_server".
        Errors: RuntimeError, with the end of its log; also for an address or a folder that is in use.
        """
        folder = self.folder / name.removesuffix("_server")
        self._require_free(name, address)
        folder.mkdir(parents=True, exist_ok=True)
        log, address_file = folder / "server.log", folder / "address"
        address_file.unlink(missing_ok=True)
        values = {"ADDRESS": address, "DATA_DIR": str(folder), **settings}
        environment = {**os.environ, **{f"{name.upper()}_{key}": value for key, value in values.items()}}
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", name, "--address-file", str(address_file)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                # Ctrl-C reaches the starter alone, which then drains the services in their order.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not address_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                end = "\n".join(log.read_text().splitlines()[-5:])
                raise RuntimeError(f"{name} did not start; the end of {log}:\n{end}")
            time.sleep(0.05)
        service = Service(name, process, address_file.read_text(), log)
        self.running.append(service)
        return service

    def start_both(self, *, cognate: str, agent: str, admin: tuple[str, str] | None = None) -> tuple[Service, Service]:
        """Start Cognate, then the agent service that is told where Cognate is. FORGE_DATA names a folder of data.

        admin: where each serves its metrics and its health over HTTP; None: nowhere.

        Errors: RuntimeError, also for a FORGE_DATA that is no folder.
        """
        folder = os.environ.get("FORGE_DATA", "")
        if folder and not Path(folder).is_dir():
            raise RuntimeError(f"FORGE_DATA: {folder} is no folder; correct the path, or unset it for generated data")
        # Both before the first is started, so that a second starter leaves nothing behind.
        for name, address in (("cognate_server", cognate), ("agent_server", agent)):
            self._require_free(name, address)
        for address in admin or ():
            require_free(address)
        data = {"DATA__FOLDER": str(Path(folder).resolve())} if folder else {}
        pages: list[dict[str, str]] = [{"TELEMETRY__ADDRESS": address} for address in admin or ()] or [{}, {}]
        first = self.start("cognate_server", address=cognate, settings={**data, **pages[0]})
        told = {**data, **pages[1], "COGNATE__ADDRESS": first.address}
        second = self.start("agent_server", address=agent, settings=told)
        return first, second

    def _require_free(self, name: str, address: str) -> None:
        require_free(address)
        folder = self.folder / name.removesuffix("_server")
        if pid := holder(folder):
            raise RuntimeError(f"{folder} is in use by process {pid}: stop it, or use another folder")

    def stop(self) -> None:
        """Drain what runs, the last started first."""
        while self.running:
            self.running.pop().stop()
