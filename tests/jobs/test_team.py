"""Processes that train together, where one of them is silent."""

import os
import socket
import subprocess
import sys

import pytest

from training_common.engines.processes import EX_TEMPFAIL


@pytest.mark.parametrize("size_bytes", [10, 100_000])
def test_the_first_process_does_not_wait_for_ever_for_one_that_is_silent(size_bytes: int) -> None:
    """A cut link closes no connection; the others wait patiently for the first, and it for none of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Also how much later than the other one a process may start, which on a busy machine is seconds.
    timeout_s = 6
    command = [sys.executable, "-m", "tests.support.silent_team", str(size_bytes), str(timeout_s)]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env={**os.environ, **together, "RANK": str(rank)}) for rank in (0, 1)]
    try:
        assert EX_TEMPFAIL == processes[0].wait(60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
