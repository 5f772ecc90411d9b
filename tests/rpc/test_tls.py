"""Mutual TLS over real connections: who is let in, as whom, and what a rotation costs."""

import asyncio
import datetime
import json
import os
import shutil
import socket
import ssl
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from typer.testing import CliRunner

import agent_server.server
import cognate_server.server
from agent_server import foundation
from agent_server.settings import CognateEndpoint
from cognateforge.certificates import CA_CERT, Authority
from cognateforge.cli.app import app
from cognateforge.client import AsyncCognateClient, CognateClient, TlsFiles
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import (
    ClientSetupError,
    DeadlineExceededError,
    ForbiddenError,
    ForgeError,
    IdentityMissingError,
    InvalidFieldError,
    ModelNotFoundError,
    RequestIdReusedError,
    ResourceExhaustedError,
    RoleMissingError,
    UnavailableError,
    from_rpc_error,
)
from cognateforge.policy.v1 import policy_pb2
from tests.support.certificates import HOSTS, TRUST, authority, files, odd, server_tls, spiffe, uri
from tests.support.servers import running_agent, running_cognate
from tests.support.waiting import until
from training_common.rpc.identity import SPIFFE_ID
from training_common.rpc.policy import role_names
from training_common.rpc.server import RunningServer, create_server
from training_common.settings import ServiceSettings, SettingsError

SERVED = {
    "cognate": (running_cognate, cognate_server.server.SERVICES),
    "agent": (running_agent, agent_server.server.SERVICES),
}
# One caller for each role, and one that is known to the authority alone.
CALLERS = (*role_names(), "stranger")


@pytest.fixture(autouse=True)
def rotation_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cognateforge.client.tls.LOOK_EVERY_S", 0.0)


def security(certs: Path, **more: Any) -> dict[str, Any]:
    roles = {spiffe(role): (role,) for role in role_names()}
    return {"security": {"tls": server_tls(certs), "roles": roles}, **more}


@asynccontextmanager
async def cognate(folder: Path, certs: Path, **more: Any) -> AsyncIterator[RunningServer]:
    async with running_cognate(folder / "server", **security(certs, **more)) as server:
        yield server


def methods(services: Iterable[str]) -> list[MethodDescriptor]:
    pool = descriptor_pool.Default()
    return [method for service in services for method in pool.FindServiceByName(service).methods]


def audited(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "audit" / "audit.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


async def answer(channel: grpc.aio.Channel, method: MethodDescriptor) -> ForgeError | None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.server_streaming:
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            call = stream(b"", timeout=10)
            await call.read()
            call.cancel()
        else:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            await unary(b"", timeout=10)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


async def ask(address: str, tls: TlsFiles) -> ForgeError | None:
    """Return what a caller with these files is told, or None where it is served."""
    try:
        async with AsyncCognateClient(address, tls=tls) as client:
            await client.pretraining.ListJobs(pb.ListJobsRequest(), timeout=10)
    except ForgeError as error:
        return error
    return None


# --- who may call


@pytest.mark.parametrize("service", SERVED)
async def test_every_method_is_for_the_roles_of_its_policy_and_nobody_else(service: str, tmp_path: Path) -> None:
    """Every method x every caller over mutual TLS, each decision as the descriptor says."""
    certs = tmp_path / "certs"
    authority(certs, *CALLERS)
    running, services = SERVED[service]
    decisions, wrong = 0, []
    async with running(tmp_path / "server", **security(certs, heartbeat_frame_s=0.05)) as server:
        for caller in CALLERS:
            async with grpc.aio.secure_channel(server.address, files(certs, caller).credentials()) as channel:
                for method in methods(services):
                    roles = method.GetOptions().Extensions[policy_pb2.access].roles
                    allowed = caller.upper() in {policy_pb2.Role.Name(r).removeprefix("ROLE_") for r in roles}
                    refused = isinstance(await answer(channel, method), RoleMissingError)
                    decisions += 1
                    if allowed == refused:
                        wrong.append((caller, method.full_name))
    print(f"{decisions} decisions, {len(wrong)} wrong")
    assert [] == wrong
    assert len(CALLERS) * len(methods(services)) == decisions


async def test_a_certificate_that_is_not_good_gets_no_connection(tmp_path: Path) -> None:
    """None, another authority's, an expired one, plaintext: the handshake fails and no call reaches the contract."""
    certs, other = tmp_path / "certs", tmp_path / "other"
    authority(certs)
    authority(other, "operator")
    ca = certs / CA_CERT
    hour = datetime.timedelta(hours=1)
    callers = {
        "none": TlsFiles(ca=ca),
        "other authority": TlsFiles(ca=ca, cert=other / "operator.pem", key=other / "operator.key"),
        "expired": odd(certs, "old", names=[uri(spiffe("operator"))], ends_in=-hour),
        "right": odd(certs, "right", names=[uri(spiffe("operator"))]),
    }
    async with cognate(tmp_path, certs) as server:
        told = {name: await ask(server.address, tls) for name, tls in callers.items()}
        async with AsyncCognateClient(server.address) as client:
            with pytest.raises(UnavailableError):
                await client.pretraining.ListJobs(pb.ListJobsRequest())
    assert told.pop("right") is None
    assert dict.fromkeys(told, UnavailableError) == {name: type(error) for name, error in told.items()}
    assert not (tmp_path / "server" / "audit" / "audit.jsonl").exists()


async def test_an_identity_is_one_spiffe_uri_and_nothing_that_looks_like_it(tmp_path: Path) -> None:
    """A DNS name, a subject, two ids or another URI tell nobody's name: UNAUTHENTICATED, and audited."""
    certs = tmp_path / "certs"
    authority(certs)
    operator = spiffe("operator")
    callers = {
        "dns": odd(certs, "dns", names=[x509.DNSName(operator)]),
        "subject": odd(certs, "subject", names=[], subject=operator),
        "two": odd(certs, "two", names=[uri(operator), uri(spiffe("viewer"))]),
        "https": odd(certs, "https", names=[uri(f"https://{TRUST}/operator")]),
        "email": odd(certs, "email", names=[x509.RFC822Name(f"operator@{TRUST}")]),
    }
    async with cognate(tmp_path, certs) as server:
        told = {name: await ask(server.address, tls) for name, tls in callers.items()}
    assert dict.fromkeys(callers, IdentityMissingError) == {name: type(error) for name, error in told.items()}
    assert ["IDENTITY_MISSING"] * len(callers) == [row["outcome"] for row in audited(tmp_path / "server")]


@pytest.mark.parametrize(
    "name",
    [
        "spiffe://forge.test/operator/",
        "spiffe://forge.test/Operator",
        "spiffe://other.test/operator",
        "spiffe://forge.test/operator2",
        "spiffe://forge.test/x/../operator",
    ],
)
async def test_an_id_that_is_nearly_the_listed_one_plays_no_part(name: str, tmp_path: Path) -> None:
    """Ids are compared whole and as they are."""
    certs = tmp_path / "certs"
    authority(certs)
    tls = odd(certs, "near", names=[uri(name)])
    async with cognate(tmp_path, certs) as server:
        error = await ask(server.address, tls)
    assert isinstance(error, ForbiddenError), error


async def test_a_server_of_another_authority_is_not_spoken_to(tmp_path: Path) -> None:
    """And none starts with a certificate that is a client's."""
    certs, other = tmp_path / "certs", tmp_path / "other"
    authority(certs, "operator")
    authority(other)
    async with cognate(tmp_path / "a", other) as server:
        assert isinstance(await ask(server.address, files(certs, "operator")), UnavailableError)
    Authority.open(certs).issue("server")  # without hosts: a client's
    with pytest.raises(SettingsError, match="is a client's certificate only"):
        async with cognate(tmp_path / "b", certs):
            pass


# --- rotation


def served_serial(address: str, tls: TlsFiles) -> int:
    """Return the serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(str(tls.cert), str(tls.key))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as wrapped:
        shown = wrapped.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@pytest.mark.slow
async def test_rotation_under_load_drops_no_call(tmp_path: Path) -> None:
    """Server and client certificates change ten times under calls and a watch: all are served, with the new ones."""
    certs = tmp_path / "certs"
    made = authority(certs, "operator")
    tls = files(certs, "operator")
    done, failed, stop = [0] * 4, [], threading.Event()
    async with cognate(tmp_path, certs, heartbeat_frame_s=0.05, limits={"caller_calls_per_s": 0}) as server:
        client = CognateClient(server.address, tls=tls)

        def press(number: int) -> None:
            while not stop.is_set():
                try:
                    client.pretraining.ListJobs(pb.ListJobsRequest())
                    done[number] += 1
                except Exception as error:
                    failed.append(error)

        start = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
        job = (await asyncio.to_thread(client.pretraining.StartPretraining, start)).job.job.name
        ended = []

        def follow() -> None:
            ended.append(list(client.watch_job(job))[-1].WhichOneof("frame"))

        threads = [threading.Thread(target=press, args=(n,)) for n in range(len(done))]
        threads.append(threading.Thread(target=follow))
        for thread in threads:
            thread.start()

        async def served(count: int) -> bool:
            """Whether every caller has made so many calls since `before`."""
            assert not failed, failed[0]
            return all(now - then >= count for now, then in zip(done, before, strict=True))

        for turn in range(10):
            if turn % 2:
                (certs / "server.pem").write_bytes(b"half of a cert")  # as a careless copy leaves it for a moment
                (certs / "operator.key").write_bytes(b"half of a key")
                before = list(done)
                await until(lambda: served(5), timeout_s=20)
            made.issue("server", hosts=HOSTS)
            made.issue("operator")
            before = list(done)
            await until(lambda: served(20), timeout_s=20)
            assert serial(certs / "server.pem") == await asyncio.to_thread(served_serial, server.address, tls)
        stop.set()
        cancel = pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=job)
        await asyncio.to_thread(client.pretraining.CancelJob, cancel)
        for thread in threads:
            await asyncio.to_thread(thread.join, 30)
        client.close()
    print(f"10 rotations, {sum(done)} calls, {len(failed)} failed")
    assert [] == failed
    assert ["end"] == ended


async def test_an_authority_that_is_dropped_lets_nobody_in(tmp_path: Path) -> None:
    """Authorities rotate like certificates: first both are trusted, then the new one alone."""
    certs, new = tmp_path / "certs", tmp_path / "new"
    authority(certs, "operator")
    authority(new, "operator")
    both = (certs / CA_CERT).read_bytes() + (new / CA_CERT).read_bytes()
    old_caller = files(certs, "operator")
    new_caller = TlsFiles(ca=certs / CA_CERT, cert=new / "operator.pem", key=new / "operator.key")
    trusted = tmp_path / "clients.pem"
    shutil.copy(certs / CA_CERT, trusted)
    tls = {**server_tls(certs), "client_ca_file": trusted}
    roles = {spiffe("operator"): ("operator",)}
    async with running_cognate(tmp_path / "server", security={"tls": tls, "roles": roles}) as server:
        seen = [(await ask(server.address, old_caller), await ask(server.address, new_caller))]
        for bundle in (both, (new / CA_CERT).read_bytes()):
            trusted.write_bytes(bundle)
            seen.append((await ask(server.address, old_caller), await ask(server.address, new_caller)))
    served = [(old is None, new is None) for old, new in seen]
    assert [(True, False), (True, True), (False, True)] == served


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pem: b"\xef\xbb\xbf" + pem,
        lambda pem: b"\n".join(b"  " + line for line in pem.splitlines()),
        lambda pem: b"some words\n" + pem + b"more of them",
    ],
    ids=["byte order mark", "indented", "words around it"],
)
async def test_an_odd_authority_file_is_used_or_refused_and_never_passed_over(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """After a rotation that was taken, the dropped authority lets nobody in."""
    certs, new = tmp_path / "certs", tmp_path / "new"
    authority(certs, "operator")
    authority(new, "operator")
    trusted = tmp_path / "clients.pem"
    shutil.copy(certs / CA_CERT, trusted)
    tls = {**server_tls(certs), "client_ca_file": trusted}
    roles = {spiffe("operator"): ("operator",)}
    fresh = TlsFiles(ca=certs / CA_CERT, cert=new / "operator.pem", key=new / "operator.key")
    async with running_cognate(tmp_path / "server", security={"tls": tls, "roles": roles}) as server:
        assert await ask(server.address, files(certs, "operator")) is None
        trusted.write_bytes(spoil((new / CA_CERT).read_bytes()))
        served = [await ask(server.address, tls) is None for tls in (files(certs, "operator"), fresh)]
    assert [False, True] == served


async def test_a_key_that_grpc_cannot_serve_is_refused(tmp_path: Path) -> None:
    """At the start by name, and at a rotation the last good pair stays."""
    certs = tmp_path / "certs"
    authority(certs, "operator")
    good = {name: (certs / f"server.{name}").read_bytes() for name in ("pem", "key")}
    roles = {spiffe("operator"): ("operator",)}
    async with running_cognate(tmp_path / "server", security={"tls": server_tls(certs), "roles": roles}) as server:
        odd(certs, "server", names=[x509.DNSName("localhost")], key=ed25519.Ed25519PrivateKey.generate())
        assert await ask(server.address, files(certs, "operator")) is None
    settings = {"address": "127.0.0.1:0", "data_dir": tmp_path / "other", "security": {"tls": server_tls(certs)}}
    with pytest.raises(SettingsError, match="gRPC serves RSA keys of 2048 bits or more, and those of P-256"):
        create_server(ServiceSettings.model_validate(settings), [])
    assert good["key"] != (certs / "server.key").read_bytes()


async def test_an_aio_client_takes_its_new_certificate(tmp_path: Path) -> None:
    """A caller that was renamed is another caller from its next call on."""
    certs = tmp_path / "certs"
    made = authority(certs, "viewer", "operator")
    shutil.copy(certs / "viewer.pem", certs / "me.pem")
    shutil.copy(certs / "viewer.key", certs / "me.key")
    start = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
    async with cognate(tmp_path, certs) as server:
        async with AsyncCognateClient(server.address, tls=files(certs, "me")) as client:
            with pytest.raises(RoleMissingError, match=f"caller {spiffe('viewer')} has no such role"):
                await client.pretraining.StartPretraining(start)
            issued = made.issue("operator")
            issued.key.replace(certs / "me.key")
            await client.pretraining.ListJobs(pb.ListJobsRequest())  # with the old pair: the new one is not whole yet
            issued.cert.replace(certs / "me.pem")
            await client.pretraining.StartPretraining(start)
        rows = [row for row in audited(tmp_path / "server") if row["method"].endswith("/StartPretraining")]
    assert [(spiffe("viewer"), "ROLE_MISSING"), (spiffe("operator"), "OK")] == [
        (row["caller"], row["outcome"]) for row in rows
    ]


# --- limits and audit


async def test_one_caller_cannot_take_the_share_of_another(tmp_path: Path) -> None:
    """Calls a second and calls at once are bounded for each caller; the refusal tells how long to wait."""
    certs = tmp_path / "certs"
    authority(certs, "viewer", "operator")
    limits = {"caller_calls_per_s": 5, "caller_open_calls": 3}
    async with (
        cognate(tmp_path, certs, limits=limits, heartbeat_frame_s=0.05) as server,
        AsyncCognateClient(server.address, tls=files(certs, "viewer")) as greedy,
        AsyncCognateClient(server.address, tls=files(certs, "operator")) as modest,
    ):
        served = 0
        with pytest.raises(ResourceExhaustedError, match="more than 5 calls a second: wait") as caught:
            for _ in range(100):
                await greedy.pretraining.ListJobs(pb.ListJobsRequest())
                served += 1
        assert 10 <= served <= 12
        assert 0 < float(caught.value.metadata["retry_after_s"]) <= 0.2
        await modest.pretraining.ListJobs(pb.ListJobsRequest())
        request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
        job = (await modest.pretraining.StartPretraining(request)).job.job.name
        watches = [modest.pretraining.WatchJob(pb.WatchJobRequest(name=job)) for _ in range(3)]
        for watch in watches:
            await watch.read()
        with pytest.raises(ResourceExhaustedError, match="has 3 calls open, and may have 3"):
            await modest.pretraining.ListJobs(pb.ListJobsRequest())
        watches[0].cancel()

        async def served_again() -> bool:
            await asyncio.sleep(0.3)  # its own rate counts too
            return await ask(server.address, files(certs, "operator")) is None

        await until(served_again, timeout_s=20)
        for watch in watches:
            watch.cancel()


async def test_every_mutation_and_refusal_is_in_the_audit_log(tmp_path: Path) -> None:
    """Caller, call id, method and outcome, with the mutation's own id and what it is about. Reads are not in it."""
    certs = tmp_path / "certs"
    authority(certs, "viewer", "operator")
    wish = str(uuid.uuid4())
    missing = f"jobs/{uuid.uuid4()}"
    async with cognate(tmp_path, certs) as server:
        async with (
            AsyncCognateClient(server.address, tls=files(certs, "viewer")) as viewer,
            AsyncCognateClient(server.address, tls=files(certs, "operator")) as operator,
        ):
            start = pb.StartPretrainingRequest(request_id=wish, plan=pb.PretrainingPlan(total_steps=9))
            await operator.pretraining.ListJobs(pb.ListJobsRequest())
            await operator.pretraining.StartPretraining(start, metadata=(("x-request-id", "call-7"),))
            for client, plan in ((viewer, start), (operator, pb.StartPretrainingRequest(request_id="x"))):
                with pytest.raises(ForgeError):
                    await client.pretraining.StartPretraining(plan)
            with pytest.raises(RequestIdReusedError):
                await operator.pretraining.CancelJob(pb.CancelJobRequest(request_id=wish, name=missing))
        rows = audited(tmp_path / "server")
    method = "/cognateforge.cognate.v1.CognatePretrainingService"
    expected = [
        (spiffe("operator"), f"{method}/StartPretraining", "OK", wish, None),
        (spiffe("viewer"), f"{method}/StartPretraining", "ROLE_MISSING", None, None),
        (spiffe("operator"), f"{method}/StartPretraining", "INVALID_FIELD", "x", None),
        (spiffe("operator"), f"{method}/CancelJob", "REQUEST_ID_REUSED", wish, missing),
    ]
    found = [(r["caller"], r["method"], r["outcome"], r.get("wish"), r.get("name")) for r in rows]
    assert expected == found
    assert "call-7" == rows[0]["request_id"]
    assert all(row["peer"].startswith("ipv4:127.0.0.1:") and row["time"].endswith("+00:00") for row in rows)


async def test_an_audit_log_that_cannot_be_written_takes_health_with_it(tmp_path: Path) -> None:
    """The record goes to the service's log, health says NOT_SERVING, and both end when there is room again."""
    certs = tmp_path / "certs"
    authority(certs, "operator")
    folder = tmp_path / "server" / "audit"
    async with cognate(tmp_path, certs) as server:
        async with AsyncCognateClient(server.address, tls=files(certs, "operator")) as client:

            async def is_health(wanted: str) -> bool:
                return await client.health() == wanted

            folder.rmdir()
            folder.write_text("in the way")
            request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
            await client.pretraining.StartPretraining(request)
            await until(lambda: is_health("NOT_SERVING"), timeout_s=20)
            folder.unlink()
            folder.mkdir()
            await until(lambda: is_health("SERVING"), timeout_s=20)
        assert ["AUDIT_RESUMED"] == [row["outcome"] for row in audited(tmp_path / "server")]


async def test_the_audit_log_is_bounded(tmp_path: Path) -> None:
    """Old files go: a caller that is refused without end cannot fill the disk."""
    certs = tmp_path / "certs"
    authority(certs, "stranger")
    async with (
        cognate(tmp_path, certs, audit={"max_file_bytes": 4096, "keep_files": 2}) as server,
        AsyncCognateClient(server.address, tls=files(certs, "stranger")) as client,
    ):
        for _ in range(100):
            with pytest.raises(RoleMissingError):
                await client.pretraining.ListJobs(pb.ListJobsRequest())
    found = sorted((tmp_path / "server" / "audit").iterdir())
    assert ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"] == [path.name for path in found]
    assert all(path.stat().st_size <= 4096 for path in found)


async def test_metadata_is_bounded(tmp_path: Path) -> None:
    """Metadata above the bound is refused by the connection, and the next call is served."""
    async with (
        running_cognate(tmp_path, limits={"max_metadata_bytes": 2048}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        with pytest.raises(ForgeError):
            await client.pretraining.ListJobs(pb.ListJobsRequest(), metadata=(("x-long", "x" * 4000),))
        await client.pretraining.ListJobs(pb.ListJobsRequest())


@pytest.mark.parametrize("caller", ["stranger", "viewer"])
async def test_calls_without_a_request_and_health_watches_lock_nobody_out(caller: str, tmp_path: Path) -> None:
    """A caller is looked at when its headers arrive, and what is open to everybody is bounded as well."""
    certs = tmp_path / "certs"
    authority(certs, "operator", caller)
    limits = {"max_concurrent_rpcs": 60, "caller_open_calls": 20}
    async with (
        cognate(tmp_path, certs, limits=limits) as server,
        AsyncCognateClient(server.address, tls=files(certs, "operator")) as operator,
    ):
        held: list[Any] = []
        for _ in range(4):  # connections
            channel = grpc.aio.secure_channel(
                server.address, files(certs, caller).credentials(), [("grpc.use_local_subchannel_pool", 1)]
            )
            await asyncio.wait_for(channel.channel_ready(), 10)
            for _ in range(15):
                silent: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
                    "/cognateforge.cognate.v1.CognatePretrainingService/ListJobs"
                )
                held.append(silent())
                watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
                    "/grpc.health.v1.Health/Watch"
                )
                held.append(watch(b""))
            held.append(channel)
        for _ in range(20):
            await operator.pretraining.ListJobs(pb.ListJobsRequest())
            assert "SERVING" == await operator.health()
        for one in held:
            await one.close() if isinstance(one, grpc.aio.Channel) else one.cancel()


async def test_a_request_that_does_not_come_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers alone hold a call for a bounded time; a call that ends without a request is a bad one."""
    monkeypatch.setattr("training_common.rpc.interceptor._ARRIVAL_S", 0.1)
    async with running_cognate(tmp_path) as server, grpc.aio.insecure_channel(server.address) as channel:
        path = "/cognateforge.cognate.v1.CognatePretrainingService/ListJobs"
        silent: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await silent(wait_for_ever(), timeout=20)
        assert isinstance(from_rpc_error(late.value), DeadlineExceededError)
        with pytest.raises(grpc.aio.AioRpcError) as none:
            await silent(iter(()), timeout=20)
        assert isinstance(from_rpc_error(none.value), InvalidFieldError)


async def wait_for_ever() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def test_a_server_that_ends_by_itself_is_noticed(tmp_path: Path) -> None:
    """A path that is no UTF-8 ends gRPC's server: the service says so in its health, and ends with status 1."""
    address_file = tmp_path / "address"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cognate_server", "--address-file", str(address_file)),
        env={**os.environ, "COGNATE_SERVER_ADDRESS": "127.0.0.1:0", "COGNATE_SERVER_DATA_DIR": str(tmp_path / "data")},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )

    await until(address_file.exists, timeout_s=20)
    host, _, port = address_file.read_text().rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))

    def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
        return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body

    def header(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"\x83\x86" + header(b":path", b"/\xff/x") + header(b":authority", b"x") + header(b"te", b"trailers")
    headers += header(b"content-type", b"application/grpc")
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, headers))
    _, told = await asyncio.wait_for(process.communicate(), 15)  # gRPC itself tells of it after 20 s
    writer.close()
    assert 1 == process.returncode
    assert b"the gRPC server ended by itself" in told


# --- set-up


async def test_the_agent_service_crosses_the_boundary_with_its_certificate(tmp_path: Path) -> None:
    """`cognate.tls` of its settings: as the agent service it is served, with another certificate it is not."""
    certs = tmp_path / "certs"
    authority(certs, "agent_service", "viewer")
    async with cognate(tmp_path, certs) as server:

        def find(name: str) -> None:
            tls = {"ca_file": certs / CA_CERT, "cert_file": certs / f"{name}.pem", "key_file": certs / f"{name}.key"}
            endpoint = CognateEndpoint.model_validate({"address": server.address, "tls": tls})
            with foundation.connect(endpoint) as client:
                foundation.fetch(
                    client, "cognate-25m@1", accept_experimental=True, required=None, cache_dir=tmp_path / "cache"
                )

        with pytest.raises(ModelNotFoundError):
            await asyncio.to_thread(find, "agent_service")
        with pytest.raises(ClientSetupError, match=r"nobody.key cannot be read"):
            await asyncio.to_thread(find, "nobody")


async def test_forge_speaks_tls_with_the_certificates_that_it_makes(tmp_path: Path) -> None:
    """`forge certs init`, a server with the printed settings, and a command with an issued certificate."""
    certs = tmp_path / "certs"
    run = CliRunner().invoke
    made = run(app, ["certs", "init", str(certs), "--trust-domain", "forge.test"])
    assert made.exit_code == 0, made.output
    settings = certs / "cognate.toml"
    assert f"settings for --settings: {settings}" in made.stdout
    before = x509.load_pem_x509_certificate((certs / "cognate.pem").read_bytes())
    again = run(app, ["certs", "issue", str(certs), "cognate"])
    assert again.exit_code == 0, again.output
    after = x509.load_pem_x509_certificate((certs / "cognate.pem").read_bytes())
    # A stack that makes its certificates at every start keeps its authority.
    kept = run(app, ["certs", "init", str(certs), "--trust-domain", "forge.test", "--keep"])
    assert (0, f"{certs} has an authority: nothing was changed\n") == (kept.exit_code, kept.stdout)
    # One that was interrupted is told what it lacks.
    (certs / "agent.pem").unlink()
    assert "certs issue" in run(app, ["certs", "init", str(certs), "--keep"]).stderr
    assert after == x509.load_pem_x509_certificate((certs / "cognate.pem").read_bytes())
    assert 0 != run(app, ["certs", "init", str(certs), "--trust-domain", "forge.test"]).exit_code
    names = [cert.extensions.get_extension_for_class(x509.SubjectAlternativeName) for cert in (before, after)]
    assert names[0] == names[1]
    assert before.serial_number != after.serial_number
    from cognate_server.settings import load_settings

    loaded = load_settings(settings).model_copy(update={"address": "127.0.0.1:0", "data_dir": tmp_path / "server"})
    server = cognate_server.server.build(loaded, settings)
    await server.start()
    try:
        options = ["--cognate", server.address, "--tls-ca", str(certs / "ca.pem"), "--json"]

        def forge(name: str) -> Any:
            pair = ["--tls-cert", str(certs / f"{name}.pem"), "--tls-key", str(certs / f"{name}.key")]
            return run(app, ["models", *options, *pair])

        assert 0 == (await asyncio.to_thread(forge, "viewer")).exit_code
        assert 0 != (await asyncio.to_thread(forge, "cognate")).exit_code
    finally:
        await server.stop()
    assert 0o600 == (certs / "viewer.key").stat().st_mode & 0o777


async def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path: Path) -> None:
    """Each error names the key or the file, and the remedy."""
    certs = tmp_path / "certs"
    authority(certs, "operator")
    good = server_tls(certs)

    def start(**security: Any) -> None:
        create_server(
            ServiceSettings.model_validate({"address": "0.0.0.0:0", "data_dir": tmp_path, "security": security}), []
        )

    start(tls=good)
    (certs / "garbage.pem").write_text("x")
    expired = odd(certs, "expired", names=[], ends_in=datetime.timedelta(hours=-1))
    wrong = {
        "No such file": {"tls": {**good, "cert_file": certs / "none.pem"}},
        "is a client's certificate only": {
            "tls": {**good, "cert_file": certs / "operator.pem", "key_file": certs / "operator.key"}
        },
        "is not the key of": {"tls": {**good, "key_file": certs / "operator.key"}},
        "garbage.pem holds no certificate": {"tls": {**good, "client_ca_file": certs / "garbage.pem"}},
        "expired at": {"tls": {**good, "cert_file": expired.cert, "key_file": expired.key}},
        "is no SPIFFE id": {"tls": good, "roles": {"operator": ("operator",)}},
        "chief is no role": {"tls": good, "roles": {spiffe("a"): ("chief",)}},
    }
    for text, security in wrong.items():
        with pytest.raises(SettingsError, match=text):
            start(**security)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("spiffe://a/b", True),
        ("spiffe://forge.test/ns/x/sa/y", True),
        ("spiffe://forge.test", False),
        ("spiffe://forge.test/", False),
        ("spiffe://forge.test/a//b", False),
        ("spiffe://forge.test/../b", False),
        ("spiffe://Forge.test/a", False),
        ("spiffe://forge.test/a?b", False),
        ("https://forge.test/a", False),
    ],
)
def test_what_a_spiffe_id_is(name: str, good: bool) -> None:
    """As in the standard: a trust domain, and a path without empty or relative parts."""
    assert good == bool(SPIFFE_ID.fullmatch(name))
