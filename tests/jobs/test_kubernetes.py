"""The Kubernetes engine against a double of the API: real worker processes, run by the double as its kubelet."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.toy_service import ClusterToyService, ended
from tests.support.toy_worker import expected_result
from training_common.jobs.scheduler import Scheduler
from training_common.jobs.states import JobState
from training_common.settings import KubernetesSettings

for library in ("kubernetes", "kubeflow_trainer_api"):
    pytest.importorskip(library, reason="the extra [kubernetes] is not installed")

from tests.support.kubernetes_double import ACCOUNT, KubernetesDouble  # noqa: E402 - only where the extra is
from training_common.engines.kubernetes import KubernetesEngine  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesDouble]:
    path = os.pathsep.join([str(ROOT / "clients"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    cluster = KubernetesDouble(tmp_path, environment={"PYTHONPATH": path})
    yield cluster
    cluster.stop()


class ClusterService(ClusterToyService):
    """A toy service whose workers run on the cluster."""

    def __init__(self, folder: Path, cluster: KubernetesDouble, *, queue: str = "", **workers: Any) -> None:
        values = {"namespace": "team", "runtime": "torch-cpu", "resources": {"cpu": "2"}}
        self.kubernetes = KubernetesSettings.model_validate(
            {**values, "queue": queue, "kubeconfig": cluster.kubeconfig}
        )
        super().__init__(folder, **workers)

    def _start(self) -> None:
        super()._start()
        # Its own type where the base has the local one.
        self.cluster_engine = KubernetesEngine(self.kubernetes, module="tests.support.toy_worker", owner="one")
        self.scheduler = Scheduler(
            self.store, self.cluster_engine, self.settings.workers, settings_file=self.settings_file, server=self.server
        )


@pytest.fixture
def service(tmp_path: Path, cluster: KubernetesDouble) -> Iterator[ClusterService]:
    service = ClusterService(tmp_path, cluster)
    yield service
    service.database.close()


async def test_a_worker_is_a_train_job(service: ClusterService, cluster: KubernetesDouble) -> None:
    """Its manifest says what runs, on what, and for whom; the job ends like any other, and its name is the handle."""
    job = service.submit(steps=12, step_s=0.02)
    await service.until(job, lambda row: row.step >= 3)
    name = service.handle(job)
    assert name == f"forge-{job.name.removeprefix('jobs/')}-1"
    manifest = cluster.jobs[name]
    assert manifest["metadata"]["namespace"] == "team"
    assert manifest["spec"]["runtimeRef"]["name"] == "torch-cpu"
    trainer = manifest["spec"]["trainer"]
    assert trainer["command"] == ["python", "-m"]
    assert trainer["args"][0] == "tests.support.toy_worker"
    assert trainer["resourcesPerNode"] == {"limits": {"cpu": "2"}, "requests": {"cpu": "2"}}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (1, 1)
    job = await service.until(job, ended)
    assert (job.state, [expected_result(12)]) == (JobState.SUCCEEDED, service.result(job))


@pytest.mark.parametrize(("processes", "per_node", "expected"), [(4, 1, (4, 1)), (4, 3, (2, 2)), (3, 8, (1, 3))])
def test_processes_are_spread_over_nodes(
    processes: int, per_node: int, expected: tuple[int, int], cluster: KubernetesDouble
) -> None:
    """Evenly, as many to a node as the settings allow, each under torchrun."""
    settings = KubernetesSettings(kubeconfig=cluster.kubeconfig, processes_per_node=per_node, queue="training")
    engine = KubernetesEngine(settings, module="worker", owner="one")
    name = engine.launch(["--attempt", "2"], log_name="job/logs/attempt-2.log", processes=processes)
    trainer = cluster.jobs[name]["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == expected
    command = ["python", "-m", "training_common.engines.torchrun", "--cluster", "--run-id", "forge-job-2"]
    assert trainer["command"] == command
    assert trainer["args"] == ["worker", "--attempt", "2", "--handle", "forge-job-2"]


@pytest.mark.parametrize("how", ["killed", "evicted", "deleted"])
async def test_a_lost_worker_is_followed_by_another(
    how: str, service: ClusterService, cluster: KubernetesDouble
) -> None:
    """From its checkpoint, and without touching the retry budget: the cluster ended it."""
    job = service.submit(steps=60, step_s=0.02, checkpoint_every=10)
    await service.until(job, lambda row: row.step >= 15)
    name = service.handle(job)
    if how == "killed":
        cluster.processes[name].send_signal(signal.SIGKILL)
    elif how == "evicted":
        cluster.evict(name)
    else:
        cluster.answer("DELETE", f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/{name}", None)
    job = await service.until(job, ended)
    assert (job.state, job.attempt, job.retries_without_progress) == (JobState.SUCCEEDED, 2, 0)
    assert [expected_result(60)] == service.result(job)
    words = {"killed": "exit code 137", "evicted": "Evicted", "deleted": "was deleted"}
    assert words[how] in service.cuts(job)[0]


@pytest.mark.slow
async def test_a_lost_process_on_a_node_is_told_from_outside(
    service: ClusterService, tmp_path: Path, cluster: KubernetesDouble
) -> None:
    """Two processes on one node, under an agent that ends as the killed one did: the retry budget is not touched."""
    service.kubernetes = service.kubernetes.model_copy(update={"processes_per_node": 2})
    service.settings = service.settings.model_copy(
        update={"workers": service.settings.workers.model_copy(update={"slots": 2})}
    )
    service.restart()
    job = service.submit(steps=40, step_s=0.05, checkpoint_every=5, processes=2)
    await service.until(job, lambda row: row.step >= 7)
    agent = psutil.Process(cluster.processes[service.handle(job)].pid)
    agent.children()[-1].kill()
    job = await service.until(job, ended, timeout_s=120)
    assert (job.state, job.attempt, job.retries_without_progress) == (JobState.SUCCEEDED, 2, 0)
    assert [expected_result(40)] == service.result(job)
    assert "exit code 137" in service.cuts(job)[0]


async def test_a_worker_in_the_queue_is_waited_for(tmp_path: Path, cluster: KubernetesDouble) -> None:
    """However long Kueue has no room for it: longer here than a start may take, and than silence may last."""
    service = ClusterService(
        tmp_path, cluster, queue="training", start_timeout_s=0.3, silent_cut_s=0.3, lost_after_s=0.1
    )
    job = service.submit(steps=5)
    await service.until(job, lambda row: row.attempt == 1)
    [name] = cluster.jobs
    assert cluster.jobs[name]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    for _ in range(40):
        await asyncio.to_thread(service.scheduler.tick)
        await asyncio.sleep(0.02)
    assert (service.store.get(job.name).state, service.store.get(job.name).attempt) == (JobState.PREPARING, 1)
    service.scheduler._settings = service.settings.workers.model_copy(
        update={"start_timeout_s": 60, "silent_cut_s": 60}
    )
    cluster.admit(name)
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    service.database.close()


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
async def test_a_preempted_worker_costs_nothing(seen: bool, tmp_path: Path, cluster: KubernetesDouble) -> None:
    """Kueue takes its room for another. The job waits in the queue again, in a new attempt, and no budget is touched.

    unseen: Kueue has room again before anybody looked, and starts the same worker anew. It does not go on, since the
    first one may be at work yet and could not be told from it.
    """
    service = ClusterService(tmp_path, cluster, queue="training", heartbeat_interval_s=0.05)
    job = service.submit(steps=30, step_s=0.02, checkpoint_every=5)
    await service.until(job, lambda row: row.attempt == 1)
    first = next(iter(cluster.jobs))
    cluster.admit(first)
    await service.until(job, lambda row: row.step >= 6)
    cluster.preempt(first)
    if not seen:
        cluster.admit(first)
    await service.until(job, lambda row: row.attempt == 2)
    words = "was suspended while it ran" if seen else "was ended and started anew"
    assert [words in message for message in service.cuts(job)] == [True]
    second = f"{first.removesuffix('1')}2"
    assert (cluster.jobs.keys() == {second}) is seen
    cluster.admit(second)
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2)
    assert (job.retries_without_progress, job.kills_without_progress) == (0, 0)
    assert [expected_result(30)] == service.result(job)
    service.database.close()


async def test_a_worker_in_the_queue_holds_up_no_hand_over(tmp_path: Path, cluster: KubernetesDouble) -> None:
    """It cannot be asked before it has capacity, and there is nothing to save."""
    service = ClusterService(tmp_path, cluster, queue="training", hand_over_grace_s=3600)
    job = service.submit(steps=3)
    await service.until(job, lambda row: row.attempt == 1)
    looking = asyncio.create_task(service.scheduler.run())
    async with asyncio.timeout(30):
        await service.scheduler.hand_over()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert {} == cluster.jobs
    job = service.store.get(job.name)
    assert (JobState.RECOVERING, 0, 0) == (job.state, job.retries_without_progress, job.kills_without_progress)
    service.database.close()


async def test_an_api_that_is_away_ends_no_worker(service: ClusterService, cluster: KubernetesDouble) -> None:
    """Nor does a server that starts meanwhile: what nobody can see is not lost. New workers wait."""
    job = service.submit(steps=60, step_s=0.02)
    await service.until(job, lambda row: row.step >= 3)
    cluster.away = True
    service.restart()
    step = service.store.get(job.name).step
    await service.until(job, lambda row: row.step >= step + 10)
    assert service.store.get(job.name).attempt == 1
    cluster.away = False
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    cluster.away = True
    second = service.submit(steps=3)
    await service.until(second, lambda row: row.attempt == 1 and row.state is JobState.RECOVERING)
    assert service.scheduler.last_launch_failed
    cluster.away = False
    assert (await service.until(second, ended)).state == JobState.SUCCEEDED


async def test_a_refused_train_job_says_why(tmp_path: Path, cluster: KubernetesDouble) -> None:
    """Wrong credentials are no fault of the job: it waits, and its events say what Kubernetes said."""
    service = ClusterService(tmp_path, cluster)
    service.kubernetes.kubeconfig.write_text(  # type: ignore[union-attr]
        cluster.kubeconfig.read_text().replace("of-the-double", "wrong")
    )
    service.restart()
    job = await service.until(service.submit(steps=3), lambda row: row.state is JobState.RECOVERING)
    assert "401 Unauthorized" in service.cuts(job)[0]
    service.database.close()


async def test_a_right_that_the_account_lacks_is_told(service: ClusterService, cluster: KubernetesDouble) -> None:
    """The job waits until it is granted, and its events name the account and the right."""
    cluster.forbidden = {"create"}
    job = await service.until(service.submit(steps=3), lambda row: row.state is JobState.RECOVERING)
    assert f'User "{ACCOUNT}" cannot create resource "trainjobs"' in service.cuts(job)[0]
    cluster.forbidden = set()
    job = await service.until(job, ended)
    assert (job.state, job.retries_without_progress) == (JobState.SUCCEEDED, 0)


async def test_a_lost_answer_costs_no_attempt(service: ClusterService, cluster: KubernetesDouble) -> None:
    """The TrainJob was created, and its worker is the first attempt's."""
    cluster.loses_answer = True
    job = await service.until(service.submit(steps=3), ended)
    assert (job.state, job.attempt, len(cluster.jobs)) == (JobState.SUCCEEDED, 1, 1)


async def test_a_cancelled_worker_leaves_and_a_killed_one_is_deleted(
    service: ClusterService, cluster: KubernetesDouble
) -> None:
    """A cancel is the worker's to obey; kill removes the TrainJob, and once more is no error."""
    job = service.submit(steps=10_000, step_s=0.01)
    await service.until(job, lambda row: row.state is JobState.RUNNING)
    service.steer("cancel", job)
    assert (await service.until(job, ended)).state == JobState.CANCELLED
    other = service.submit(steps=10_000, step_s=0.01)
    await service.until(other, lambda row: row.state is JobState.RUNNING)
    name = service.handle(other)
    for _ in range(2):
        service.cluster_engine.kill(name)
    assert name not in cluster.jobs
    service.steer("cancel", other)
    assert (await service.until(other, ended)).state == JobState.CANCELLED
