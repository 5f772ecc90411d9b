"""Clients and servers of neighbouring releases live together, and what one does not know of the other does no harm.

Every side that is not today's speaks from descriptors, over real connections: tests/support/contracts.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2
from typer.testing import CliRunner, Result

import agent_server.server
import cognate_server.server
from agent_server.architectures.factory import FoundationRequirement
from agent_server.foundation import asked_kinds, check_compatible
from cognate_server.models import ARCHITECTURE
from cognateforge._vendor.buf.validate import validate_pb2
from cognateforge.cli.app import app
from cognateforge.cli.exits import Exit
from cognateforge.client import AgentClient, CognateClient, ModelSnapshot
from cognateforge.client.services import health_word
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import (
    AgentNotFoundError,
    CheckpointNotFoundError,
    ClientSetupError,
    ForgeError,
    IncompatibleError,
    InvalidFieldError,
    ModelExperimentalError,
    NotFoundError,
    NotImplementedByServerError,
    PreconditionError,
    UnavailableError,
    UnknownFieldError,
    from_rpc_error,
)
from cognateforge.exchange.v1 import model_pb2
from tests.support import contracts
from tests.support.contracts import NEW_VALUE, Answer, Caller, Contract, filled, new_reason, serving
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.store.database import Database

JOB = "jobs/00000000-0000-4000-8000-000000000001"
PAYLOAD = bytes(range(256)) * 20
A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
VERSIONS: Mapping[str, Callable[[], Contract]] = {
    "released": contracts.released,
    "older": contracts.older,
    "today": contracts.today,
    "newer": contracts.newer,
}
COGNATE_SERVICES = {name.rpartition(".")[2] for name in cognate_server.server.SERVICES}
AGENT_SERVICES = {name.rpartition(".")[2] for name in agent_server.server.SERVICES}


pytestmark = pytest.mark.usefixtures("no_drain_notice")


@pytest.fixture(params=list(VERSIONS))
def version(request: pytest.FixtureRequest) -> Contract:
    """Return each version of the contract in turn."""
    return VERSIONS[request.param]()


def new_id() -> str:
    return str(uuid.uuid4())


def publish(folder: Path, *, family: str, state: str, body: dict[str, Any]) -> ArtifactRow:
    """Publish straight into a service's store: these tests are about serving, not about training."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    registry = ArtifactRegistry(database, BlobStore(folder / "artifacts"))
    source = folder / "payload.bin"
    source.write_bytes(PAYLOAD)
    file = registry.blobs.put(source, "payload.bin")
    with database.write() as connection:
        row = registry.publish(connection, family=family, state=state, job="jobs/x", files=[file], body=body)
    database.close()
    return row


def publish_model(folder: Path) -> ArtifactRow:
    architecture = {"name": "cognate_v1", "fingerprint": A, "parameter_count": 7, "act_version": 1, "ltm_version": 1}
    body = {
        "architecture": architecture,
        "tokenizer_digest": B,
        "data": [],
        "checks": [],
        "training": {"steps": 1, "tokens": 512},
    }
    return publish(folder, family="cognate-25m", state="READY", body=body)


def publish_agent(folder: Path) -> ArtifactRow:
    body = {
        "architecture": "cognate",
        "task": "classification",
        "labels": ["yes", "no"],
        "parent": {"name": "cognate-25m@1", "digest": A},
        "parameters": {"trainable": 7, "total": 11},
        "evaluations": [],
        "data": [],
    }
    return publish(folder, family="intent-router", state="PUBLISHED", body=body)


async def refused(call: Any) -> ForgeError:
    """Return the error that a call of a Caller ends with, as today's client library would raise it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


# --- clients of every version, a server of today


async def test_a_client_of_every_version_is_served_by_cognate(version: Contract, tmp_path: Path) -> None:
    """Every RPC that the client's version has takes its requests and gives answers that its classes can read."""
    settings = {"reservations": {"slots": 1}}
    async with running_cognate(tmp_path, **settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        row = publish_model(tmp_path)
        call = Caller(channel, version)
        await pretrain(call)
        if "CognatePretrainingService/CreateReservation" in version:
            await reserve(call, "CognatePretrainingService")
        await use_models(call, row, watches="ModelService/WatchModels" in version)
        await read_more(call, "ModelService", "Model", row)
        if "ModelService/RegisterDependents" in version:
            await depend(call, row)
        await keep(call, row)
        if "ResourceService/AcquireLease" in version:
            await borrow(call)
    has = {name for name in version.methods if name.partition("/")[0] in COGNATE_SERVICES}
    assert has - {"ModelService/RetractModel"} == call.called


async def pretrain(call: Caller) -> None:
    service = "CognatePretrainingService"
    plan = {"total_steps": 40, "seed": 1, "datasets": [{"dataset": "DATASET_FORGE_ARITHMETIC", "weight": 1}]}
    started = (await call(f"{service}/StartPretraining", request_id=new_id(), plan=plan)).job
    name = started.job.name
    assert (40, "local") == (started.plan.total_steps, started.job.caller)
    assert name == (await call(f"{service}/GetJob", name=name)).job.job.name
    listed = await call(f"{service}/ListJobs", states=["JOB_STATE_QUEUED"])
    assert [name] == [job.job.name for job in listed.jobs]
    await steer(call, service, name)
    assert [] == list((await call(f"{service}/ListCheckpoints", name=name)).checkpoints)
    await pin(call, service, name)
    assert [] == list((await call(f"{service}/GetMetrics", name=name)).series)
    assert (await call(f"{service}/GetServerInfo")).info.version
    error = await refused(call(f"{service}/ValidateModel", request_id=new_id(), name="cognate-25m@1"))
    assert type(error) is IncompatibleError


async def reserve(call: Caller, service: str) -> None:
    """Keep a slot, see it in the calendar, and let it go."""
    times = {"start_time": "2090-01-01T00:00:00Z", "end_time": "2090-01-02T00:00:00Z"}
    made = (await call(f"{service}/CreateReservation", request_id=new_id(), slots=1, **times)).reservation
    assert [made] == list((await call(f"{service}/ListReservations")).reservations)
    gone = (await call(f"{service}/CancelReservation", request_id=new_id(), name=made.name)).reservation
    assert (made.name, True) == (gone.name, gone.HasField("cancel_time"))
    assert [] == list((await call(f"{service}/ListReservations")).reservations)


async def steer(call: Caller, service: str, name: str) -> None:
    """Pause, resume, cancel, and watch to the end. A state that a version lacks is a number to it, and no fault."""
    states = [
        (await call(f"{service}/{verb}Job", request_id=new_id(), name=name)).job.job.state
        for verb in ("Pause", "Resume", "Cancel")
    ]
    paused, queued, cancelled = 8, 1, 7
    assert [paused, queued, cancelled] == states
    frames = [response.frame for response in await call.frames(f"{service}/WatchJob", name=name)]
    assert [1, 2, 3, 4] == [frame.event.sequence for frame in frames if frame.WhichOneof("frame") == "event"]
    assert [queued, paused, queued, cancelled] == [frame.event.state_change.to for frame in frames[:4]]
    assert (cancelled, 4) == (frames[-1].end.state, frames[-1].end.last_sequence)
    if f"{service}/WatchLogs" in call.methods:
        [response] = await call.frames(f"{service}/WatchLogs", name=name, follow=True)
        assert (0, 0) == (response.frame.end.attempt, response.frame.end.next_position), "no worker has run"


async def pin(call: Caller, service: str, name: str) -> None:
    """A job that saved nothing has nothing to pin or to verify. Versions before do not know of it."""
    if f"{service}/VerifyResume" in call.methods:
        error = await refused(call(f"{service}/VerifyResume", request_id=new_id(), name=name))
        assert type(error) is CheckpointNotFoundError
        assert [] == list((await call(f"{service}/ListVerifications", name=name)).verifications)
    for verb in ("Pin", "Unpin"):
        if f"{service}/{verb}Checkpoint" in call.methods:
            error = await refused(call(f"{service}/{verb}Checkpoint", request_id=new_id(), name=name, step=10))
            assert type(error) is CheckpointNotFoundError


async def use_models(call: Caller, row: ArtifactRow, *, watches: bool) -> None:
    model = (await call("ModelService/GetModel", name="cognate-25m")).model
    assert (row.digest, 1, 7) == (model.digest, model.state, model.architecture.parameter_count)
    assert [row.name] == [one.name for one in (await call("ModelService/ListModels")).models]
    header, *chunks = await call.frames("ModelService/FetchModel", name=row.name, offset_bytes=100)
    assert row.digest == f"sha256:{hashlib.sha256(header.header.manifest).hexdigest()}"
    assert PAYLOAD[100:] == b"".join(frame.chunk.data for frame in chunks)
    wanted = {"name": "cognate_v1", "fingerprint": A}
    assert (await call("ModelService/CheckCompatibility", name=row.name, architecture=wanted)).verdict == 1
    wanted["fingerprint"] = B
    answer = await call("ModelService/CheckCompatibility", name=row.name, architecture=wanted)
    assert (2, ["architecture.fingerprint"]) == (answer.verdict, [one.field for one in answer.mismatches])
    if watches:
        [frame] = await call.frames("ModelService/WatchModels", 1)
        assert (1, row.name) == (frame.event.sequence, frame.event.published.name)


async def read_more(call: Caller, service: str, what: str, row: ArtifactRow) -> None:
    """Card and provenance, of versions that have them."""
    if f"{service}/Get{what}Card" in call.methods:
        assert row.name == (await call(f"{service}/Get{what}Card", name=row.name)).name
    if f"{service}/Get{what}Provenance" in call.methods:
        provenance = (await call(f"{service}/Get{what}Provenance", name=row.name)).provenance
        assert (row.name, row.manifest) == (provenance.name, provenance.manifest)


async def depend(call: Caller, row: ArtifactRow) -> None:
    """Tell of an agent that is made of a model, and no longer."""
    told = {"dependents": [{"model": row.name, "name": "intent-router@3", "digest": A}]}
    await call("ModelService/RegisterDependents", request_id=new_id(), **told)
    listed = (await call("ModelService/ListDependents", name=row.name)).dependents
    assert [("intent-router@3", "local")] == [(one.name, one.owner) for one in listed]
    await call("ModelService/ReleaseDependents", request_id=new_id(), **told)
    assert not (await call("ModelService/ListDependents", name=row.name)).dependents


async def keep(call: Caller, row: ArtifactRow) -> None:
    """Hold a version, verify it, and collect nothing: it is its family's only one."""
    service = "StorageService"
    if f"{service}/SetPin" not in call.methods:
        return
    assert (await call(f"{service}/SetPin", request_id=new_id(), name=row.name, pinned=True)).storage.pinned
    standard = {"name": row.name, "tier": "TIER_STANDARD"}
    assert 1 == (await call(f"{service}/SetTier", request_id=new_id(), **standard)).storage.tier
    assert 1 == (await call.frames(f"{service}/VerifyArtifacts"))[-1].summary.versions
    assert not (await call(f"{service}/CollectArtifacts", request_id=new_id())).collected


async def borrow(call: Caller) -> None:
    assert (await call("ResourceService/GetAvailability")).capacities
    acquire = {"request_id": new_id(), "kind": "RESOURCE_KIND_CPU", "amount": 1, "ttl": "60s"}
    lease = (await call("ResourceService/AcquireLease", **acquire)).lease
    active, ended = 1, 3
    assert active == lease.state
    mine = {"name": lease.name, "fencing_token": lease.fencing_token}
    assert active == (await call("ResourceService/RenewLease", request_id=new_id(), ttl="60s", **mine)).lease.state
    assert ended == (await call("ResourceService/ReleaseLease", request_id=new_id(), **mine)).lease.state
    assert ended == (await call.frames("ResourceService/WatchLease", name=lease.name))[-1].lease.state


async def test_a_client_of_every_version_is_served_by_the_agent_service(version: Contract, tmp_path: Path) -> None:
    """As for Cognate."""
    async with running_agent(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        row = publish_agent(tmp_path)
        call = Caller(channel, version)
        await train(call)
        assert row.digest == (await call("AgentService/GetAgent", name="intent-router")).agent.digest
        assert [row.name] == [agent.name for agent in (await call("AgentService/ListAgents")).agents]
        alias = {"request_id": new_id(), "name": row.name, "alias": "production"}
        assert ["production"] == list((await call("AgentService/SetAlias", **alias)).agent.aliases)
        await read_more(call, "AgentService", "Agent", row)
        await keep(call, row)
        _, *chunks = await call.frames("AgentService/FetchAgent", name="intent-router@production")
        assert PAYLOAD == b"".join(frame.chunk.data for frame in chunks)
        if "AgentService/SetLifecycle" in call.methods:
            candidate = 2
            move = {"request_id": new_id(), "name": row.name, "lifecycle": candidate}
            assert candidate == (await call("AgentService/SetLifecycle", **move)).agent.lifecycle
            moves = (await call("AgentService/ListMoves", family="intent-router")).moves
            assert ["lifecycle", "alias"] == [one.WhichOneof("kind") for one in moves]
    assert {name for name in version.methods if name.partition("/")[0] in AGENT_SERVICES} == call.called


async def train(call: Caller) -> None:
    service = "AgentForgeTrainingService"
    plan = {
        "agent": "intent-router",
        "architecture": "cognate",
        "foundation": {"name": "cognate-25m"},
        "classification": {"generated": {"seed": 5}},
        "adaptation": {"lora": {}},
        "optimization": {"adamw": {}},
        "total_steps": 40,
    }
    started = (await call(f"{service}/StartTraining", request_id=new_id(), plan=plan)).job
    name = started.job.name
    assert name == (await call(f"{service}/GetJob", name=name)).job.job.name
    assert [name] == [job.job.name for job in (await call(f"{service}/ListJobs")).jobs]
    await steer(call, service, name)
    assert [] == list((await call(f"{service}/ListCheckpoints", name=name)).checkpoints)
    await pin(call, service, name)
    assert [] == list((await call(f"{service}/GetMetrics", name=name)).series)
    assert "cognate" in [one.name for one in (await call(f"{service}/ListArchitectures")).architectures]
    assert (await call(f"{service}/GetServerInfo")).info.version
    evaluate = {"name": "intent-router@9", "classification": {"generated": {"seed": 5}}}
    error = await refused(call(f"{service}/EvaluateAgent", request_id=new_id(), **evaluate))
    assert type(error) is AgentNotFoundError


# --- requests of a newer client, a server of today


async def test_a_read_ignores_what_it_does_not_know(tmp_path: Path) -> None:
    """A field, that is; a value of an enum would change the meaning of the query, and is refused."""
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        row = publish_model(tmp_path)
        call = Caller(channel, contracts.newer())
        assert not (await call("CognatePretrainingService/ListJobs", new="field")).jobs
        wanted = {"name": "cognate_v1"}
        answer = await call("ModelService/CheckCompatibility", name=row.name, architecture=wanted, new="part")
        name, experimental = 1, 7
        assert [name, experimental] == list(answer.compared)  # and so not the new part
        error = await refused(call("ModelService/ListModels", states=["MODEL_STATE_NEW"]))
        assert (InvalidFieldError, ["states[0]"]) == (type(error), [one.field for one in error.violations])
        error = await refused(call("CognatePretrainingService/ListJobs", states=["JOB_STATE_NEW"]))
        assert (InvalidFieldError, ["states[0]"]) == (type(error), [one.field for one in error.violations])


@pytest.mark.parametrize(
    ("method", "request_values", "kind", "field"),
    [
        ("CognatePretrainingService/StartPretraining", {"plan": {"new": "x"}}, UnknownFieldError, "plan.#900"),
        (
            "CognatePretrainingService/StartPretraining",
            {"plan": {"curriculum": {"new": "x"}}},
            UnknownFieldError,
            "plan.curriculum.#900",
        ),
        (
            "CognatePretrainingService/StartPretraining",
            {"plan": {"total_steps": 40, "datasets": [{"dataset": "DATASET_NEW", "weight": 1}]}},
            InvalidFieldError,
            "plan.datasets[0].dataset",
        ),
        (
            "ResourceService/AcquireLease",
            {"kind": "RESOURCE_KIND_NEW", "amount": 1, "ttl": "60s"},
            InvalidFieldError,
            "kind",
        ),
        ("ResourceService/ReleaseLease", {"new": "x"}, UnknownFieldError, "#900"),
    ],
)
async def test_a_mutation_refuses_what_it_does_not_know(
    method: str, request_values: dict[str, Any], kind: type[ForgeError], field: str, tmp_path: Path
) -> None:
    """A field at any depth is UNKNOWN_FIELD, a value of an enum INVALID_FIELD, and both name the place."""
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = Caller(channel, contracts.newer())
        error = await refused(call(method, request_id=new_id(), **request_values))
        assert (kind, [field]) == (type(error), [violation.field for violation in error.violations])
        assert not (await call("CognatePretrainingService/ListJobs")).jobs


async def test_a_mutation_refuses_a_choice_that_it_does_not_know(tmp_path: Path) -> None:
    """A new member of a oneof is a new field, and so is one of a mutation that changes something published."""
    async with running_agent(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        publish_agent(tmp_path)
        call = Caller(channel, contracts.newer())
        plan = {"agent": "intent-router", "architecture": "cognate", "total_steps": 40, "new_task": "x"}
        start = call("AgentForgeTrainingService/StartTraining", request_id=new_id(), plan=plan)
        assert type(await refused(start)) is UnknownFieldError
        move = {"request_id": new_id(), "name": "intent-router@1", "alias": "production", "new": "x"}
        assert type(await refused(call("AgentService/SetAlias", **move))) is UnknownFieldError
        assert not (await call("AgentService/GetAgent", name="intent-router")).agent.aliases
        assert not (await call("AgentService/ListAgents", new="x")).next_page_token


async def test_an_rpc_that_a_server_lacks_is_not_implemented(tmp_path: Path) -> None:
    """gRPC answers it, without a reason of ours; the class is that of NOT_IMPLEMENTED all the same."""
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        error = await refused(Caller(channel, contracts.newer())("ModelService/RetractModel", name="cognate-25m@1"))
        assert type(error) is NotImplementedByServerError


def test_every_enum_of_a_request_is_checked() -> None:
    """No handler meets a number that it has no name for: the rule `defined_only` stands on every such field."""
    unchecked = []

    def visit(message: Any, seen: set[str]) -> None:
        if message.full_name in seen:
            return
        seen.add(message.full_name)
        for field in message.fields:
            rules = field.GetOptions().Extensions[validate_pb2.field]
            of_one = rules.repeated.items if field.is_repeated else rules
            if field.type == FieldDescriptor.TYPE_ENUM and not of_one.enum.defined_only:
                unchecked.append(field.full_name)
            if field.message_type is not None:
                visit(field.message_type, seen)

    seen: set[str] = set()
    for method in contracts.today().methods.values():
        visit(method.input_type, seen)
    assert [] == unchecked


# --- today's client library and agent service, servers of every version


def outcomes(stubs: Mapping[str, Any], fill: Callable[[Any], Any]) -> dict[str, str]:
    """Call every RPC of today's stubs, and return the reason of each that was not answered."""
    failed = {}
    for name, method in contracts.today().methods.items():
        service, _, rpc = name.partition("/")
        installed = descriptor_pool.Default().FindMessageTypeByName(method.input_type.full_name)
        request = message_factory.GetMessageClass(installed)()
        try:
            answer = getattr(stubs[service], rpc)(fill(request))
            for _ in answer if method.server_streaming else ():
                break
        except ForgeError as error:
            failed[name] = error.reason_name()
    return failed


def plain(request: Any) -> Any:
    return request


def all_outcomes(contract: Contract, fill: Callable[[Any], Any]) -> dict[str, str]:
    with serving(contract) as address, CognateClient(address) as cognate, AgentClient(address) as agent:
        stubs = {
            "CognatePretrainingService": cognate.pretraining,
            "ModelService": cognate.models,
            "ResourceService": cognate.resources,
            "AgentForgeTrainingService": agent.training,
            "AgentService": agent.agents,
            "StorageService": cognate.storage,
        }
        return outcomes(stubs, fill)


def test_the_client_library_calls_servers_of_every_version(version: Contract) -> None:
    """What a server has is answered; what it lacks is NotImplementedByServerError, and nothing else."""
    missing = {name: "NOT_IMPLEMENTED" for name in contracts.today().methods if name not in version}
    assert missing == all_outcomes(version, plain)


@pytest.mark.parametrize(
    ("old", "refused_methods"),
    [
        ("older", {"CognatePretrainingService/StartPretraining"}),
        ("newer", set()),
    ],
)
def test_a_field_that_a_server_lacks_is_refused_only_where_it_is_set(old: str, refused_methods: set[str]) -> None:
    """With every field of today's requests set, older servers refuse the mutations that they would misunderstand."""
    contract = VERSIONS[old]()
    missing = {name: "NOT_IMPLEMENTED" for name in contracts.today().methods if name not in contract}
    assert missing | dict.fromkeys(refused_methods, "UNKNOWN_FIELD") == all_outcomes(contract, filled)


def job_event(sequence: int, **kind: Any) -> dict[str, Any]:
    return {"frame": {"event": {"sequence": sequence, **kind}}}


def ended(last_sequence: int, state: str = "JOB_STATE_SUCCEEDED") -> dict[str, Any]:
    return {"frame": {"end": {"state": state, "last_sequence": last_sequence}}}


WATCH = "CognatePretrainingService/WatchJob"
UNKNOWN_FRAME = {"frame": {"new_frame": "x"}}


def test_a_watch_goes_on_over_frames_and_events_of_new_kinds() -> None:
    """An unknown frame is passed over. An unknown event has its place in the sequence, so it is delivered, empty."""
    frames = [
        job_event(1, state_change={"to": "JOB_STATE_NEW"}),
        UNKNOWN_FRAME,
        job_event(2, new_kind="x"),
        ended(2, "JOB_STATE_NEW"),
    ]
    with serving(contracts.newer(), {WATCH: frames}) as address, CognateClient(address) as client:
        first, second, end = client.watch_job(JOB)
    assert (1, NEW_VALUE) == (first.event.sequence, first.event.state_change.to)
    assert (2, None) == (second.event.sequence, second.event.WhichOneof("kind"))
    assert end.end.state == NEW_VALUE


@pytest.mark.parametrize("frames", [[UNKNOWN_FRAME, job_event(2, note={})], [UNKNOWN_FRAME, ended(1)]])
def test_a_gap_behind_an_unknown_frame_ends_a_watch_at_once(frames: list[dict[str, Any]]) -> None:
    """What the frame stood for cannot be had by trying again, and is not passed over in silence."""
    with (
        serving(contracts.newer(), {WATCH: frames}) as address,
        CognateClient(address) as client,
        pytest.raises(ClientSetupError, match="does not know in its place: install a newer release"),
    ):
        list(client.watch_job(JOB))


def test_unknown_frames_alone_do_not_keep_a_watch_alive() -> None:
    """They are no sign of progress: a watch that gets nothing else gives up in its time."""
    with (
        serving(contracts.newer(), {WATCH: [UNKNOWN_FRAME]}) as address,
        CognateClient(address) as client,
        pytest.raises(UnavailableError, match="closed before the job's end"),
    ):
        list(client.watch_job(JOB, give_up_after_s=0.1))


def test_a_watch_of_models_goes_on_over_frames_and_events_of_new_kinds() -> None:
    """As a job's watch; a snapshot may have an unknown frame between its pages."""
    frames = [
        {"snapshot": {"models": [{"name": "cognate-25m@1"}], "last_sequence": 2, "more": True}},
        {"new_frame": "x"},
        {"snapshot": {"models": [{"name": "cognate-25m@2", "state": "MODEL_STATE_NEW"}], "last_sequence": 2}},
        {"event": {"sequence": 3, "new_kind": "x"}},
        {"event": {"sequence": 4, "published": {"name": "cognate-25m@3", "new": "x"}}},
        {"event": {"sequence": 5, "changed": {"model": {"name": "cognate-25m@3"}, "change": "MODEL_CHANGE_NEW"}}},
    ]
    with serving(contracts.newer(), {"ModelService/WatchModels": frames}) as address, CognateClient(address) as client:
        news = client.watch_models()
        snapshot, unknown, published, changed = (next(news) for _ in range(4))
        news.close()
    assert isinstance(snapshot, ModelSnapshot)
    assert [1, 2] == [int(model.name[-1]) for model in snapshot.models]
    assert NEW_VALUE == snapshot.models[1].state
    assert isinstance(unknown, model_pb2.ModelEvent)
    assert isinstance(published, model_pb2.ModelEvent)
    assert (3, None) == (unknown.sequence, unknown.WhichOneof("kind"))
    assert (4, "cognate-25m@3") == (published.sequence, published.published.name)
    assert isinstance(changed, model_pb2.ModelEvent)
    assert (5, NEW_VALUE) == (changed.sequence, changed.changed.change)


def artifact(kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the JSON form of an artifact, and of the frames of its fetch."""

    def b64(data: bytes) -> str:
        return base64.b64encode(data).decode()

    file = {
        "path": "payload.bin",
        "size_bytes": len(PAYLOAD),
        "digest": f"sha256:{hashlib.sha256(PAYLOAD).hexdigest()}",
    }
    manifest = json.dumps({"files": [file]}).encode()
    body = {"name": "cognate-25m@1", "digest": f"sha256:{hashlib.sha256(manifest).hexdigest()}"}
    half = len(PAYLOAD) // 2
    frames: list[dict[str, Any]] = [
        {"header": {kind: body, "manifest": b64(manifest)}},
        {"chunk": {"offset_bytes": 0, "data": b64(PAYLOAD[:half])}},
        {"chunk": {"offset_bytes": half, "data": b64(PAYLOAD[half:])}},
    ]
    return body, frames


def fetch_both(contract: Contract, folder: Path, *, between: list[dict[str, Any]]) -> list[bytes]:
    """Fetch a model and an agent, and return their payloads. between: frames around those of the fetch."""
    model, model_frames = artifact("model")
    agent, agent_frames = artifact("agent")
    answers: dict[str, Answer] = {
        "ModelService/GetModel": {"model": model},
        "ModelService/FetchModel": [part for frame in model_frames for part in [*between, frame]],
        "AgentService/GetAgent": {"agent": agent},
        "AgentService/FetchAgent": [part for frame in agent_frames for part in [*between, frame]],
    }
    with (
        serving(contract, answers) as address,
        CognateClient(address) as cognate,
        AgentClient(address) as agents,
    ):
        fetched = [
            cognate.fetch_model("cognate-25m", folder / "model"),
            agents.fetch_agent("intent-router", folder / "agent"),
        ]
    return [(one.path / "payload.bin").read_bytes() for one in fetched]


def test_artifacts_are_fetched_from_servers_of_every_version(version: Contract, tmp_path: Path) -> None:
    """Model and agent land whole."""
    assert [PAYLOAD, PAYLOAD] == fetch_both(version, tmp_path, between=[])


def test_a_fetch_goes_on_over_frames_of_new_kinds(tmp_path: Path) -> None:
    """Only digests decide whether an artifact is whole, so a frame that is not understood does no harm."""
    assert [PAYLOAD, PAYLOAD] == fetch_both(contracts.newer(), tmp_path, between=[{"new_frame": "x"}])


def test_jobs_and_models_are_watched_on_servers_of_every_version(version: Contract) -> None:
    """A job to its end, and models where the server has that; where it has not, the error says so at once."""
    frames = [job_event(1, state_change={"to": "JOB_STATE_RUNNING"}), job_event(2, note={}), ended(2)]
    published = [{"event": {"sequence": 1, "published": {"name": "cognate-25m@1"}}}]
    with (
        serving(version, {WATCH: frames, "ModelService/WatchModels": published}) as address,
        CognateClient(address) as client,
    ):
        assert [1, 2, 0] == [frame.event.sequence for frame in client.watch_job(JOB)]
        news = client.watch_models()
        if "ModelService/WatchModels" in version:
            event = next(news)
            assert isinstance(event, model_pb2.ModelEvent)
            assert "cognate-25m@1" == event.published.name
            news.close()
        else:
            with pytest.raises(NotImplementedByServerError):
                next(news)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (code_pb2.FAILED_PRECONDITION, PreconditionError),
        (code_pb2.NOT_FOUND, NotFoundError),
        (code_pb2.UNAVAILABLE, UnavailableError),
    ],
)
def test_an_unknown_reason_is_the_nearest_class(code: int, kind: type[ForgeError]) -> None:
    """The status decides, and the reason is not lost."""
    answers = {"CognatePretrainingService/GetServerInfo": new_reason(code)}
    with (
        serving(contracts.newer(), answers) as address,
        CognateClient(address) as client,
        pytest.raises(kind) as caught,
    ):
        client.pretraining.GetServerInfo(pretraining_pb2.GetServerInfoRequest())
    error = caught.value
    assert (kind, "SOMETHING_NEW", {"fact": "7"}) == (type(error), error.unknown_reason, error.metadata)
    assert error.message == "it is not to be"


def test_a_health_that_is_not_known_is_unknown() -> None:
    """No server of ours says such a thing; a proxy of tomorrow may."""
    assert ["SERVING", "UNKNOWN"] == [health_word(health_pb2.HealthCheckResponse.SERVING), health_word(NEW_VALUE)]


# --- the handshake, between agent services of today and Cognates of every version

REQUIRED = FoundationRequirement(name="cognate_v1", fingerprint=A, act_version=1, ltm_version=1)


def shake(contract: Contract, answer: Mapping[str, Any], *, state: int = model_pb2.MODEL_STATE_READY) -> None:
    """Shake hands over one model with a Cognate that answers so."""
    model = model_pb2.FoundationModel(name="cognate-25m@1", digest=A)
    model.state = state  # type: ignore[assignment]
    answers = {"ModelService/CheckCompatibility": {"model_digest": A, **answer}}
    with serving(contract, answers) as address, CognateClient(address) as client:
        check_compatible(client, model, required=REQUIRED, accept_experimental=False)


ALL = [
    *("MISMATCH_KIND_ARCHITECTURE_NAME", "MISMATCH_KIND_FINGERPRINT", "MISMATCH_KIND_ACT_VERSION"),
    *("MISMATCH_KIND_LTM_VERSION", "MISMATCH_KIND_EXPERIMENTAL"),
]


def test_a_cognate_of_every_version_can_consent(version: Contract) -> None:
    """One without kinds compares all that is asked; one of today says so; one of tomorrow may compare more."""
    answer: dict[str, Any] = {"verdict": "VERDICT_COMPATIBLE"}
    if "compared" in version.methods["ModelService/CheckCompatibility"].output_type.fields_by_name:
        answer["compared"] = [*ALL, NEW_VALUE]
    shake(version, answer)


@pytest.mark.parametrize("old", ["released", "older"])
def test_a_mismatch_of_a_cognate_without_kinds_is_told_by_its_field(old: str) -> None:
    """The verdict is enough to refuse, and the text to say why."""
    mismatch = {"field": "architecture.fingerprint", "model_value": B, "wanted_value": A}
    answer = {"verdict": "VERDICT_INCOMPATIBLE", "mismatches": [mismatch]}
    with pytest.raises(IncompatibleError, match=f"architecture.fingerprint is {B}, wanted {A}") as caught:
        shake(VERSIONS[old](), answer)
    assert {"architecture.fingerprint": B} == caught.value.metadata


EXPERIMENTAL = {"kind": "MISMATCH_KIND_EXPERIMENTAL", "field": "state", "model_value": "EXPERIMENTAL"}
NEW_MISMATCH = {"kind": "MISMATCH_KIND_NEW", "field": "context.length", "model_value": "512", "wanted_value": "1024"}


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (
            {"verdict": "VERDICT_INCOMPATIBLE", "mismatches": [NEW_MISMATCH]},
            IncompatibleError,
            "context.length is 512, wanted 1024",
        ),
        ({"verdict": "VERDICT_INCOMPATIBLE", "mismatches": [EXPERIMENTAL]}, ModelExperimentalError, "is EXPERIMENTAL"),
        (
            {"verdict": "VERDICT_INCOMPATIBLE", "mismatches": [EXPERIMENTAL, NEW_MISMATCH]},
            IncompatibleError,
            "context.length is 512",
        ),
        ({"verdict": "VERDICT_NEW", "compared": ALL}, IncompatibleError, "Cognate gave no reason"),
        ({"verdict": "VERDICT_INCOMPATIBLE"}, IncompatibleError, "Cognate gave no reason"),
        ({}, IncompatibleError, "Cognate gave no reason"),
        (
            {"verdict": "VERDICT_COMPATIBLE", "compared": [name for name in ALL if "LTM" not in name]},
            IncompatibleError,
            "did not compare LTM_VERSION",
        ),
    ],
)
def test_what_is_not_understood_is_no_consent(answer: dict[str, Any], kind: type[ForgeError], words: str) -> None:
    """An unknown verdict, an unknown kind and a part that was not compared all refuse the model, with their reason."""
    with pytest.raises(kind, match=words):
        shake(contracts.newer(), answer)


@pytest.mark.parametrize("state", [model_pb2.MODEL_STATE_UNSPECIFIED, NEW_VALUE])
@pytest.mark.parametrize("required", [REQUIRED, None])
def test_a_model_in_an_unknown_state_is_not_used(state: int, required: FoundationRequirement | None) -> None:
    """A newer Cognate may have taken it back; also an architecture that asks for nothing leaves it alone."""
    model = model_pb2.FoundationModel(name="cognate-25m@1", digest=A)
    model.state = state  # type: ignore[assignment]
    with (
        serving(contracts.newer()) as address,
        CognateClient(address) as client,
        pytest.raises(IncompatibleError, match=f"in state {state}, which this release does not know"),
    ):
        check_compatible(client, model, required=required, accept_experimental=True)


def test_every_kind_of_mismatch_is_compared_and_asked_for() -> None:
    """The enum, Cognate's comparisons and the agent side's questions have the same parts."""
    kinds = set(model_pb2.MismatchKind.values()) - {model_pb2.MISMATCH_KIND_UNSPECIFIED}
    request = filled(model_pb2.CheckCompatibilityRequest())
    assert isinstance(request, model_pb2.CheckCompatibilityRequest)
    request.accept_experimental = False
    assert kinds == asked_kinds(request)
    beside = {model_pb2.MISMATCH_KIND_TOKENIZER, model_pb2.MISMATCH_KIND_EXPERIMENTAL}
    assert kinds == {*ARCHITECTURE.values(), *beside}
    assert set(ARCHITECTURE) == set(model_pb2.Architecture.DESCRIPTOR.fields_by_name)


# --- forge, against a newer server


@pytest.fixture
def forge() -> Callable[..., Result]:
    """Run forge against a newer server that answers so."""

    def run(answers: Mapping[str, Answer], *args: str) -> Result:
        missing = {"AgentForgeTrainingService/GetJob": new_reason(code_pb2.NOT_FOUND, "JOB_NOT_FOUND")}
        with serving(contracts.newer(), {**missing, **answers}) as address:
            env = {"FORGE_COGNATE": address, "FORGE_AGENT": address}
            return CliRunner().invoke(app, list(args), env=env, catch_exceptions=False)

    return run


JOB_BODY = {"job": {"name": JOB, "state": "JOB_STATE_NEW", "observed": True, "step": 1, "total_steps": 9, "new": "x"}}
GET_JOB = {"CognatePretrainingService/GetJob": {"job": JOB_BODY}}
GET_MODEL = {"ModelService/GetModel": {"model": {"name": "cognate-25m@1", "state": "MODEL_STATE_NEW", "digest": A}}}


def test_forge_shows_an_unknown_value_by_its_number(forge: Callable[..., Result]) -> None:
    """For people and as JSON, where it is a text like every other value of an enum."""
    shown = forge(GET_JOB, "job", JOB)
    assert (0, True) == (shown.exit_code, f"state: {NEW_VALUE}" in shown.stdout)
    assert str(NEW_VALUE) == json.loads(forge(GET_JOB, "job", JOB, "--json").stdout)["job"]["state"]
    listed = forge({"CognatePretrainingService/ListJobs": {"jobs": [JOB_BODY]}}, "jobs", "cognate")
    assert (0, True) == (listed.exit_code, f" {NEW_VALUE} " in listed.stdout)
    models = forge({"ModelService/ListModels": {"models": [GET_MODEL["ModelService/GetModel"]["model"]]}}, "models")
    assert (0, True) == (models.exit_code, f" {NEW_VALUE} " in models.stdout)


@pytest.mark.parametrize("progress", ["--progress", "--no-progress", ""])
def test_forge_watch_tells_of_unknown_events_and_does_not_call_an_unknown_end_success(
    forge: Callable[..., Result], progress: str
) -> None:
    """The exit code is that of a job that did not succeed, whatever the new state means."""
    frames = [
        job_event(1, state_change={"to": "JOB_STATE_NEW"}),
        UNKNOWN_FRAME,
        job_event(2, new_kind="x"),
        ended(2, "JOB_STATE_NEW"),
    ]
    result = forge({**GET_JOB, WATCH: frames}, "watch", JOB, *filter(None, [progress]))
    assert (Exit.JOB_FAILED, f"{JOB} {NEW_VALUE}") == (result.exit_code, result.stdout.strip())
    if progress != "--no-progress":
        assert "event 2: something of a kind that this release does not know" in result.stderr
    lines = forge({**GET_JOB, WATCH: frames}, "watch", JOB, "--json")
    first, second, end = map(json.loads, lines.stdout.splitlines())
    assert str(NEW_VALUE) == first["event"]["state_change"]["to"]
    assert (2, {"sequence", "attempt"}) == (second["event"]["sequence"], set(second["event"]))
    assert (Exit.JOB_FAILED, str(NEW_VALUE)) == (lines.exit_code, end["end"]["state"])


def test_forge_watch_of_a_failure_with_an_unknown_reason(forge: Callable[..., Result]) -> None:
    """The reason is told as it came."""
    failure = {"reason": "SOMETHING_NEW", "message": "it is not to be"}
    frames = [{"frame": {"end": {"state": "JOB_STATE_FAILED", "last_sequence": 0, "failure": failure}}}]
    result = forge({**GET_JOB, WATCH: frames}, "watch", JOB)
    assert (Exit.JOB_FAILED, "error: SOMETHING_NEW: it is not to be") == (result.exit_code, result.stderr.strip())
    result = forge({**GET_JOB, WATCH: frames}, "watch", JOB, "--json")
    assert (Exit.JOB_FAILED, "SOMETHING_NEW") == (result.exit_code, json.loads(result.stderr)["reason"])


def test_forge_models_watch_tells_of_unknown_events(forge: Callable[..., Result]) -> None:
    """The line says what it can, and a gap behind an unknown frame ends the command with its own error."""
    frames = [{"event": {"sequence": 1, "new_kind": "x"}}, {"new_frame": "x"}, {"event": {"sequence": 3}}]
    result = forge({"ModelService/WatchModels": frames}, "models", "watch")
    assert "1 something of a kind that this release does not know" == result.stdout.strip()
    assert (Exit.LOCAL, True) == (result.exit_code, "event 2 is missing" in result.stderr)
    result = forge({"ModelService/WatchModels": frames}, "models", "watch", "--json")
    assert {"event": {"sequence": 1}} == json.loads(result.stdout)


def test_forge_tells_an_unknown_reason(forge: Callable[..., Result]) -> None:
    """The exit code follows the status; the reason is in the words and in the JSON."""
    answers = {"ModelService/GetModel": new_reason(code_pb2.FAILED_PRECONDITION)}
    result = forge(answers, "model", "cognate-25m")
    expected = "error: it is not to be\n  reason: SOMETHING_NEW, which this release does not know\n"
    assert (Exit.PRECONDITION, expected) == (result.exit_code, result.stderr)
    told = json.loads(forge(answers, "model", "cognate-25m", "--json").stderr)
    assert ("SOMETHING_NEW", "FAILED_PRECONDITION") == (told["reason"], told["code"])
