"""Metrics go to people's own tools, and a job fares the same whatever becomes of them there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cognate_server.server
from cognate_server.settings import CognateSettings
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.event_files import EventFile
from tests.support.toy_service import ToyService, ended
from tests.support.waiting import until
from training_common import exporters, worker
from training_common.exporters import Exports, Metrics, RunInfo, TensorBoardExporter, require_exporters
from training_common.jobs.folders import job_dir
from training_common.jobs.states import JobState
from training_common.jobs.store import JobRow
from training_common.masking import secrets_of
from training_common.settings import ExporterSettings, SettingsError

DIARY = '''
import json, pathlib, time


class Diary:
    """Writes every call down, and misbehaves as its settings say."""

    def __init__(self, options):
        self.options = options

    def _write(self, *call):
        if call[0] == self.options.get("fails_at"):
            raise RuntimeError("no route to the tracker of user:hunter2hunter2@host")
        if call[0] == self.options.get("hangs_at"):
            time.sleep(3600)
        with pathlib.Path(self.options["file"]).open("a") as file:
            file.write(json.dumps(call) + "\\n")

    def start(self, run):
        self._write("start", run.job, run.attempt, run.total_steps, run.from_step)

    def log(self, step, metrics):
        self._write("log", step, metrics)

    def event(self, kind, message, facts):
        self._write("event", kind, message)

    def finish(self, state):
        self._write("finish", state)
'''


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with an exporter for worker processes, and return the file that it writes."""
    site = tmp_path / "site"
    (site / "diary-1.0.dist-info").mkdir(parents=True)
    (site / "diary.py").write_text(DIARY)
    info = site / "diary-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diary\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{exporters.GROUP}]\ndiary = diary:Diary\n")
    (info / "RECORD").write_text("diary.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "diary.jsonl"


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """Return a function that starts a service whose workers export."""
    services: list[ToyService] = []

    def start(*names: str, queue_length: int = 1000, **options: str) -> ToyService:
        folder = tmp_path / "service"
        folder.mkdir()
        service = ToyService(folder)
        lines = ["[exporters]", f"names = {json.dumps(names)}", f"queue_length = {queue_length}"]
        if options:
            lines += ["[exporters.options.diary]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
        with service.settings_file.open("a") as file:
            file.write("\n".join(lines) + "\n")
        services.append(service)
        return service

    yield start
    for service in services:
        service.database.close()


def read(folder: Path) -> EventAccumulator:
    """Return what TensorBoard's own reader makes of a run."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found


def texts(found: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(tag)]


def troubles(service: ToyService, job: JobRow) -> list[str]:
    events = service.events(job)
    return [event.payload["message"] for event in events if event.payload.get("kind") == "exporter_failed"]


def entries(diary: Path) -> list[list[Any]]:
    return [json.loads(line) for line in diary.read_text().splitlines()]


async def test_a_cut_job_has_every_point_once(toy: Callable[..., ToyService]) -> None:
    """Killed between two checkpoints, it goes on from the older one: what was trained again is not doubled."""
    service = toy("tensorboard", queue_length=100_000)
    job = service.submit(steps=40, checkpoint_every=10, step_s=0.02)
    await service.until(job, lambda now: now.step >= 15)
    os.kill(int(service.handle(job).partition(":")[0]), signal.SIGKILL)
    job = await service.until(job, ended)
    assert (JobState.SUCCEEDED, 2) == (job.state, job.attempt)
    folder = job_dir(service.settings, job.name) / "tensorboard"
    assert 2 == len(list(folder.iterdir()))
    await until(lambda: "end" in read(folder).Tags()["tensors"])
    found = read(folder)
    losses = found.Scalars("loss")
    assert list(range(1, 41)) == [event.step for event in losses]
    assert [pytest.approx(1 / step) for step in range(1, 41)] == [event.value for event in losses]
    assert [(40, "attempt ended, the job is SUCCEEDED")] == texts(found, "end")
    assert 1 == len(texts(found, "result"))
    assert [] == troubles(service, job)


async def test_a_package_brings_an_exporter(toy: Callable[..., ToyService], diary: Path) -> None:
    """It is told of the attempt, every point, what else happened and the end, in order."""
    service = toy("diary", file=str(diary))
    job = await service.until(service.submit(steps=12), ended)
    # The job has ended, and its worker may still write the last word.
    await until(lambda: "finish" in diary.read_text())
    calls = entries(diary)
    assert ["start", job.name, 1, 12, 0] == calls[0]
    assert [["log", step, {"loss": 1 / step}] for step in range(1, 13)] == calls[1:13]
    assert ["event", "result", service.result(job)[0]] == calls[13]
    assert ["finish", "SUCCEEDED"] == calls[14]
    assert 15 == len(calls)


@pytest.mark.parametrize("at", ["start", "log", "event"])
async def test_an_exporter_that_fails_is_told_once(toy: Callable[..., ToyService], diary: Path, at: str) -> None:
    """The job succeeds, its history tells what happened and no secret of it, and another exporter goes on."""
    service = toy("tensorboard", "diary", file=str(diary), fails_at=at)
    # The last step waits for no exporter: the note must come while the job is at work.
    job = await service.until(service.submit(steps=12, step_s=0.05, checkpoint_every=4), ended)
    assert JobState.SUCCEEDED == job.state
    told = troubles(service, job)
    if at != "event":  # which comes with the end
        [message] = told
        assert message.startswith("exporter diary: RuntimeError: no route to the tracker of ")
    assert len(told) <= 1
    folder = job_dir(service.settings, job.name) / "tensorboard"
    await until(lambda: "end" in read(folder).Tags()["tensors"])
    assert 12 == len(read(folder).Scalars("loss"))
    states = [event.payload["to"] for event in service.events(job) if event.kind == "state_change"]
    assert "SUCCEEDED" == states[-1] == service.events(job)[-1].payload.get("to")


class Recorder:
    """An exporter in this process, which waits for a gate at every point."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate, self.calls = gate, list[tuple[Any, ...]]()
        self.arrived = threading.Event()

    def start(self, run: RunInfo) -> None:
        self.calls.append(("start", run.from_step))

    def log(self, step: int, metrics: Metrics) -> None:
        self.arrived.set()
        if self.gate is not None:
            self.gate.wait(30)
        self.calls.append(("log", step, dict(metrics)))

    def event(self, kind: str, message: str, facts: Mapping[str, str]) -> None:
        self.calls.append(("event", kind))

    def finish(self, state: str) -> None:
        self.calls.append(("finish", state))


def exports_to(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder, told: list[str], *, queue_length: int = 1000
) -> Exports:
    monkeypatch.setattr(exporters, "_maker", lambda _name, _settings: lambda: recorder)

    def run(from_step: int) -> RunInfo:
        return RunInfo(job="jobs/1", attempt=1, total_steps=9, from_step=from_step, folder=Path(), plan={})

    settings = ExporterSettings(queue_length=queue_length)
    return Exports(["x"], settings, run=run, tell=lambda _name, problem: told.append(problem))


def test_a_slow_exporter_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points beyond its queue are lost to it, and that is told once; the end does not wait for it."""
    recorder, told = Recorder(threading.Event()), list[str]()
    exports = exports_to(monkeypatch, recorder, told, queue_length=3)
    exports.log(1, {"loss": 1.0})
    assert recorder.arrived.wait(10)
    for step in range(2, 10_000):
        exports.log(step, {"loss": 1.0})
    exports.finish("SUCCEEDED", patience_s=0.01)
    assert recorder.gate is not None
    recorder.gate.set()
    exports.finish("SUCCEEDED", patience_s=10)
    assert [("start", 0), *(("log", step, {"loss": 1.0}) for step in (1, 2, 3, 4)), ("finish", "SUCCEEDED")] == (
        recorder.calls
    )
    [problem] = told
    assert "some points are lost" in problem


def test_an_exporter_that_ends_its_thread_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.exit ends a thread without a word: it is a failure like any other, and the job's history has it."""
    told: list[str] = []

    class Leaves(Recorder):
        def log(self, step: int, metrics: Mapping[str, Any]) -> None:
            raise SystemExit("goodbye")

    exports = exports_to(monkeypatch, Leaves(), told)
    exports.log(1, {"loss": 1.0})
    exports.finish("SUCCEEDED", patience_s=10)
    assert ["SystemExit: goodbye; nothing more of this attempt is exported by it"] == told


@pytest.mark.parametrize(
    "left",
    ["atexit.register(time.sleep, 600)", "threading.Thread(target=time.sleep, args=(600,), daemon=False).start()"],
)
def test_what_a_package_leaves_behind_does_not_keep_a_worker(left: str) -> None:
    """The process ends, with its own status, whatever was registered for its end or is waited for there."""
    code = f"""
import atexit, threading, time
from training_common import worker
worker._END_S = 0.3
worker.main = lambda *_, **__: 7
{left}
worker.run(None, None)
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True)
    assert 7 == ended.returncode, ended.stderr


def test_what_comes_before_training_is_kept_for_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter starts where the attempt goes on from, which is known later than what the data are."""
    recorder, told = Recorder(), list[str]()
    exports = exports_to(monkeypatch, recorder, told)
    exports.event("data_ready", "", {})
    exports.begin(20)
    exports.begin(0)
    exports.log(21, {"loss": 1.0, "shares": [0.5, 0.5], "name": "x", "flag": True, "nothing": None})
    exports.finish("PAUSED")
    assert [
        ("start", 20),
        ("event", "data_ready"),
        ("log", 21, {"loss": 1.0, "shares": [0.5, 0.5]}),
        ("finish", "PAUSED"),
    ] == recorder.calls


def test_an_attempt_that_never_began_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits for something again and again makes no run of each look."""
    recorder, told = Recorder(), list[str]()
    exports = exports_to(monkeypatch, recorder, told)
    exports.event("waits", "", {})
    exports.finish("QUEUED")
    assert ([], []) == (recorder.calls, told)


def test_event_files_hold_histograms_and_texts(tmp_path: Path) -> None:
    """Shares of 1, 2, ... as buckets around these numbers; the plan as it is."""
    exporter = TensorBoardExporter(tmp_path, clock=lambda: 1000.0)
    run = {"job": "jobs/abc", "total_steps": 9, "folder": Path("unused"), "plan": {"seed": 7}}
    exporter.start(RunInfo(attempt=1, from_step=0, **run))  # type: ignore[arg-type]
    exporter.log(1, {"halting_histogram": [0.25, 0.75], "loss": float("nan"), "lr": 0.5})
    exporter.event("recovery", "lower_lambda", {"detector": "loss_trend"})
    exporter.finish("CANCELLED")
    found = read(tmp_path / "abc")
    [histogram] = found.Histograms("halting_histogram")
    value = histogram.histogram_value
    assert (1, [1.5, 2.5], [0.25, 0.75], 1.75) == (histogram.step, value.bucket_limit, value.bucket, value.sum)
    assert (["lr"], 1000.0) == (found.Tags()["scalars"], found.Scalars("lr")[0].wall_time)
    assert [(0, '    {\n      "seed": 7\n    }')] == texts(found, "plan")
    assert [(1, "lower_lambda\n\n- detector: loss_trend")] == texts(found, "recovery")
    again = TensorBoardExporter(tmp_path)
    again.start(RunInfo(attempt=2, from_step=0, **run))  # type: ignore[arg-type]
    again.finish("SUCCEEDED")
    assert 1 == len(texts(read(tmp_path / "abc"), "plan"))


def test_a_run_that_goes_back_keeps_what_was_told_of_it(tmp_path: Path) -> None:
    """A recovery rolls training back in one attempt: the points after it are replaced, its text stays."""
    file = EventFile(tmp_path, attempt=1, from_step=0, at_s=1.0)
    for step in range(1, 11):
        file.log(step, {"loss": float(step)}, at_s=1.0)
    file.log(10, {"validation_loss": 2.0}, at_s=1.0)
    file.text("recovery", "roll_back", at_s=1.0)
    for step in range(6, 9):
        file.log(step, {"loss": -float(step)}, at_s=2.0)
    file.close()
    found = read(tmp_path)
    assert [1, 2, 3, 4, 5, -6, -7, -8] == [event.value for event in found.Scalars("loss")]
    assert [(10, "roll_back")] == texts(found, "recovery")
    assert [] == found.Scalars("validation_loss")


def test_what_is_not_installed_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the remedy, by the server itself, before anything is made."""
    monkeypatch.setattr("cognateforge.event_files.find_spec", lambda _name: None)
    values = {"address": "127.0.0.1:0", "data_dir": tmp_path / "data", "exporters": {"names": ["tensorboard"]}}
    with pytest.raises(SettingsError, match=r"tensorboard is not installed: pip install 'cognateforge\[tensorboard\]'"):
        cognate_server.server.build(CognateSettings.model_validate(values), None)
    assert not (tmp_path / "data").exists()
    settings = CognateSettings.model_validate({**values, "exporters": {"names": ["nobodys"]}})
    with pytest.raises(SettingsError, match=r"no installed package brings 'nobodys'.*tensorboard"):
        require_exporters(settings)
    elsewhere = CognateSettings.model_validate({**values, "workers": {"engine": "ray"}})
    require_exporters(elsewhere)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"names": ["tensorboard", "tensorboard"]}, "named twice"),
        ({"options": {"diary": {"file": "x"}}}, "diary: not among names"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(section: Mapping[str, Any], problem: str) -> None:
    """A mistyped name would otherwise look like an exporter without settings."""
    with pytest.raises(ValueError, match=problem):
        ExporterSettings.model_validate(section)


def test_an_exporters_secrets_are_secrets(tmp_path: Path) -> None:
    """They are hidden in logs, and are not shown with the settings."""
    options = {"diary": {"api_key": "diarys-own-key", "file": "x"}}
    settings = CognateSettings.model_validate(
        {"data_dir": tmp_path, "exporters": {"names": ["diary"], "options": options}}
    )
    assert "diarys-own-key" in secrets_of(settings)
    assert "diarys-own-key" not in repr(settings)


def test_the_plan_is_shown_by_its_fields() -> None:
    """As JSON, by the names of the contract."""
    plan = pb.PretrainingPlan(total_steps=9, seed=7)
    assert {"total_steps": 9, "seed": 7}.items() <= worker._plan_of(
        plan.SerializeToString(), pb.PretrainingPlan
    ).items()
    assert {} == worker._plan_of(b"x", None)
