"""The tables that both services have: jobs and their history, idempotent requests, artifacts and their outbox.

Each service keeps them in a database of its own, under its own migrations. Times are microseconds since 1970 in UTC,
so that they order and compare alike on every database.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

# SQLite gives automatic keys to INTEGER columns only.
KEY = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("state", String(16), nullable=False, index=True),
    Column("plan", LargeBinary, nullable=False, comment="the plan message with its defaults filled in"),
    Column("caller", String(255), nullable=False),
    # What the owner asked for and the worker has not done yet: "pause", "cancel" or nothing.
    Column("wish", String(16), nullable=False, default=""),
    Column("attempt", Integer, nullable=False, default=0),
    # Grows with every attempt and every cut. A worker's write with an older one changes nothing.
    Column("fencing_token", BigInteger, nullable=False, default=0),
    Column("step", BigInteger, nullable=False, default=0),
    Column("total_steps", BigInteger, nullable=False),
    # On how many it trains, on how many machines, and how many of them take a slot: those on its server's machine.
    Column("processes", Integer, nullable=False, default=1, server_default="1"),
    Column("nodes", Integer, nullable=False, default=1, server_default="1"),
    Column("slots", Integer, nullable=False, default=1, server_default="1"),
    Column("last_sequence", BigInteger, nullable=False, default=0),
    Column("observed", Boolean, nullable=False, default=True),
    # Attempts in a row that brought no new checkpoint: lost by their own fault, and ended from outside.
    Column("retries_without_progress", Integer, nullable=False, default=0),
    Column("kills_without_progress", Integer, nullable=False, default=0, server_default="0"),
    # Waiting for something outside this service: no attempt before `not_before_us`; how often and since when it waits.
    Column("not_before_us", BigInteger, nullable=False, default=0, server_default="0"),
    Column("waits", Integer, nullable=False, default=0, server_default="0"),
    Column("waiting_since_us", BigInteger),
    # Which service `not_before_us` waits for; empty where workers were ended from outside too often.
    Column("waits_for", String(64), nullable=False, default="", server_default=""),
    Column("priority", Integer, nullable=False, default=0, server_default="0"),
    # Place in the queue: the submission, moved forward by the priority. None while the job is not in it,
    # below 0 while another one makes room for it.
    Column("queue_us", BigInteger),
    Column("start_by_us", BigInteger),
    Column("finish_by_us", BigInteger),
    # When somebody must look at it because of a deadline. None where there is no deadline left.
    Column("deadline_us", BigInteger, index=True),
    # Digest of what of its plan and its server's settings decides how long a step takes.
    Column("configuration", String(64), nullable=False, default="", server_default=""),
    # Whose share of the capacity it counts for, and what it takes of it while a worker holds it.
    Column("tenant", String(48), nullable=False, default="", server_default=""),
    Column("cores", Integer, nullable=False, default=0, server_default="0"),
    Column("memory_bytes", BigInteger, nullable=False, default=0, server_default="0"),
    # The reservation that it runs in; empty: in none.
    Column("reservation", String(64), nullable=False, default="", server_default="", index=True),
    # An attempt on borrowed capacity: its lease, and until when its worker may write. Only renewals move that on.
    Column("lease", String(64), nullable=False, default="", server_default=""),
    Column("lease_token", BigInteger, nullable=False, default=0, server_default="0"),
    Column("lease_until_us", BigInteger),
    Column("create_us", BigInteger, nullable=False),
    Column("start_us", BigInteger),
    Column("end_us", BigInteger),
    Column("failure_reason", String(64), nullable=False, default=""),
    Column("failure_message", Text, nullable=False, default=""),
    Column("artifact", String(128), nullable=False, default=""),
    Column("facts", JSON, nullable=False, default=dict, comment="what a service adds, e.g. the foundation's digest"),
    # Where in a trace it was submitted, as W3C writes it; empty: in none. Its attempts go on from there.
    Column("traceparent", String(55), nullable=False, default="", server_default=""),
    Index("ix_jobs_configuration_id", "configuration", "id"),
    # What retention has left: the oldest event, and when the job's folder was removed.
    Column("first_sequence", BigInteger, nullable=False, default=1, server_default="1"),
    Column("files_removed_us", BigInteger),
    Index("ix_jobs_end_us", "end_us"),
    Index("ix_jobs_queue", "queue_us", "id", "not_before_us"),
    # The queue of each tenant: without those that are not in it, so that tenants who wait are found by a few steps.
    Index(
        "ix_jobs_tenant_queue",
        "tenant",
        "queue_us",
        "id",
        sqlite_where=text("queue_us IS NOT NULL"),
        postgresql_where=text("queue_us IS NOT NULL"),
    ),
)

events = Table(
    "events",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", JSON, nullable=False),
    UniqueConstraint("job_id", "sequence"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("fencing_token", BigInteger, nullable=False),
    Column("engine", String(32), nullable=False),
    # Which of several servers started the worker, and can see whether it lives.
    Column("server", String(255), nullable=False, default="", server_default=""),
    # Name of the worker in the engine's words; for the local engine "PID:start time". Empty until it has registered.
    Column("handle", String(255), nullable=False, default=""),
    # The same as the engine told when it started the worker. It outlives the server that did.
    Column("launched", String(255), nullable=False, default="", server_default=""),
    Column("first_step", BigInteger, nullable=False),
    Column("start_us", BigInteger, nullable=False),
    Column("heartbeat_us", BigInteger, nullable=False),
    Column("end_us", BigInteger),
    # Measured over the attempt's own steps, where it trained to the end on capacity of its server.
    Column("steps_per_s", Float),
    UniqueConstraint("job_id", "number"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("folder", String(128), nullable=False),
    Column("create_us", BigInteger, nullable=False),
    Column("available", Boolean, nullable=False, default=True),
    # Nothing removes the files of a pinned one.
    Column("pinned", Boolean, nullable=False, default=False, server_default=false()),
    # The newest validation that was known when it was saved, in the service's own metric.
    Column("score", Float),
    Index("ix_checkpoints_job_id_step", "job_id", "step"),
)

# Replays of some steps between two checkpoints of a job that holds no worker, and what came of them.
verifications = Table(
    "verifications",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False, index=True),
    Column("caller", String(255), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("from_checkpoint_id", ForeignKey("checkpoints.id"), nullable=False),
    Column("to_checkpoint_id", ForeignKey("checkpoints.id"), nullable=False),
    # Grows with every worker that begins it. What one with an older number writes changes nothing.
    Column("tries", Integer, nullable=False, default=0),
    Column("server", String(255), nullable=False, default=""),
    Column("handle", String(255), nullable=False, default=""),
    # By which handle its worker was started, until the worker registers itself.
    Column("launched", String(255), nullable=False, default="", server_default=""),
    Column("heartbeat_us", BigInteger, nullable=False, default=0),
    Column("create_us", BigInteger, nullable=False),
    Column("start_us", BigInteger),
    Column("end_us", BigInteger),
    Column("failure", Text, nullable=False, default=""),
    Column("receipt", JSON),
)

requests = Table(
    "requests",
    metadata,
    Column("caller", String(255), primary_key=True),
    Column("request_id", String(36), primary_key=True),
    Column("method", String(128), nullable=False),
    Column("payload_sha256", String(64), nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("create_us", BigInteger, nullable=False, index=True),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", KEY, primary_key=True, autoincrement=True),
    Column("family", String(48), nullable=False),
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("digest", String(71), nullable=False, index=True),
    Column("manifest", LargeBinary, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("job", String(64), nullable=False),
    Column("create_us", BigInteger, nullable=False),
    # What may change of a version is how it is kept: the columns from here on, and nothing else.
    Column("tier", String(16), nullable=False, default="STANDARD", server_default="STANDARD"),
    Column("pinned", Boolean, nullable=False, default=False, server_default=false()),
    # When its stored bytes were last found whole, and what was wrong when they were last read.
    Column("verify_us", BigInteger),
    Column("damage", String(500), nullable=False, default="", server_default=""),
    # When it was removed: the row stays, so that its name is not given again.
    Column("collect_us", BigInteger),
    # A Sigstore bundle over manifest and files, and the fingerprint of the key that made it.
    Column("signature", LargeBinary),
    Column("key", String(71), nullable=False, default="", server_default=""),
    UniqueConstraint("family", "version"),
    Index("ix_artifacts_create_us", "create_us", "id"),
    Index("ix_artifacts_size_bytes", "size_bytes", "id"),
    Index("ix_artifacts_family", "family", "id"),
    # Of a few rows each: what is looked for is seldom so.
    Index("ix_artifacts_pinned", "id", sqlite_where=text("pinned IS 1"), postgresql_where=text("pinned IS true")),
    Index("ix_artifacts_damage", "id", sqlite_where=text("damage != ''"), postgresql_where=text("damage != ''")),
    Index("ix_artifacts_tier", "tier", "id"),
)

# What versions are looked for by: the newest result of each metric on each set, and the sets they were trained on.
results = Table(
    "results",
    metadata,
    Column("artifact_id", ForeignKey("artifacts.id"), primary_key=True),
    Column("metric", String(64), primary_key=True),
    Column("dataset", String(128), primary_key=True),
    Column("value", Float, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Index("ix_results_metric", "metric", "dataset", "value", "artifact_id"),
)

sources = Table(
    "sources",
    metadata,
    Column("artifact_id", ForeignKey("artifacts.id"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Index("ix_sources_name", "name", "artifact_id"),
    Index("ix_sources_digest", "digest", "artifact_id"),
)

# The outbox: written in the transaction of the change it tells of.
artifact_events = Table(
    "artifact_events",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time_us", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("artifact_id", ForeignKey("artifacts.id"), nullable=False),
)
