"""Jobs of several processes: slots, and what becomes of a job when one of its processes is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cognate_server.leases import LeaseStore, Resource
from cognate_server.resources import CognateResourceManager
from cognate_server.settings import LendingSettings
from cognateforge.exceptions import InvalidFieldError
from cognateforge.job.v1 import job_pb2
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common import worker
from training_common.attempt import TeamBrokenError
from training_common.compute import require_slots, threads_of
from training_common.engines.processes import EX_TEMPFAIL, pid_of
from training_common.engines.torchrun import status_of
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow
from training_common.settings import WorkerSettings


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ToyService]:
    service = ToyService(tmp_path, slots=2)
    yield service
    service.database.close()


def processes_of(service: ToyService, job: JobRow) -> dict[str, psutil.Process]:
    """Return the processes of a job's worker by their rank, the agent's being ""."""
    agent = psutil.Process(pid_of(service.handle(job)))
    return {process.environ().get("RANK", ""): process for process in (agent, *agent.children())}


def wait_for(processes: dict[str, psutil.Process]) -> list[psutil.Process]:
    """Return those that are still there after a while."""
    return psutil.wait_procs(list(processes.values()), timeout=20)[1]


def test_a_job_takes_a_slot_for_every_process(service: ToyService) -> None:
    """One of two processes waits until two slots are free, and nobody overtakes it; one of three is not for here."""
    for processes in (1, 3, 2, 1):
        service.submit(steps=1, processes=processes)
    begun = [service.store.begin_attempt("test", most=2, free=free) for free in (2, 1, 2)]
    assert [job and job.processes for job in begun] == [1, None, 2]
    with service.database.read() as connection:
        assert service.store.held_slots(connection) == 3
        assert service.store.due_slots(connection) == 4


def test_a_plan_for_more_processes_than_slots_is_refused() -> None:
    """The field and the remedy are named. A server without slots takes jobs in for others."""
    compute = job_pb2.Compute(processes=3)
    with pytest.raises(InvalidFieldError, match=r"workers\.slots") as refused:
        require_slots(compute, WorkerSettings(slots=2))
    assert ["plan.compute.processes"] == [violation.field for violation in refused.value.violations]
    require_slots(compute, WorkerSettings(slots=3))
    with pytest.raises(InvalidFieldError, match=r"at most 1.*workers\.devices"):
        require_slots(compute, WorkerSettings(slots=3, devices=("0", "1", "2"), devices_per_worker=2))
    shared = WorkerSettings(slots=3, devices=("0", "1", "2"), devices_per_worker=2, workers_per_device=2)
    require_slots(compute, shared)
    require_slots(compute, WorkerSettings(slots=0))


@pytest.mark.parametrize(("setting", "processes", "expected"), [(0, 1, 8), (0, 3, 2), (0, 16, 1), (4, 3, 4)])
def test_cores_are_shared_out_among_processes(setting: int, processes: int, expected: int) -> None:
    """Without a setting the processes of a job do not fight for cores."""
    assert threads_of(setting, 8, processes) == expected


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([-signal.SIGTERM, -signal.SIGKILL], -signal.SIGKILL),
        ([EX_TEMPFAIL, -signal.SIGSEGV], -signal.SIGSEGV),
        ([EX_TEMPFAIL, 1], 1),
        ([EX_TEMPFAIL, -signal.SIGTERM], EX_TEMPFAIL),
    ],
)
def test_the_worker_ends_as_the_process_that_began_it(statuses: list[int], expected: int) -> None:
    """Not as those that were ended for its sake, or that missed it."""
    failures = [ProcessFailure(rank, rank, status, "") for rank, status in enumerate(statuses)]
    assert status_of(failures) == expected


def test_a_lost_partner_is_no_fault_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch tells of it by a plain RuntimeError, wherever in a step it comes; others are the job's own."""
    lost = RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    assert worker._platform_fault(lost) == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for error in (lost, TeamBrokenError("gone")):
        assert worker._platform_fault(error) == "another process of the worker is gone"
    assert worker._platform_fault(RuntimeError("size mismatch")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1", ""])
async def test_a_lost_process_ends_the_attempt_and_the_next_goes_on(rank: str, service: ToyService) -> None:
    """The first one, another one, and the agent over them: no process is left, and nothing counts against the job."""
    job = service.submit(steps=40, step_s=0.05, checkpoint_every=5, processes=2)
    await service.until(job, lambda row: row.step >= 12)
    before = processes_of(service, job)
    assert sorted(before) == ["", "0", "1"]
    before[rank].kill()
    await service.until(job, lambda row: row.attempt == 2)
    assert wait_for(before) == []
    job = await service.until(job, ended)
    assert (job.state, job.attempt, job.retries_without_progress) == (JobState.SUCCEEDED, 2, 0)
    assert [expected_result(40)] == service.result(job)
    cut = [e.payload["message"] for e in service.events(job) if e.payload.get("to") == "RECOVERING"]
    assert "ended by SIGKILL" in cut[0]


@pytest.mark.slow
async def test_several_processes_are_found_again_and_paused_and_killed_as_one(service: ToyService) -> None:
    """A restarted server knows them by their agent; a pause leaves none; one that is given up takes all with it."""
    job = service.submit(steps=60, step_s=0.05, checkpoint_every=5, processes=2)
    await service.until(job, lambda row: row.step >= 5)
    before = processes_of(service, job)
    service.restart()
    step = service.store.get(job.name).step
    await service.until(job, lambda row: row.step > step)
    assert service.store.get(job.name).attempt == 1
    service.steer("pause", job)
    job = await service.until(job, lambda row: row.state is JobState.PAUSED)
    assert wait_for(before) == []
    service.steer("resume", job)
    await service.until(job, lambda row: row.step > job.step)
    second = processes_of(service, job)
    service.engine.kill(service.handle(job))
    assert wait_for(second) == []
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 3)
    assert [expected_result(60)] == service.result(job)


@pytest.mark.slow
async def test_an_error_of_any_process_fails_the_job(service: ToyService) -> None:
    """Not only the first one's, and once: its text stays in the log, and nothing is written after it."""
    job = service.submit(steps=10_000, step_s=0.01, assistant_raises_at=5, processes=2)
    job = await service.until(job, ended)
    assert (job.state, job.failure_reason, job.attempt) == (JobState.FAILED, "INTERNAL", 1)
    assert "secret" not in job.failure_message
    assert "secret detail" in service.log(job)
    assert service.events(job)[-1].payload["to"] == "FAILED"


def test_a_process_goes_with_its_parent(tmp_path: Path) -> None:
    """However the parent ends: SIGKILL leaves it no time to tell."""
    child = (
        "import os, sys, time; from training_common.engines.processes import end_with_parent; "
        "end_with_parent(os.getppid()); print('ready', flush=True); time.sleep(600)"
    )
    parent = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); "
    started = subprocess.Popen(
        [sys.executable, "-c", parent + "import time; time.sleep(600)"], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    lines = {started.stdout.readline().strip(), started.stdout.readline().strip()}
    process = psutil.Process(int((lines - {"ready"}).pop()))
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert psutil.wait_procs([process], timeout=10)[1] == []
    started.stdout.close()


def test_what_is_lent_counts_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one job hold the cores of two slots."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    service = ToyService(tmp_path)
    service.submit(processes=2, steps=3)
    workers = WorkerSettings(slots=4, threads=2)
    manager = CognateResourceManager(
        service.store, LeaseStore(service.database), workers=workers, lending=LendingSettings()
    )
    assert (0, 4) == held_and_available(manager)
    assert service.store.begin_attempt("test") is not None
    assert (4, 4) == held_and_available(manager)
    service.database.close()


def held_and_available(manager: CognateResourceManager) -> tuple[int, int]:
    [cores] = [one for one in manager.availability().amounts if one.kind is Resource.CPU]
    return cores.held, cores.available
