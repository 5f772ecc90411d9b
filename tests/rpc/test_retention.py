"""What callers see of jobs whose events and files retention has removed."""

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import LogGoneError, SequenceOutOfRangeError
from tests.support.logs import PlayedWorker
from tests.support.servers import running_cognate
from tests.support.waiting import until
from training_common.store import tables as t

DAY_US = 86_400 * 10**6


async def test_a_swept_job_says_clearly_what_is_left(tmp_path: Path) -> None:
    """The job stays; a watch from the beginning is told the oldest sequence, one from there on gets the end."""
    async with running_cognate(tmp_path, retention={"sweep_interval_s": 0.05}) as server:
        worker = PlayedWorker(tmp_path)
        worker.begin()
        worker.write("x\n")
        worker.end()
        name = worker.job
        async with AsyncCognateClient(server.address) as client:

            async def job() -> pb.PretrainingJob:
                return (await client.pretraining.GetJob(pb.GetJobRequest(name=name))).job

            assert (1, False) == ((await job()).job.first_sequence, (await job()).job.HasField("files_removed_time"))
            with worker.database.write() as connection:
                connection.execute(sa.update(t.jobs).values(end_us=t.jobs.c.end_us - 366 * DAY_US))

            async def swept() -> bool:
                now = (await job()).job
                return now.HasField("files_removed_time") and now.first_sequence > 1

            await until(swept)
            one = (await job()).job
            assert one.last_sequence == one.first_sequence
            with pytest.raises(SequenceOutOfRangeError, match="removed the events") as caught:
                [frame async for frame in client.watch_job(name)]
            oldest = int(caught.value.metadata["oldest_sequence"])
            event, end = [frame async for frame in client.watch_job(name, oldest - 1)]
            assert (one.last_sequence, one.last_sequence) == (event.event.sequence, end.end.last_sequence)
            with pytest.raises(LogGoneError, match="retention has removed"):
                [frame async for frame in client.watch_logs(name)]
            removed = (await client.pretraining.GetServerInfo(pb.GetServerInfoRequest())).info.removed
            assert (1, 2, oldest - 1) == (removed.job_folders, removed.size_bytes, removed.events)
        worker.database.close()


async def test_a_store_that_is_busy_does_not_end_the_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stays up, and the next sweep does it."""
    failed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail(*_: object) -> None:
        loop.call_soon_threadsafe(failed.set)
        raise sa.exc.OperationalError("", None, Exception("database is locked"))

    with monkeypatch.context() as patch:
        patch.setattr("training_common.jobs.sweeper.Sweeper.sweep", fail)
        async with running_cognate(tmp_path, retention={"sweep_interval_s": 0.01}) as server:
            await failed.wait()
            failed.clear()
            await failed.wait()
            async with AsyncCognateClient(server.address) as client:
                assert "SERVING" == await client.health()
