"""A real S3 server (SeaweedFS) on free ports, and an empty place in its bucket for each test."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

BINARY = Path(sys.executable).parent / "weed"
BUCKET = "models"
START_TIMEOUT_S = 60.0
# Some of its ports would otherwise stand 10,000 above another, where somebody else may listen.
_PORTS = tuple(f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))


class S3Server:
    """Started by `start`; `new_url` gives URLs, which `options` open."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forge-s3-"))
        self.options = {
            "region": "us-east-1",
            "allow_http": "true",
            "access_key_id": "forge-tests",
            "secret_access_key": f"secret-{uuid.uuid4().hex}",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until an object can be put and read. Errors: RuntimeError with the log."""
        credentials = {"accessKey": self.options["access_key_id"], "secretKey": self.options["secret_access_key"]}
        identities = [{"name": "forge", "credentials": [credentials], "actions": ["Admin"]}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}), encoding="utf-8")
        (self.folder / "data").mkdir()
        ports = _free_ports(len(_PORTS))
        flags = {
            **dict(zip(_PORTS, map(str, ports), strict=True)),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": "data",
            "bucket": BUCKET,
            "s3.config": "s3.json",
            "filer.localSocket": "filer.sock",
            "s3.localSocket": "s3.sock",
            # A misspelt bucket is missing, as on other servers.
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",
            "admin.ui": "false",
            "webdav": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
        }
        self.options["endpoint"] = f"http://127.0.0.1:{ports[_PORTS.index('s3.port')]}"
        with (self.folder / "log").open("wb") as out:
            command = [str(BINARY), "mini", *(f"-{name}={value}" for name, value in flags.items())]
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder)
        config = {name: value for name, value in self.options.items() if name != "allow_http"}
        store = S3Store(
            BUCKET,
            config=config,  # type: ignore[arg-type]
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(store):
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"weed did not come up:\n{(self.folder / 'log').read_text()[-4000:]}")
            time.sleep(0.05)

    def new_url(self) -> str:
        """Return the URL of an empty place."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def stop(self) -> None:
        """End it as a crash does, and remove its folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _answers(store: S3Store) -> bool:
    try:
        obstore.put(store, "probe", b"1")
        return bytes(obstore.get(store, "probe").bytes()) == b"1"
    except (BaseError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in held]
