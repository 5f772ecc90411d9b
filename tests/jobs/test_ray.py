"""The Ray engine on a local cluster of three nodes: Ray Train's own controller and workers, and real processes."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.proxy import FaultyProxy
from tests.support.toy_service import ClusterToyService, ended
from tests.support.toy_worker import expected_result
from training_common.engines.processes import EX_TEMPFAIL
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow
from training_common.settings import RaySettings

pytest.importorskip("ray", reason="the extra [ray] is not installed")
pytest.importorskip("ray.train", reason="the extra [ray] is not installed")

from tests.support.ray_cluster import RayCluster
from tests.support.small_pretraining import losses
from training_common.engines import ray as engine_module
from training_common.engines.ray import RayEngine
from training_common.engines.ray_driver import status_of
from training_common.engines.ray_process import ProcessEndedError
from training_common.jobs.folders import jobs_dir
from training_common.team import ALONE


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    yield cluster
    cluster.stop()


class ClusterService(ClusterToyService):
    """A toy service whose workers run on the Ray cluster."""

    look_every_s = 0.1
    patience_s = 120.0

    def __init__(self, folder: Path, address: str, *, ray: dict[str, Any] | None = None, **workers: Any) -> None:
        self.ray = RaySettings.model_validate({"address": address, **(ray or {})})
        super().__init__(folder, **workers)

    def _start(self) -> None:
        super()._start()
        workers = self.settings.workers.model_copy(update={"ray": self.ray})
        self.cluster_engine = RayEngine(
            workers, module="tests.support.toy_worker", owner=str(self.folder), log_dir=jobs_dir(self.settings)
        )
        self.scheduler = Scheduler(
            self.store, self.cluster_engine, workers, settings_file=self.settings_file, server=self.server
        )


@pytest.fixture
def service(tmp_path: Path, cluster: RayCluster) -> Iterator[ClusterService]:
    service = ClusterService(tmp_path, cluster.address, slots=2)
    yield service
    service.database.close()


def processes_of(job: JobRow) -> dict[str, psutil.Process]:
    """Return a job's processes by their rank, that of one alone being ""."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if job.name in words and "training_common.engines.child" in words:
            found[process.environ().get("RANK", "")] = process
    return found


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([-9], 137),
        ([EX_TEMPFAIL, -9], 137),
        ([EX_TEMPFAIL, -11], 139),
        ([EX_TEMPFAIL, 1], 1),
        ([None, EX_TEMPFAIL], EX_TEMPFAIL),
    ],
)
def test_the_worker_ends_as_the_process_that_began_it(statuses: list[int | None], expected: int) -> None:
    """Not as those that missed it. A process that Ray has lost was ended from outside."""
    failures = {
        rank: RuntimeError("the actor died") if status is None else ProcessEndedError(status)
        for rank, status in enumerate(statuses)
    }
    assert status_of(failures) == expected


@pytest.mark.slow
async def test_a_worker_is_a_ray_job(service: ClusterService) -> None:
    """A restarted server finds it by its submission id; stopped, it leaves nothing, and another one goes on."""
    job = service.submit(steps=60, step_s=0.05, checkpoint_every=5)
    await service.until(job, lambda row: row.step >= 7)
    folder = job.name.removeprefix("jobs/")
    assert service.handle(job) == f"forge-{folder}-1"
    before = processes_of(job)
    service.restart()
    step = service.store.get(job.name).step
    await service.until(job, lambda row: row.step > step)
    for _ in range(2):  # once more is no error
        service.cluster_engine.kill(service.handle(job))
    job = await service.until(job, ended)
    assert (job.state, job.attempt, job.retries_without_progress) == (JobState.SUCCEEDED, 2, 0)
    assert [expected_result(60)] == service.result(job)
    assert psutil.wait_procs(list(before.values()), timeout=20)[1] == []
    assert "was stopped" in service.cuts(job)[0]
    # What processes write is in the attempt's log, and a lost answer to a launch is no second worker.
    assert "attempt ended" in service.log(job)
    again = service.cluster_engine.launch(["--attempt", "2"], log_name=f"{folder}/logs/attempt-2.log")
    assert again == f"forge-{folder}-2"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_what_is_lost_is_followed_by_another_attempt(service: ClusterService, cluster: RayCluster) -> None:
    """A killed process, Ray's over it, and a node: each time the job goes on from its checkpoint, at no cost."""
    job = service.submit(steps=60, step_s=0.05, checkpoint_every=5, processes=2)
    for attempt, (lost, words) in enumerate(
        [("process", "exit status 137"), ("ray", "lost a process"), ("node", "lost a process")], start=1
    ):
        # Beyond the attempt before, and beyond a checkpoint.
        await service.until(job, lambda row, least=12 * attempt: row.step >= least)  # type: ignore[misc]
        assert service.store.get(job.name).attempt == attempt
        before = processes_of(job)
        assert sorted(before) == ["0", "1"]
        nodes = [cluster.node_of(process) for process in before.values()]
        assert nodes[0] is not nodes[1]
        if lost == "process":
            before["1"].kill()
        elif lost == "ray":
            parent = before["1"].parent()
            assert parent is not None
            parent.kill()
        else:
            cluster.kill(nodes[0] or nodes[1])
        await service.until(job, lambda row, last=attempt: row.attempt > last)  # type: ignore[misc]
        assert words in service.cuts(job)[-1]
        assert psutil.wait_procs(list(before.values()), timeout=20)[1] == []
    job = await service.until(job, ended)
    assert (job.state, job.attempt, job.retries_without_progress) == (JobState.SUCCEEDED, 4, 0)
    assert [expected_result(60)] == service.result(job)


@pytest.mark.slow
async def test_a_worker_without_room_is_waited_for(tmp_path: Path, cluster: RayCluster) -> None:
    """However long the cluster has none: longer here than a start may take, and than silence may last."""
    service = ClusterService(tmp_path, cluster.address, ray={"resources": {"CPU": 1, "room": 1}})
    job = service.submit(steps=5)
    await service.until(job, lambda row: row.attempt == 1)
    handle = service.store.held()[0][1].launched
    # Before, its driver has to start, which is no wait for room.
    await service.until(job, lambda _: bool(service.cluster_engine._without_room()))
    assert service.cluster_engine.waits(handle)
    patience = service.scheduler._settings
    service.scheduler._settings = patience.model_copy(
        update={"start_timeout_s": 0.5, "silent_cut_s": 0.5, "lost_after_s": 0.2}
    )
    until = time.monotonic() + 3
    while time.monotonic() < until:
        await asyncio.to_thread(service.scheduler.tick)
        await asyncio.sleep(0.1)
    assert (service.store.get(job.name).state, service.store.get(job.name).attempt) == (JobState.PREPARING, 1)
    service.scheduler._settings = patience
    cluster.add(room=1)
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    service.database.close()


@pytest.mark.slow
async def test_a_cluster_that_is_away_ends_no_worker(
    tmp_path: Path, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a server that starts meanwhile: what nobody can see is not lost. New workers wait."""
    monkeypatch.setattr(engine_module, "_CALL_TIMEOUT_S", 1)
    proxy = FaultyProxy(cluster.port)
    service = ClusterService(tmp_path, f"http://{proxy.address}")
    job = service.submit(steps=100, step_s=0.05)
    await service.until(job, lambda row: row.step >= 3)
    for away in (proxy.partition, proxy.refuse):
        away()
        service.restart()
        step = service.store.get(job.name).step
        await service.until(job, lambda row, step=step: row.step >= step + 5)  # type: ignore[misc]
        proxy.heal()
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    proxy.refuse()
    second = service.submit(steps=3)
    await service.until(second, lambda row: row.attempt == 1 and row.state is JobState.RECOVERING)
    assert service.scheduler.last_launch_failed
    assert "Ray did not take the job" in service.cuts(second)[0]
    service.steer("cancel", second)
    service.database.close()
    proxy.close()


@pytest.mark.slow
async def test_two_processes_on_two_nodes_train_as_one(
    tmp_path: Path, service: ClusterService, cluster: RayCluster
) -> None:
    """A small pretraining: the loss of every step, with uneven rows and memory carried over."""
    engine = RayEngine(
        service.settings.workers.model_copy(update={"ray": service.ray}),
        module="tests.support.small_pretraining",
        owner="training",
        log_dir=tmp_path,
    )
    file = tmp_path / "losses"
    arguments = ["--attempt", "1", "--losses", str(file)]
    handle = engine.launch(arguments, log_name="training/logs/attempt-1.log", processes=2)
    async with asyncio.timeout(120):
        while engine.alive(handle):
            await asyncio.sleep(0.2)
            await asyncio.to_thread(engine.tidy)
    assert file.exists(), (tmp_path / "training/logs/attempt-1.log").read_text()
    assert json.loads(file.read_text()) == pytest.approx(losses(ALONE, tmp_path / "alone"), rel=2e-6)
