"""One worker as several processes: a torchrun agent that ends the way its worker did.

    python -m training_common.engines.torchrun --processes N --run-id ID MODULE ARGUMENT...

The agent is the process that an engine sees: while it lives the worker lives, its death ends every process of the
worker, and its exit status is that of the process that failed first, so that whoever looks at it learns why.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training_common.engines.processes import EX_TEMPFAIL

_HERE = "127.0.0.1"
# How long processes that are to end may take, before they are killed: they have nothing to save by then.
_SHUTDOWN_S = 5
# Lets the agents' store be the processes' store too, which gets lost with the agent that holds it (pytorch#135712).
_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}


def main(argv: list[str]) -> int:
    """Run the worker to its end. Returns its exit status; a worker that was ended by a signal ends this process so."""
    parser = argparse.ArgumentParser(description="Runs one worker as several processes. Started by an engine.")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.processes,
        run_id=options.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{_HERE}:0",
        local_addr=_HERE,
        # A process that is lost ends the attempt, and the scheduler begins the next one: from the newest checkpoint,
        # under a new fencing token, and on record.
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=_SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", options.module, *options.arguments)
    except ChildFailedError as error:
        return _end_as(status_of(error.failures.values()))
    except SignalException as error:
        return _end_as(-error.sigval)
    return 0


def status_of(failures: Iterable[ProcessFailure]) -> int:
    """Return the exit status that tells best why a worker failed: that of the process that began it.

    The others fail because it is gone: they are ended by the agent, or say themselves that a partner is lost.
    """
    statuses = [failure.exitcode for failure in failures]
    ended_by_the_agent = (-signal.SIGTERM, EX_TEMPFAIL)
    return next((status for status in statuses if status not in ended_by_the_agent), statuses[0])


def _end_as(status: int) -> int:
    """Return an exit status, or end by the signal that a negative one stands for."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
