"""A watch survives whatever breaks its streams: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
from collections import deque

import grpc
import pytest

from cognateforge import exceptions
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import JOB, Driver, Fake, progress_events


def sequences(frames: list[job_pb2.WatchFrame]) -> list[int]:
    """Return the events' sequences; the last frame must be the end."""
    assert frames[-1].WhichOneof("frame") == "end"
    return [frame.event.sequence for frame in frames[:-1]]


@pytest.mark.parametrize("how", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, None])
async def test_nothing_is_lost_or_doubled_over_broken_streams(
    client: Driver, fake: Fake, how: grpc.StatusCode | None
) -> None:
    """Streams that end after random numbers of events, with an error or without, add up to the whole history."""
    pick = random.Random(7)  # noqa: S311
    fake.history.events = progress_events(200)
    fake.history.cuts, fake.history.how = deque(pick.randint(1, 25) for _ in range(12)), how
    assert list(range(1, 201)) == sequences(await client.watch())
    assert fake.script.count("WatchJob") > 6


async def test_a_server_that_repeats_itself_is_not_believed_twice(client: Driver, fake: Fake) -> None:
    """Events that were delivered before are dropped."""
    fake.history.overlap, fake.history.cuts = 3, deque([5, 5, 5])
    assert list(range(1, 21)) == sequences(await client.watch())


async def test_a_gap_is_asked_for_again(client: Driver, fake: Fake) -> None:
    """An event that is missing is never passed over in silence."""
    del fake.history.events[4]
    with pytest.raises(exceptions.UnavailableError, match="event 5 is missing"):
        await client.watch(give_up_after_s=0.2)


async def test_a_watch_starts_where_it_is_told(client: Driver) -> None:
    """after_sequence is honoured."""
    assert sequences(await client.watch(after=17)) == [18, 19, 20]


async def test_a_watch_gives_up_when_its_patience_is_spent(client: Driver, fake: Fake) -> None:
    """A service that stays away ends the watch with its own error."""
    fake.script.always = exceptions.UnavailableError("the server is draining")
    with pytest.raises(exceptions.UnavailableError):
        await client.watch(give_up_after_s=0.3)


async def test_a_verdict_ends_a_watch_at_once(client: Driver) -> None:
    """No such job: there is nothing to wait for."""
    with pytest.raises(exceptions.JobNotFoundError):
        await client.watch(JOB.replace("1", "9"))


async def test_a_watch_survives_a_restart_of_the_server(client: Driver, fake: Fake) -> None:
    """The port is the same, the process is not: the watch goes on."""
    fake.history.cuts = deque([5])
    before = await client.watch(after=0)
    fake.stop()
    fake.start()
    assert sequences(before) == sequences(await client.watch(after=0))
