"""What a person sees of a watched job on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cognateforge.cli import follow
from cognateforge.cli.app import app
from cognateforge.cli.board import Board
from cognateforge.cli.curve import Curve, span
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import JOB, Fake, progress_events


def reported(step: int, at_s: float = 0.0, **metrics: float) -> job_pb2.JobEvent:
    values = [job_pb2.Metric(name=name, unit="nats", value=value) for name, value in metrics.items()]
    event = job_pb2.JobEvent(sequence=step + 1, progress=job_pb2.Progress(step=step, total_steps=100, metrics=values))
    event.time.FromMicroseconds(round(at_s * 1e6))
    return event


def drawn(board: Board, *, width: int = 80, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(board)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_curve_shows_what_falls_and_what_rises() -> None:
    """One block for each column, the lowest value lowest."""
    curve = Curve()
    for step in range(8):
        curve.add(step, float(step))
    assert "▁▂▃▄▅▆▇█" == curve.line(8)
    assert "▁▃▆█" == curve.line(4)
    flat = Curve()
    flat.add(1, 2.5)
    assert "▁" == flat.line(10)
    assert "" == Curve().line(10)


def test_a_curve_of_a_long_job_stays_small() -> None:
    """A million steps are no more points than a terminal can show, and the shape is the same."""
    curve = Curve()
    for step in range(1_000_000):
        curve.add(step, -float(step))
    assert len(curve._sums) <= 1024
    assert "█▇▆▅▄▃▂▁" == curve.line(8)
    assert -999_999 == curve.last


def test_a_curve_goes_back_with_its_job() -> None:
    """What was trained again counts once, and what is no number makes no point."""
    curve = Curve()
    for step, value in ((1, 1.0), (2, float("nan")), (3, 3.0), (4, 100.0)):
        curve.add(step, value)
    curve.back_to(3)
    curve.add(4, 4.0)
    assert "▁▆█" == curve.line(9)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (18_720, "5 h 12 min"),
        (183_600, "2 d 3 h"),
        (86_400 * 400, "400 d"),
    ],
)
def test_spans_are_told_in_two_units(seconds: float, words: str) -> None:
    """As people say them."""
    assert words == span(seconds)


def test_a_board_shows_state_speed_curves_and_metrics() -> None:
    """The loss and a chosen metric as curves, everything newest in a table, and the time left by the job's pace."""
    now = 50.0
    board = Board(job_pb2.Job(name=JOB, state=job_pb2.JOB_STATE_QUEUED), ["lr"], clock=lambda: now)
    board.take(job_pb2.JobEvent(state_change=job_pb2.StateChange(to=job_pb2.JOB_STATE_RUNNING)))
    for step in range(1, 41):
        board.take(reported(step, 1000 + step / 2, loss=10.0 / step, lr=0.001))
    lines = drawn(board)
    assert "RUNNING  step 40/100 (40%)  2 steps/s  30 s left" == lines[0]
    [loss] = [line for line in lines if line.startswith("loss █")]
    assert loss.rstrip().endswith("▁ 0.25  (0.25 to 10)")
    assert any(line.startswith("lr   ▁") for line in lines)
    assert any(re.fullmatch(r"loss +0\.25 +nats *", line) for line in lines)
    assert all(len(line) <= 80 for line in lines)
    now += 60
    assert "nothing new for 1 min" in drawn(board, width=120)[0]


def test_the_trainers_own_word_of_the_time_left_counts_and_runs_down() -> None:
    """It knows of validations to come; it is gone when the job's state changes."""
    now = 0.0
    board = Board(job_pb2.Job(name=JOB, state=job_pb2.JOB_STATE_RUNNING), clock=lambda: now)
    board.take(reported(10, 5.0, seconds_left=90.0))
    now = 30.0
    assert 60.0 == board.seconds_left
    board.take(job_pb2.JobEvent(state_change=job_pb2.StateChange(to=job_pb2.JOB_STATE_RECOVERING)))
    assert board.seconds_left is None


def test_a_board_fits_a_small_screen() -> None:
    """Metrics that have no room are counted, with the command that shows them."""
    board = Board(job_pb2.Job(name=JOB, state=job_pb2.JOB_STATE_RUNNING))
    board.take(reported(1, 0.0, **{f"metric_{number}": 1.0 for number in range(40)}))
    lines = drawn(board, height=12)
    assert len(lines) <= 12
    assert re.search(rf"and \d+ more: forge metrics {JOB}", lines[-1])


def test_names_from_the_wire_cannot_steer_the_terminal() -> None:
    """A metric's name is text, whatever is in it."""
    board = Board(job_pb2.Job(name=JOB), ["a\x1b[2J"])
    board.take(reported(1, 0.0, **{"a\x1b[2J": 1.0}))
    assert not any("\x1b[2J" in line for line in drawn(board))


def test_recovery_events_stand_in_line(fake: Fake) -> None:
    """On a screen and in a log: what the recovery manager did is told where it happened, and a broken stream is not."""
    recovery = job_pb2.Note(kind="recovery", message="lower_lambda at step 9 after loss_trend")
    fake.history.events = [
        *progress_events(9)[:-1],
        job_pb2.JobEvent(sequence=9, note=recovery),
        *[event for event in progress_events(20) if event.sequence > 9],
    ]
    for options in (["--progress", "--metric", "mean_ponder_steps"], ["--metric", "mean_ponder_steps"]):
        fake.history.cuts.extend([3, 4])
        env = {"FORGE_COGNATE": fake.address, "FORGE_AGENT": fake.address, "COLUMNS": "100", "TERM": "xterm"}
        result = CliRunner().invoke(app, ["watch", JOB, *options], env=env)
        assert (0, f"{JOB} SUCCEEDED cognate-25m@7\n") == (result.exit_code, result.stdout)
        assert 1 == result.stderr.count("recovery: lower_lambda at step 9 after loss_trend")
    assert "ponder 2.5" in result.stderr


def test_a_chosen_metric_is_in_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the usual ones, under its own name, with the time left where the trainer tells it."""
    with follow._lines(["wobble"]) as show:
        show(job_pb2.WatchFrame(event=reported(100, wobble=0.5, loss=2.0, seconds_left=75.0)))
    assert "step 100/100 loss 2 wobble 0.5, 1 min 15 s left\n" == capsys.readouterr().err


def test_an_interrupted_watch_leaves_the_job_alone(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says how to look again, and calls nothing that changes the job."""

    def interrupted(*_: object) -> Iterator[job_pb2.WatchFrame]:
        yield job_pb2.WatchFrame(event=progress_events(2)[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("cognateforge.client.sync.watch.watch", interrupted)
    env = {"FORGE_COGNATE": fake.address, "FORGE_AGENT": fake.address}
    result = CliRunner().invoke(app, ["watch", JOB, "--progress"], env=env)
    assert 130 == result.exit_code
    assert f"no longer watching; the job goes on: forge watch {JOB}" in result.stderr
    assert {"GetJob"} == {call.method for call in fake.script.calls}
