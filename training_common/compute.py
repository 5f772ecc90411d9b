"""On how many processes a job trains: what its plan says, with defaults, and whether a server can give that."""

from __future__ import annotations

from cognateforge.exceptions import FieldViolation, InvalidFieldError
from cognateforge.job.v1 import job_pb2
from training_common.settings import WorkerSettings

DEFAULT_STRATEGY = job_pb2.COMPUTE_STRATEGY_DDP


def fill_defaults(compute: job_pb2.Compute) -> None:
    """Put the defaults that the contract names in the place of zeros."""
    compute.processes = compute.processes or 1
    compute.strategy = compute.strategy or DEFAULT_STRATEGY


def require_slots(compute: job_pb2.Compute, workers: WorkerSettings) -> None:
    """Refuse what this server never has room for. One without slots only takes jobs in, for others to run.

    Errors: InvalidFieldError.
    """
    if not workers.slots:
        return
    if compute.processes > workers.slots:
        raise _too_many(compute, workers.slots, "slots", "workers.slots")
    places = len(workers.devices) * workers.workers_per_device
    if workers.devices and compute.processes * workers.devices_per_worker > places:
        most = places // workers.devices_per_worker
        raise _too_many(compute, most, "devices for each process", "workers.devices")


def require_at_most(compute: job_pb2.Compute, most: int, what: str) -> None:
    """Refuse more processes than something has slots, which `what` names. Errors: InvalidFieldError."""
    if compute.processes > most:
        raise _refused(f"must be at most {most}, the slots of {what}, not {compute.processes}: ask for fewer processes")


def _too_many(compute: job_pb2.Compute, most: int, what: str, setting: str) -> InvalidFieldError:
    return _refused(
        f"must be at most {most}, by this server's {what}, not {compute.processes}: ask for fewer processes, or have "
        f"{setting} raised"
    )


def _refused(description: str) -> InvalidFieldError:
    field = "plan.compute.processes"
    return InvalidFieldError(
        f"{field} {description}", violations=[FieldViolation(field=field, description=description)]
    )


def rows_of_each(batch_size: int, compute: job_pb2.Compute) -> int:
    """Return the most rows of a batch that one process trains on."""
    return -(-batch_size // max(1, compute.processes))


def parts_of(compute: job_pb2.Compute) -> int:
    """Return among how many processes a job's model and its state are parted; 1 where each holds all of them."""
    return compute.processes if compute.strategy == job_pb2.COMPUTE_STRATEGY_FSDP2 else 1


def threads_of(setting: int, cores: int, processes: int) -> int:
    """Return the torch threads of each process. setting: `workers.threads`; 0 shares out all cores."""
    return setting or max(1, cores // processes)
