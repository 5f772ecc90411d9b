"""`forge top`: both services and their jobs in one picture, also when one of them is away."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cognateforge.cli.app import app
from cognateforge.cli.jobs import JobService, Service
from cognateforge.cli.overview import Capacity, JobLine, Lookout, ServiceLine
from cognateforge.cli.session import Session
from cognateforge.cli.top import screen
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import AGENT_JOB, JOB, Fake

NOWHERE = "unix:/nonexistent/forge.sock"


def forge_top(*args: str, cognate: str, agent: str) -> Result:
    env = {"FORGE_COGNATE": cognate, "FORGE_AGENT": agent}
    return CliRunner().invoke(app, ["top", *args], env=env, catch_exceptions=False)


def session(cognate: str, agent: str) -> Session:
    return Session(cognate=cognate, agent_server=agent, ca=None, cert=None, key=None, timeout_s=2.0, as_json=False)


def timed(fake: Fake, *, step_s: float, seconds_left: float | None) -> None:
    """Give the fake's progress events times, and the last one what the trainer expects."""
    for event in fake.history.events:
        event.time.FromMicroseconds(round((1000 + event.sequence * step_s) * 1e6))
    last = [event for event in fake.history.events if event.HasField("progress")][-1]
    if seconds_left is not None:
        last.progress.metrics.add(name="seconds_left", value=seconds_left)
    fake.pretraining.job.job.last_sequence = last.sequence


def test_one_look_shows_both_services_and_their_jobs(fake: Fake) -> None:
    """Health, version and jobs with their step, pace, time left and loss; the running one first."""
    timed(fake, step_s=0.5, seconds_left=None)
    result = forge_top("--once", cognate=fake.address, agent=fake.address)
    assert 0 == result.exit_code, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"cognate: SERVING  {fake.address}  9.9  1 of 4 slots  ")
    assert any(line.startswith("agent: SERVING") for line in lines)
    cells = next(line for line in lines if line.startswith(JOB.removeprefix("jobs/"))).split()
    assert ["cognate", "RUNNING", "2/20", "10%", "2", "9", "s", "0.2632"] == cells[1:9]
    [agent] = [line.split() for line in lines if line.startswith(AGENT_JOB.removeprefix("jobs/"))][:1]
    assert ["agent", "QUEUED", "0/20", "0%"] == agent[1:5]


def test_scripts_read_json(fake: Fake) -> None:
    """One object a service, its jobs within, in the order of the picture."""
    fake.pretraining.job.job.wait.reason = job_pb2.WAIT_REASON_SLOT
    fake.pretraining.job.job.caller = "spiffe://example.org/operator"
    result = forge_top("--once", "--json", "--ended", "0", cognate=fake.address, agent=fake.address)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["cognate", "agent"] == [row["service"] for row in rows]
    [job] = {job["name"]: job for job in rows[0]["jobs"]}.values()
    assert ("RUNNING", 2, 20, "slot") == (job["state"], job["step"], job["total_steps"], job["waits_for"])
    assert ("", None, True) == (rows[0]["away"], rows[0]["since"], rows[0]["seen"] > 0)


def test_a_service_that_is_away_does_not_hide_the_other(fake: Fake) -> None:
    """It is told with the reason, and the exit code says so."""
    result = forge_top("--once", cognate=fake.address, agent=NOWHERE)
    assert 4 == result.exit_code
    assert "cognate: SERVING" in result.stdout
    assert "agent: AWAY since" in result.stdout


def test_a_service_that_goes_away_is_shown_as_it_was(fake: Fake) -> None:
    """Since when it is away stays, however often it is looked for; it is forgotten when it is back."""
    now = 100.0
    opened = session(fake.address, fake.address)
    lookout = Lookout(JobService(Service.AGENT, opened), ended=0, clock=lambda: now)
    assert lookout.look().well
    fake.stop()
    now = 200.0
    assert 200.0 == lookout.look().since
    now = 300.0
    gone = lookout.look()
    assert (200.0, 100.0, False) == (gone.since, gone.seen, gone.well)
    assert [AGENT_JOB] == [line.job.name for line in gone.jobs]
    opened.close()
    text = drawn([gone], now=320.0)
    assert "(2 min)" in text[0]
    assert text[1].startswith("  its jobs are as of ")


def test_later_looks_ask_only_for_what_is_new(fake: Fake) -> None:
    """The pace of a job goes on from what was seen, and its time left is the trainer's, less what has passed."""
    now = 1010.0
    timed(fake, step_s=0.5, seconds_left=90.0)
    opened = session(fake.address, fake.address)
    lookout = Lookout(JobService(Service.COGNATE, opened), ended=0, clock=lambda: now)
    first = lookout.look()
    told_s = 1000 + 19 * 0.5
    assert told_s + 90 - 1010 == pytest.approx(first.jobs[0].seconds_left)
    now = 1020.0
    again = lookout.look()
    opened.close()
    assert told_s + 90 - 1020 == pytest.approx(again.jobs[0].seconds_left)
    assert 2.0 == again.jobs[0].steps_per_s
    assert [0] == [call.request.after_sequence for call in fake.script.calls if call.method == "WatchJob"][:1]
    assert 1 == fake.script.count("WatchJob")


def line(number: int, **fields: Any) -> JobLine:
    left = fields.pop("seconds_left", None)
    name = f"jobs/{number:08d}-0000-4000-8000-000000000000"
    return JobLine(service=Service.AGENT, job=job_pb2.Job(name=name, **fields), seconds_left=left)


def drawn(lines: list[ServiceLine], *, width: int = 120, height: int | None = None, now: float = 0.0) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(screen(lines, console, height=height, now=now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_jobs_are_sorted_by_what_ends_first() -> None:
    """At work by time left, the queue by its turn, paused ones, and what has ended; what has no room is counted."""
    jobs = [
        line(1, state=job_pb2.JOB_STATE_FAILED, failure=job_pb2.Failure(reason="TRAINING_DIVERGED")),
        line(2, state=job_pb2.JOB_STATE_PAUSED),
        line(3, state=job_pb2.JOB_STATE_QUEUED, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_SLOT, queue_position=2)),
        line(4, state=job_pb2.JOB_STATE_RUNNING, observed=True),
        line(5, state=job_pb2.JOB_STATE_QUEUED, wait=job_pb2.Wait(reason=job_pb2.WAIT_REASON_SLOT, queue_position=1)),
        line(6, state=job_pb2.JOB_STATE_RUNNING, seconds_left=60.0),
    ]
    service = ServiceLine(
        service=Service.AGENT,
        seen=1.0,
        health="SERVING",
        circuits={"to cognate": "OPEN", "of this client": "closed"},
        capacities=(Capacity(kind="memory", total=8 << 30, held=2 << 30, lent=1 << 30),),
        damaged_artifacts=2,
        jobs=tuple(jobs),
    )
    text = drawn([service])
    assert "circuit to cognate OPEN  2 DAMAGED: forge artifacts verify" in text[0]
    assert "of this client" not in text[0]
    assert "  memory 2 of 8 GiB held, 1 lent" == text[1]
    assert ["6", "4", "5", "3", "2", "1"] == [row[7] for row in text[4:]]
    assert "RUNNING (out of sight)" in text[4]
    assert "TRAINING_DIVERGED" in text[9]
    short = drawn([service], height=9)
    assert (9, "and 2 more: forge jobs") == (len(short), short[-1])


def test_names_from_the_wire_cannot_steer_the_terminal() -> None:
    """A caller's name is text, whatever is in it."""
    service = ServiceLine(service=Service.AGENT, seen=1.0, jobs=(line(1, caller="\x1b[2J[bold]x"),))
    text = "\n".join(drawn([service]))
    assert "\x1b" not in text
    assert "[bold]x" in text
