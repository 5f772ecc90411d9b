"""A Ray cluster of three nodes on this machine, on loopback and free ports, for the tests of its engine."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Nodes keep to 127.0.0.1.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Its thresholds are of the whole machine, on which other tests run.
    "RAY_memory_monitor_refresh_ms": "0",
    # Of a node that is killed: how soon the others know.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_STORE_BYTES = 80 << 20  # Ray asks for 75 MiB at least
_CPUS = 1


class RayCluster:
    """A head and two nodes with a CPU each, until `stop`."""

    def __init__(self) -> None:
        # Sockets lie below it, and their paths may have 107 characters.
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        with self._environment():
            from ray.cluster_utils import Cluster

            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "include_dashboard": True,
                    "dashboard_host": "127.0.0.1",
                    "dashboard_port": self.port,
                    **self._node({}),
                },
            )
            self.nodes = [self.add(), self.add()]

    @property
    def address(self) -> str:
        """Where its job server is."""
        return f"http://127.0.0.1:{self.port}"

    @staticmethod
    def _node(resources: Mapping[str, float]) -> dict[str, Any]:
        return {
            "num_cpus": _CPUS,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": _STORE_BYTES,
            "resources": dict(resources),
        }

    def add(self, **resources: float) -> Any:
        """Start a node."""
        with self._environment():
            return self._cluster.add_node(**self._node(resources))

    def kill(self, node: Any) -> None:
        """End a node with all its processes, and start another one."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self.nodes.append(self.add())

    def node_of(self, process: psutil.Process) -> Any:
        """Return the node, other than the head, on which a process runs, or None."""
        above = {parent.pid for parent in process.parents()}
        for node in self.nodes:
            if any(info.process.pid in above for infos in node.all_processes.values() for info in infos):
                return node
        return None

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """Let nodes inherit what they, and the drivers of their jobs, are to see."""
        path = os.pathsep.join([str(ROOT / "clients"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        wanted = {**_ENVIRONMENT, "RAY_TMPDIR": self.folder, "PYTHONPATH": path, "PATH": binaries}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def stop(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
