"""Storage that fails under running jobs: told clearly, nothing corrupt, and the job goes on by itself when it is over.

Real mounts, real workers. The retry budgets of these services are empty: whatever counted would fail the job at once.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.jobs.test_jobs import assert_contiguous, pid
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from tests.support.waiting import until
from training_common import faults
from training_common.jobs.folders import job_dir, jobs_dir, log_name
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow

pytestmark = pytest.mark.slow
MIB = 1 << 20


def mount(*arguments: str) -> None:
    """Run mount. Skips the test where that is not allowed."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


def umount(folder: Path) -> None:
    """Take away what was mounted last."""
    subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        # As often as it was mounted over.
        with contextlib.suppress(subprocess.CalledProcessError):
            while True:
                umount(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch again at once."""
    monkeypatch.setattr("training_common.jobs.scheduler.MAX_LAUNCH_PAUSE_S", 0.2)
    monkeypatch.setattr("training_common.jobs.scheduler.LAUNCH_PAUSE_S", 0.2)


@pytest.fixture
def service(tmp_path: Path, mounted: Path, quick: None) -> Iterator[ToyService]:
    service = ToyService(tmp_path, shared_dir=mounted, retries_without_progress=0, kills_without_progress=1)
    yield service
    service.database.close()


def told(service: ToyService, job: JobRow, kind: str) -> list[str]:
    return [e.payload["message"] for e in service.events(job) if e.payload.get("kind") == kind]


def assert_whole(service: ToyService, job: JobRow, steps: int) -> None:
    """The job ended as if nothing had been, and every checkpoint that is told to be there is whole."""
    assert (JobState.SUCCEEDED, [expected_result(steps)]) == (job.state, service.result(job))
    assert (0, 0) == (job.retries_without_progress, job.kills_without_progress)
    assert_contiguous(service, job)
    folder = job_dir(service.settings, job.name) / "checkpoints"
    there = sorted(path.name for path in folder.iterdir())
    assert sorted(row.folder for row in service.store.checkpoints(job.id) if row.available) == there


async def waits(service: ToyService, job: JobRow, times: int, what: str = "waiting_for_storage") -> JobRow:
    return await service.until(job, lambda row: len(told(service, row, what)) >= times)


async def test_a_full_disk_is_waited_out(service: ToyService, mounted: Path) -> None:
    """The attempt that meets it ends; the next ones look for room, less and less often, until there is some."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10, ballast_bytes=MIB)
    await service.until(job, lambda row: row.step >= 12)
    ballast = mounted / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 65_536)
    job = await waits(service, job, 2)
    assert ["the worker's machine failed it: no space left for a checkpoint; another attempt will go on"] == told(
        service, job, "platform"
    )
    assert "No space left on device: 1048" in told(service, job, "waiting_for_storage")[0]
    assert job.state in (JobState.QUEUED, JobState.PREPARING)
    ballast.unlink()
    job = await service.until(job, ended)
    assert_whole(service, job, 60)


def test_a_library_that_takes_back_what_did_not_fit_is_believed(mounted: Path) -> None:
    """A tensor file that could not be written whole is removed: when one looks, nothing is full any more."""
    with pytest.raises(SafetensorError) as caught:
        save_file({"weight": torch.zeros(4 * MIB)}, mounted / "model.safetensors")
    assert shutil.disk_usage(mounted).free > MIB
    assert faults.of_full_disk(caught.value, mounted)
    assert not faults.of_full_disk(RuntimeError("another error"), mounted)


async def test_a_full_disk_that_holds_the_store_too_is_waited_out(mounted: Path, quick: None) -> None:
    """Neither side can write a word: the worker ends, the server goes on looking, and both go on when there is room."""
    (mounted / "all").mkdir()
    service = ToyService(mounted / "all", retries_without_progress=0)
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10, ballast_bytes=MIB // 2)
    looking = asyncio.create_task(service.scheduler.run())
    await until(lambda: service.store.get(job.name).step >= 12)
    worker = psutil.Process(pid(service.handle(job)))
    ballast = mounted / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    await until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 30)
    await asyncio.sleep(1.0)  # the scheduler meets it, too
    ballast.unlink()
    await until(lambda: ended(service.store.get(job.name)), 90)
    assert_whole(service, service.store.get(job.name), 60)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    service.database.close()


async def test_a_folder_that_turns_read_only_is_waited_out(service: ToyService, mounted: Path) -> None:
    """No worker can be started there; the job says why, and goes on when it can be written."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: row.step >= 12)
    # Over itself: what the worker holds open stays as it was, as on a disk whose errors make it read-only.
    mount("--bind", str(mounted), str(mounted))
    mount("-o", "remount,ro,bind", str(mounted))
    message = "the worker could not be started: Read-only file system"

    def refused() -> int:
        return sum(message in e.payload.get("message", "") for e in service.events(job))

    job = await service.until(job, lambda _: refused() >= 2)
    assert "the worker's machine failed it: Read-only file system; another attempt will go on" in told(
        service, job, "platform"
    )
    umount(mounted)
    job = await service.until(job, ended)
    assert_whole(service, job, 60)


async def test_a_folder_that_is_not_mounted_costs_a_job_nothing(service: ToyService, mounted: Path) -> None:
    """Its checkpoints are away, not lost: it does not begin anew, and goes on when they are back."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: row.step >= 25)
    service.steer("pause", job)
    job = await service.until(job, lambda row: row.state is JobState.PAUSED)
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mounted))  # hides what is below
    service.steer("resume", job)
    job = await waits(service, job, 1)
    assert "checkpoints is in its folder; mount what belongs there" in told(service, job, "waiting_for_storage")[0]
    assert all(row.available for row in service.store.checkpoints(job.id)[:2])
    umount(mounted)
    job = await service.until(job, ended)
    assert_whole(service, job, 60)
    steps = [e.payload["step"] for e in service.events(job) if e.kind == "progress"]
    assert list(range(1, 61)) == steps


async def test_a_pipe_in_place_of_the_log_is_waited_out(service: ToyService) -> None:
    """Nobody is kept waiting by it: the worker is started when it is gone."""
    job = service.submit(steps=5)
    path = jobs_dir(service.settings) / log_name(job.name, 1)
    path.parent.mkdir(parents=True)
    for attempt in (1, 2):
        os.mkfifo(path.with_name(f"attempt-{attempt}.log"))
    job = await service.until(job, ended)
    assert 3 == job.attempt
    assert (JobState.SUCCEEDED, [expected_result(5)]) == (job.state, service.result(job))
    reasons = [
        e.payload["message"] for e in service.events(job) if "could not be started" in e.payload.get("message", "")
    ]
    assert 2 == len(reasons)


async def test_a_slow_disk_is_not_taken_for_a_dead_worker(tmp_path: Path) -> None:
    """A save that takes longer than silence may last: the worker beats beside it, and nothing is cut."""
    service = ToyService(tmp_path, retries_without_progress=0, kills_without_progress=0, silent_cut_s=1.0)
    job = service.submit(steps=20, checkpoint_every=10, slow_save_s=1.5)
    job = await service.until(job, ended)
    assert 1 == job.attempt
    assert_whole(service, job, 20)
    service.database.close()
