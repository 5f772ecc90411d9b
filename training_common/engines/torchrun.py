"""One worker as several processes: a torchrun agent that ends the way its worker did.

    python -m training_common.engines.torchrun --processes N --run-id ID MODULE ARGUMENT...

The agent is the process that an engine sees: while it lives the worker lives, its death ends every process of the
worker, and its exit status is that of the process that failed first, so that whoever looks at it learns why.

On several machines an agent runs on each, with the same --run-id and --rendezvous, the address of the first of them.
They go on with as few as --nodes allows when one is lost, and take it in again when it is back; each time their
processes start anew from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training_common.engines.processes import EX_TEMPFAIL

_HERE = "127.0.0.1"
# How long processes that are to end may take, before they are killed: they have nothing to save by then.
SHUTDOWN_S = 5
# Of processes that the agent has ended, and of those that missed another one.
ENDED_FOR_ANOTHER = (-signal.SIGTERM, EX_TEMPFAIL)
# How long agents wait for one more when they are enough, and after which silence of one they go on without it.
_LAST_CALL_S = 5
_KEEP_ALIVE_S, _KEEP_ALIVE_TRIES = 2, 3


def main(argv: list[str]) -> int:
    """Run the worker to its end. Returns its exit status; a worker that was ended by a signal ends this process so."""
    options = _options(argv)
    # Otherwise the agents' store is the processes' store too, and is lost with the agent that has it (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if options.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = options.interface
    least, _, most = options.nodes.partition(":")
    config = LaunchConfig(
        min_nodes=int(least),
        max_nodes=int(most or least),
        nproc_per_node=options.processes,
        run_id=options.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=options.rendezvous,
        rdzv_configs={
            "is_host": options.is_host,
            "last_call_timeout": _LAST_CALL_S,
            "keep_alive_interval": _KEEP_ALIVE_S,
            "keep_alive_max_attempt": _KEEP_ALIVE_TRIES,
        },
        local_addr=options.address or None,
        # By default none: a process that is lost ends the attempt, and the scheduler begins the next one, from the
        # newest checkpoint, under a new fencing token, and on record.
        max_restarts=options.restarts,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-m", options.module, *options.arguments)
    except ChildFailedError as error:
        return end_as(status_of(error.failures.values()))
    except SignalException as error:
        return end_as(-error.sigval)
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs one worker as several processes. Started by an engine.")
    parser.add_argument("--processes", type=int, default=1, help="on this machine")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--nodes", default="1", help="machines: N, or LEAST:MOST")
    parser.add_argument("--rendezvous", default=f"{_HERE}:0", help="HOST:PORT on which the first one listens")
    parser.add_argument("--address", default=_HERE, help="under which the others reach this one")
    parser.add_argument("--interface", default="lo", help="the network interface that has this address")
    parser.add_argument("--restarts", type=int, default=0, help="how often processes may start anew")
    parser.add_argument(
        "--cluster", action="store_true", help="take all of this from the PET_* variables of Kubeflow's torch runtime"
    )
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    # By itself torch knows an address of this machine only if its host name resolves to it.
    options.is_host = options.rendezvous.rpartition(":")[0] == options.address
    if options.cluster:
        options.nodes = os.environ["PET_NNODES"]
        options.processes = int(os.environ["PET_NPROC_PER_NODE"])
        options.rendezvous = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
        options.is_host = os.environ["PET_NODE_RANK"] == "0"
        # Pods have names that the others can look up, and one interface.
        options.address = options.interface = ""
    return options


def status_of(failures: Iterable[ProcessFailure]) -> int:
    """Return the exit status that tells best why a worker failed: that of the process that began it.

    The others fail because it is gone: they are ended by the agent, or say themselves that a partner is lost.
    """
    return first_cause([failure.exitcode for failure in failures])


def first_cause(statuses: Sequence[int]) -> int:
    """Return the one of some failures' exit statuses that tells why they failed; 0 where there was no failure."""
    causes = (status for status in statuses if status not in ENDED_FOR_ANOTHER)
    return next(causes, statuses[0] if statuses else 0)


def end_as(status: int) -> int:
    """Return an exit status, or end by the signal that a negative one stands for."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
