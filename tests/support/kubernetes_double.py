"""A double of the part of a Kubernetes API that the engine uses: TrainJobs, their pods, and a queue before them.

As the real one it answers with a `Status` where it refuses (401, 404, 409, 422), gives objects their uid, creation time
and resource version, and selects by labels. TrainJobs are checked against Kubeflow's own models. One with Kueue's label
is created suspended, and `admit` lets it begin. Beginning it runs its command here, once, as its node 0: the double is
the kubelet too. When the process ends, the TrainJob's conditions and its pod's status tell of it as a cluster would.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubeflow_trainer_api import models

TOKEN = "of-the-double"  # noqa: S105 - opens nothing
_PATH = re.compile(r"^/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/([^/]+)/trainjobs(?:/([^/]+))?$")
_PODS = re.compile(r"^/api/v1/namespaces/([^/]+)/pods$")
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


class KubernetesDouble:
    """Serves on a free port until `stop`."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.away = False
        self._environment = environment
        self._version = 0
        self._lock = threading.RLock()
        double = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                if double.away:
                    self.close_connection = True
                    self.connection.close()
                    return
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, answer = _refusal(401, "Unauthorized", "Unauthorized")
                else:
                    status, answer = double.answer(self.command, self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig that leads here."""
        file = self.folder / "kubeconfig"
        cluster = {"name": "double", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}
        user = {"name": "forge", "user": {"token": TOKEN}}
        context = {"name": "double", "context": {"cluster": "double", "user": "forge"}}
        values = {"apiVersion": "v1", "kind": "Config", "current-context": "double"}
        file.write_text(json.dumps({**values, "clusters": [cluster], "users": [user], "contexts": [context]}))
        return file

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for process in self.processes.values():
            process.kill()
            process.wait()

    # What the API does

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        parts = urlsplit(path)
        wanted = dict(
            pair.split("=") for pair in parse_qs(parts.query).get("labelSelector", [""])[0].split(",") if pair
        )
        with self._lock:
            self._look()
            if pods := _PODS.match(parts.path):
                return 200, {"kind": "PodList", "apiVersion": "v1", "items": _selected(self.pods, wanted)}
            found = _PATH.match(parts.path)
            if not found:
                return _refusal(404, "NotFound", f"the server could not find {parts.path}")
            del pods
            namespace, name = found[1], found[2]
            if method == "POST":
                return self._create(namespace, body)
            if name is None:
                return 200, {"kind": "TrainJobList", "items": _selected(self.jobs, wanted)}
            if name not in self.jobs:
                return _refusal(404, "NotFound", f'trainjobs.trainer.kubeflow.org "{name}" not found')
            if method == "DELETE":
                self._delete(name)
                return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            return 200, self.jobs[name]

    def _create(self, namespace: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return _refusal(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        try:
            models.TrainerV1alpha1TrainJob.from_dict(body)
        except ValueError as error:
            return _refusal(422, "Invalid", str(error))
        if not _NAME.match(name):
            return _refusal(422, "Invalid", f"metadata.name: {name} is no DNS label")
        self._version += 1
        stored = {**body, "status": {"conditions": []}}
        stored["metadata"] = {
            **body["metadata"],
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "resourceVersion": str(self._version),
            "creationTimestamp": _now(),
        }
        self.jobs[name] = stored
        if QUEUE_LABEL in body["metadata"].get("labels", {}):
            stored["spec"] = {**body["spec"], "suspend": True}
            self._set(name, "Suspended", "Suspended", "TrainJob is suspended")
        else:
            self._begin(name)
        return 201, stored

    def _delete(self, name: str) -> None:
        process = self.processes.get(name)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        del self.jobs[name]
        self.pods.pop(name, None)

    # What the cluster does

    def admit(self, name: str) -> None:
        """Kueue has room for it."""
        with self._lock:
            self.jobs[name]["spec"]["suspend"] = False
            self.jobs[name]["status"]["conditions"] = []
            self._begin(name)

    def _begin(self, name: str) -> None:
        trainer = self.jobs[name]["spec"]["trainer"]
        command = [
            sys.executable if trainer["command"][0] == "python" else trainer["command"][0],
            *trainer["command"][1:],
        ]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*command, *trainer["args"]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment, **_torch_policy(trainer)},
            )
        labels = {"jobset.sigs.k8s.io/jobset-name": name}
        status = {"phase": "Running", "containerStatuses": [_container({"running": {"startedAt": _now()}})]}
        self.pods[name] = {"metadata": {"name": f"{name}-node-0-0", "labels": labels}, "status": status, "spec": None}

    def _look(self) -> None:
        """Tell of processes that have ended since."""
        for name, process in self.processes.items():
            code = process.poll()
            pod = self.pods.get(name)
            if code is None or pod is None or pod["status"]["phase"] != "Running":
                continue
            exit_code = 128 - code if code < 0 else code
            pod["status"]["phase"] = "Failed" if exit_code else "Succeeded"
            pod["status"]["containerStatuses"] = [_container({"terminated": {"exitCode": exit_code}})]
            if exit_code:
                self._set(name, "Failed", "JobsFailed", "jobset failed due to one or more job failures")
            else:
                self._set(name, "Complete", "JobsCompleted", "jobset completed successfully")

    def evict(self, name: str) -> None:
        """A node goes: its pod is evicted."""
        with self._lock:
            self.processes[name].kill()
            self.processes[name].wait()
            self.pods[name]["status"] = {"phase": "Failed", "reason": "Evicted", "containerStatuses": []}
            self._set(name, "Failed", "JobsFailed", "jobset failed due to one or more job failures")

    def _set(self, name: str, kind: str, reason: str, message: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": _now()}
        self.jobs[name]["status"]["conditions"].append(condition)


def _torch_policy(trainer: Mapping[str, Any]) -> dict[str, str]:
    """Return what Kubeflow's torch runtime tells the containers of a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"], "NODE_RANK": 0}
    return {
        f"PET_{name}": str(value) for name, value in {**values, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items()
    }


def _container(state: dict[str, Any]) -> dict[str, Any]:
    values = {"name": "node", "image": "forge", "imageID": "", "ready": False, "restartCount": 0}
    return {**values, "state": state}


def _selected(items: Mapping[str, dict[str, Any]], wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    return [item for item in items.values() if wanted.items() <= item["metadata"].get("labels", {}).items()]


def _refusal(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    values = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return code, {**values, "code": code, "reason": reason, "message": message}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
