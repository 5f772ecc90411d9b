"""A watch of a job or of the models survives whatever breaks its streams: nothing is lost, nothing comes twice."""

from __future__ import annotations

import random
from collections import deque

import grpc
import pytest

from cognateforge import exceptions
from cognateforge.client import ModelSnapshot
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import JOB, Driver, Fake, progress_events, sequence_of


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


@pytest.mark.parametrize("how", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, None])
async def test_no_model_event_is_lost_or_doubled_over_broken_streams(
    client: Driver, fake: Fake, how: grpc.StatusCode | None
) -> None:
    """As for a job: streams that end anywhere add up to the whole outbox, in order."""
    pick = random.Random(7)  # noqa: S311
    fake.outbox.count, fake.outbox.how, fake.outbox.overlap = 200, how, 2
    fake.outbox.cuts = deque(pick.randint(1, 25) for _ in range(12))
    seen = await client.watch_models(until=200)
    assert list(range(1, 201)) == [sequence_of(one) for one in seen]
    assert fake.script.count("WatchModels") > 6


async def test_a_model_watch_starts_where_it_is_told(client: Driver) -> None:
    """after_sequence is honoured."""
    assert [18, 19, 20] == [sequence_of(one) for one in await client.watch_models(until=20, after=17)]


async def test_a_gap_between_model_events_is_asked_for_again(client: Driver, fake: Fake) -> None:
    """An event that is missing is never passed over in silence."""
    fake.outbox.missing = 5
    with pytest.raises(exceptions.UnavailableError, match="event 5 is missing"):
        await client.watch_models(until=20, give_up_after_s=0.2)


@pytest.mark.parametrize("cuts", [[], [1, 2], [2, 0, 2, 1]])
async def test_a_snapshot_is_one_result_and_events_follow_it(client: Driver, fake: Fake, cuts: list[int]) -> None:
    """A stream that breaks between its pages starts it again: nothing of it was told, and nothing comes twice."""
    fake.outbox.keep, fake.outbox.cuts = 5, deque(cuts)
    [snapshot] = await client.watch_models(until=20)
    assert isinstance(snapshot, ModelSnapshot)
    assert ([f"cognate-25m@{n}" for n in range(1, 21)], 20) == (
        [model.name for model in snapshot.models],
        snapshot.last_sequence,
    )
    asked = [call.request.after_sequence for call in fake.script.calls if call.method == "WatchModels"]
    assert [0] * (len(cuts) + 1) == asked


async def test_events_after_a_snapshot_are_resumed_after_it(client: Driver, fake: Fake) -> None:
    """Streams that break after the snapshot go on from its sequence and do not take it again."""
    fake.outbox.keep, fake.outbox.count, fake.outbox.after_snapshot = 5, 23, 3
    fake.outbox.cuts = deque([4, 0, 1])
    snapshot, *events = await client.watch_models(until=23)
    assert isinstance(snapshot, ModelSnapshot)
    assert [20, 21, 22, 23] == [snapshot.last_sequence, *map(sequence_of, events)]
    asked = [call.request.after_sequence for call in fake.script.calls if call.method == "WatchModels"]
    assert [0, 21, 21, 22] == asked


async def test_a_position_that_is_no_longer_kept_is_told(client: Driver, fake: Fake) -> None:
    """It is no reason to try again: the caller learns what is left."""
    fake.outbox.keep = 5
    with pytest.raises(exceptions.SequenceOutOfRangeError) as caught:
        await client.watch_models(until=20, after=3)
    assert {"oldest_sequence": "16"} == caught.value.metadata
    assert 1 == fake.script.count("WatchModels")


async def test_a_model_watch_gives_up_when_its_patience_is_spent(client: Driver, fake: Fake) -> None:
    """A service that stays away ends the watch with its own error."""
    fake.script.always = exceptions.UnavailableError("the server is draining")
    with pytest.raises(exceptions.UnavailableError):
        await client.watch_models(until=1, give_up_after_s=0.3)


def texts(frames: list[job_pb2.LogFrame]) -> list[str]:
    """Return the lines of a watch of logs; the last frame must be the end."""
    assert frames[-1].WhichOneof("frame") == "end"
    return [line.text for frame in frames for line in frame.lines.lines]


@pytest.mark.parametrize("how", [grpc.StatusCode.UNAVAILABLE, None])
async def test_no_line_of_a_log_is_lost_or_doubled_over_broken_streams(
    client: Driver, fake: Fake, how: grpc.StatusCode | None
) -> None:
    """Streams that end anywhere add up to every attempt's whole log, in order."""
    fake.logs.written = [[f"{attempt}.{number}" for number in range(60)] for attempt in (1, 2, 3)]
    pick = random.Random(7)  # noqa: S311
    fake.logs.cuts, fake.logs.how = deque(pick.randint(0, 25) for _ in range(12)), how
    seen = texts(await client.watch_logs(attempt=1, follow=True))
    assert [text for lines in fake.logs.written for text in lines] == seen
    assert fake.script.count("WatchLogs") > 6


async def test_the_newest_log_is_watched_from_where_it_is_told(client: Driver, fake: Fake) -> None:
    """Without an attempt, or with one and a position; a gap is told where it lies."""
    assert ["three", "four"] == texts(await client.watch_logs())
    assert ["two", "died"] == texts(await client.watch_logs(attempt=1, position=4))
    fake.logs.gap = 6
    gap, *rest = await client.watch_logs()
    assert (0, 6, ["four"]) == (gap.gap.position, gap.gap.next_position, texts(rest))


async def test_missing_bytes_of_a_log_are_never_passed_over_in_silence(client: Driver, fake: Fake) -> None:
    """A server that begins late is asked again, until the patience is spent."""
    fake.logs.late = 1
    with pytest.raises(exceptions.UnavailableError, match="byte 6 of attempt 2's log, and byte 0 is next"):
        await client.watch_logs(give_up_after_s=0.2)
