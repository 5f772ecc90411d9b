"""A double of the part of a Kubernetes API that the engine uses: TrainJobs, their pods, and a queue before them.

As the real one it answers with a `Status` where it refuses (401, 403, 404, 409, 410, 422, 500), gives objects a uid, a
creation time and a resource version, fills in what the CRD has defaults for, selects by labels and names, and gives
lists page by page. Every TrainJob that it gets or gives is held to the schema in third_party/schemas, strictly.

Shapes and words are those of kubernetes/kubernetes (apimachinery/pkg/api/errors), of kubeflow/trainer
(pkg/controller/trainjob_controller.go), of kubernetes-sigs/jobset (pkg/constants) and of kubernetes-sigs/kueue
(pkg/controller/jobs/trainjob). A TrainJob with Kueue's label is created suspended, `admit` lets it begin, and `preempt`
suspends it again, which ends its pods. Beginning it runs its command here as its node 0: the double is the kubelet too.
When the process ends, the TrainJob's conditions and its pod's status tell of it as a cluster would.
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

from tests.support.manifests import problems

TOKEN = "of-the-double"  # noqa: S105 - opens nothing
_PATH = re.compile(r"^/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/([^/]+)/trainjobs(?:/([^/]+))?$")
_PODS = re.compile(r"^/api/v1/namespaces/([^/]+)/pods$")
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
_GROUP = "trainer.kubeflow.org"
_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
)
_FAILED = "jobset failed due to one or more job failures (first failed job: {name}-node-0)"
_VERBS = {"POST": "create", "DELETE": "delete", "GET": "list"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ACCOUNT = "system:serviceaccount:team:forge"


class KubernetesDouble:
    """Serves on a free port until `stop`."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # No connection is answered; calls are answered only once this is set; the server itself fails; the answer to
        # the next create is lost; verbs that the account lacks; most objects in one answer; pages that grew too old.
        self.away = False
        self.held_up = threading.Event()
        self.held_up.set()
        self.broken = False
        self.loses_answer = False
        self.forbidden: set[str] = set()
        self.page = 500
        self.expires = False
        self.calls: list[str] = []
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
                double.held_up.wait(10)
                if double.away:
                    self._hang_up()
                    return
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, answer = _refusal(401, "Unauthorized", "Unauthorized")
                else:
                    status, answer = double.answer(self.command, self.path, body)
                if double.loses_answer and self.command == "POST":
                    double.loses_answer = False
                    self._hang_up()
                    return
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.close()

            do_GET = do_POST = do_DELETE = _answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

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
        self.held_up.set()
        self._server.shutdown()
        self._server.server_close()
        for process in self.processes.values():
            process.kill()
            process.wait()

    # What the API does

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            self._look()
            self.calls.append(f"{method} {path}")
            if self.broken:
                return _refusal(500, "InternalError", "etcdserver: request timed out")
            pods, found = _PODS.match(parts.path), _PATH.match(parts.path)
            if not pods and not found:
                return _refusal(404, "NotFound", "the server could not find the requested resource")
            kind, namespace, name = ("pods", pods[1], None) if pods else ("trainjobs", found[1], found[2])  # type: ignore[index]
            if _VERBS[method] in self.forbidden or f"{_VERBS[method]} {kind}" in self.forbidden:
                group = "" if pods else _GROUP
                whole = f'{kind}.{group} "{name}"' if name else f"{kind}.{group}".rstrip(".")
                what = (
                    f'cannot {_VERBS[method]} resource "{kind}" in API group "{group}" in the namespace "{namespace}"'
                )
                return _refusal(403, "Forbidden", f'{whole} is forbidden: User "{ACCOUNT}" {what}')
            if method == "POST":
                return self._create(namespace, body)
            if name is None:
                return self._listed(kind, query)
            if name not in self.jobs:
                return _refusal(404, "NotFound", f'trainjobs.{_GROUP} "{name}" not found', name=name)
            if method == "DELETE":
                deleted = {**self.jobs[name]}
                deleted["metadata"] = {
                    **deleted["metadata"],
                    "deletionTimestamp": _now(),
                    "deletionGracePeriodSeconds": 0,
                    "finalizers": ["foregroundDeletion"],
                }
                self._delete(name)
                return 200, deleted
            return 200, self.jobs[name]

    def _listed(self, kind: str, query: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """Return one page of a list. A token for the next one is the place where it begins."""
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
        named = query.get("fieldSelector", "").removeprefix("metadata.name=")
        items = _selected(self.pods if kind == "pods" else self.jobs, wanted)
        items = [item for item in items if named in ("", item["metadata"]["name"])]
        if query.get("continue") and self.expires:
            return _refusal(410, "Expired", _TOO_OLD)
        first = int(query.get("continue") or 0)
        end = first + min(int(query.get("limit") or len(items) or 1), self.page)
        metadata: dict[str, Any] = {"resourceVersion": str(self._version)}
        if end < len(items):
            metadata |= {"continue": str(end), "remainingItemCount": len(items) - end}
        page = items[first:end]
        if kind == "pods":
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": page}
        for item in page:
            assert problems(item) == [], item
        return 200, {"apiVersion": f"{_GROUP}/v1alpha1", "kind": "TrainJobList", "metadata": metadata, "items": page}

    def _create(self, namespace: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return _refusal(409, "AlreadyExists", f'trainjobs.{_GROUP} "{name}" already exists', name=name)
        wrong = problems(body) or ([] if _NAME.match(name) else [f"metadata.name: {name} is no DNS label"])
        if wrong:
            message = f'TrainJob.{_GROUP} "{name}" is invalid: {"; ".join(wrong)}'
            return _refusal(422, "Invalid", message, name=name)
        self._version += 1
        reference = {"apiGroup": _GROUP, "kind": "ClusterTrainingRuntime", **body["spec"]["runtimeRef"]}
        defaults = {"managedBy": f"{_GROUP}/trainjob-controller", "suspend": False, "runtimeRef": reference}
        stored = {**body, "spec": {**body["spec"], **defaults}}
        stored["metadata"] = {
            **body["metadata"],
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "generation": 1,
            "resourceVersion": str(self._version),
            "creationTimestamp": _now(),
        }
        self.jobs[name] = stored
        if QUEUE_LABEL in body["metadata"].get("labels", {}):
            stored["spec"] |= {"suspend": True, "runtimePatches": [{"manager": "kueue.x-k8s.io/manager"}]}
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
            self._change(name, suspend=False)
            self._set(name, "Suspended", "Resumed", "TrainJob is resumed", status="False")
            self._begin(name)

    def preempt(self, name: str) -> None:
        """Kueue takes its room for another: it is suspended, and its pods are ended and deleted."""
        with self._lock:
            self._change(name, suspend=True)
            self.processes[name].terminate()
            self.processes[name].wait()
            del self.pods[name]
            self._set(name, "Suspended", "Suspended", "TrainJob is suspended")

    def _change(self, name: str, **spec: Any) -> None:
        self._version += 1
        metadata = self.jobs[name]["metadata"]
        metadata |= {"generation": metadata["generation"] + 1, "resourceVersion": str(self._version)}
        self.jobs[name]["spec"] |= spec

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
                self._set(name, "Failed", "FailedJobs", _FAILED.format(name=name))
            else:
                self._set(name, "Complete", "AllJobsCompleted", "jobset completed successfully")

    def evict(self, name: str) -> None:
        """A node goes: its pod is evicted."""
        with self._lock:
            self.processes[name].kill()
            self.processes[name].wait()
            self.pods[name]["status"] = {"phase": "Failed", "reason": "Evicted", "containerStatuses": []}
            self._set(name, "Failed", "FailedJobs", _FAILED.format(name=name))

    def _set(self, name: str, kind: str, reason: str, message: str, *, status: str = "True") -> None:
        """Set a condition as meta.SetStatusCondition does: there is one of each type."""
        condition = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _now()}
        held = self.jobs[name].setdefault("status", {}).setdefault("conditions", [])
        held[:] = [one for one in held if one["type"] != kind] + [condition]
        active = int(kind == "Suspended" and status == "False")
        counts = {"active": active, "failed": 0, "ready": active, "succeeded": 0, "suspended": 1 - active}
        counts |= {"failed": int(kind == "Failed"), "succeeded": int(kind == "Complete")}
        self.jobs[name]["status"]["jobsStatus"] = [{"name": "node", **counts}]


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


def _refusal(code: int, reason: str, message: str, *, name: str = "") -> tuple[int, dict[str, Any]]:
    """Return a metav1.Status, as the API server writes it."""
    values = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    details = {"details": {"name": name, "group": _GROUP, "kind": "trainjobs"}} if name else {}
    return code, {**values, "message": message, "reason": reason, **details, "code": code}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
