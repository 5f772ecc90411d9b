"""WatchLogs over gRPC: both services, real files, connections that break."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from cognateforge.client import AsyncAgentClient, AsyncCognateClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exceptions import (
    AttemptNotFoundError,
    JobNotFoundError,
    LogGoneError,
    OffsetOutOfRangeError,
    UnavailableError,
)
from cognateforge.job.v1 import job_pb2
from tests.support.cuts import NEVER
from tests.support.logs import PlayedWorker
from tests.support.proxy import FaultyProxy
from tests.support.servers import running_agent, running_cognate
from training_common.store import tables as t


@asynccontextmanager
async def service(kind: str, folder: Path, **settings: Any) -> AsyncIterator[AsyncCognateClient | AsyncAgentClient]:
    """Yield a client of a running service."""
    if kind == "cognate":
        async with running_cognate(folder, **settings) as server, AsyncCognateClient(server.address) as cognate:
            yield cognate
    else:
        async with running_agent(folder, **settings) as server, AsyncAgentClient(server.address) as agent:
            yield agent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "service"


@pytest.fixture
async def cognate(folder: Path) -> AsyncIterator[AsyncCognateClient]:
    async with running_cognate(folder) as server, AsyncCognateClient(server.address) as client:
        yield client


@pytest.fixture
def worker(cognate: AsyncCognateClient, folder: Path) -> Iterator[PlayedWorker]:
    worker = PlayedWorker(folder)
    yield worker
    worker.database.close()


def text_of(frames: list[job_pb2.LogFrame]) -> str:
    lines = [line for frame in frames for line in frame.lines.lines]
    return "".join(line.text + ("" if line.continued else "\n") for line in lines)


@pytest.mark.parametrize("kind", ["cognate", "agent"])
async def test_logs_are_followed_over_attempts_to_the_jobs_end(kind: str, folder: Path) -> None:
    """What is written comes at once; a new attempt goes on below the old one; last words come before the end frame."""
    async with service(kind, folder, heartbeat_frame_s=0.3) as client:
        worker = PlayedWorker(folder)
        frames = client.watch_logs(worker.job, follow=True)
        coming = asyncio.ensure_future(anext(frames))
        worker.begin()
        worker.write("one\ntwo\nunfin")
        assert ["one", "two"] == [line.text for line in (await coming).lines.lines]
        worker.write("ished\n")
        assert ["unfinished"] == [line.text for line in (await anext(frames)).lines.lines]
        worker.write("killed here")
        worker.lose()
        worker.begin()
        worker.write("again\n")
        seen = [await anext(frames), await anext(frames)]
        assert [(1, "killed here"), (2, "again")] == [(f.lines.attempt, f.lines.lines[0].text) for f in seen]
        worker.end()
        await asyncio.sleep(0.05)  # the server has seen the end by now; the worker says more
        worker.write("last words\n")
        *rest, end = [frame async for frame in frames]
        assert "last words\n" == text_of(rest)
        assert (2, worker.path.stat().st_size) == (end.end.attempt, end.end.next_position)
        worker.database.close()


async def test_what_is_there_is_sent_and_no_more(cognate: AsyncCognateClient, worker: PlayedWorker) -> None:
    """Without follow a watch ends, whatever the job does: of no attempt, a running one, an older one, from a place."""

    async def read(**options: Any) -> list[job_pb2.LogFrame]:
        return [frame async for frame in cognate.watch_logs(worker.job, **options)]

    assert [job_pb2.LogFrame(end=job_pb2.LogEnd())] == await read()
    worker.begin()
    worker.write("one\ntwo")
    *lines, end = await read()
    assert ("two", True) == (lines[-1].lines.lines[-1].text, lines[-1].lines.lines[-1].continued)
    assert (1, 7) == (end.end.attempt, end.end.next_position)
    worker.lose()
    worker.begin()
    worker.write("three\n")
    assert "three\n" == text_of(await read())
    assert "one\ntwo\n" == text_of(await read(attempt=1))
    assert "two\n" == text_of(await read(attempt=1, position=4))


async def test_what_cannot_be_watched_is_refused_with_a_reason(
    cognate: AsyncCognateClient, worker: PlayedWorker, folder: Path
) -> None:
    """No job, no attempt, beyond the end, no file: the last names the host where the worker ran."""

    async def read(name: str = worker.job, **options: Any) -> list[job_pb2.LogFrame]:
        return [frame async for frame in cognate.watch_logs(name, **options)]

    with pytest.raises(JobNotFoundError):
        await read("jobs/00000000-0000-4000-8000-000000000000")
    with pytest.raises(AttemptNotFoundError, match="has had 0 attempts"):
        await read(attempt=1)
    worker.begin()
    worker.write("x\n")
    with pytest.raises(OffsetOutOfRangeError):
        await read(position=3)
    worker.end(ago_s=90)
    shutil.rmtree(folder / "jobs")
    with worker.database.write() as connection:
        connection.execute(sa.update(t.attempts).values(start_us=t.attempts.c.start_us - 90_000_000))
    with pytest.raises(LogGoneError, match=r"ran on node-7: .* the same shared_dir"):
        await read()


async def test_a_log_that_grows_faster_than_it_is_read_comes_to_its_end(
    cognate: AsyncCognateClient, worker: PlayedWorker
) -> None:
    """Who asks for the log as it is gets what was there at first, and not much more."""
    worker.begin()
    worker.write("x" * 999 + "\n")
    frames = []
    async for frame in cognate.watch_logs(worker.job):
        frames.append(frame)
        worker.write("x" * 999 + "\n")
        await asyncio.sleep(0.01)
    assert ["lines", "end"] == [frame.WhichOneof("frame") for frame in frames]


async def test_what_is_no_file_is_not_read(cognate: AsyncCognateClient, worker: PlayedWorker) -> None:
    """A pipe in the log's place keeps nobody waiting."""
    worker.begin()
    worker.path.unlink()
    os.mkfifo(worker.path)
    request = pretraining_pb2.WatchLogsRequest(name=worker.job)
    with pytest.raises(UnavailableError, match="cannot be read now"):
        [frame async for frame in cognate.pretraining.WatchLogs(request, timeout=10)]


async def test_a_silent_log_sends_heartbeats(folder: Path) -> None:
    """A follower can tell a quiet worker from a dead server."""
    async with running_cognate(folder, heartbeat_frame_s=0.1) as server, AsyncCognateClient(server.address) as client:
        worker = PlayedWorker(folder)
        worker.begin()
        worker.write("x\n")
        request = pretraining_pb2.WatchLogsRequest(name=worker.job, follow=True)
        stream = client.pretraining.WatchLogs(request, timeout=10)
        frames = [(await anext(aiter(stream))).frame for _ in range(3)]
        assert ["lines", "heartbeat", "heartbeat"] == [frame.WhichOneof("frame") for frame in frames]
        assert (1, 2) == (frames[-1].heartbeat.attempt, frames[-1].heartbeat.next_position)
        stream.cancel()
        worker.database.close()


async def test_settings_and_environment_give_no_secret_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that prints its connection string does not tell it to viewers."""
    monkeypatch.setenv("HUB_TOKEN", "hf_verysecret")
    async with service("cognate", folder, consul={"token": "consul-secret"}) as client:
        worker = PlayedWorker(folder)
        worker.begin()
        worker.write("a hf_verysecret b consul-secret c postgresql://u:pass@host/db d\n")
        frames = [frame async for frame in client.watch_logs(worker.job)]
        assert f"a {'*' * 13} b {'*' * 13} c postgresql://u:****@host/db d\n" == text_of(frames)
        worker.database.close()


@pytest.mark.slow
async def test_no_line_is_lost_or_doubled_over_a_hundred_cuts(cognate_address: str, folder: Path) -> None:
    """While three attempts write, over connections that are reset behind any frame and in the midst of some."""
    worker = PlayedWorker(folder)
    pick = random.Random(5)  # noqa: S311
    # A frame holds up to 64 KiB of text: connections that die earlier every time would bring none.
    after = [pick.choice((NEVER, pick.randint(500, 200_000))) for _ in range(100)]
    proxy = FaultyProxy(int(cognate_address.rpartition(":")[2]), after_bytes=after)

    def follow() -> str:
        frames = []
        with CognateClient(proxy.address) as client:
            for frame in client.watch_logs(worker.job, attempt=1, follow=True):
                frames.append(frame)
                if proxy.cut < 100 and pick.random() < 0.7:
                    proxy.cut_all()
        return text_of(frames)

    written = ""
    worker.begin()
    reading = asyncio.create_task(asyncio.to_thread(follow))
    for attempt in (1, 2, 3):
        if attempt > 1:
            worker.begin()
        for number in range(100):
            text = "".join(f"{attempt}.{number}.{n} {'x' * pick.randint(0, 300)}\n" for n in range(50))
            worker.write(text)
            written += text
            await asyncio.sleep(0.03)
        if attempt < 3:
            worker.lose()
    worker.end()
    assert written == await reading
    print(f"{proxy.cut} cuts, {len(written)} bytes")
    assert proxy.cut >= 50
    proxy.close()
    worker.database.close()


@pytest.fixture
async def cognate_address(folder: Path) -> AsyncIterator[str]:
    async with running_cognate(folder) as server:
        yield server.address


@pytest.mark.slow
async def test_a_follower_that_does_not_read_is_waited_for(cognate_address: str, folder: Path) -> None:
    """Forty megabytes of log cost the server no more than what is on the way; the rest follows when it reads."""
    worker = PlayedWorker(folder)
    worker.begin()
    line = "x" * 1000 + "\n"
    for _ in range(40):
        worker.write(line * 1000)
    worker.end(ago_s=5)
    async with AsyncCognateClient(cognate_address) as client:
        before_bytes = psutil.Process().memory_info().rss
        frames = client.watch_logs(worker.job)
        count = len((await anext(frames)).lines.lines)
        await asyncio.sleep(1.5)
        grown_bytes = psutil.Process().memory_info().rss - before_bytes
        async for frame in frames:
            count += len(frame.lines.lines)
    assert 40_000 == count
    print(f"grown by {grown_bytes >> 20} MiB")
    assert grown_bytes < 24 << 20
    worker.database.close()
