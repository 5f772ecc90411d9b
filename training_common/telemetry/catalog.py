"""Every metric that a server exposes: its kind, its labels and its meaning. docs/metrics.md is written from it.

Names follow Prometheus's: a unit at the end, base units, `_total` for counters. All have the label `service`, "cognate"
or "agent". Labels are bounded: methods and codes by the contract, reasons by its table of errors, jobs by a setting.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """What a sample of a metric may do."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class ServerMetric:
    """One metric. labels: beside `service`. services: who exposes it."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    services: tuple[str, ...] = ("cognate", "agent")


def _metric(name: str, kind: Kind, description: str, *labels: str, only: str = "") -> ServerMetric:
    services = (only,) if only else ("cognate", "agent")
    return ServerMetric(name=name, kind=kind, description=description, labels=labels, services=services)


CATALOG = (
    _metric("forge_build_info", Kind.GAUGE, "always 1; the release", "version"),
    _metric("forge_serving", Kind.GAUGE, "1 while health says SERVING, otherwise 0"),
    # Calls.
    _metric("forge_rpc_calls_total", Kind.COUNTER, "calls that have ended, by gRPC status code", "method", "code"),
    _metric("forge_rpc_errors_total", Kind.COUNTER, "calls that ended in an error, by its reason", "method", "reason"),
    _metric(
        "forge_rpc_duration_seconds",
        Kind.HISTOGRAM,
        "time from a unary call's arrival to its answer; a slow one has its trace as exemplar",
        "method",
    ),
    _metric("forge_rpc_open_streams", Kind.GAUGE, "streams that are open: watches and fetches", "method"),
    _metric("forge_fetched_bytes_total", Kind.COUNTER, "bytes of artifacts that were sent", "method"),
    # Jobs.
    _metric("forge_jobs", Kind.GAUGE, "jobs that have not ended, by state", "state"),
    _metric("forge_jobs_unobserved", Kind.GAUGE, "jobs with a worker of which there is no recent sign"),
    _metric("forge_jobs_waiting", Kind.GAUGE, "jobs without a worker, by what they wait for", "what"),
    _metric("forge_queue_oldest_seconds", Kind.GAUGE, "age of the oldest job that waits for its first worker, or 0"),
    _metric("forge_queue_wait_seconds", Kind.HISTOGRAM, "time from submission to the first worker"),
    _metric(
        "forge_jobs_ended_total", Kind.COUNTER, "jobs that ended, by state; failed ones by reason", "state", "reason"
    ),
    _metric("forge_attempts_lost_total", Kind.COUNTER, "attempts that the platform ended: worker killed, lost, silent"),
    _metric("forge_recovery_actions_total", Kind.COUNTER, "actions of recovery managers", "detector", "action"),
    _metric("forge_worker_slots", Kind.GAUGE, "processes that may train at the same time"),
    _metric("forge_worker_slots_used", Kind.GAUGE, "processes that train"),
    _metric("forge_scheduler_tick_age_seconds", Kind.GAUGE, "time since the scheduler last looked at jobs"),
    # Training, of the newest jobs that run; how many is a setting. `job` is Prometheus's own label of a target.
    _metric("forge_training_step", Kind.GAUGE, "finished optimizer steps", "training_job"),
    _metric("forge_training_total_steps", Kind.GAUGE, "optimizer steps in all", "training_job"),
    _metric("forge_training_metric", Kind.GAUGE, "newest value of a metric of training", "training_job", "metric"),
    _metric(
        "forge_training_metrics_left_out",
        Kind.GAUGE,
        "metrics of training without a series: beyond the first 64, or with a name of more than 64 characters",
        "training_job",
    ),
    _metric(
        "forge_training_progress_age_seconds",
        Kind.GAUGE,
        "time since the job's last progress event, or since its attempt began if that is later",
        "training_job",
    ),
    # Across the boundary.
    _metric(
        "forge_circuit_open", Kind.GAUGE, "1 while calls to the peer are held back, otherwise 0", "peer", only="agent"
    ),
    _metric(
        "forge_peer_calls_total",
        Kind.COUNTER,
        "calls to the peer: sent, failed, held back",
        "peer",
        "outcome",
        only="agent",
    ),
    _metric("forge_leases", Kind.GAUGE, "leases that have not ended", "kind", only="cognate"),
    _metric("forge_leased", Kind.GAUGE, "capacity that is lent", "kind", only="cognate"),
    _metric(
        "forge_leases_ended_total", Kind.COUNTER, "leases that ended: released, expired, revoked", "how", only="cognate"
    ),
    _metric("forge_outbox_events", Kind.GAUGE, "events that WatchModels can still begin at", only="cognate"),
    _metric(
        "forge_outbox_lag_events",
        Kind.GAUGE,
        "newest event less the one that the slowest watcher of this server has been sent; 0 without watchers",
        only="cognate",
    ),
    # Artifacts and the store.
    _metric("forge_artifacts_damaged", Kind.GAUGE, "versions with files that are not what was published"),
    _metric("forge_artifacts_unverified_seconds", Kind.GAUGE, "age of the oldest look at a stored version"),
    _metric("forge_store_up", Kind.GAUGE, "1 when the database took the last write and answers reads, otherwise 0"),
    _metric("forge_store_write_seconds", Kind.HISTOGRAM, "time of a write transaction of the server, waits included"),
    _metric("forge_disk_free_bytes", Kind.GAUGE, "space that is left where a folder is", "folder"),
    _metric("forge_disk_size_bytes", Kind.GAUGE, "size of the disk where a folder is", "folder"),
    _metric("forge_certificate_expiry_timestamp_seconds", Kind.GAUGE, "when the server's certificate ends, since 1970"),
    _metric("forge_audit_failures_total", Kind.COUNTER, "calls that could not be written to the audit log"),
)

BY_NAME = {metric.name: metric for metric in CATALOG}
