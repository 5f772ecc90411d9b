"""What every call passes, over real connections: policy, deadlines, exception firewall, health, drain, reflection."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

import agent_server.server
import cognate_server.server
from cognateforge.artifact.v1 import artifact_pb2
from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import (
    DataUnavailableError,
    DeadlineRequiredError,
    FieldViolation,
    ForgeError,
    InternalError,
    InvalidFieldError,
    NoPolicyError,
    ResourceExhaustedError,
    RoleMissingError,
    UnavailableError,
    from_rpc_error,
)
from cognateforge.exchange.v1 import model_pb2
from cognateforge.policy.v1 import policy_pb2
from tests.support.servers import running_agent, running_cognate
from training_common.jobs.store import JobStore
from training_common.rpc.policy import policies, read_policy, role_names
from training_common.rpc.server import HEALTH, create_server
from training_common.settings import ServiceSettings

PRETRAINING = "/cognateforge.cognate.v1.CognatePretrainingService"
BUF = Path(sys.executable).with_name("buf")
SERVED = {
    "cognate": (running_cognate, cognate_server.server.SERVICES),
    "agent": (running_agent, agent_server.server.SERVICES),
}


def new_id() -> str:
    return str(uuid.uuid4())


def start() -> pb.StartPretrainingRequest:
    return pb.StartPretrainingRequest(request_id=new_id(), plan=pb.PretrainingPlan(total_steps=9))


def methods(services: Iterable[str]) -> list[MethodDescriptor]:
    pool = descriptor_pool.Default()
    return [method for service in services for method in pool.FindServiceByName(service).methods]


async def refusal(
    channel: grpc.aio.Channel, path: str, request: bytes = b"", *, streams: bool = False, deadline_s: float | None = 10
) -> ForgeError | None:
    """Call with raw bytes and return the error, or None when the call or the stream's first frame succeeds."""
    try:
        if streams:
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            call = stream(request, timeout=deadline_s)
            await call.read()
            call.cancel()
        else:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            await unary(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


# --- policy


@pytest.mark.parametrize("service", SERVED)
@pytest.mark.parametrize("role", role_names())
async def test_only_the_roles_of_the_contract_may_call(service: str, role: str, tmp_path: Path) -> None:
    """Every RPC, called by somebody with one role: served or refused as its policy says, whatever the request."""
    running, services = SERVED[service]
    # Quick heartbeats, so that a watch with nothing to tell has a first frame.
    settings = {"security": {"local_roles": (role,)}, "heartbeat_frame_s": 0.05}
    async with running(tmp_path, **settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        allowed, served = set(), set()
        for method in methods(services):
            path = f"/{method.containing_service.full_name}/{method.name}"
            if role in {
                policy_pb2.Role.Name(value).removeprefix("ROLE_").lower()
                for value in method.GetOptions().Extensions[policy_pb2.access].roles
            }:
                allowed.add(path)
            answer = await refusal(channel, path, streams=method.server_streaming)
            if not isinstance(answer, RoleMissingError):
                served.add(path)
        assert allowed == served


async def test_a_caller_without_the_role_changes_nothing(tmp_path: Path) -> None:
    """PERMISSION_DENIED names who may call, and a good request leaves no row."""
    settings = {"security": {"local_roles": ("viewer",)}}
    async with running_cognate(tmp_path, **settings) as server, AsyncCognateClient(server.address) as client:
        with pytest.raises(RoleMissingError, match="StartPretraining is for operator"):
            await client.pretraining.StartPretraining(start())
        assert [] == list((await client.pretraining.ListJobs(pb.ListJobsRequest())).jobs)


@pytest.mark.parametrize("service", SERVED)
async def test_a_deadline_is_asked_for_where_the_policy_says_so(service: str, tmp_path: Path) -> None:
    """Every RPC without a deadline: unary ones are refused, streams that live as long as a job are not."""
    running, services = SERVED[service]
    async with (
        running(tmp_path, heartbeat_frame_s=0.05) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        required, refused = set(), set()
        for method in methods(services):
            path = f"/{method.containing_service.full_name}/{method.name}"
            if method.GetOptions().Extensions[policy_pb2.access].deadline_required:
                required.add(path)
            async with asyncio.timeout(10):
                answer = await refusal(channel, path, streams=method.server_streaming, deadline_s=None)
            if isinstance(answer, DeadlineRequiredError):
                refused.add(path)
        assert required == refused


class Unlisted:
    """A service that somebody adds to the server and forgets to give a policy."""

    def __init__(self) -> None:
        self.calls = 0

    async def do(self, request: bytes, context: Any) -> bytes:
        self.calls += 1
        return b"done"

    async def tell(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.calls += 1
        yield b"told"

    def handler(self, service: str) -> Any:
        do: Any = grpc.unary_unary_rpc_method_handler(self.do)
        tell: Any = grpc.unary_stream_rpc_method_handler(self.tell)
        return grpc.method_handlers_generic_handler(service, {"Do": do, "Tell": tell})


async def test_a_method_without_a_policy_is_refused(tmp_path: Path) -> None:
    """Whatever the caller's roles are: what nobody has thought about is open to nobody, and is not even run."""
    unlisted = Unlisted()
    settings = ServiceSettings(address="127.0.0.1:0", data_dir=tmp_path)
    server = create_server(settings, cognate_server.server.SERVICES).server
    names = ("cognateforge.cognate.v1.Extra", "grpc.health.v1.HealthAndMore", "grpc.health.v1")
    server.add_generic_rpc_handlers([unlisted.handler(name) for name in names])
    port = server.add_insecure_port(settings.address)
    await server.start()
    answers = {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for path, streams in ((f"/{name}/{method}", method == "Tell") for name in names for method in ("Do", "Tell")):
            answers[path] = type(await refusal(channel, path, streams=streams))
    await server.stop(None)
    assert dict.fromkeys(answers, NoPolicyError) == answers
    assert 0 == unlisted.calls


def test_a_policy_is_read_from_the_descriptor_or_is_not_there() -> None:
    """No option, and an option without roles, are no policy; the health service of gRPC carries none."""
    assert policies([HEALTH]) == {}
    assert read_policy(methods([HEALTH])[0]) is None
    file = descriptor_pb2.FileDescriptorProto(name="forge_test.proto", package="forge.test", syntax="proto3")
    file.message_type.add(name="Nothing")
    service = file.service.add(name="Extra")
    for name in ("Roleless", "Open"):
        method = service.method.add(name=name, input_type=".forge.test.Nothing", output_type=".forge.test.Nothing")
        method.options.Extensions[policy_pb2.access].repeat = policy_pb2.REPEAT_BY_REQUEST_ID
    service.method[1].options.Extensions[policy_pb2.access].roles.append(policy_pb2.ROLE_VIEWER)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    assert ["/forge.test.Extra/Open"] == list(policies(["forge.test.Extra"]))
    policy = policies(["forge.test.Extra"])["/forge.test.Extra/Open"]
    assert (frozenset({"viewer"}), False, True) == (
        policy.roles,
        policy.deadline_required,
        policy.mutation,
    )


# --- the firewall


async def raw_error(address: str, path: str, request: bytes, **options: Any) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(address) as channel:
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(request, timeout=10, **options)
    return caught.value


def failing(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(JobStore, method, fail)


async def test_a_stream_that_fails_keeps_its_text_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events were sent already, then something breaks: INTERNAL with the request id, and no word of the exception."""
    async with running_cognate(tmp_path) as server, AsyncCognateClient(server.address) as client:
        name = (await client.pretraining.StartPretraining(start())).job.job.name
        call = client.pretraining.WatchJob(pb.WatchJobRequest(name=name), timeout=10)
        frames = aiter(call)
        assert 1 == (await anext(frames)).frame.event.sequence
        failing(monkeypatch, "events_after", KeyError("secret of the house"))
        await client.pretraining.PauseJob(pb.PauseJobRequest(request_id=new_id(), name=name))
        with pytest.raises(InternalError) as caught:
            await anext(frames)
        assert InternalError.info().message == caught.value.message
        assert caught.value.request_id


@pytest.mark.parametrize("text", ["x" * 100_000, "ü%\n" * 100_000, "\N{PILE OF POO}" * 100_000, "\udcff" * 100_000])
async def test_an_error_is_bounded_and_arrives_as_what_it_is(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A status that is longer than gRPC's metadata would reach the caller as another, retryable one."""
    violations = [FieldViolation(field="plan.classification.domains[17]", description=text) for _ in range(20)]
    failing(monkeypatch, "page", DataUnavailableError(text, violations=violations))
    async with running_cognate(tmp_path) as server:
        error = await raw_error(server.address, f"{PRETRAINING}/ListJobs", b"")
    assert grpc.StatusCode.FAILED_PRECONDITION == error.code()
    typed = from_rpc_error(error)
    assert isinstance(typed, DataUnavailableError)
    assert text.encode(errors="replace").decode().startswith(typed.message)
    assert 200 < len(typed.message) <= 2000
    assert len(typed.violations) > 0
    assert typed.request_id
    assert sum(len(key) + len(value) for key, value in error.trailing_metadata() or ()) < 8192


async def test_bytes_that_are_no_message_are_a_bad_request(tmp_path: Path) -> None:
    """The decoder's own exception stays inside, for unary calls and streams; a mutation's row is not written."""
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        for method, streams in (("ListJobs", False), ("StartPretraining", False), ("WatchJob", True)):
            answer = await refusal(channel, f"{PRETRAINING}/{method}", b"\xff\xff\xff", streams=streams)
            assert isinstance(answer, InvalidFieldError), method
            assert f"the request's bytes are no message that {PRETRAINING}/{method} takes" == answer.message
            assert answer.request_id


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (artifact_pb2.ArtifactFilter(data="gsm8k\0"), "filter.data"),
        (artifact_pb2.ArtifactFilter(results=[artifact_pb2.ResultFilter(metric="\0")]), "filter.results.metric"),
    ],
)
async def test_a_text_that_no_database_holds_is_refused(
    wanted: artifact_pb2.ArtifactFilter, field: str, tmp_path: Path
) -> None:
    """PostgreSQL would fail at it, as a fault of the server; every store refuses the same."""
    async with running_cognate(tmp_path) as server, AsyncCognateClient(server.address) as client:
        with pytest.raises(InvalidFieldError, match=f"{field}: must not hold a NUL character") as refused:
            await client.models.ListModels(model_pb2.ListModelsRequest(filter=wanted))
    assert [field] == [violation.field for violation in refused.value.violations]


async def test_the_callers_request_id_is_told_back_if_it_is_one(tmp_path: Path) -> None:
    """It ties answer and log together; one that could forge log lines or headers is replaced."""
    request = pb.GetJobRequest(name="jobs/nowhere").SerializeToString()
    async with running_cognate(tmp_path) as server:
        for given, kept in (("order-66", True), ("a b", False), ("x" * 65, False)):
            error = await raw_error(
                server.address, f"{PRETRAINING}/GetJob", request, metadata=(("x-request-id", given),)
            )
            told = from_rpc_error(error).request_id
            assert kept == (told == given)
            if not kept:
                uuid.UUID(told)


async def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED above the limit, and the next call is served."""
    async with (
        running_cognate(tmp_path, limits={"max_request_bytes": 1024}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        large = pb.ListJobsRequest(page_token="a" * 2048).SerializeToString()
        assert isinstance(await refusal(channel, f"{PRETRAINING}/ListJobs", large), ResourceExhaustedError)
        assert await refusal(channel, f"{PRETRAINING}/ListJobs") is None


async def test_too_many_calls_at_once_are_refused(tmp_path: Path) -> None:
    """A stream counts as long as it is open: RESOURCE_EXHAUSTED meanwhile, service again afterwards."""
    async with running_cognate(tmp_path) as server, AsyncCognateClient(server.address) as client:
        name = (await client.pretraining.StartPretraining(start())).job.job.name
    async with (
        running_cognate(tmp_path, limits={"max_concurrent_rpcs": 1}) as server,
        AsyncCognateClient(server.address) as client,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = client.pretraining.WatchJob(pb.WatchJobRequest(name=name), timeout=10)
        await anext(aiter(call))
        assert isinstance(await refusal(channel, f"{PRETRAINING}/ListJobs"), ResourceExhaustedError)
        call.cancel()
        async with asyncio.timeout(10):
            while await refusal(channel, f"{PRETRAINING}/ListJobs") is not None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("kind", ["ipv6", "unix"])
async def test_every_local_address_is_served(kind: str, tmp_path: Path) -> None:
    """IPv6's loopback with a port of its own, and a Unix socket."""
    if kind == "ipv6" and not has_ipv6_loopback():
        pytest.skip("this machine has no IPv6 loopback")
    wanted = "[::1]:0" if kind == "ipv6" else f"unix:{tmp_path / 'socket'}"
    async with running_cognate(tmp_path, address=wanted) as server, AsyncCognateClient(server.address) as client:
        assert wanted == server.address or server.address.startswith("[::1]:")
        assert (await client.pretraining.StartPretraining(start())).job.job.name


# --- health


class HealthWatch:
    """The standard health service's own watch of several names."""

    def __init__(self, channel: grpc.aio.Channel, *services: str) -> None:
        watch: grpc.aio.UnaryStreamMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        watch = channel.unary_stream(
            f"/{HEALTH}/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        self._calls = {name: watch(health_pb2.HealthCheckRequest(service=name), timeout=30) for name in services}

    async def next(self) -> dict[str, str]:
        """Return the next status of each service."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        frames = {name: await anext(aiter(call)) for name, call in self._calls.items()}
        return {name: str(status.Name(frame.status)) for name, frame in frames.items()}

    async def until(self, wanted: str) -> None:
        """Wait until each service has told the status. Errors: AioRpcError, after 30 s."""
        for call in self._calls.values():
            status = ""
            while status != wanted:
                status = health_pb2.HealthCheckResponse.ServingStatus.Name((await anext(aiter(call))).status)


async def test_health_follows_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SERVING, NOT_SERVING while the database file is gone, SERVING again; calls need no restart in between."""
    monkeypatch.setattr("training_common.rpc.health._INTERVAL_S", 0.05)
    services = ("", *cognate_server.server.SERVICES)
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        watch = HealthWatch(channel, *services)
        assert dict.fromkeys(services, "SERVING") == await watch.next()
        database = tmp_path / "store.db"
        database.rename(tmp_path / "elsewhere.db")
        database.mkdir()
        assert dict.fromkeys(services, "NOT_SERVING") == await watch.next()
        database.rmdir()
        (tmp_path / "elsewhere.db").rename(database)
        assert dict.fromkeys(services, "SERVING") == await watch.next()
        async with AsyncCognateClient(server.address) as client:
            assert (await client.pretraining.StartPretraining(start())).job.job.name


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("part", ["jobs.scheduler.Scheduler", "jobs.hub.ChangeHub", "rpc.health.HealthMonitor"])
async def test_a_part_that_ends_takes_health_with_it(
    part: str, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs or watches would stand still behind a server that says SERVING, and the health task's own end freezes it."""

    async def end(self: object) -> None:
        if raises:
            raise RuntimeError("a fault that nobody foresaw")

    monkeypatch.setattr(f"training_common.{part}.run", end)
    services = ("", *cognate_server.server.SERVICES)
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        await HealthWatch(channel, *services).until("NOT_SERVING")


async def test_workers_that_cannot_be_started_are_told_for_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models can still be fetched from a server that cannot train."""
    monkeypatch.setattr("training_common.rpc.health._INTERVAL_S", 0.05)

    def no_process(*_: object, **__: object) -> str:
        raise OSError(11, "no process can be started")

    monkeypatch.setattr("training_common.engines.local.LocalEngine.launch", no_process)
    [training], exchange = cognate_server.server.TRAINING, cognate_server.server.EXCHANGE
    async with (
        running_cognate(tmp_path, workers={"slots": 1}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        watch = HealthWatch(channel, training, "")
        assert {training: "SERVING", "": "SERVING"} == await watch.next()
        async with AsyncCognateClient(server.address) as client:
            await client.pretraining.StartPretraining(start())
        assert {training: "NOT_SERVING", "": "NOT_SERVING"} == await watch.next()
        assert dict.fromkeys(exchange, "SERVING") == await HealthWatch(channel, *exchange).next()


# --- drain


@contextlib.asynccontextmanager
async def server_process(folder: Path, **environment: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Yield a Cognate service in a process of its own, and its address."""
    values = {
        "ADDRESS": "127.0.0.1:0",
        "DATA_DIR": str(folder / "data"),
        "WORKERS__SLOTS": "0",
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cognate_server", "--address-file", str(folder / "address")),
        env={**os.environ, **{f"COGNATE_SERVER_{key}": value for key, value in values.items()}},
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            while b'"event": "serving"' not in (line := await process.stderr.readline()):
                assert line, "the server ended before it served"
        yield process, str(json.loads(line)["address"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_sigterm_drains_the_server(tmp_path: Path) -> None:
    """Health says so first, calls get their grace, an open watch ends with UNAVAILABLE, and the exit is clean."""
    async with server_process(tmp_path, DRAIN_GRACE_S="0.5") as (process, address):
        async with AsyncCognateClient(address) as client, grpc.aio.insecure_channel(address) as channel:
            name = (await client.pretraining.StartPretraining(start())).job.job.name
            frames = aiter(client.pretraining.WatchJob(pb.WatchJobRequest(name=name), timeout=30))
            assert 1 == (await anext(frames)).frame.event.sequence
            health = HealthWatch(channel, "")
            assert {"": "SERVING"} == await health.next()
            assert address == (tmp_path / "address").read_text()
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            assert {"": "NOT_SERVING"} == await health.next()
            with pytest.raises(UnavailableError):
                await anext(frames)
            assert time.monotonic() - sent >= 0.5
        async with asyncio.timeout(10):
            assert 0 == await process.wait()
        assert not (tmp_path / "address").exists()


# --- reflection, with a client that knows nothing of this contract


async def buf_curl(address: str, path: str, *arguments: str, data: dict[str, Any] | None = None) -> tuple[int, str]:
    """Return exit status and output of `buf curl`, which learns the contract by reflection."""
    process = await asyncio.create_subprocess_exec(
        *(str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--timeout", "20s", *arguments),
        *(("--data", json.dumps(data)) if data is not None else ()),
        f"http://{address}{path}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return await process.wait(), output.decode()


async def test_a_plain_client_finds_everything_by_reflection(tmp_path: Path) -> None:
    """Services are listed, health is asked, a job is started, refused and watched to its end, all without our code."""
    async with running_cognate(tmp_path) as server:
        status, listed = await buf_curl(server.address, "", "--list-services")
        assert 0 == status
        assert {*cognate_server.server.SERVICES, HEALTH} <= set(listed.split())
        status, health = await buf_curl(server.address, f"/{HEALTH}/Check", data={})
        assert (0, {"status": "SERVING"}) == (status, json.loads(health))
        plan = {"requestId": new_id(), "plan": {"totalSteps": 9}}
        status, started = await buf_curl(server.address, f"{PRETRAINING}/StartPretraining", data=plan)
        assert 0 == status, started
        name = json.loads(started)["job"]["job"]["name"]
        status, refused = await buf_curl(
            server.address, f"{PRETRAINING}/StartPretraining", data={**plan, "plan": {"totalSteps": -1}}
        )
        # buf shifts the status code by three bits.
        assert grpc.StatusCode.INVALID_ARGUMENT.value[0] << 3 == status
        assert "plan.total_steps" in json.loads(refused)["message"]
        watch = asyncio.create_task(buf_curl(server.address, f"{PRETRAINING}/WatchJob", data={"name": name}))
        cancel = {"requestId": new_id(), "name": name}
        status, _ = await buf_curl(server.address, f"{PRETRAINING}/CancelJob", data=cancel)
        assert 0 == status
        status, output = await watch
        assert 0 == status
        frames = [json.loads(text)["frame"] for text in output.replace("\n}\n", "\n}\0").split("\0") if text.strip()]
        assert ["1", "2"] == [frame["event"]["sequence"] for frame in frames[:-1]]
        assert {"state": "JOB_STATE_CANCELLED", "lastSequence": "2"} == frames[-1]["end"]
