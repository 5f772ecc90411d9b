"""Reservations and forecasts: the calendar over a connection, and whose turn it is beside it, on both stores."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp

import cognate_server.migrations
from cognate_server import reservations
from cognate_server.forecast import Forecast
from cognate_server.reservations import Calendar, ReservationRow, RoomForReservations
from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import InvalidFieldError, ReservationConflictError, ReservationNotFoundError
from cognateforge.job.v1 import job_pb2
from tests.support.outbox import open_database
from tests.support.replays import Replays, stored_verification
from tests.support.servers import running_cognate
from tests.support.waiting import until
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptStore, JobRow, JobStore
from training_common.jobs.verifications import VerificationStore
from training_common.jobs.waits import Standing, WaitReason, waits
from training_common.store import tables as t
from training_common.store.database import Database, now_us

HOUR_US = 3_600_000_000


class Service:
    """A store with a calendar, and workers that are only rows."""

    def __init__(self, url: str, slots: int) -> None:
        self.database = Database(url)
        self.database.upgrade(Path(cognate_server.migrations.__file__).parent)
        self.calendar = Calendar(self.database, slots=slots)
        self.store = JobStore(self.database, self.calendar)
        self.room = RoomForReservations(self.store, self.calendar, grace_s=60)
        self.now = now_us()

    def reserve(self, slots: int, start_h: float = 0, end_h: float = 1) -> ReservationRow:
        with self.database.write() as connection:
            return self.calendar.create(
                connection,
                caller="test",
                slots=slots,
                start_us=self.now + round(start_h * HOUR_US),
                end_us=self.now + round(end_h * HOUR_US),
                purpose="",
            )

    def cancel(self, one: ReservationRow) -> None:
        with self.database.write() as connection:
            self.calendar.cancel(connection, one.name)

    def submit(self, reservation: ReservationRow | None = None, steps: int = 100) -> JobRow:
        with self.database.write() as connection:
            return self.store.submit(
                connection,
                plan=b"",
                total_steps=steps,
                caller="test",
                configuration="same",
                reservation=reservation.name if reservation else "",
            )

    def begin(self) -> AttemptStore | None:
        job = self.store.begin_attempt("here", "server")
        if job is None:
            return None
        attempt = self.store.attempt(job.name, job.attempt, job.fencing_token)
        attempt.move(JobState.RUNNING)
        return attempt

    def next(self) -> str:
        attempt = self.begin()
        assert attempt is not None
        return attempt.job.name

    def started(self) -> list[str]:
        names = []
        while (attempt := self.begin()) is not None:
            names.append(attempt.job.name)
        return names

    def reasons(self, *jobs: JobRow) -> list[WaitReason]:
        with self.database.read() as connection:
            standing = Standing(slots=self.calendar.slots, taken=len(self.store.held()))
            found = waits(connection, [self.store.get(j.name) for j in jobs], standing, self.calendar)
        return [found[job.id].reason for job in jobs]

    def expected(self, *jobs: JobRow) -> list[float | None]:
        """Return the forecast, in hours from now."""
        with self.database.read() as connection:
            rows = [self.store.get(job.name) for job in jobs]
            found = Forecast(self.calendar, server="server").expected(connection, rows)
        return [(found[job.id] - self.now) / HOUR_US if job.id in found else None for job in jobs]


@pytest.fixture
def open_service(store_url: str) -> Iterator[Callable[[int], Service]]:
    services: list[Service] = []

    def open_one(slots: int) -> Service:
        services.append(Service(store_url, slots))
        return services[-1]

    yield open_one
    for service in services:
        service.database.close()


# --- whose turn it is


def test_reserved_slots_are_for_the_reservations_jobs(open_service: Callable[[int], Service]) -> None:
    """Others get what is left, though they are older and a reserved slot is empty; cancelled, it is like any slot."""
    service = open_service(2)
    others = [service.submit() for _ in range(3)]
    one = service.reserve(1)
    assert [others[0].name] == service.started()
    assert [WaitReason.RESERVED] * 2 == service.reasons(*others[1:])
    jobs = [service.submit(one) for _ in range(2)]
    assert jobs[0].name == service.next()
    assert [WaitReason.RESERVED, WaitReason.SLOT] == service.reasons(jobs[1], others[1])
    service.cancel(one)
    assert others[1].name == service.next()


def test_a_job_waits_for_its_reservation_to_begin(
    open_service: Callable[[int], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on until then; when it begins, its job is the next. What it leaves behind is in the queue again."""
    service = open_service(1)
    one = service.reserve(1, 1, 2)
    job, other = service.submit(one), service.submit()
    assert [WaitReason.RESERVED, WaitReason.TURN] == service.reasons(job, other)
    begun = service.begin()
    assert begun is not None
    assert other.name == begun.job.name
    begun.move(JobState.RECOVERING)
    monkeypatch.setattr(reservations, "now_us", lambda: one.start_us)
    begun = service.begin()
    assert begun is not None
    assert job.name == begun.job.name
    begun.move(JobState.RECOVERING)
    later = service.submit(one)
    monkeypatch.setattr(reservations, "now_us", lambda: one.end_us)
    assert {job.name, other.name, later.name} == set(service.started())


def test_other_jobs_make_room_when_a_reservation_begins(open_service: Callable[[int], Service]) -> None:
    """As many as its jobs need, the youngest first, and nobody when nothing of it waits."""
    service = open_service(3)
    running = [service.submit() for _ in range(3)]
    attempts = [service.begin() for _ in running]
    one = service.reserve(2)
    service.room.look(service.store.held(), free=0)
    assert [""] * 3 == [service.store.get(job.name).wish for job in running]
    job = service.submit(one)
    for _ in range(3):
        service.room.look(service.store.held(), free=0)
        assert ["", "", "yield"] == [service.store.get(job.name).wish for job in running]
    assert attempts[2] is not None
    attempts[2].move(JobState.RECOVERING)
    assert job.name == service.next()
    service.room.look(service.store.held(), free=0)
    assert ["", ""] == [service.store.get(job.name).wish for job in running[:2]]


def test_a_replay_takes_no_slot_that_is_kept(open_service: Callable[[int], Service]) -> None:
    """Nor does a job beside it: what replays hold is held. Without a reservation nothing is kept."""
    service = open_service(2)
    verifications = VerificationStore(service.store)
    for _ in range(2):
        stored_verification(service.database, state="QUEUED")
    one = service.reserve(1)
    claim = verifications.begin("server", may_start=service.calendar.has_room)
    assert claim is not None
    assert verifications.begin("server", may_start=service.calendar.has_room) is None
    other = service.submit()
    assert ([], [WaitReason.RESERVED]) == (service.started(), service.reasons(other))
    job = service.submit(one)
    assert job.name == service.next()
    verifications.give_up(claim.row, "", most_tries=0)
    assert other.name == service.next()
    service.cancel(one)
    assert verifications.begin("server", may_start=service.calendar.has_room) is not None


async def test_a_server_replays_nothing_in_a_reservation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its empty slot stays empty until the reservation is cancelled."""
    replays = Replays(monkeypatch)
    async with (
        running_cognate(tmp_path, workers={"slots": 1}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        request = pb.CreateReservationRequest(
            request_id=str(uuid.uuid4()), slots=1, start_time=time(now_us()), end_time=time(now_us() + HOUR_US)
        )
        one = (await client.pretraining.CreateReservation(request)).reservation
        database = open_database(tmp_path)
        name = stored_verification(database, state="QUEUED")
        database.close()
        before = replays.looks
        await until(lambda: replays.looks > before + 1, timeout_s=20)
        assert [] == replays.started
        cancel = pb.CancelReservationRequest(request_id=str(uuid.uuid4()), name=one.name)
        await client.pretraining.CancelReservation(cancel)
        await until(lambda: replays.started == [name], timeout_s=20)


# --- the calendar


def test_overlapping_reservations_share_the_slots(open_service: Callable[[int], Service]) -> None:
    """What is beyond them is refused, naming what is in the way; an end is no longer part of a reservation."""
    service = open_service(3)
    first, second = service.reserve(2, 1, 3), service.reserve(1, 2, 4)
    for start_h, end_h in ((0, 2.5), (2, 3), (1, 8)):
        with pytest.raises(ReservationConflictError, match=f"{first.name} .* {second.name}") as caught:
            service.reserve(1, start_h, end_h)
        assert first.name == caught.value.metadata["reservation"]
    service.reserve(1, 0, 2)
    service.reserve(2, 3, 4)
    service.cancel(first)
    service.reserve(1, 2, 3)


@pytest.mark.parametrize(
    ("slots", "start_h", "end_h", "field"),
    [(4, 1, 2, "slots"), (1, 2, 2, "end_time"), (1, -3, -1, "end_time"), (1, 0, 24 * 367, "end_time")],
)
def test_a_reservation_that_cannot_be_is_refused(
    open_service: Callable[[int], Service], slots: int, start_h: float, end_h: float, field: str
) -> None:
    """By the field that is wrong."""
    with pytest.raises(InvalidFieldError) as caught:
        open_service(3).reserve(slots, start_h, end_h)
    assert [field] == [violation.field for violation in caught.value.violations]


def time(time_us: int) -> Timestamp:
    result = Timestamp()
    result.FromMicroseconds(time_us)
    return result


async def test_the_calendar_over_a_connection(tmp_path: Path) -> None:
    """Made once for a request id, listed by pages, named by a job, cancelled, and then not to be named any more."""
    workers = {"slots": 0}
    async with (
        running_cognate(tmp_path, workers=workers, reservations={"slots": 2}) as server,
        AsyncCognateClient(server.address) as client,
    ):
        calls, now = client.pretraining, now_us()

        def asked(start_h: int, slots: int = 1) -> pb.CreateReservationRequest:
            return pb.CreateReservationRequest(
                request_id=str(uuid.uuid4()),
                slots=slots,
                start_time=time(now + start_h * HOUR_US),
                end_time=time(now + (start_h + 1) * HOUR_US),
                purpose="evaluation week",
            )

        request = asked(5, slots=2)
        made = (await calls.CreateReservation(request)).reservation
        assert made == (await calls.CreateReservation(request)).reservation
        assert ("local", "evaluation week", 2) == (made.caller, made.purpose, made.slots)
        with pytest.raises(ReservationConflictError, match=made.name):
            await calls.CreateReservation(asked(5))
        others = [(await calls.CreateReservation(asked(hour))).reservation for hour in (7, 9)]
        page = await calls.ListReservations(pb.ListReservationsRequest(page_size=2))
        rest = await calls.ListReservations(pb.ListReservationsRequest(page_size=2, page_token=page.next_page_token))
        assert [*others[::-1], made] == [*page.reservations, *rest.reservations]

        def start(**changes: Any) -> pb.StartPretrainingRequest:
            plan = pb.PretrainingPlan(total_steps=40)
            return pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan, **changes)

        job = (await calls.StartPretraining(start(reservation=made.name))).job.job
        assert job_pb2.WAIT_REASON_RESERVED == job.wait.reason
        assert f"its {made.name} begins at " in job.wait.message
        assert made.start_time == job.wait.expected_start
        cancel = pb.CancelReservationRequest(request_id=str(uuid.uuid4()), name=made.name)
        assert (await calls.CancelReservation(cancel)).reservation.HasField("cancel_time")
        assert (await calls.CancelReservation(cancel)).reservation.HasField("cancel_time")
        for dry in (True, False):
            with pytest.raises(ReservationNotFoundError, match=made.name):
                await calls.StartPretraining(start(reservation=made.name, validate_only=dry))
        assert 2 == len((await calls.ListReservations(pb.ListReservationsRequest())).reservations)
        everything = await calls.ListReservations(pb.ListReservationsRequest(include_ended=True))
        assert 3 == len(everything.reservations)
        assert 1 == len((await calls.ListJobs(pb.ListJobsRequest())).jobs)


# --- forecasts


def at_speed(service: Service, attempt: AttemptStore | None, *, steps_per_h: int, step: int) -> None:
    """Let a worker report two steps, the second one now, and the first one as long before as a step takes."""
    assert attempt is not None
    for at in (step - 1, step):
        attempt.progress(step=at, payload={"step": at, "total_steps": 100, "metrics": {}})
    with service.database.write() as connection:
        last = service.store.get(attempt.job.name, connection).last_sequence
        for sequence, time_us in ((last - 1, service.now - HOUR_US // steps_per_h), (last, service.now)):
            event = sa.update(t.events).filter_by(job_id=attempt.job.id, sequence=sequence)
            connection.execute(event.values(time_us=time_us))


def measured(service: Service, steps_per_h: int) -> None:
    """Leave an ended attempt of the configuration, with its speed."""
    service.submit()
    attempt = service.begin()
    at_speed(service, attempt, steps_per_h=steps_per_h, step=99)
    assert attempt is not None
    attempt.move(JobState.VALIDATING)
    attempt.move(JobState.SUCCEEDED)


def test_a_start_is_foretold_by_what_was_measured(open_service: Callable[[int], Service]) -> None:
    """One slot: 60 steps left of the running job at 20 an hour, then jobs of 100 steps at 50 an hour."""
    service = open_service(1)
    measured(service, 50)
    service.submit()
    attempt = service.begin()
    first, second = service.submit(), service.submit()
    assert [None, None] == service.expected(first, second)
    at_speed(service, attempt, steps_per_h=20, step=40)
    assert [pytest.approx(3, abs=0.01), pytest.approx(5, abs=0.01)] == service.expected(first, second)


def test_what_was_not_measured_is_not_foretold(open_service: Callable[[int], Service]) -> None:
    """The first job's start follows from the running one; how long it takes itself, nobody knows."""
    service = open_service(1)
    service.submit()
    attempt = service.begin()
    at_speed(service, attempt, steps_per_h=20, step=40)
    first, second = service.submit(), service.submit()
    assert [pytest.approx(3, abs=0.01), None] == service.expected(first, second)


def test_reservations_are_part_of_the_forecast(open_service: Callable[[int], Service]) -> None:
    """A job of one starts when it begins; others wait for the end of one that keeps every slot."""
    service = open_service(1)
    measured(service, 50)
    now, later = service.reserve(1, 0, 4), service.reserve(1, 6, 7)
    mine, his, other = service.submit(later), service.submit(now), service.submit()
    assert [pytest.approx(6, abs=0.01), pytest.approx(0, abs=0.01), pytest.approx(4, abs=0.01)] == (
        service.expected(mine, his, other)
    )
