"""What Ray Train runs for each process of a worker: the process itself, as torchrun would have started it.

It is a process of its own below Ray's: its exit status tells how it ended, it writes into the attempt's log where that
is to be had, and nothing that Ray has loaded is in it. It ends with Ray's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train import get_context
from ray.train.collective import broadcast_from_rank_zero

from training_common.engines.processes import WORKER_ENVIRONMENT


class ProcessEndedError(Exception):
    """A process of the worker has failed. status: its exit status; negative is the signal that ended it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_process(config: dict[str, Any]) -> None:
    """Run this rank's process to its end. Errors: ProcessEndedError; OSError, where it cannot be started."""
    command = [sys.executable, "-m", "training_common.engines.child", str(os.getpid()), *config["command"]]
    environment = {**WORKER_ENVIRONMENT, **os.environ, **_ranks()}
    status = _run(command, environment, Path(config["log"]))
    if status != 0:
        raise ProcessEndedError(status)


def _ranks() -> dict[str, str]:
    """Return the environment by which the processes of a worker find each other, or nothing for one alone."""
    context = get_context()
    if context.get_world_size() == 1:
        return {}
    address, port = broadcast_from_rank_zero(_meeting_place() if context.get_world_rank() == 0 else None)
    return {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "GROUP_RANK": str(context.get_node_rank()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _meeting_place() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        found.bind((address, 0))
        return address, found.getsockname()[1]


def _run(command: Sequence[str], environment: dict[str, str], log: Path) -> int:
    try:
        # The engine has made it. Where it is not seen, the folder is not shared, and output is for Ray's own log.
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=False).returncode  # noqa: S603
    try:
        ended = subprocess.run(  # noqa: S603 - the module and its arguments are ours
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False
        )
        return ended.returncode
    finally:
        os.close(output)
