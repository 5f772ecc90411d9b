"""Metrics of a job as files of other tools, after the fact."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner, Result

from cognateforge.cli.app import app
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import JOB, Fake, progress_events


def export(fake: Fake, *args: str) -> Result:
    env = {"FORGE_COGNATE": fake.address, "FORGE_AGENT": fake.address}
    return CliRunner().invoke(app, ["export-metrics", JOB, *args], env=env, catch_exceptions=False)


def test_rows_come_as_csv_and_as_json(fake: Fake, tmp_path: Path) -> None:
    """To a file or to stdout; a file that is there stays."""
    path = tmp_path / "loss.csv"
    assert (0, f"{path}\n") == ((result := export(fake, "--csv", str(path))).exit_code, result.stdout)
    rows = list(csv.reader(path.read_text().splitlines()))
    assert [["metric", "unit", "step", "value"], ["loss", "nats/token", "1", "4.0"]] == rows[:2]
    lines = export(fake, "--jsonl", "-").stdout.splitlines()
    assert {"metric": "loss", "unit": "nats/token", "step": 2, "value": 3.5} == json.loads(lines[1])
    before = path.read_text()
    assert 13 == export(fake, "--csv", str(path)).exit_code
    assert before == path.read_text()


def test_a_run_of_tensorboard_is_the_jobs_whole_history(fake: Fake, tmp_path: Path) -> None:
    """Every point at its time and once, though an attempt was lost and the stream broke; histograms and texts too."""

    def reported(step: int) -> job_pb2.JobEvent:
        bins = job_pb2.Metric(name="halting_histogram", bins=[0.5, 0.5])
        loss = job_pb2.Metric(name="loss", value=1 / step)
        return job_pb2.JobEvent(progress=job_pb2.Progress(step=step, total_steps=9, metrics=[loss, bins]))

    note = job_pb2.JobEvent(note=job_pb2.Note(kind="recovery", message="roll_back"))
    started = job_pb2.JobEvent(attempt_started=job_pb2.AttemptStarted(attempt=2, engine="local"))
    events = [*map(reported, range(1, 7)), note, started, *map(reported, range(4, 10))]
    for sequence, event in enumerate(events, start=1):
        event.sequence = sequence
        event.time.FromSeconds(1000 + sequence)
    fake.history.events = events
    fake.history.cuts.extend([3, 2])
    fake.pretraining.job.job.last_sequence = len(events)
    result = export(fake, "--tensorboard", str(tmp_path))
    run = tmp_path / JOB.removeprefix("jobs/")
    assert (0, f"{run}\n") == (result.exit_code, result.stdout)
    found = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    losses = found.Scalars("loss")
    assert list(range(1, 10)) == [event.step for event in losses]
    assert (1001.0, 1014.0) == (losses[0].wall_time, losses[-1].wall_time)
    assert 9 == len(found.Histograms("halting_histogram"))
    assert b"recovery: roll_back" == found.Tensors("recovery")[0].tensor_proto.string_val[0]
    assert 13 == export(fake, "--tensorboard", str(tmp_path)).exit_code


def test_one_metric_may_be_asked_for(fake: Fake, tmp_path: Path) -> None:
    """The others are left out."""
    fake.history.events = progress_events(9)
    fake.pretraining.job.job.last_sequence = 9
    told = json.loads(export(fake, "--tensorboard", str(tmp_path), "--metric", "loss", "--json").stdout)
    assert 7 == told["points"]
    found = EventAccumulator(told["path"])
    found.Reload()
    assert ["loss"] == found.Tags()["scalars"]


@pytest.mark.parametrize("options", [(), ("--csv", "a", "--jsonl", "b")])
def test_one_form_is_named(fake: Fake, options: tuple[str, ...]) -> None:
    """Neither none nor two."""
    assert 2 == export(fake, *options).exit_code


def test_tensorboard_that_is_absent_is_told_with_the_remedy(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written."""
    monkeypatch.setattr("cognateforge.event_files.find_spec", lambda _name: None)
    result = export(fake, "--tensorboard", str(tmp_path / "runs"))
    assert 13 == result.exit_code
    assert "pip install 'cognateforge[tensorboard]'" in result.stderr
    assert not (tmp_path / "runs").exists()
