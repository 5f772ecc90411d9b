"""What a scale takes of each resource, by measured figures: the arithmetic behind tools/capacity.py.

Signs of life, events and answers are rates here: nothing of them is simulated one by one, so that thousands of nodes
cost no more than one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training_common.jobs.scheduler import TICK_S
from training_common.rpc.server import max_streams
from training_common.settings import (
    ArtifactSettings,
    AuditSettings,
    LimitSettings,
    RetentionSettings,
    WorkerSettings,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "capacity"
MEASURED_FILE = FOLDER / "measured.toml"
DAY_S, HOUR_S = 86_400.0, 3_600.0
# The most that the settings allow a server.
MOST_SLOTS = 64
# What a TrainJob that has ended is kept for (training_common.engines.kubernetes).
_KEPT_HOURS = 1.0


class Scale(BaseModel):
    """The scale that a person expects. Times and amounts are those of one service."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    title: str = Field(default="", description="what it is, in words")
    nodes: int = Field(ge=1, le=100_000, description="machines that train")
    slots_per_node: int = Field(default=1, ge=1, le=64, description="processes that train on a machine at once")
    servers: int = Field(default=1, ge=1, le=10_000, description="servers that share the store")
    store: Literal["sqlite", "postgresql"] = Field(default="sqlite", description="kind of the database")
    engine: Literal["local", "kubernetes", "ray"] = Field(default="local", description="what starts the workers")
    jobs_per_day: float = Field(gt=0, description="jobs that are submitted in a day")
    job_slots: int = Field(default=1, ge=1, description="processes of a job")
    job_hours: float = Field(gt=0, description="hours that a job trains, mean")
    job_hours_spread: float = Field(
        default=1.0, ge=0, le=5, description="standard deviation of those hours over their mean; 0: all alike"
    )
    step_s: float = Field(gt=0, description="seconds of an optimizer step")
    progress_interval_steps: int = Field(default=1, ge=1, description="steps between two progress events")
    checkpoint_interval_steps: int = Field(default=100, ge=1, description="steps between two checkpoints")
    checkpoints_kept: int = Field(default=2, ge=2, description="checkpoints of a job that stay")
    checkpoint_bytes: float | None = Field(default=None, gt=0, description="size of one; none: of Cognate-25M")
    artifact_bytes: float | None = Field(default=None, gt=0, description="size of a version; none: of Cognate-25M")
    published_share: float = Field(default=1.0, ge=0, le=1, description="share of the jobs that publish a version")
    calls_per_s: float = Field(default=1.0, ge=0, description="unary calls a second, of people and programs")
    watches: int = Field(default=1, ge=0, description="watches that are open at once, over the running jobs")
    fetches_per_day: float = Field(default=1.0, ge=0, description="versions that are fetched whole in a day")
    heartbeat_interval_s: float = Field(
        default=WorkerSettings().heartbeat_interval_s, gt=0, le=60, description="workers.heartbeat_interval_s"
    )
    job_files_days: float = Field(
        default=RetentionSettings().job_files_days, ge=0, description="retention.*, 0: for good"
    )
    job_events_days: float = Field(default=RetentionSettings().job_events_days, ge=0, description="the same")
    request_ids_days: float = Field(default=RetentionSettings().request_ids_days, ge=0, description="the same")
    artifact_days: float = Field(default=0.0, ge=0, description="artifacts.collect_after_days, 0: for good")
    scrub_bytes_per_s: int = Field(
        default=ArtifactSettings().scrub_bytes_per_s, ge=0, description="artifacts.scrub_bytes_per_s, 0: no bound"
    )
    scrub_interval_hours: float = Field(
        default=ArtifactSettings().scrub_interval_hours, ge=0, description="artifacts.*, 0: only on request"
    )
    max_concurrent_rpcs: int = Field(
        default=LimitSettings().max_concurrent_rpcs, ge=1, description="limits.max_concurrent_rpcs of each server"
    )
    network_bytes_per_s: float = Field(default=125e6, gt=0, description="of a server; 125e6 is 1 Gbit/s")
    shared_bytes_per_s: float = Field(default=500e6, gt=0, description="that the shared folder takes in all")
    store_cores: float = Field(default=2.0, gt=0, description="processor cores of PostgreSQL's machine")
    store_writes_per_s: float | None = Field(
        default=None, gt=0, description="transactions a second that your store takes; none: as measured here"
    )
    price_node_hour: float | None = Field(default=None, ge=0, description="price of a machine's hour; none: no cost")
    currency: str = Field(default="", pattern="^([A-Z]{3})?$", description="ISO 4217 code of the price")
    simulated_jobs: int = Field(default=20_000, ge=100, le=1_000_000, description="jobs that the simulation counts")
    seed: int = Field(default=1, description="of the simulation's random numbers")

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.store == "sqlite" and self.servers > 1:
            raise ValueError(
                "servers: several servers share a PostgreSQL only: set store = 'postgresql', or one server"
            )
        if self.job_slots > self.slots:
            raise ValueError(f"job_slots: a job of {self.job_slots} processes has no place among {self.slots} slots")
        if self.price_node_hour is not None and not self.currency:
            raise ValueError("currency: a price has a currency: set it beside price_node_hour")
        return self

    @property
    def slots(self) -> int:
        """Return all processes that may train at once."""
        return self.nodes * self.slots_per_node

    @property
    def arrival_rate(self) -> float:
        """Return jobs a second."""
        return self.jobs_per_day / DAY_S

    def times(self, factor: float) -> Self:
        """Return the scale with so many times the jobs, calls, watches and fetches."""
        grow = ("jobs_per_day", "calls_per_s", "watches", "fetches_per_day")
        # Unchecked: a fraction of a watch is as good here.
        return self.model_copy(update={name: factor * getattr(self, name) for name in grow})


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured figure. most: the largest of what it was measured with, None where it is the same for all."""

    value: float
    unit: str
    what: str
    source: str
    most: float | None = None
    most_of: str = ""


class Measured:
    """The measured figures by their names, as the file has them."""

    def __init__(self, figures: Mapping[str, Figure]) -> None:
        self.figures = figures

    @classmethod
    def load(cls, file: Path = MEASURED_FILE) -> Self:
        """Read the figures. Errors: TypeError, for one that lacks a part."""
        values = tomllib.loads(file.read_text(encoding="utf-8"))
        return cls({name: Figure(**value) for name, value in values.items()})

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value

    def of_store(self, name: str, store: str) -> float:
        """Return a figure of a kind of store."""
        return self.figures[f"{store}_{name}"].value


@dataclass(frozen=True, kw_only=True)
class Load:
    """Something that can be full: how much of it is taken, and the metric, alert and remedy that go with it."""

    name: str
    taken: float
    capacity: float
    unit: str

    @property
    def utilization(self) -> float:
        """Return the share that is taken; above 1 it does not fit."""
        return self.taken / self.capacity


def loads(scale: Scale, measured: Measured, running: float) -> list[Load]:
    """Return what is taken of each resource while so many jobs train."""
    m, per_server = measured, 1 / scale.servers
    store = scale.store
    beats = running / scale.heartbeat_interval_s
    progress = running / (scale.step_s * scale.progress_interval_steps)
    checkpoints = running / (scale.step_s * scale.checkpoint_interval_steps)
    moves = scale.arrival_rate * m["events_of_a_job"]
    events = progress + 2 * checkpoints + moves
    seen = events / max(running, 1.0) * scale.watches  # each watch sees the events of one job
    look_server_s = m.of_store("look_server_s", store) + running * m.of_store("look_job_server_s", store)
    look_store_s = 0.0
    if store == "postgresql":
        look_store_s = m["postgresql_look_store_s"] + running * m["postgresql_look_job_store_s"]
    look_s = look_server_s + look_store_s
    looks = 1 / (TICK_S + look_s)
    ended = scale.arrival_rate * _KEPT_HOURS * HOUR_S
    trainjobs = (running + ended) * per_server if scale.engine == "kubernetes" else 0.0
    polls = min(1.0, scale.watches) * m["watching_cores"]
    calls = scale.calls_per_s + 2 * scale.arrival_rate
    fetched = scale.fetches_per_day * artifact_bytes(scale, m) / DAY_S
    core = (
        per_server * (calls * m["call_processor_s"] + seen * m["delivered_event_processor_s"])
        + per_server * fetched * m["fetched_byte_processor_s"]
        + polls
        + looks * (look_server_s + trainjobs * m["trainjob_processor_s"])
    )
    own = scale.store_writes_per_s
    beat_rate, event_rate = own or m.of_store("heartbeats_per_s", store), own or m.of_store("progress_per_s", store)
    found = [
        Load(name="store writes", taken=beats / beat_rate + events / event_rate, capacity=1.0, unit="share"),
        Load(name="server core", taken=core, capacity=1.0, unit="cores"),
        Load(name="scheduler look", taken=look_s, capacity=TICK_S, unit="s"),
        Load(
            name="open streams",
            taken=scale.watches * per_server,
            capacity=float(max_streams(scale.max_concurrent_rpcs)),
            unit="streams",
        ),
        Load(
            name="server network",
            taken=per_server * (fetched + seen * m.of_store("progress_event_bytes", store))
            + trainjobs * m["trainjob_bytes"] * looks,
            capacity=scale.network_bytes_per_s,
            unit="bytes/s",
        ),
        Load(
            name="shared folder",
            taken=checkpoints * checkpoint_bytes(scale, m)
            + scale.arrival_rate * scale.published_share * artifact_bytes(scale, m),
            capacity=scale.shared_bytes_per_s,
            unit="bytes/s",
        ),
    ]
    if scale.scrub_bytes_per_s and scale.scrub_interval_hours:
        scrub_s = stock(scale, measured)["artifacts"] / scale.scrub_bytes_per_s
        found.append(Load(name="artifact scrub", taken=scrub_s, capacity=scale.scrub_interval_hours * HOUR_S, unit="s"))
    if store == "postgresql":
        cores = (
            beats * m["postgresql_heartbeat_store_s"]
            + events * m["postgresql_progress_store_s"]
            + scale.servers * looks * look_store_s
        )
        found.append(Load(name="store processor", taken=cores, capacity=scale.store_cores, unit="cores"))
    return found


def checkpoint_bytes(scale: Scale, m: Measured) -> float:
    """Return the size of a checkpoint."""
    return scale.checkpoint_bytes or m["checkpoint_bytes"]


def artifact_bytes(scale: Scale, m: Measured) -> float:
    """Return the size of a version."""
    return scale.artifact_bytes or m["artifact_bytes"]


def growth(scale: Scale, m: Measured) -> dict[str, float]:
    """Return the bytes that a day's jobs add, by where they are and how long they stay."""
    store, jobs = scale.store, scale.jobs_per_day
    steps = scale.job_hours * HOUR_S / scale.step_s
    progress, checkpoints = steps / scale.progress_interval_steps, steps / scale.checkpoint_interval_steps
    published = jobs * scale.published_share * artifact_bytes(scale, m)
    # Each checkpoint is an event, and another one when a newer one takes its place.
    others = m["events_of_a_job"] + 2 * checkpoints - min(checkpoints, scale.checkpoints_kept)
    rows = m.of_store("job_bytes", store) + scale.published_share * m.of_store("version_bytes", store)
    events = progress * m.of_store("progress_event_bytes", store) + others * m.of_store("other_event_bytes", store)
    return {
        "rows for good": jobs * (rows + checkpoints * m.of_store("checkpoint_row_bytes", store)),
        "events": jobs * events,
        "request ids": jobs * m.of_store("request_bytes", store),
        # What is published stays there as well, until the folder goes.
        "job folders": jobs * (scale.checkpoints_kept * checkpoint_bytes(scale, m) + m["worker_log_bytes"]) + published,
        "artifacts": published,
        "audit log": 2 * jobs * m["audit_record_bytes"],
        "server log": (scale.calls_per_s * DAY_S + 2 * jobs) * m["log_line_bytes"],
    }


def stock(scale: Scale, m: Measured, days: float = 365.0) -> dict[str, float]:
    """Return the bytes that lie there after so many days, with what retention has removed."""

    def kept(limit: float) -> float:
        return min(days, limit) if limit else days

    added = growth(scale, m)
    audit = AuditSettings()
    most_audit = scale.servers * audit.max_file_bytes * (audit.keep_files + 1)
    return {
        "database": added["rows for good"] * days
        + added["events"] * kept(scale.job_events_days)
        + added["request ids"] * kept(scale.request_ids_days),
        "job folders": added["job folders"] * kept(scale.job_files_days),
        "artifacts": added["artifacts"] * kept(scale.artifact_days),
        "audit logs": min(added["audit log"] * days, most_audit),
    }


def saturation(scale: Scale, m: Measured, running: float, name: str) -> float:
    """Return at how many times the load, with nodes in step, a resource is full at. Beyond 1e6 it is infinity."""
    return _root(lambda factor: _named(loads(scale.times(factor), m, running * factor), name).utilization)


def _root(utilization: Callable[[float], float]) -> float:
    low, high = 0.0, 1e6
    if utilization(high) < 1:
        return float("inf")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if utilization(middle) >= 1 else (middle, high)
    return high


def _named(found: Sequence[Load], name: str) -> Load:
    return next(load for load in found if load.name == name)


def memory_bytes(scale: Scale, m: Measured) -> float:
    """Return the memory of one server's process."""
    return m["server_bytes"] + scale.watches / scale.servers * m["watch_bytes"]


def warnings(scale: Scale, m: Measured, running: float) -> list[str]:
    """Return what of the scale the settings refuse, or nobody has measured, in words."""
    asked = {
        "jobs with a worker": running,
        "watches of a server": scale.watches / scale.servers,
        "versions": scale.jobs_per_day
        * scale.published_share
        * (min(scale.artifact_days, 365.0) if scale.artifact_days else 365.0),
        "jobs of the store": scale.jobs_per_day * 365,
    }
    found = []
    needed = -(-scale.slots // MOST_SLOTS)
    if scale.servers < needed:
        found.append(
            f"a server takes {MOST_SLOTS} slots at most (workers.slots): {scale.slots} slots need {needed} servers, "
            f"not {scale.servers}"
        )
    longest_s = WorkerSettings().lost_after_s / 2
    if scale.heartbeat_interval_s > longest_s:
        found.append(f"heartbeat_interval_s: beyond {longest_s:g} s two lost signs of life make a job unobserved")
    other = "postgresql_" if scale.store == "sqlite" else "sqlite_"
    for name, figure in m.figures.items():
        amount = asked.get(figure.most_of)
        if amount is not None and figure.most is not None and amount > figure.most and not name.startswith(other):
            found.append(f"extrapolated: {amount:,.0f} {figure.most_of}, measured up to {figure.most:,.0f}")
    return list(dict.fromkeys(found))
