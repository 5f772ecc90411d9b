"""Leases of Cognate's capacity: one winner, an end that holds, and a way back for Cognate's own jobs."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf import duration_pb2

import cognate_server.migrations
from cognate_server.leases import LeaseState, LeaseStore, Resource
from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import (
    CapacityTakenError,
    InvalidFieldError,
    LeaseEndedError,
    LeaseNotFoundError,
    RequestIdReusedError,
)
from cognateforge.exchange.v1 import resource_pb2 as pb
from cognateforge.job.v1 import job_pb2
from tests.support.certificates import authority, files, server_tls, spiffe
from tests.support.outbox import job_with_events
from tests.support.servers import running_cognate
from tests.support.waiting import until
from training_common.jobs.store import JobRow, JobStore
from training_common.store import tables as t
from training_common.store.database import Database

GPU = pb.RESOURCE_KIND_GPU


def new_id() -> str:
    return str(uuid.uuid4())


def seconds(value: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(round(value * 1000))
    return duration


async def acquire(
    client: AsyncCognateClient, *, amount: int = 1, ttl_s: float = 60, kind: Any = GPU, request_id: str = ""
) -> pb.Lease:
    request = pb.AcquireLeaseRequest(request_id=request_id or new_id(), kind=kind, amount=amount, ttl=seconds(ttl_s))
    return (await client.resources.AcquireLease(request)).lease


async def renew(client: AsyncCognateClient, lease: pb.Lease, *, ttl_s: float = 60, token: int = 0) -> pb.Lease:
    request = pb.RenewLeaseRequest(
        request_id=new_id(), name=lease.name, fencing_token=token or lease.fencing_token, ttl=seconds(ttl_s)
    )
    return (await client.resources.RenewLease(request)).lease


async def release(client: AsyncCognateClient, lease: pb.Lease, *, token: int = 0) -> pb.Lease:
    request = pb.ReleaseLeaseRequest(request_id=new_id(), name=lease.name, fencing_token=token or lease.fencing_token)
    return (await client.resources.ReleaseLease(request)).lease


async def capacity(client: AsyncCognateClient, kind: Any) -> pb.Capacity:
    answer = await client.resources.GetAvailability(pb.GetAvailabilityRequest())
    return next(one for one in answer.capacities if one.kind == kind)


def left_s(lease: pb.Lease) -> float:
    return float(lease.remaining.ToTimedelta().total_seconds())


async def test_what_is_lent_is_gone_until_it_is_given_back(tmp_path: Path) -> None:
    """Acquire, renew, release: the availability follows, and tokens grow."""
    async with (
        running_cognate(tmp_path, lending={"gpus": 2, "keep_gpus": 1}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        before = await capacity(client, GPU)
        assert (2, 0, 0, 1) == (before.total, before.held, before.lent, before.available)
        first = await acquire(client, ttl_s=10)
        assert (pb.LEASE_STATE_ACTIVE, GPU, 1) == (first.state, first.kind, first.amount)
        assert 9 < left_s(first) <= 10
        lent = await capacity(client, GPU)
        assert (1, 0) == (lent.lent, lent.available)
        with pytest.raises(CapacityTakenError, match="1 of GPU cannot be borrowed now, but 0") as taken:
            await acquire(client)
        assert {"available": "0"} == taken.value.metadata
        longer = await renew(client, first, ttl_s=50)
        assert 49 < left_s(longer) <= 50
        assert left_s(await renew(client, first, ttl_s=1)) > 40, "a shorter renewal shortens nothing"
        ended = await release(client, first)
        assert (pb.LEASE_STATE_ENDED, 0) == (ended.state, left_s(ended))
        second = await acquire(client)
        assert second.fencing_token > first.fencing_token


async def test_a_verification_holds_what_a_job_holds(tmp_path: Path) -> None:
    """While it replays, its slot's cores are not lent."""
    async with (
        running_cognate(tmp_path, workers={"slots": 1, "threads": 1}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        before = await capacity(client, pb.RESOURCE_KIND_CPU)
        database = Database(f"sqlite:///{tmp_path / 'store.db'}")
        name = job_with_events(database, 1)
        with database.write() as connection:
            job_id = JobStore(database).get(name, connection).id
            saved = {"attempt": 1, "step": 1, "digest": "", "size_bytes": 1, "folder": "", "create_us": 1}
            key = connection.execute(sa.insert(t.checkpoints).values(job_id=job_id, **saved)).inserted_primary_key
            assert key is not None
            named = {"from_checkpoint_id": key[0], "to_checkpoint_id": key[0], "server": "another", "create_us": 1}
            values = {"name": "verifications/x", "job_id": job_id, "caller": "c", "state": "RUNNING", **named}
            connection.execute(sa.insert(t.verifications).values(**values))
        database.close()
        after = await capacity(client, pb.RESOURCE_KIND_CPU)
        assert (before.held + 1, before.available - 1) == (after.held, after.available)


async def test_a_lease_ends_at_its_time_and_nothing_of_it_works_after(tmp_path: Path) -> None:
    """Expiry needs nobody to write it down; renewal of it fails and release changes nothing."""
    async with (
        running_cognate(tmp_path, lending={"gpus": 1}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        lease = await acquire(client, ttl_s=1)
        watched = [frame.lease async for frame in client.resources.WatchLease(pb.WatchLeaseRequest(name=lease.name))]
        assert [pb.LEASE_STATE_ACTIVE, pb.LEASE_STATE_ENDED] == [frame.state for frame in watched]
        with pytest.raises(LeaseEndedError, match="has ended"):
            await renew(client, lease)
        assert pb.LEASE_STATE_ENDED == (await release(client, lease)).state
        other = await acquire(client)
        with pytest.raises(LeaseEndedError, match="is not that of"):
            await release(client, other, token=lease.fencing_token)
        with pytest.raises(LeaseEndedError, match="is not that of"):
            await renew(client, other, token=lease.fencing_token)
        assert 1 == (await capacity(client, GPU)).lent


async def test_acquiring_is_idempotent(tmp_path: Path) -> None:
    """The same id brings the same lease, another payload is refused, and a refusal stores nothing."""
    async with (
        running_cognate(tmp_path, lending={"gpus": 2}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        wish = new_id()
        first = await acquire(client, request_id=wish)
        again = await acquire(client, request_id=wish)
        assert (first.name, first.fencing_token) == (again.name, again.fencing_token)
        with pytest.raises(RequestIdReusedError):
            await acquire(client, request_id=wish, amount=2)
        assert 1 == (await capacity(client, GPU)).lent
        refused = new_id()
        with pytest.raises(CapacityTakenError):
            await acquire(client, request_id=refused, amount=2)
        await release(client, first)
        assert 2 == (await acquire(client, request_id=refused, amount=2)).amount


async def test_a_repeated_answer_tells_what_the_lease_is_now(tmp_path: Path) -> None:
    """Who repeats an acquisition after the end is told that it has ended, and not what was answered then."""
    async with (
        running_cognate(tmp_path, lending={"gpus": 1}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        wish = new_id()
        first = await acquire(client, request_id=wish, ttl_s=1)
        repeated = await acquire(client, request_id=wish, ttl_s=1)
        assert (first.name, first.state) == (repeated.name, repeated.state)
        assert left_s(repeated) <= left_s(first)
        await release(client, first)
        ended = await acquire(client, request_id=wish, ttl_s=1)
        assert (first.name, pb.LEASE_STATE_ENDED, 0) == (ended.name, ended.state, left_s(ended))


async def test_an_ask_for_longer_than_is_lent_gets_the_longest(tmp_path: Path) -> None:
    """And what no rule allows is refused by name."""
    async with (
        running_cognate(tmp_path, lending={"gpus": 1, "longest_ttl_s": 5}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        lease = await acquire(client, ttl_s=80_000)
        assert 4 < left_s(lease) <= 5
        assert left_s(await renew(client, lease, ttl_s=80_000)) <= 5
        for wrong in ({"ttl_s": 0.5}, {"ttl_s": 90_000}, {"amount": 0}, {"amount": -1}, {"kind": 0}, {"kind": 9}):
            with pytest.raises(InvalidFieldError):
                await acquire(client, **wrong)
        for name in ("leases/x", f"leases/{'0' * 36}"):
            with pytest.raises((InvalidFieldError, LeaseNotFoundError)):
                await renew(client, pb.Lease(name=name, fencing_token=1))


async def test_a_lease_is_its_holders_alone(tmp_path: Path) -> None:
    """Another agent service can neither see, keep nor end it."""
    certs = tmp_path / "certs"
    authority(certs, "one", "two")
    security = {"tls": server_tls(certs), "roles": {spiffe(name): ("agent_service",) for name in ("one", "two")}}
    async with (
        running_cognate(tmp_path / "server", security=security, lending={"gpus": 1}) as server,
        AsyncCognateClient(server.address, tls=files(certs, "one")) as one,
        AsyncCognateClient(server.address, tls=files(certs, "two")) as two,
    ):
        lease = await acquire(one)
        for call in (renew, release):
            with pytest.raises(LeaseNotFoundError):
                await call(two, lease)
        with pytest.raises(LeaseNotFoundError):
            await two.resources.WatchLease(pb.WatchLeaseRequest(name=lease.name)).read()
        await renew(one, lease)


@pytest.mark.slow
async def test_of_many_who_want_one_device_exactly_one_gets_it(tmp_path: Path) -> None:
    """64 callers at once over real connections, round after round. The bench `leases` does a thousand rounds."""
    rounds, callers = 30, 64
    winners, tokens = [], []
    async with running_cognate(tmp_path, lending={"gpus": 1}) as server:
        clients = [await AsyncCognateClient(server.address).__aenter__() for _ in range(4)]

        async def want(number: int) -> pb.Lease | None:
            try:
                return await acquire(clients[number % len(clients)])
            except CapacityTakenError:
                return None

        for _ in range(rounds):
            answers = await asyncio.gather(*(want(number) for number in range(callers)))
            won = [lease for lease in answers if lease is not None]
            winners.append(len(won))
            tokens.append(won[0].fencing_token)
            await release(clients[0], won[0])
        for client in clients:
            await client.close()
    print(f"{callers} callers, {rounds} rounds, winners in each: {sorted(set(winners))}")
    assert [1] * rounds == winners
    assert sorted(set(tokens)) == tokens


def submit(folder: Path) -> str:
    """Put a job into the queue of a server."""
    database = Database(f"sqlite:///{folder / 'store.db'}")
    plan = pretraining_pb2.PretrainingPlan(total_steps=9)
    with database.write() as connection:
        job = JobStore(database).submit(connection, plan=plan.SerializeToString(), total_steps=9, caller="t")
    database.close()
    return job.name


async def wait_of(client: AsyncCognateClient, name: str) -> job_pb2.Wait:
    """Return why a job has no worker."""
    return (await client.pretraining.GetJob(pretraining_pb2.GetJobRequest(name=name))).job.job.wait


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Start no worker, and return where each start is recorded."""
    started: list[Any] = []

    def launch(_engine: Any, arguments: Any, **_: Any) -> str:
        started.append(arguments)
        return "1:0"

    monkeypatch.setattr("training_common.engines.local.LocalEngine.launch", launch)
    return started


async def test_a_job_of_ours_takes_back_what_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The borrower is told and has its grace; the job says what it waits for, and starts when the capacity is back."""
    monkeypatch.setattr("cognate_server.resources.os.cpu_count", lambda: 4)
    started = record_launches(monkeypatch)
    cpu = pb.RESOURCE_KIND_CPU
    workers = {"slots": 1, "threads": 2}
    async with (
        running_cognate(tmp_path, workers=workers, lending={"grace_s": 600}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        small, large = (
            await acquire(client, kind=cpu, ttl_s=3600),
            await acquire(client, kind=cpu, amount=3, ttl_s=3600),
        )
        watch = aiter(client.resources.WatchLease(pb.WatchLeaseRequest(name=large.name)))
        assert pb.LEASE_STATE_ACTIVE == (await anext(watch)).lease.state
        job = submit(tmp_path)
        told = (await anext(watch)).lease
        assert pb.LEASE_STATE_REVOKING == told.state
        assert 590 < left_s(told) <= 600
        assert told.HasField("revoke_time")
        assert pb.LEASE_STATE_REVOKING == (await renew(client, large, ttl_s=3600)).state
        assert pb.LEASE_STATE_ACTIVE == (await renew(client, small, ttl_s=3600)).state, "one was enough"
        with pytest.raises(CapacityTakenError):
            await acquire(client, kind=cpu)
        assert [] == started
        async with asyncio.timeout(20):
            while (wait := await wait_of(client, job)).reason != job_pb2.WAIT_REASON_LENT:  # noqa: ASYNC110 - told to nobody
                await asyncio.sleep(0.02)
        assert ("2 cores are missing, which are lent to local, and were asked back", 1) == (
            wait.message,
            wait.queue_position,
        )
        await release(client, large)
        await until(lambda: bool(started), timeout_s=20)
        watching = client.watch_job(job)
        notes = []
        async for frame in watching:
            if frame.event.HasField("note"):
                notes.append(frame.event.note)
            if frame.event.HasField("attempt_started"):
                break
        assert ["waiting_for_capacity"] == [note.kind for note in notes]
        assert "waits up to 600 s for 3 cores that are lent to local" == notes[0].message


async def test_a_job_that_comes_while_slots_are_given_out_waits_for_what_is_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job that gets the slot is the one that is asked about, also where nobody waited a moment before."""
    monkeypatch.setattr("cognate_server.resources.os.cpu_count", lambda: 4)
    started = record_launches(monkeypatch)
    came: list[str] = []
    begin = JobStore.begin_attempt
    async with (
        running_cognate(tmp_path, workers={"slots": 1, "threads": 2}, lending={"grace_s": 600}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        await acquire(client, kind=pb.RESOURCE_KIND_CPU, amount=3, ttl_s=3600)

        def begin_late(store: JobStore, *args: Any, **options: Any) -> JobRow | None:
            if not came:
                came.append(submit(tmp_path))
            return begin(store, *args, **options)

        monkeypatch.setattr(JobStore, "begin_attempt", begin_late)
        await until(lambda: bool(came), timeout_s=20)
        async with asyncio.timeout(20):
            while (await wait_of(client, came[0])).reason != job_pb2.WAIT_REASON_LENT:  # noqa: ASYNC110 - told to nobody
                await asyncio.sleep(0.02)
        assert [] == started


async def test_a_borrower_that_does_not_let_go_loses_it_at_the_end_of_its_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job starts then, and the borrower's renewal is refused: it is fenced out."""
    monkeypatch.setattr("cognate_server.resources.os.cpu_count", lambda: 2)
    started = record_launches(monkeypatch)
    async with (
        running_cognate(tmp_path, workers={"slots": 1}, lending={"grace_s": 0.5}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        lease = await acquire(client, kind=pb.RESOURCE_KIND_CPU, amount=2, ttl_s=3600)
        submit(tmp_path)
        await until(lambda: bool(started), timeout_s=20)
        with pytest.raises(LeaseEndedError):
            await renew(client, lease)
        assert pb.LEASE_STATE_ENDED == (await release(client, lease)).state


async def test_what_a_waiting_job_needs_is_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment a job waits for a free slot its share is its own."""
    monkeypatch.setattr("cognate_server.resources.os.cpu_count", lambda: 4)
    monkeypatch.setattr("training_common.jobs.scheduler.Scheduler.tick", lambda self: None)
    cpu = pb.RESOURCE_KIND_CPU
    async with (
        running_cognate(tmp_path, workers={"slots": 1, "threads": 3}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        submit(tmp_path)
        assert 1 == (await capacity(client, cpu)).available
        with pytest.raises(CapacityTakenError):
            await acquire(client, kind=cpu, amount=2)
        await acquire(client, kind=cpu)


def test_leases_survive_a_restart(tmp_path: Path) -> None:
    """They are rows: the next server knows who holds what."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    first = Database(url)
    first.upgrade(Path(cognate_server.migrations.__file__).parent)
    with first.write() as connection:
        lease = LeaseStore(first).acquire(
            connection, holder="h", kind=Resource.GPU, amount=1, available=1, ttl_us=60_000_000
        )
    first.close()
    second = Database(url)
    assert lease == LeaseStore(second).find(lease.name, "h")
    with second.write() as connection:
        assert (
            LeaseState.ENDED
            is LeaseStore(second).release(connection, lease.name, holder="h", token=lease.fencing_token).state
        )
    second.close()
