"""Jobs on several machines: nodes that take places, come late, are lost, and leave nothing behind."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cognate_server.settings import CognateSettings
from cognateforge.exceptions import InvalidFieldError
from cognateforge.job.v1 import job_pb2
from tests.support.small_pretraining import losses
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import ToySettings, expected_result
from tests.support.waiting import until
from training_common.compute import require_at_most, require_slots, share_of, slots_of
from training_common.engines.build import build_engine
from training_common.engines.invitations import Beats, Invitation, Run, runs
from training_common.engines.local import LocalEngine, Spread
from training_common.engines.node import Node
from training_common.jobs.folders import nodes_dir
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow
from training_common.settings import SettingsError, WorkerSettings, load
from training_common.team import ALONE

HERE = "127.0.0.1"
JOB = "jobs/00000000-0000-0000-0000-000000000000"


class Nodes:
    """Nodes of the toy service, all of them on this machine."""

    def __init__(self, service: ToyService) -> None:
        self.service = service
        self.log = service.folder / "nodes.log"
        self.running: list[psutil.Popen] = []

    def start(self, *, slots: int = 1) -> psutil.Popen:
        settings = str(self.service.settings_file)
        command = [sys.executable, "-m", "tests.support.toy_node", "--settings", settings, "--slots", str(slots)]
        with self.log.open("ab") as log:
            node = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.running.append(node)
        return node

    def stop(self) -> None:
        for node in self.running:
            if node.poll() is None:
                node.send_signal(signal.SIGCONT)
                node.terminate()
            node.wait(20)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ToyService]:
    service = ToyService(tmp_path, slots=1, rendezvous_host=HERE, node_lost_after_s=3.0)
    yield service
    service.database.close()


@pytest.fixture
def nodes(service: ToyService) -> Iterator[Nodes]:
    nodes = Nodes(service)
    yield nodes
    nodes.stop()


def processes_of(job: JobRow) -> list[psutil.Process]:
    """Return all processes of a job: agents and those that train, on every node."""
    return [p for p in psutil.process_iter(["cmdline"]) if job.name in (p.info["cmdline"] or ())]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether no process is left, after a while."""
    return bool(processes) and psutil.wait_procs(processes, timeout=20)[1] == []


def cuts(service: ToyService, job: JobRow) -> list[str]:
    return [e.payload["message"] for e in service.events(job) if e.payload.get("to") == "RECOVERING"]


def test_processes_are_spread_evenly_and_only_the_first_share_takes_slots() -> None:
    """Every machine has one at least, none has two more than another, and none is forgotten."""
    for processes in range(1, 20):
        for nodes in range(1, processes + 1):
            shares = [share_of(processes, nodes, place) for place in range(nodes)]
            assert processes == sum(shares)
            assert max(shares) - min(shares) <= 1
            assert shares[0] == slots_of(job_pb2.Compute(processes=processes, nodes=nodes)) >= 1


def test_a_server_takes_only_jobs_whose_nodes_it_can_have(tmp_path: Path, store_url: str) -> None:
    """Slots are taken by this machine's processes. Servers that no node can meet leave such jobs to others."""
    service = ToyService(tmp_path, store_url=store_url)
    spread = service.submit(steps=1, processes=5, nodes=2)
    alone = service.submit(steps=1, processes=2)
    assert [(5, 2, 2), (2, 1, 2)] == [(job.processes, job.nodes, job.slots) for job in (spread, alone)]
    with service.database.read() as connection:
        assert service.store.due_slots(connection) == 4
    begun = service.store.begin_attempt("test", most=2, free=2, most_nodes=1)
    assert begun is not None
    assert begun.name == alone.name
    begun = service.store.begin_attempt("test", most=2, free=2)
    assert begun is not None
    assert begun.name == spread.name
    with service.database.read() as connection:
        assert service.store.held_slots(connection) == 4
    service.database.close()


def test_nodes_are_refused_where_there_can_be_none() -> None:
    """The field and the remedy are named. Slots and reservations are asked for this machine's share alone."""
    compute = job_pb2.Compute(processes=5, nodes=2)
    for workers, remedy in (
        (WorkerSettings(slots=8), r"must be 1.*workers\.rendezvous_host"),
        (WorkerSettings(slots=8, engine="ray"), "must be 1.*ray"),
    ):
        with pytest.raises(InvalidFieldError, match=remedy) as refused:
            require_slots(compute, workers)
        assert ["plan.compute.nodes"] == [violation.field for violation in refused.value.violations]
    require_slots(compute, WorkerSettings(slots=2, rendezvous_host=HERE))
    require_at_most(compute, 2, "reservations/a")
    with pytest.raises(InvalidFieldError, match=r"at most 1 on each of 2 nodes.*workers\.slots"):
        require_slots(compute, WorkerSettings(slots=1, rendezvous_host=HERE))
    require_slots(compute, WorkerSettings(slots=0))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"workers": {"rendezvous_host": "0.0.0.0"}}, "give this machine's address"),  # noqa: S104 - refused
        ({"workers": {"rendezvous_host": HERE, "engine": "ray"}}, "leave one of the two out"),
        ({"workers": {"rendezvous_host": "192.0.2.1"}}, "shared_dir is missing"),
        ({"workers": {"rendezvous_host": "192.0.2.1"}, "shared_dir": "/mnt"}, "store_url is no PostgreSQL"),
    ],
)
def test_settings_that_no_node_could_use_are_refused(values: dict[str, object], told: str, tmp_path: Path) -> None:
    """When the service starts, and not when its first job waits."""
    file = tmp_path / "settings.toml"
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    top = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name not in sections]
    for name, section in sections.items():
        top += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    file.write_text("\n".join(top))
    with pytest.raises(SettingsError, match=told):
        load(CognateSettings, file=file, environment={}, prefix="X_")


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    """Nothing could listen on it."""
    reached = {"shared_dir": tmp_path, "store_url": "postgresql://x/y", "workers": {"rendezvous_host": "192.0.2.1"}}
    with pytest.raises(SettingsError, match=r"workers\.rendezvous_host"):
        build_engine(ToySettings.model_validate({"data_dir": tmp_path, **reached}), module="none")


def invite(folder: Path, name: str, create_us: int, *, processes: int = 2, nodes: int = 2) -> Run:
    run = Run(folder / name)
    run.invite(
        Invitation(
            handle="1:1.00",
            host=HERE,
            port=9,
            processes=processes,
            nodes=nodes,
            job=JOB,
            attempt=1,
            token=1,
            create_us=create_us,
        )
    )
    return run


def go_on(*all_: Run) -> None:
    for run in all_:
        os.utime(run.invitation_path, ns=(time.time_ns(), time.time_ns()))


def node_of(tmp_path: Path, slots: int) -> tuple[Node, Path]:
    settings = ToySettings.model_validate({"data_dir": tmp_path})
    node = Node(settings, module="tests.support.no_module", settings_file=None, slots=slots)
    return node, nodes_dir(settings)


def test_places_are_taken_in_the_order_of_invitations(tmp_path: Path) -> None:
    """A node gives a later run's place back for an earlier one's, as long as the later one has not begun."""
    node, folder = node_of(tmp_path, slots=2)
    later = invite(folder, "later", 3)
    node.look()
    assert later.taken() == set(), "nothing shows that its host is there"
    go_on(later)
    node.look()
    assert later.taken() == {1}
    earlier = invite(folder, "earlier", 2, processes=4)  # two of them in its place
    too_large = invite(folder, "too-large", 1, processes=6)
    node.look()
    go_on(later, earlier, too_large)
    node.look()
    assert (later.taken(), earlier.taken(), too_large.taken()) == (set(), {1}, set())
    earlier.remove()
    node.look()
    assert later.taken() == {1}
    node.stop()
    assert later.taken() == set()


def test_a_run_that_needs_all_slots_is_not_overtaken(tmp_path: Path) -> None:
    """One slot is taken by a run that goes on, and the other one is kept for the run that waits for both."""
    node, folder = node_of(tmp_path, slots=2)
    running, large, small = (
        invite(folder, "running", 1, processes=3, nodes=3),
        invite(folder, "large", 2, processes=4),
        invite(folder, "small", 3),
    )
    assert not running.take(1, "another") or running.taken() == {1}
    node.look()
    go_on(running, large, small)
    node.look()
    assert (running.taken(), large.taken(), small.taken()) == ({1, 2}, set(), set())
    running.remove()
    node.look()
    assert (large.taken(), small.taken()) == ({1}, set())


def test_what_is_no_invitation_is_left_alone(tmp_path: Path) -> None:
    """A file of another kind, another user, another form, or too large: none of them starts or stops a node."""
    node, folder = node_of(tmp_path, slots=1)
    bad = {name: invite(folder, name, 1) for name in ("text", "pipe", "link", "module", "job", "large")}
    good = bad["text"].invitation_path.read_text()
    for name in ("pipe", "link"):
        bad[name].invitation_path.unlink()
    os.mkfifo(bad["pipe"].invitation_path)
    bad["link"].invitation_path.symlink_to(bad["text"].invitation_path)
    bad["text"].invitation_path.write_text("{")
    bad["module"].invitation_path.write_text(json.dumps({**json.loads(good), "module": "os"}))
    bad["job"].invitation_path.write_text(json.dumps({**json.loads(good), "job": "jobs/../../x"}))
    bad["large"].invitation_path.write_text(good + " " * (64 << 10))
    if os.geteuid() == 0:
        bad["owner"] = invite(folder, "owner", 1)
        os.chown(bad["owner"].invitation_path, 65_534, -1)
    assert {None} == {run.invitation() for run in bad.values()}
    (folder / "file").write_text("")
    bad.pop("link")  # whose target would be touched
    for _ in range(2):
        node.look()
        go_on(*bad.values())
    assert all(run.taken() == set() for run in runs(folder) if run.name != "file")


def test_silence_is_counted_by_the_readers_clock(tmp_path: Path) -> None:
    """Whatever time a stamp tells: clocks of machines differ."""
    now = [0.0]
    beats, file = Beats(lambda: now[0]), tmp_path / "beat"
    file.touch()
    os.utime(file, (1e9, 1e9))
    assert (beats.silent_s(file), beats.moves(file)) == (0.0, False)
    now[0] = 5.0
    assert (beats.silent_s(file), beats.moves(file)) == (5.0, False)
    os.utime(file, (9e8, 9e8))
    assert (beats.silent_s(file), beats.moves(file)) == (0.0, True)
    file.unlink()
    assert (beats.silent_s(file), beats.moves(file)) == (float("inf"), False)


@pytest.mark.slow
async def test_a_job_waits_for_nodes_that_come_late(service: ToyService, nodes: Nodes) -> None:
    """However long; it can be cancelled meanwhile. Once a node is there it runs, and a restarted server finds it."""
    first = service.submit(steps=5, processes=2, nodes=2)
    await service.until(first, lambda _: any(service.engine.waits(a.launched) for _, a in service.store.held()))
    patience = service.scheduler._settings
    hasty = {"start_timeout_s": 0.5, "silent_cut_s": 0.5, "lost_after_s": 0.2}
    service.scheduler._settings = patience.model_copy(update=hasty)
    enough = time.monotonic() + 2
    while time.monotonic() < enough:
        service.scheduler.tick()
        await asyncio.sleep(0.05)
    assert (service.store.get(first.name).state, service.store.get(first.name).attempt) == (JobState.PREPARING, 1)
    service.scheduler._settings = patience
    before = processes_of(first)
    service.steer("cancel", first)
    first = await service.until(first, ended)
    assert first.state is JobState.CANCELLED
    assert all_gone(before)
    assert runs(nodes_dir(service.settings)) == []
    job = service.submit(steps=60, step_s=0.05, processes=2, nodes=2)
    await service.until(job, lambda _: any(service.engine.waits(a.launched) for _, a in service.store.held()))
    nodes.start()
    await service.until(job, lambda row: row.step >= 5)
    service.restart()
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    assert [expected_result(60)] == service.result(job)
    assert '"missing": 1' in service.log(job)
    await until(lambda: runs(nodes_dir(service.settings)) == [])


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_what_is_lost_is_followed_by_another_attempt(service: ToyService, nodes: Nodes) -> None:
    """A killed process, a killed node, a machine that hangs: the job goes on from its checkpoint, at no cost."""
    job = service.submit(steps=70, step_s=0.05, checkpoint_every=5, processes=2, nodes=2)
    node, frozen = nodes.start(), list[psutil.Process]()
    for attempt, (lost, words) in enumerate(
        [("process", "ended by SIGKILL"), ("node", "machine failed it"), ("machine", "machine failed it")], start=1
    ):
        await service.until(job, lambda row, least=12 * attempt: row.step >= least)  # type: ignore[misc]
        assert service.store.get(job.name).attempt == attempt
        before = processes_of(job)
        there = node.children(recursive=True)
        assert {"0", "1"} == {process.environ().get("RANK") for process in before} - {None}
        if lost == "process":
            [trains] = [process for process in there if process.environ().get("RANK") == "1"]
            trains.kill()
        elif lost == "node":
            node.kill()
            node = nodes.start()
        else:
            frozen = [*there, node]
            for process in frozen:
                process.suspend()
            node = nodes.start()
        await service.until(job, lambda row, last=attempt: row.attempt > last)  # type: ignore[misc]
        assert words in cuts(service, job)[-1]
        assert all_gone([process for process in before if process not in frozen])
    # The machine that hung is back, and its processes have nothing to do there any more.
    for process in frozen:
        process.resume()
    assert all_gone(frozen[:-1])
    before = processes_of(job)
    service.steer("pause", job)
    job = await service.until(job, lambda row: row.state is JobState.PAUSED)
    assert (job.attempt, job.retries_without_progress) == (4, 0)
    assert all_gone(before)
    service.steer("resume", job)
    job = await service.until(job, ended)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 5)
    assert [expected_result(70)] == service.result(job)


@pytest.mark.slow
async def test_two_nodes_train_as_one_process(tmp_path: Path) -> None:
    """A small pretraining: the loss of every step, with uneven rows and memory carried over."""
    settings = ToySettings.model_validate({"data_dir": tmp_path})
    spread = Spread(folder=nodes_dir(settings), owner="here", host=HERE, lost_after_s=30)
    engine = LocalEngine(module="tests.support.small_pretraining", log_dir=tmp_path, spread=spread)
    node = Node(settings, module="tests.support.small_pretraining", settings_file=None, slots=1)
    file = tmp_path / "losses"
    arguments = ["--job", JOB, "--attempt", "1", "--token", "1", "--losses", str(file)]
    handle = engine.launch(arguments, log_name="training.log", processes=2, nodes=2)
    try:
        async with asyncio.timeout(120):
            while engine.alive(handle):
                node.look()
                await asyncio.sleep(0.1)
    finally:
        node.stop()
    assert file.exists(), (tmp_path / "training.log").read_text()
    assert json.loads(file.read_text()) == pytest.approx(losses(ALONE, tmp_path / "alone"), rel=2e-6)
