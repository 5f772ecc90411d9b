"""On how many processes a job trains: what its plan says, with defaults, and whether a server can give that."""

from __future__ import annotations

from cognateforge.exceptions import FieldViolation, InvalidFieldError
from cognateforge.job.v1 import job_pb2

DEFAULT_STRATEGY = job_pb2.COMPUTE_STRATEGY_DDP


def fill_defaults(compute: job_pb2.Compute) -> None:
    """Put the defaults that the contract names in the place of zeros."""
    compute.processes = compute.processes or 1
    compute.strategy = compute.strategy or DEFAULT_STRATEGY


def require_slots(compute: job_pb2.Compute, slots: int) -> None:
    """Refuse what this server never has room for. One without slots only takes jobs in, for others to run.

    Errors: InvalidFieldError.
    """
    if 0 < slots < compute.processes:
        description = (
            f"must be at most {slots}, this server's slots, not {compute.processes}: ask for fewer processes, or have "
            "workers.slots raised"
        )
        field = "plan.compute.processes"
        raise InvalidFieldError(
            f"{field} {description}", violations=[FieldViolation(field=field, description=description)]
        )


def threads_of(setting: int, cores: int, processes: int) -> int:
    """Return the torch threads of each process. setting: `workers.threads`; 0 shares out all cores."""
    return setting or max(1, cores // processes)
