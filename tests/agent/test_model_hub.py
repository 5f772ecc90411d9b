"""A model of the hub becomes a model folder: all of it, or nothing, and nothing that could run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A header of two bytes, "{}", and no tensor.
WEIGHTS = b"\x02" + bytes(7) + b"{}"
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "modeling_mine.py": b"raise SystemExit",
    "onnx/model.onnx": b"a graph",
}
FETCH = """
import sys
from pathlib import Path
from agent_server.bases import resolve
from agent_server.settings import ModelSettings
from cognateforge.agent.v1 import training_pb2 as pb

plan = pb.TrainingPlan(model_folder=pb.ModelFolderBase(path="org/tiny"))
models = ModelSettings(folder=Path(sys.argv[1]), hub=True)
base = resolve(plan, fetch=None, registry=None, cache_dir=None, models=models)
print(base.name, base.digest)
"""


class _Hub(BaseHTTPRequestHandler):
    """The calls of the hub that a snapshot takes."""

    files: dict[str, bytes] = FILES

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data, usedforsecurity=False).hexdigest()}
                for name, data in self.files.items()
            ]
            about = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(tree if "/tree/" in path else about).encode(), body=body)
            return
        name = path.partition(f"/org/tiny/resolve/{COMMIT}/")[2]
        if name in self.files:
            self._send(self.files[name], body=body)
        else:
            self.send_error(404)

    def _send(self, data: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{sha1(data, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in for the hub, with one model."""
    monkeypatch.setattr(_Hub, "files", dict(FILES))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fetch(folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """Resolve the model in a process of its own: the library reads its endpoint when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", FETCH, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_model_comes_from_the_hub_once(hub: str, tmp_path: Path) -> None:
    """What a model folder needs is there afterwards, pickles and code are not, and the second job needs no hub."""
    models = tmp_path / "models"
    models.mkdir()
    done = fetch(models, hub)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (models / "org" / "tiny").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert [folder.name for folder in (models / "org").iterdir()] == ["tiny"]
    again = fetch(models, "http://127.0.0.1:9")
    assert again.stdout == done.stdout


def test_a_hub_that_has_no_such_weights_leaves_nothing(hub: str, tmp_path: Path) -> None:
    """A model with pickles alone, and a hub that is away, are told by name; no half folder stays."""
    models = tmp_path / "models"
    models.mkdir()
    del _Hub.files["model.safetensors"]
    done = fetch(models, hub)
    assert "DataUnavailableError: org/tiny has no model.safetensors" in done.stderr
    away = fetch(models, "http://127.0.0.1:9")
    assert "DataUnavailableError: org/tiny cannot be loaded from the hub" in away.stderr
    assert list((models / "org").iterdir()) == []
