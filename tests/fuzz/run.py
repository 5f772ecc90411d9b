"""Calls every RPC of both services with what their descriptors allow, nearly allow and do not allow at all.

What must hold: no answer is INTERNAL or UNKNOWN, none shows anything of the code behind it, a refused request writes
nothing, every method answers OK at least once where this release serves it, and memory stays flat.
Usage: python -m tests.fuzz.run [requests] [seed]; the last line is one JSON object.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import psutil
import sqlalchemy as sa
from google.protobuf import descriptor_pool, duration_pb2, timestamp_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import agent_server.migrations
import agent_server.server
import cognate_server.migrations
import cognate_server.server
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.artifact.v1 import storage_pb2
from cognateforge.cognate.v1 import pretraining_pb2, pretraining_pb2_grpc
from cognateforge.exchange.v1 import model_pb2, resource_pb2, resource_pb2_grpc
from tests.fuzz.requests import Request, requests
from tests.support.published import publish_agent, publish_model
from training_common.jobs.store import JobStore
from training_common.store import tables as t
from training_common.store.database import Database

USUAL_TIMEOUT_S = 5.0
# A watch of a job that waits has nothing to say at once, but for a heartbeat.
HEARTBEAT_S = 0.02
_QUIET_S = 0.1
ROUNDS = 10
# Of the first job that waits; their folders are never opened.
CHECKPOINTS: list[dict[str, Any]] = [
    {
        "attempt": 1,
        "step": step,
        "digest": f"sha256:{'0' * 64}",
        "size_bytes": 1,
        "folder": f"1-{step}",
        "create_us": 1_700_000_000_000_000,
    }
    for step in (4, 8)
]
# The models and agents here hold no weights, so none of them can be measured.
NOT_SERVED = {"ValidateModel", "EvaluateAgent"}
# What finds that out is a process that loads torch.
SLOW_TIMEOUTS_S = {"EvaluateAgent": 120.0, "ValidateModel": 120.0}
# What a service may be busy with by itself: leases end, and what ended jobs have held is let go.
_MOVES_BY_ITSELF = {"leases", "lease_clock", "descents"}
_LEAK = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|sqlite3|sqlalchemy|sqlalche\.me|\[SQL:|protovalidate|pydantic|"
    r"object at 0x|<class '|\b[A-Z]\w+(Error|Exception)\b\(|NoneType|/tmp/|self\."
)


@dataclass
class Tally:
    """What came of the calls."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    served: collections.Counter[str] = field(default_factory=collections.Counter)
    called: collections.Counter[str] = field(default_factory=collections.Counter)
    refused: int = 0
    requests: int = 0


class Store:
    """Looks at a service's database from outside, as another connection sees it."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path)
        names = self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        self._tables = sorted(name for (name,) in names if name not in _MOVES_BY_ITSELF)
        self._version, self._digest = self.version(), self.digest()

    def version(self) -> int:
        """Return a number that changes when anybody else has written anything."""
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def digest(self) -> str:
        """Return a digest of every row but those that a service changes by itself."""
        hashed = hashlib.sha256()
        for table in self._tables:
            for row in self._connection.execute(f"SELECT * FROM {table} ORDER BY rowid"):  # noqa: S608 - our tables
                hashed.update(repr(row).encode())
        return hashed.hexdigest()

    def has_changed(self) -> bool:
        """Return whether rows have changed since the last look. Cheap where nobody has written."""
        version = self.version()
        if version == self._version:
            return False
        digest, before = self.digest(), self._digest
        self._version, self._digest = version, digest
        return digest != before

    def settle(self) -> None:
        """Wait until nothing has been written for a moment, and take that as the state to compare with."""
        quiet_since, version = time.monotonic(), self.version()
        while time.monotonic() - quiet_since < _QUIET_S:
            time.sleep(_QUIET_S / 5)
            if self.version() != version:
                quiet_since, version = time.monotonic(), self.version()
        self.has_changed()


@dataclass
class Service:
    """A running service, and what is known about it."""

    name: str
    methods: Sequence[MethodDescriptor]
    known: Sequence[str]
    channel: grpc.Channel
    store: Store
    process: psutil.Process


def _methods(services: Sequence[str]) -> list[MethodDescriptor]:
    pool = descriptor_pool.Default()
    return [method for name in services for method in pool.FindServiceByName(name).methods]


@contextlib.contextmanager
def running(name: str, folder: Path, **more: str) -> Iterator[Service]:
    """Run a service over a folder in which something is published and jobs wait. They stay QUEUED."""
    migrations = {"cognate": cognate_server.migrations, "agent": agent_server.migrations}[name]
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'store.db'}")
    database.upgrade(Path(migrations.__file__ or "").parent)
    jobs = []
    with database.write() as connection:
        for _ in range(5):
            plan = pretraining_pb2.PretrainingPlan(total_steps=9).SerializeToString() if name == "cognate" else b""
            jobs.append(JobStore(database).submit(connection, plan=plan, total_steps=9, caller="seed"))
        # As if an earlier attempt of the first had saved them.
        for checkpoint in CHECKPOINTS:
            connection.execute(sa.insert(t.checkpoints).values(job_id=jobs[0].id, available=True, **checkpoint))
    database.close()
    published = [(publish_model if name == "cognate" else publish_agent)(folder) for _ in range(3)]
    prefix = f"{name.upper()}_SERVER_"
    values = {
        "ADDRESS": "127.0.0.1:0",
        "DATA_DIR": str(folder),
        "WORKERS__SLOTS": "0",
        "HEARTBEAT_FRAME_S": str(HEARTBEAT_S),
        "DRAIN_GRACE_S": "0.5",
        **more,
    }
    address_file = folder / "address"
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", f"{name}_server", "--address-file", str(address_file)],
            env={**os.environ, **{f"{prefix}{key}": value for key, value in values.items()}},
            stderr=log,
            stdout=log,
        )
    try:
        end = time.monotonic() + 30
        while not address_file.exists():
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "server.log").read_text())
            time.sleep(0.05)
        modules = {"cognate": cognate_server.server, "agent": agent_server.server}
        family = published[0].name.partition("@")[0]
        with grpc.insecure_channel(address_file.read_text()) as channel:
            yield Service(
                name=name,
                methods=_methods(modules[name].SERVICES),
                known=(*(job.name for job in jobs), *(row.name for row in published), family),
                channel=channel,
                store=Store(folder / "store.db"),
                process=psutil.Process(server.pid),
            )
    finally:
        server.terminate()
        server.wait(15)


def served_requests(services: Sequence[Service]) -> dict[str, list[Message]]:
    """Return requests that chance would not find, by the methods that serve them.

    Some leases are acquired for them, and a slot is reserved.
    """
    cognate, agent = services
    resources = resource_pb2_grpc.ResourceServiceStub(cognate.channel)
    leases = []
    for _ in range(2):
        acquire = resource_pb2.AcquireLeaseRequest(
            request_id=str(uuid.uuid4()),
            kind=resource_pb2.RESOURCE_KIND_GPU,
            amount=1,
            ttl=duration_pb2.Duration(seconds=3600),
        )
        leases.append(resources.AcquireLease(acquire, timeout=USUAL_TIMEOUT_S).lease)
    plan = training_pb2.TrainingPlan(
        agent="intent-router",
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name="cognate-25m"),
        classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=5)),
        adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
        total_steps=40,
    )
    keep, end = leases
    now_s = int(time.time())
    reserve = pretraining_pb2.CreateReservationRequest(
        request_id=str(uuid.uuid4()),
        slots=1,
        start_time=timestamp_pb2.Timestamp(seconds=now_s),
        end_time=timestamp_pb2.Timestamp(seconds=now_s + 86_400),
    )
    pretraining = pretraining_pb2_grpc.CognatePretrainingServiceStub(cognate.channel)
    reserved = pretraining.CreateReservation(reserve, timeout=USUAL_TIMEOUT_S).reservation
    reserve.ClearField("request_id")
    model = next(name for name in cognate.known if name.startswith("cognate-25m@"))
    dependents = [model_pb2.Dependent(model=model, name="intent-router@3", digest=f"sha256:{'0' * 64}")]
    made: list[tuple[str, Message]] = [
        (
            "cognate.v1.CognatePretrainingService.StartPretraining",
            pretraining_pb2.StartPretrainingRequest(plan=pretraining_pb2.PretrainingPlan(total_steps=9)),
        ),
        ("agent.v1.AgentForgeTrainingService.StartTraining", training_pb2.StartTrainingRequest(plan=plan)),
        ("agent.v1.AgentService.ListMoves", agent_pb2.ListMovesRequest(family=agent.known[-1])),
        (
            "exchange.v1.ResourceService.RenewLease",
            resource_pb2.RenewLeaseRequest(
                name=keep.name, fencing_token=keep.fencing_token, ttl=duration_pb2.Duration(seconds=3600)
            ),
        ),
        (
            "exchange.v1.ResourceService.ReleaseLease",
            resource_pb2.ReleaseLeaseRequest(name=end.name, fencing_token=end.fencing_token),
        ),
        ("exchange.v1.ResourceService.WatchLease", resource_pb2.WatchLeaseRequest(name=keep.name)),
        ("cognate.v1.CognatePretrainingService.CreateReservation", reserve),
        (
            "cognate.v1.CognatePretrainingService.CancelReservation",
            pretraining_pb2.CancelReservationRequest(name=reserved.name),
        ),
        ("exchange.v1.ModelService.RegisterDependents", model_pb2.RegisterDependentsRequest(dependents=dependents)),
        ("exchange.v1.ModelService.ReleaseDependents", model_pb2.ReleaseDependentsRequest(dependents=dependents)),
        ("exchange.v1.ModelService.ListDependents", model_pb2.ListDependentsRequest(name=model)),
        ("exchange.v1.ModelService.GetModelCard", model_pb2.GetModelCardRequest(name=model)),
        ("exchange.v1.ModelService.GetModelProvenance", model_pb2.GetModelProvenanceRequest(name=model)),
        ("agent.v1.AgentService.GetAgentCard", agent_pb2.GetAgentCardRequest(name=agent.known[-1])),
        ("agent.v1.AgentService.GetAgentProvenance", agent_pb2.GetAgentProvenanceRequest(name=agent.known[-1])),
        *(
            (f"{package}.{service}.{verb}", request)
            for package, service, owner, module in (
                ("cognate.v1", "CognatePretrainingService", cognate, pretraining_pb2),
                ("agent.v1", "AgentForgeTrainingService", agent, training_pb2),
            )
            for verb, request in (
                ("PinCheckpoint", module.PinCheckpointRequest(name=owner.known[0], step=CHECKPOINTS[0]["step"])),
                ("UnpinCheckpoint", module.UnpinCheckpointRequest(name=owner.known[0], step=CHECKPOINTS[0]["step"])),
                ("VerifyResume", module.VerifyResumeRequest(name=owner.known[0])),
            )
        ),
    ]
    served = {f"cognateforge.{name}": [message] for name, message in made}
    # Both services serve it, each for names of its own: what one does not know, the other does.
    for verb, requests_of in _storage_requests(cognate, agent).items():
        served[f"cognateforge.artifact.v1.StorageService.{verb}"] = requests_of
    return served


def _storage_requests(*services: Service) -> dict[str, list[Message]]:
    names = [next(name for name in service.known if re.fullmatch("[a-z0-9-]+@1", name)) for service in services]
    return {
        "SetPin": [storage_pb2.SetPinRequest(name=name, pinned=True) for name in names],
        "SetTier": [storage_pb2.SetTierRequest(name=name, tier=storage_pb2.TIER_STANDARD) for name in names],
        "VerifyArtifacts": [storage_pb2.VerifyArtifactsRequest(name=name) for name in names],
        # Only told: what is published has to last for the other calls.
        "CollectArtifacts": [storage_pb2.CollectArtifactsRequest(validate_only=True)],
    }


def call(service: Service, method: MethodDescriptor, request: Request) -> grpc.RpcError | None:
    """Make one call with raw bytes, a stream up to its third frame. Returns how it failed, or None."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = service.channel.unary_unary(path)
            unary(request.data, timeout=request.timeout_s, metadata=request.metadata)
            return None
        stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = service.channel.unary_stream(path)
        frames = stream(request.data, timeout=request.timeout_s, metadata=request.metadata)
        for _, _frame in zip(range(3), frames, strict=False):
            pass
        frames.cancel()
    except grpc.RpcError as error:
        return error
    return None


def judge(service: Service, method: MethodDescriptor, request: Request, tally: Tally) -> None:
    """Make a call and check what must hold. Errors: AssertionError, with what to repeat it with."""
    error = call(service, method, request)
    tally.requests += 1
    tally.kinds[request.kind] += 1
    tally.called[method.full_name] += 1
    changed = service.store.has_changed()
    if error is None:
        tally.outcomes["OK"] += 1
        tally.served[method.full_name] += 1
        return
    code, reason, words = error.code(), *_told(error)
    tally.outcomes[reason or code.name] += 1
    case = f"{method.full_name} {request!r} -> {code.name} {reason} {error.details()!r}"
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE), case
    leaked = _LEAK.search(words)
    assert not leaked, f"{leaked and leaked[0]!r} in {words!r}: {case}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        assert request.timeout_s is not None, case
        assert request.timeout_s < 1, case
        service.store.settle()  # it tells nothing of the change, which may come yet
        return
    tally.refused += 1
    assert not changed, f"a refused request has written: {case}"
    by_grpc = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED}
    assert reason or code in by_grpc, f"no ErrorInfo: {case}"


def _told(error: Any) -> tuple[str, str]:
    """Return the reason, and everything that the caller can read."""
    status = rpc_status.from_call(error)
    reason, words = "", [error.details() or ""]
    for detail in status.details if status else ():
        info, bad, unmet = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.PreconditionFailure(),
        )
        if detail.Unpack(info):
            reason = info.reason
            words += [*info.metadata.keys(), *info.metadata.values()]
        elif detail.Unpack(bad):
            words += [f"{v.field} {v.description}" for v in bad.field_violations]
        elif detail.Unpack(unmet):
            words += [f"{v.subject} {v.description}" for v in unmet.violations]
    return reason, "\n".join(words)


def fuzz(folder: Path, *, count: int, seed: int) -> dict[str, Any]:
    """Make `count` calls and return what came of them. Errors: AssertionError, at the first that must not be."""
    tally = Tally()
    with contextlib.ExitStack() as stack:
        services = [
            stack.enter_context(running("cognate", folder / "cognate", LENDING__GPUS="4", RESERVATIONS__SLOTS="4")),
            stack.enter_context(running("agent", folder / "agent", COGNATE__ASK_WITHIN_S="0")),
        ]
        served = served_requests(services)
        services[0].store.has_changed()
        targets = [
            (
                service,
                method,
                requests(
                    method,
                    service.known,
                    served.get(method.full_name, ()),
                    usual_timeout_s=SLOW_TIMEOUTS_S.get(method.name, USUAL_TIMEOUT_S),
                ),
            )
            for service in services
            for method in service.methods
        ]
        rss: dict[str, list[int]] = {service.name: [] for service in services}

        start_s = time.monotonic()
        for turn in range(ROUNDS):
            for number, (service, method, strategy) in enumerate(targets):
                examples = _share(count, turn * len(targets) + number, ROUNDS * len(targets))
                # Each its own: of one seed, all would draw the same request ids, which serve once.
                own_seed = (seed * ROUNDS + turn) * len(targets) + number
                _press(service, method, strategy, tally, examples=examples, seed=own_seed)
            for service in services:
                rss[service.name].append(service.process.memory_info().rss)
        spent_s = time.monotonic() - start_s
    never = sorted(
        method.full_name
        for _, method, _ in targets
        if method.name not in NOT_SERVED and not tally.served[method.full_name]
    )
    grown = {name: values[-1] / values[ROUNDS // 3] for name, values in rss.items()}
    return {
        "name": "fuzz",
        "value": tally.requests,
        "unit": "requests",
        "seed": seed,
        "seconds": round(spent_s, 1),
        "methods": len(targets),
        "never_served": never,
        "outcomes": dict(tally.outcomes.most_common()),
        "kinds": dict(tally.kinds),
        "refused_without_a_write": tally.refused,
        "rss_mib": {name: [round(value / 2**20) for value in values] for name, values in rss.items()},
        "rss_grown": {name: round(value, 3) for name, value in grown.items()},
    }


def _share(total: int, index: int, parts: int) -> int:
    """Return the size of one of so many parts of a total that differ by one at most."""
    return total // parts + (index < total % parts)


def _press(
    service: Service,
    method: MethodDescriptor,
    strategy: st.SearchStrategy[Request],
    tally: Tally,
    *,
    examples: int,
    seed: int,
) -> None:
    """Call one method so many times. Where a type has few different requests, hypothesis gives fewer than asked for."""
    done = tally.requests
    while (left := examples - (tally.requests - done)) > 0:
        seed += 1_000_003

        @hypothesis.seed(seed)
        @settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def one(request: Request) -> None:
            judge(service, method, request, tally)

        one()


def main(count: int, seed: int) -> None:
    """Run and print."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        result = fuzz(Path(name), count=count, seed=seed)
    print(json.dumps(result))
    assert not result["never_served"], "some methods were never served, so what they do was not tried"
    assert all(grown < 1.15 for grown in result["rss_grown"].values()), "memory grows"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
