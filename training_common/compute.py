"""On how many processes and machines a job trains: its plan, with defaults, and whether a server can give that."""

from __future__ import annotations

import os

from cognateforge.exceptions import FieldViolation, InvalidFieldError
from cognateforge.job.v1 import job_pb2
from training_common.settings import WorkerSettings

DEFAULT_STRATEGY = job_pb2.COMPUTE_STRATEGY_DDP


def fill_defaults(compute: job_pb2.Compute) -> None:
    """Put the defaults that the contract names in the place of zeros."""
    compute.processes = compute.processes or 1
    compute.nodes = compute.nodes or 1
    compute.strategy = compute.strategy or DEFAULT_STRATEGY


def require_slots(compute: job_pb2.Compute, workers: WorkerSettings) -> None:
    """Refuse what this server never has room for. One without slots only takes jobs in, for others to run.

    Errors: InvalidFieldError.
    """
    if not workers.slots:
        return
    _require_nodes(compute, workers)
    if slots_of(compute) > workers.slots:
        raise _too_many(compute, workers.slots, "slots", "workers.slots")
    places = len(workers.devices) * workers.workers_per_device
    if workers.devices and slots_of(compute) * workers.devices_per_worker > places:
        most = places // workers.devices_per_worker
        raise _too_many(compute, most, "devices for each process", "workers.devices")


def require_at_most(compute: job_pb2.Compute, most: int, what: str) -> None:
    """Refuse more processes than something has slots, which `what` names. Errors: InvalidFieldError."""
    if slots_of(compute) > most:
        raise _refused(
            f"{_at_most(compute, most)}, the slots of {what}, not {compute.processes}: ask for fewer processes"
        )


def _require_nodes(compute: job_pb2.Compute, workers: WorkerSettings) -> None:
    if compute.nodes <= 1:
        return
    if workers.engine != "local":
        raise _refused(f"must be 1: {workers.engine} itself says where processes run: leave it out", field="nodes")
    if not workers.rendezvous_host:
        raise _refused(
            "must be 1: this server cannot be met by other machines: leave it out, or have workers.rendezvous_host set",
            field="nodes",
        )


def _too_many(compute: job_pb2.Compute, most: int, what: str, setting: str) -> InvalidFieldError:
    return _refused(
        f"{_at_most(compute, most)}, by this server's {what}, not {compute.processes}: ask for fewer processes, or "
        f"have {setting} raised"
    )


def _at_most(compute: job_pb2.Compute, most: int) -> str:
    on_each = f" on each of {compute.nodes} nodes" if compute.nodes > 1 else ""
    return f"must be at most {most}{on_each}"


def _refused(description: str, *, field: str = "processes") -> InvalidFieldError:
    field = f"plan.compute.{field}"
    return InvalidFieldError(
        f"{field} {description}", violations=[FieldViolation(field=field, description=description)]
    )


def rows_of_each(batch_size: int, compute: job_pb2.Compute) -> int:
    """Return the most rows of a batch that one process trains on."""
    return -(-batch_size // max(1, compute.processes))


def share_of(processes: int, nodes: int, place: int) -> int:
    """Return how many of a job's processes run on the machine of that place. The first is the server's."""
    return processes * (place + 1) // nodes - processes * place // nodes


def slots_of(compute: job_pb2.Compute) -> int:
    """Return how many slots of its server a job takes: one for each process on the server's machine."""
    return share_of(max(1, compute.processes), max(1, compute.nodes), 0)


def processes_here() -> int:
    """Return how many processes of this one's job run on its machine, as a launcher's environment says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def parts_of(compute: job_pb2.Compute) -> int:
    """Return among how many processes a job's model and its state are parted; 1 where each holds all of them."""
    return compute.processes if compute.strategy == job_pb2.COMPUTE_STRATEGY_FSDP2 else 1


def threads_of(setting: int, cores: int, processes: int) -> int:
    """Return the torch threads of each process. setting: `workers.threads`; 0 shares out all cores."""
    return setting or max(1, cores // processes)
