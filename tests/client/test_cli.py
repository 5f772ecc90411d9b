"""The forge command against a real server: results on stdout, everything else on stderr, exit codes for scripts."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.descriptor import Descriptor
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from cognateforge import exceptions
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.cli import errors
from cognateforge.cli.app import app
from cognateforge.cli.exits import MEANING, Exit, exit_for
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import AGENT_JOB, JOB, RESERVATION, Fake, progress_events
from tests.support.consul_double import ConsulDouble


class Forge:
    """Runs commands against the fake server."""

    def __init__(self, address: str) -> None:
        self._env = {"FORGE_COGNATE": address, "FORGE_AGENT": address}

    def __call__(self, *args: str) -> Result:
        return CliRunner().invoke(app, list(args), env=self._env, catch_exceptions=False)

    def json(self, *args: str) -> list[dict[str, Any]]:
        """Run with --json and return its lines."""
        result = self(*args, "--json")
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def forge(fake: Fake) -> Forge:
    """The command line, pointed at the fake server."""
    return Forge(fake.address)


def test_every_exit_code_is_in_the_help() -> None:
    """One table in code, and the same one in `forge --help`."""
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert set(Exit) == set(MEANING)
    for code in Exit:
        assert re.search(rf"^\s*{code.value}  ", text, re.MULTILINE), code


def test_every_error_has_an_exit_code() -> None:
    """No error of the tree but a fault inside the server is reported as one."""
    codes = {name: exit_for(cls("x")) for name, cls in exceptions.BY_REASON.items()}
    assert [name for name, code in codes.items() if code is Exit.INTERNAL] == ["INTERNAL"]
    assert exit_for(exceptions.LocalStorageError("x")) is Exit.LOCAL


def test_pretrain_submits_the_plan(forge: Forge, fake: Fake) -> None:
    """Each option is a field of the plan; stdout is the job's name."""
    result = forge(
        *("pretrain", "--steps", "30", "--seed", "7", "--batch-size", "2", "--sequence-length", "64", "--lr", "0.001"),
        *("--warmup-steps", "3", "--checkpoint-interval", "10", "--progress-interval", "5"),
        *("--dataset", "forge-arithmetic:2", "--dataset", "hotpotqa"),
        *("--request-id", "00000000-0000-4000-8000-00000000000a"),
    )
    assert (result.exit_code, result.stdout) == (0, f"{JOB}\n")
    request = fake.script.calls[-1].request
    assert request.request_id == "00000000-0000-4000-8000-00000000000a"
    plan = request.plan
    assert (plan.total_steps, plan.seed, plan.batch_size, plan.sequence_length) == (30, 7, 2, 64)
    assert (plan.peak_learning_rate, plan.warmup_steps) == (0.001, 3)
    assert (plan.checkpoint_interval_steps, plan.progress_interval_steps) == (10, 5)
    assert [(share.dataset, share.weight) for share in plan.datasets] == [(3, 2.0), (2, 1.0)]
    assert not plan.HasField("curriculum")


def test_pretrain_asks_for_a_curriculum(forge: Forge, fake: Fake) -> None:
    """The flag alone leaves both numbers to the server; they mean nothing without it."""
    forge("pretrain", "--steps", "30", "--curriculum")
    plan = fake.script.calls[-1].request.plan
    assert (plan.HasField("curriculum"), plan.curriculum.steps, plan.curriculum.initial_competence) == (True, 0, 0.0)
    forge("pretrain", "--steps", "30", "--curriculum", "--curriculum-steps", "9", "--initial-competence", "0.25")
    plan = fake.script.calls[-1].request.plan
    assert (plan.curriculum.steps, plan.curriculum.initial_competence) == (9, 0.25)
    assert forge("pretrain", "--steps", "30", "--curriculum-steps", "9").exit_code == 2
    assert len(fake.script.calls) == 2


@pytest.mark.parametrize("command", ["pretrain", "train"])
def test_a_start_says_when_it_is_to_run(forge: Forge, fake: Fake, command: str) -> None:
    """Priority and deadlines, as times or from now on; what is no moment never reaches the server."""
    words = [command, "--steps", "30"]
    if command == "train":
        words += ["--agent", "intent-router", "--foundation", "cognate-25m@7", "--data", "generated"]
    assert 0 == forge(*words).exit_code
    assert not fake.script.calls[-1].request.HasField("scheduling")
    before = time.time()
    asked = ("--priority", "7", "--start-by", "30m", "--finish-by", "2027-12-24T18:00:00Z", "--validate-only")
    assert 0 == forge(*words, *asked).exit_code
    request = fake.script.calls[-1].request
    assert (7, True) == (request.scheduling.priority, request.validate_only)
    assert "2027-12-24T18:00:00Z" == request.scheduling.finish_by.ToJsonString()
    assert 1799 <= request.scheduling.start_by.ToSeconds() - before <= 1801 + time.time() - before
    result = forge(*words, "--finish-by", "tomorrow")
    assert (2, 2) == (result.exit_code, len(fake.script.calls))
    assert "is no moment" in result.stderr


def test_pretraining_may_name_a_reservation(forge: Forge, fake: Fake) -> None:
    """It goes with the request; without the option there is none."""
    name = "reservations/12345678-1234-1234-1234-123456789012"
    alone = name.partition("/")[2]
    for words, expected in (((), ""), (("--reservation", name), name), (("--reservation", alone), name)):
        assert 0 == forge("pretrain", "--steps", "30", *words).exit_code
        assert expected == fake.script.calls[-1].request.reservation


def test_a_reservation_is_made_listed_and_cancelled(forge: Forge, fake: Fake) -> None:
    """Times as elsewhere; its name goes to stdout, and stands for it with or without the collection."""
    before = time.time()
    made = forge("reservations", "create", "--slots", "2", "--end", "8h", "--purpose", "the long run")
    assert (0, f"{RESERVATION}\n") == (made.exit_code, made.stdout)
    request = fake.script.calls[-1].request
    assert (2, "the long run") == (request.slots, request.purpose)
    assert 0 <= request.start_time.ToSeconds() - int(before) <= 1 + time.time() - before
    assert 8 * 3600 == request.end_time.ToSeconds() - request.start_time.ToSeconds()
    rows = forge.json("reservations", "list", "--limit", "2")
    assert [(RESERVATION, 2)] * 2 == [(row["name"], row["slots"]) for row in rows]
    assert not fake.script.calls[-1].request.include_ended
    cells = forge("reservations", "list", "--include-ended").stdout.splitlines()[1].split()
    assert ([RESERVATION, "RUNNING", "2"], ["the", "long", "run", "local"]) == (cells[:3], cells[-4:])
    assert fake.script.calls[-1].request.include_ended
    ended = forge("reservations", "cancel", RESERVATION.partition("/")[2])
    assert (0, f"{RESERVATION} CANCELLED\n") == (ended.exit_code, ended.stderr)
    assert "cancel_time" in forge.json("reservations", "cancel", RESERVATION)[0]
    [row] = forge.json("reservations", "create", "--slots", "1", "--start", "2100-01-01T00:00:00Z", "--end", "2d")
    assert "2100-01-01T00:00:00Z" == row["start_time"]
    assert "AHEAD" in forge("reservations", "list").stdout


def test_a_reservation_that_cannot_be_made_names_the_option(forge: Forge, fake: Fake) -> None:
    """By the server, with the field's option; by the command, before any call."""
    told = "slots: 2 are asked for, and 1 of 2 are left; take fewer, or another time"
    violation = exceptions.FieldViolation(field="slots", description="only 1 are left")
    fake.script.failures.append(exceptions.ReservationConflictError(told, violations=[violation]))
    refused = forge("reservations", "create", "--slots", "2", "--end", "8h")
    assert 5 == refused.exit_code
    assert [f"error: {told}", "  slots (--slots): only 1 are left"] == refused.stderr.splitlines()[:2]
    assert 3 == forge("reservations", "cancel", "00000000-0000-4000-8000-000000000009").exit_code
    calls = len(fake.script.calls)
    for words in (("create", "--slots", "1", "--end", "tonight"), ("cancel", "mine"), ("create", "--end", "8h")):
        assert 2 == forge("reservations", *words).exit_code
    assert calls == len(fake.script.calls)


def test_a_dry_run_shows_the_estimate(forge: Forge, fake: Fake) -> None:
    """In whole, as text and as JSON; a real start has one line of it for people."""
    estimate = job_pb2.Estimate(memory_bytes=2_500_000_000, steps_per_s=0.5, measured_attempts=3)
    estimate.run_time.FromSeconds(60)
    estimate.cost.amount, estimate.cost.currency = 0.25, "EUR"
    fake.pretraining.estimate = estimate
    dry = forge("pretrain", "--steps", "30", "--validate-only")
    assert (0, True) == (dry.exit_code, "memory_bytes: 2500000000" in dry.stdout)
    [row] = forge.json("pretrain", "--steps", "30", "--validate-only")
    assert (0.5, 30) == (row["estimate"]["steps_per_s"], row["job"]["plan"]["total_steps"])
    real = forge("pretrain", "--steps", "30")
    words = "expected: 2.5 GB of memory, 60 s of training, by 3 measured attempts, 0.25 EUR"
    assert (f"{JOB}\n", words) == (real.stdout, real.stderr.strip())


def test_jobs_tell_what_they_wait_for(forge: Forge, fake: Fake) -> None:
    """The place in the queue, or until when."""
    job = fake.pretraining.job.job
    job.state = job_pb2.JOB_STATE_QUEUED
    job.wait.CopyFrom(job_pb2.Wait(reason=job_pb2.WAIT_REASON_SLOT, queue_position=3))
    assert "slot, place 3" in forge("jobs", "cognate").stdout
    job.wait.CopyFrom(job_pb2.Wait(reason=job_pb2.WAIT_REASON_PEER))
    job.wait.not_before.FromSeconds(0)
    assert "peer, until 1970-01-01T00:00:00Z" in forge("jobs", "cognate").stdout


def test_several_processes_are_asked_for(forge: Forge, fake: Fake) -> None:
    """Both commands have the same options for it; without one the plan says nothing of processes."""
    agent = ("train", "--agent", "a", "--foundation", "cognate-25m@1", "--data", "generated")
    for given in (("pretrain",), agent):
        forge(*given, "--steps", "30")
        assert not fake.script.calls[-1].request.plan.HasField("compute")
        forge(*given, "--steps", "30", "--processes", "2")
        compute = fake.script.calls[-1].request.plan.compute
        assert (compute.processes, compute.strategy) == (2, job_pb2.COMPUTE_STRATEGY_DDP)
        forge(*given, "--steps", "30", "--processes", "4", "--nodes", "2")
        compute = fake.script.calls[-1].request.plan.compute
        assert (compute.processes, compute.nodes) == (4, 2)
        forge(*given, "--steps", "30", "--processes", "2", "--sharded")
        assert fake.script.calls[-1].request.plan.compute.strategy == job_pb2.COMPUTE_STRATEGY_FSDP2


def test_train_makes_agents_that_act(forge: Forge, fake: Fake) -> None:
    """An environment instead of rows, nothing for a base, and every parameter trained; the server counts the steps."""
    result = forge(
        *("train", "--agent", "balancer", "--task", "reinforcement", "--environment", "CartPole-v1"),
        *("--environment-steps", "2048", "--discount", "0.98", "--setting", "hidden_size=32", "--warmup-steps", "5"),
        *("--setting", "normalize_rewards=true", "--setting", "activation=relu"),
    )
    assert (0, f"{AGENT_JOB}\n") == (result.exit_code, result.stdout)
    plan = fake.script.calls[-1].request.plan
    assert ("policy", "scratch", "full", 5) == (
        plan.architecture,
        plan.WhichOneof("base"),
        plan.adaptation.WhichOneof("method"),
        plan.total_steps,
    )
    task = plan.reinforcement
    assert ("CartPole-v1", 2048, 0.98) == (
        task.environment,
        task.policy_optimization.environment_steps,
        task.policy_optimization.discount,
    )
    assert [("integer", 32), ("flag", True), ("word", "relu")] == [
        (kind, getattr(item, kind)) for item in plan.settings if (kind := item.WhichOneof("value"))
    ]
    together = ("train", "--agent", "a", "--task", "multi-agent", "--environment", "mpe/simple_spread_v3")
    assert 0 == forge(*together, "--agents", "3", "--coordination", "centralized-critic").exit_code
    team = fake.script.calls[-1].request.plan.multi_agent
    assert (3, training_pb2.COORDINATION_CENTRALIZED_CRITIC) == (team.agents, team.coordination)
    calls = len(fake.script.calls)
    for wrong in (
        together,
        (*together, "--agents", "3", "--data", "rows.jsonl"),
        (*together, "--agents", "3", "--foundation", "cognate-25m"),
        ("train", "--agent", "a", "--task", "reinforcement"),
        ("train", "--agent", "a", "--task", "reinforcement", "--environment", "CartPole-v1", "--agents", "2"),
        ("train", "--agent", "a", "--scratch", "--data", "generated", "--steps", "9", "--environment", "CartPole-v1"),
    ):
        assert 2 == forge(*wrong).exit_code, wrong
    assert calls == len(fake.script.calls)


def test_pretrain_refuses_an_unknown_set(forge: Forge, fake: Fake) -> None:
    """Usage errors never reach the server."""
    result = forge("pretrain", "--steps", "1", "--dataset", "wikipedia")
    assert result.exit_code == 2
    assert fake.script.calls == []


def test_pretrain_watch_ends_with_the_result(forge: Forge) -> None:
    """Progress on stderr, the outcome on stdout."""
    result = forge("pretrain", "--steps", "20", "--watch")
    assert (result.exit_code, result.stdout) == (0, f"{JOB} SUCCEEDED cognate-25m@7\n")
    assert re.search(r"step \d+/20 loss [\d.]+ ponder 2.5", result.stderr)
    assert "cognate-25m@7 is EXPERIMENTAL; checks that failed: memory_helps\n" in result.stderr


def test_a_log_of_a_watch_has_every_validation_and_no_bare_step(forge: Forge, fake: Fake) -> None:
    """Numbers that a line has no room for make no line, even at the last step."""
    rows = [(10, "validation_loss", 3.25), (20, "validation_loss", 3.0), (20, "validation_loss_memory_off", 3.5)]
    fake.history.events = [
        job_pb2.JobEvent(
            sequence=number,
            progress=job_pb2.Progress(step=step, total_steps=20, metrics=[job_pb2.Metric(name=name, value=value)]),
        )
        for number, (step, name, value) in enumerate(rows, start=1)
    ]
    steps = [line for line in forge("watch", JOB).stderr.splitlines() if line.startswith("step")]
    assert ["step 10/20 validation loss 3.25", "step 20/20 validation loss 3"] == steps


def test_a_live_bar_can_be_forced(forge: Forge) -> None:
    """--progress draws on stderr even where that is no terminal, and leaves stdout alone."""
    result = forge("watch", JOB, "--progress")
    assert (result.exit_code, result.stdout) == (0, f"{JOB} SUCCEEDED cognate-25m@7\n")
    assert "20/20" in result.stderr.replace(" ", "") or "19/20" in result.stderr


def test_train_submits_the_plan(forge: Forge, fake: Fake) -> None:
    """Base, task, adaptation and optimizer end in their oneofs."""
    common = ("train", "--agent", "router", "--foundation", "cognate-25m@7", "--steps", "9")
    result = forge(
        *common,
        *("--data", "agent/clinc.jsonl", "--adaptation", "lora", "--lora-rank", "4", "--optimizer", "sgd"),
        *("--momentum", "0.9", "--lr", "0.01", "--schedule", "linear", "--batch-size", "8", "--accept-experimental"),
        *("--domain", "banking", "--include-out-of-scope"),
    )
    assert (result.exit_code, result.stdout) == (0, f"{AGENT_JOB}\n")
    plan = fake.script.calls[-1].request.plan
    assert (plan.agent, plan.architecture, plan.total_steps, plan.batch_size) == ("router", "cognate", 9, 8)
    assert (plan.foundation.name, plan.foundation.accept_experimental) == ("cognate-25m@7", True)
    assert plan.classification.file.path == "agent/clinc.jsonl"
    assert (list(plan.classification.domains), plan.classification.include_out_of_scope) == (["banking"], True)
    assert (plan.adaptation.lora.rank, plan.optimization.sgd.momentum) == (4, 0.9)
    assert (plan.optimization.peak_learning_rate, plan.optimization.schedule) == (0.01, 2)

    assert forge(*common, "--data", "generated", "--adaptation", "full", "--optimizer", "adam").exit_code == 0
    plan = fake.script.calls[-1].request.plan
    assert plan.classification.WhichOneof("source") == "generated"
    assert plan.adaptation.WhichOneof("method") == "full"
    assert plan.optimization.WhichOneof("optimizer") == "adam"

    assert forge(*common, "--data", "d.jsonl", "--task", "dialogue").exit_code == 0
    assert fake.script.calls[-1].request.plan.dialogue.file.path == "d.jsonl"
    assert forge(*common, "--data", "generated", "--task", "dialogue").exit_code == 2


@pytest.mark.parametrize(
    ("words", "method", "expected"),
    [
        (
            ("lora", "--lora-alpha", "1.5", "--lora-dropout", "0.25", "--weight-decomposed"),
            "lora",
            training_pb2.LoraAdaptation(alpha=1.5, dropout=0.25, weight_decomposed=True),
        ),
        (("head",), "head", training_pb2.HeadAdaptation()),
        (("freezing", "--trained-blocks", "2"), "freezing", training_pb2.FreezingAdaptation(trained_blocks=2)),
        (("bottleneck", "--bottleneck-width", "64"), "bottleneck", training_pb2.BottleneckAdaptation(width=64)),
    ],
)
def test_train_asks_for_every_method(
    forge: Forge, fake: Fake, words: tuple[str, ...], method: str, expected: Any
) -> None:
    """Each method with its own options; an option of another method never reaches the server."""
    common = ("train", "--agent", "router", "--foundation", "cognate-25m@7", "--steps", "9", "--data", "generated")
    assert forge(*common, "--adaptation", *words).exit_code == 0
    adaptation = fake.script.calls[-1].request.plan.adaptation
    assert (method, expected) == (adaptation.WhichOneof("method"), getattr(adaptation, method))
    result = forge(*common, "--adaptation", "full", *words[1:])
    assert (2 if words[1:] else 0) == result.exit_code
    assert not words[1:] or f"is for --adaptation {method}" in result.stderr


@pytest.mark.parametrize(
    ("words", "base", "architecture", "method"),
    [
        (("--foundation", "cognate-25m@7"), "foundation", "cognate", "lora"),
        (("--model-folder", "org/tiny"), "model_folder", "sequence_classifier", "lora"),
        (("--model-folder", "org/tiny", "--task", "dialogue"), "model_folder", "causal_lm", "lora"),
        (("--scratch",), "scratch", "recurrent", "full"),
        (("--continue", "router@3", "--architecture", "recurrent"), "agent_version", "recurrent", "full"),
        (("--continue", "router@3", "--architecture", "cognate"), "agent_version", "cognate", "lora"),
    ],
)
def test_train_names_its_base(
    forge: Forge, fake: Fake, words: tuple[str, ...], base: str, architecture: str, method: str
) -> None:
    """The architecture and the method follow from base and task, unless they are said."""
    assert forge("train", "--agent", "router", "--steps", "9", "--data", "d.jsonl", *words).exit_code == 0
    plan = fake.script.calls[-1].request.plan
    assert (base, architecture) == (plan.WhichOneof("base"), plan.architecture)
    assert plan.adaptation.WhichOneof("method") == method


def test_train_takes_one_base_and_settings_of_every_kind(forge: Forge, fake: Fake) -> None:
    """No base, two of them, and what is no setting never reach the server."""
    common = ("train", "--agent", "router", "--steps", "9", "--data", "d.jsonl")
    words = [f"--setting={text}" for text in ("cell=lstm", "width=64", "dropout=0.5", "bidirectional=true")]
    assert forge(*common, "--scratch", *words).exit_code == 0
    given = {setting.name: setting.WhichOneof("value") for setting in fake.script.calls[-1].request.plan.settings}
    assert given == {"cell": "word", "width": "integer", "dropout": "number", "bidirectional": "flag"}
    assert forge(*common).exit_code == 2
    assert forge(*common, "--scratch", "--foundation", "cognate-25m@7").exit_code == 2
    assert "--architecture" in forge(*common, "--continue", "router@3").stderr
    assert "NAME=VALUE" in forge(*common, "--scratch", "--setting", "width").stderr


@pytest.mark.parametrize("number", ["9" * 30, "-9223372036854775809", "9" * 5000, "1e999"])
def test_a_number_that_no_setting_can_hold_is_refused_as_one(forge: Forge, fake: Fake, number: str) -> None:
    """It is neither rounded nor sent as a word, and the refusal does not repeat thousands of digits."""
    common = ("train", "--agent", "router", "--steps", "9", "--data", "d.jsonl", "--scratch")
    result = forge(*common, f"--setting=width={number}")
    assert (2, []) == (result.exit_code, fake.script.calls)
    assert "beyond what a setting can hold" in " ".join(result.stderr.split()).replace("│ ", "")
    assert len(result.stderr) < 1000
    assert 0 == forge(*common, "--setting=width=9223372036854775807", "--setting=cell=e5").exit_code
    assert ["integer", "word"] == [s.WhichOneof("value") for s in fake.script.calls[-1].request.plan.settings]


def test_train_says_how_a_step_is_taken_and_when_to_end(forge: Forge, fake: Fake) -> None:
    """Schedule, accumulation, precision, validations and early stopping are fields of the plan."""
    common = ("train", "--agent", "router", "--foundation", "cognate-25m@7", "--steps", "9", "--data", "generated")
    assert forge(*common).exit_code == 0
    assert not fake.script.calls[-1].request.plan.optimization.HasField("early_stopping")
    result = forge(
        *common,
        *("--schedule", "one-cycle", "--accumulation-steps", "4", "--precision", "bfloat16", "--early-stopping"),
        *("--patience", "2", "--min-improvement", "0.01", "--validation-interval", "3", "--max-tokens", "64"),
    )
    assert result.exit_code == 0
    plan = fake.script.calls[-1].request.plan
    assert (training_pb2.SCHEDULE_ONE_CYCLE, 4, training_pb2.PRECISION_BFLOAT16) == (
        plan.optimization.schedule,
        plan.optimization.accumulation_steps,
        plan.optimization.precision,
    )
    assert training_pb2.EarlyStopping(patience=2, min_improvement=0.01) == plan.optimization.early_stopping
    assert (3, 64) == (plan.validation_interval_steps, plan.max_tokens)
    assert forge(*common, "--early-stopping").exit_code == 0
    assert fake.script.calls[-1].request.plan.optimization.HasField("early_stopping")
    assert forge(*common, "--patience", "2").exit_code == 2


def test_pretrain_watch_as_json_starts_with_the_job(forge: Forge) -> None:
    """The submitted job, then what `forge watch --json` prints."""
    first, *frames = forge.json("pretrain", "--steps", "20", "--wait")
    assert (first["service"], first["job"]["name"], first["plan"]["total_steps"]) == ("cognate", JOB, 20)
    assert frames == forge.json("watch", JOB)


def test_watch_as_json_is_one_object_a_line(forge: Forge) -> None:
    """Every event in order, numbers as numbers, then the end."""
    *events, end = forge.json("watch", JOB, "--service", "cognate")
    assert [frame["event"]["sequence"] for frame in events] == list(range(1, 21))
    assert events[0]["event"]["state_change"] == {"from": "UNSPECIFIED", "to": "RUNNING", "message": ""}
    assert events[1]["event"]["progress"]["metrics"][1] == {
        "name": "mean_ponder_steps",
        "unit": "steps",
        "value": 2.5,
        "bins": [],
    }
    assert end == {"end": {"state": "SUCCEEDED", "last_sequence": 20}}


def test_watch_survives_broken_streams(forge: Forge, fake: Fake) -> None:
    """What the library promises, the command keeps."""
    fake.history.cuts = deque([3, 4, 5])
    events = forge.json("watch", JOB, "--service", "cognate", "--after-sequence", "2")[:-1]
    assert [frame["event"]["sequence"] for frame in events] == list(range(3, 21))


def test_a_job_whose_events_are_gone_is_watched_from_what_is_left(forge: Forge, fake: Fake) -> None:
    """Retention removes events of jobs that ended long ago; who wants the beginning is told."""
    fake.pretraining.job.job.first_sequence = 18
    result = forge("watch", JOB, "--json")
    assert [18, 19, 20] == [json.loads(line)["event"]["sequence"] for line in result.stdout.splitlines()[:-1]]
    assert "the events before 18 are no longer kept\n" == result.stderr


def test_a_verification_is_waited_for(forge: Forge, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdict is the exit code; without waiting it is just asked for."""
    monkeypatch.setattr("cognateforge.cli.jobs.POLL_S", 0.0)
    name = "verifications/00000000-0000-4000-8000-000000000000"
    result = forge("verify-resume", JOB, "--from", "10")
    assert (0, f"{name} EQUAL\n", f"{name} replays steps 10 to 20\n") == (
        result.exit_code,
        result.stdout,
        result.stderr,
    )
    assert forge("verifications", JOB).stdout.split()[5:7] == [name, "EQUAL"]
    fake.pretraining.verifications.looked = 0
    fake.pretraining.verifications.verdict = job_pb2.RESUME_VERDICT_DIFFERENT
    assert (1, "DIFFERENT") == ((result := forge("verify-resume", JOB)).exit_code, result.stdout.split()[1])
    fake.pretraining.verifications.looked, fake.pretraining.verifications.failure = 0, "DATA_UNAVAILABLE: gone"
    assert (1, "FAILED DATA_UNAVAILABLE: gone") == (
        (result := forge("verify-resume", JOB)).exit_code,
        result.stdout.split(maxsplit=1)[1].strip(),
    )
    assert "QUEUED" == forge.json("verify-resume", JOB, "--no-wait")[0]["state"]


def test_logs_are_printed_line_by_line(forge: Forge, fake: Fake) -> None:
    """The newest attempt's, or one that is named; which one is told apart, and no terminal obeys what a log holds."""
    fake.logs.written[1].append("\x1b[2Jgone")
    result = forge("logs", JOB)
    assert (0, "three\nfour\n\ufffd[2Jgone\n", "attempt 2\n") == (result.exit_code, result.stdout, result.stderr)
    assert "one\ntwo\ndied\n" == forge("logs", JOB, "--attempt", "1").stdout
    fake.logs.gap = 6
    result = forge("logs", JOB, "--attempt", "1", "--follow")
    assert "one\ntwo\ndied\nfour\n\ufffd[2Jgone\n" == result.stdout
    assert "attempt 1\nattempt 2\n6 bytes are no longer kept\n" == result.stderr
    frames = forge.json("logs", JOB, "--attempt", "1", "--position", "8")
    lines = {"attempt": 1, "lines": [{"position": 8, "text": "died", "continued": False}], "next_position": 13}
    assert [{"lines": lines}, {"end": {"attempt": 1, "next_position": 13}}] == frames


@pytest.mark.parametrize("state", [job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED])
def test_a_job_without_success_is_exit_code_1(forge: Forge, fake: Fake, state: job_pb2.JobState.ValueType) -> None:
    """Failure's reason and message are told."""
    failure = job_pb2.Failure(reason="TRAINING_DIVERGED", message="loss is nan at step 12")
    fake.history.events = progress_events(5)[:-1]
    fake.history.end = job_pb2.End(state=state, failure=failure)
    result = forge("watch", JOB)
    assert result.exit_code == 1
    assert "error: TRAINING_DIVERGED: loss is nan at step 12" in result.stderr


def test_jobs_lists_both_services(forge: Forge) -> None:
    """Newest first, over pages, with the service beside each job."""
    rows = forge.json("jobs")
    assert [(row["service"], row["job"]["name"]) for row in rows] == [
        ("cognate", JOB),
        ("cognate", JOB),
        ("agent", AGENT_JOB),
    ]
    assert [row["service"] for row in forge.json("jobs", "agent")] == ["agent"]
    text = forge("jobs", "--limit", "1").stdout
    assert JOB in text
    assert "RUNNING" in text
    assert "2/20" in text
    assert forge("jobs", "--state", "asleep").exit_code == 2


def test_a_job_is_found_in_either_service(forge: Forge) -> None:
    """By its full name or its UUID; --service asks only one."""
    assert forge.json("job", JOB)[0]["service"] == "cognate"
    assert forge.json("job", AGENT_JOB.removeprefix("jobs/"))[0]["service"] == "agent"
    assert forge("job", AGENT_JOB, "--service", "cognate").exit_code == 3
    assert "state: RUNNING" in forge("job", JOB).stdout


def test_steering_a_job(forge: Forge, fake: Fake) -> None:
    """Each command has its own request id; an illegal transition is a precondition."""
    assert "PAUSING" in forge("pause", JOB).stderr
    assert forge.json("cancel", JOB)[0]["job"]["state"] == "CANCELLING"
    ids = [call.request.request_id for call in fake.script.calls if call.method in {"PauseJob", "CancelJob"}]
    assert len(set(ids)) == 2
    result = forge("resume", JOB)
    assert result.exit_code == 5
    assert result.stderr.startswith("error: job is RUNNING; PAUSED jobs can be resumed\n")


def test_checkpoints_metrics_and_architectures(forge: Forge) -> None:
    """Lists as tables or lines."""
    assert forge.json("checkpoints", JOB)[0]["step"] == 10
    assert forge.json("metrics", JOB) == [{"name": "loss", "unit": "nats/token", "steps": [1, 2], "values": [4.0, 3.5]}]
    assert "3.5" in forge("metrics", JOB).stdout
    assert forge.json("architectures")[0]["tasks"] == ["classification"]
    assert "not loaded: echo (echo_plugin:Echo): SystemExit: bye" in forge("architectures").stderr
    assert "yes" in forge("checkpoints", JOB).stdout
    assert f"{JOB} step 10 pinned" in forge("pin", JOB, "10").stderr
    assert f"{JOB} step 10 unpinned" in forge("unpin", JOB, "10").stderr


def test_models_agents_and_aliases(forge: Forge, fake: Fake) -> None:
    """The registries of both services."""
    assert forge.json("models")[0]["state"] == "EXPERIMENTAL"
    assert forge.json("model", "cognate-25m")[0]["name"] == "cognate-25m@7"
    assert forge.json("agents")[0]["aliases"] == ["production"]
    assert forge.json("agent", "intent-router@production")[0]["name"] == "intent-router@3"
    assert "production is intent-router@3" in forge("alias", "intent-router@3", "production").stderr
    assert fake.script.calls[-1].request.alias == "production"
    assert forge("model", "gpt").exit_code == 3
    assert "error: no model nothing; no agent nothing\n" in forge("fetch", "nothing", "--out", "x").stderr


def test_agents_are_listed_moved_and_measured(forge: Forge, fake: Fake) -> None:
    """By task and state; moves in words; results in a table."""
    assert forge.json("agents", "--task", "dialogue", "--lifecycle", "draft")[0]["lifecycle"] == "DRAFT"
    listed = forge("agents", "list", "--task", "dialogue", "--lifecycle", "draft", "--lifecycle", "retired")
    assert "DRAFT" in listed.stdout
    asked = fake.script.calls[-1].request
    states = [agent_pb2.LIFECYCLE_DRAFT, agent_pb2.LIFECYCLE_RETIRED]
    assert ("dialogue", states) == (asked.task, list(asked.lifecycles))
    assert "intent-router@3 is CANDIDATE" in forge("agents", "lifecycle", "intent-router@3", "candidate").stderr
    assert fake.script.calls[-1].request.lifecycle == agent_pb2.LIFECYCLE_CANDIDATE
    assert forge("agents", "lifecycle", "intent-router@3", "perfect").exit_code == 2
    moves = forge("agents", "moves", "intent-router").stdout
    for words in ("production points at it, before at 2", "DRAFT to CANDIDATE", "production points at it  "):
        assert words in moves
    assert forge.json("agents", "moves", "intent-router")[1]["lifecycle"]["to_lifecycle"] == "CANDIDATE"
    measured = forge("agents", "evaluate", "intent-router@3", "--data", "rows.jsonl").stdout
    assert "accuracy" in measured
    assert "0.5000" in measured
    assert fake.script.calls[-1].request.classification.file.path == "rows.jsonl"
    forge("agents", "evaluate", "intent-router@3", "--data", "generated", "--data-seed", "7")
    assert fake.script.calls[-1].request.classification.generated.seed == 7


def test_a_validation_shows_every_check(forge: Forge, fake: Fake) -> None:
    """Value, threshold and rule, and whether it holds."""
    shown = forge("models", "validate", "cognate-25m@7").stdout
    for words in ("memory_gain_nats", "quality", "0.5", "0.125", "yes", "must be > the threshold"):
        assert words in shown
    assert forge("models", "validate", "../etc").exit_code == 2


def test_models_watch_tells_each_event(forge: Forge, fake: Fake) -> None:
    """A line for each; a watch has no end but an error."""
    fake.outbox.cuts, fake.outbox.how = deque([2, 2]), grpc.StatusCode.INTERNAL
    result = forge("models", "watch", "--after-sequence", "4")
    assert (result.exit_code, result.stdout) == (
        Exit.INTERNAL,
        "5 published cognate-25m@5 READY\n6 published cognate-25m@6 READY\n",
    )
    lines = [json.loads(line) for line in forge("models", "watch", "--json").stdout.splitlines()]
    assert [(1, "cognate-25m@1"), (2, "cognate-25m@2")] == [
        (line["event"]["sequence"], line["event"]["published"]["name"]) for line in lines
    ]


def test_models_watch_tells_a_snapshot_model_by_model(forge: Forge, fake: Fake) -> None:
    """Where early events are gone, lines of what there is come first."""
    fake.outbox.keep, fake.outbox.count, fake.outbox.after_snapshot = 2, 4, 2
    fake.outbox.cuts, fake.outbox.how = deque([2, 2]), grpc.StatusCode.INTERNAL
    assert forge("models", "watch").stdout == (
        "up to 2 there is cognate-25m@1 READY\nup to 2 there is cognate-25m@2 READY\n3 published cognate-25m@3 READY\n"
    )
    first = json.loads(forge("models", "watch", "--json").stdout.splitlines()[0])
    assert (2, "cognate-25m@1") == (first["snapshot"]["last_sequence"], first["snapshot"]["model"]["name"])


def test_a_bridge_without_its_extra_says_what_to_install(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NATS client is an extra."""
    monkeypatch.setitem(sys.modules, "nats", None)
    monkeypatch.delitem(sys.modules, "cognateforge.bridge.nats", raising=False)
    result = forge("models", "bridge", "--nats", "nats://127.0.0.1:1", "--stream", "S", "--subject", "s")
    assert (result.exit_code, "pip install 'cognateforge[nats]'" in result.stderr) == (Exit.LOCAL, True)


def test_options_before_a_command_below_are_not_lost_in_silence(forge: Forge) -> None:
    """`forge models --json watch` would otherwise print no JSON."""
    result = forge("models", "--json", "watch")
    assert result.exit_code == 2
    assert "--json" in result.stderr
    assert "options belong behind" in result.stderr


@pytest.mark.parametrize(
    ("name", "landed"), [("cognate-25m@7", "cognate-25m@7"), ("intent-router@production", "intent-router@3")]
)
def test_fetch_brings_models_and_agents(forge: Forge, tmp_path: Path, name: str, landed: str) -> None:
    """By name alone; a second time nothing is transferred."""
    [got] = forge.json("fetch", name, "--out", str(tmp_path / "x"))
    assert (got["name"], got["path"], got["bytes_received"]) == (landed, str(tmp_path / "x"), got["size_bytes"])
    [again] = forge.json("fetch", name, "--out", str(tmp_path / "x"))
    assert again["bytes_received"] == 0
    assert forge("fetch", name, "--out", str(tmp_path / "x")).stdout == f"{tmp_path / 'x'}\n"


def test_fetch_of_a_damaged_model_is_exit_code_8(forge: Forge, fake: Fake, tmp_path: Path) -> None:
    """Corruption has a code of its own."""
    fake.model.tamper = lambda payload: bytes(len(payload))
    assert forge("fetch", "cognate-25m", "--out", str(tmp_path / "x"), "--progress").exit_code == 8


def test_status_shows_both_services(forge: Forge) -> None:
    """Health, version, capabilities, breaker."""
    cognate, agent = forge.json("status")
    assert cognate["health"] == agent["health"] == "SERVING"
    assert (cognate["version"], cognate["capabilities"], cognate["breaker"]) == ("9.9", ["generated-data"], "closed")
    assert "  capabilities generated-data  breaker closed\n" in forge("status").stdout


def test_services_are_found_in_consul(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """consul://SERVICE stands wherever an address may, with or without a tag."""
    consul = ConsulDouble()
    try:
        consul.put_instances("Cognate_1", fake.address)
        monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{consul.port}")
        (line, _) = Forge("consul://Cognate_1").json("status")
        assert (line["health"], line["address"]) == ("SERVING", fake.address)
        assert Forge(fake.address)("jobs", "--cognate", "consul://Cognate_1").exit_code == 0
        away = Forge("consul://Cognate_1?tag=blue")("jobs", "--timeout", "0.2")
        assert (away.exit_code, "no passing instance of Cognate_1" in away.stderr) == (4, True)
        assert {"blue"} == {query["tag"] for _, _, query in consul.queries if "tag" in query}
    finally:
        consul.close()


@pytest.mark.parametrize(
    "url",
    ["consul://", "consul://a/b", "consul://a:8500", "consul://a?tags=b", "consul://a?tag=", "consul://a?tag=b&tag=c"],
)
def test_a_url_that_names_no_service_is_refused(url: str) -> None:
    """With the forms that are taken."""
    result = Forge(url)("jobs", "--cognate", url)
    assert result.exit_code == exit_for(exceptions.ClientSetupError(""))
    assert "write consul://SERVICE or consul://SERVICE?tag=TAG" in result.stderr


def test_a_service_that_is_away_is_exit_code_4(fake: Fake) -> None:
    """And what can be told is told, of each service."""
    address = fake.address
    fake.stop()
    lines = Forge(address)("status").stderr.splitlines()
    assert [["cognate:", "error"], ["agent:", "error"]] == [
        [name, error.partition(":")[0]] for name, error in zip(lines[::2], lines[1::2], strict=True)
    ]
    result = Forge(address)("status", "--json")
    assert result.exit_code == 4
    assert [json.loads(line)["health"] for line in result.stdout.splitlines()] == ["UNREACHABLE"] * 2
    errors_told = [json.loads(line) for line in result.stderr.splitlines()]
    assert [("cognate", "UNAVAILABLE"), ("agent", "UNAVAILABLE")] == [(e["service"], e["code"]) for e in errors_told]
    assert Forge(address)("jobs").exit_code == 4
    assert Forge(address)("job", JOB).exit_code == 4


def test_not_found_is_certain_only_when_both_services_could_tell(fake: Fake) -> None:
    """One says no, the other is away: that is "unavailable", and both are told."""
    env = {"FORGE_COGNATE": fake.address, "FORGE_AGENT": "127.0.0.1:9"}
    result = CliRunner().invoke(app, ["job", AGENT_JOB], env=env)
    assert result.exit_code == 4
    assert "no job" in result.stderr
    assert "cannot tell" in result.stderr


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (exceptions.InvalidFieldError("plan breaks a rule"), 2),
        (exceptions.ArchitectureNotFoundError(), 5),
        (exceptions.RoleMissingError(), 7),
        (exceptions.RequestIdReusedError(), 9),
        (exceptions.ResourceExhaustedError(), 10),
        (exceptions.NotImplementedByServerError(), 11),
        (grpc.StatusCode.UNKNOWN, 12),
    ],
)
def test_errors_are_told_without_a_traceback(
    forge: Forge, fake: Fake, failure: exceptions.ForgeError | grpc.StatusCode, code: int
) -> None:
    """One line, the violations, the call's id."""
    if isinstance(failure, exceptions.ForgeError):
        failure.violations = (exceptions.FieldViolation(field="plan.steps", description="must be positive"),)
    fake.script.always = failure
    result = forge("pretrain", "--steps", "1")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    if isinstance(failure, exceptions.ForgeError):
        assert "\n  plan.steps: must be positive\n" in result.stderr
        assert "  call id: request-7\n" in result.stderr


def test_what_a_message_says_is_not_said_twice(forge: Forge, fake: Fake) -> None:
    """A field's line brings the option that sets it, or is left out."""
    told = "plan.total_steps: must be at least 1; plan.tokens: must be 7"
    fake.script.always = exceptions.InvalidFieldError(
        told,
        violations=[
            exceptions.FieldViolation(field="plan.total_steps", description="must be at least 1"),
            exceptions.FieldViolation(field="plan.tokens", description="must be 7"),
        ],
    )
    lines = forge("pretrain", "--steps", "-4").stderr.splitlines()
    assert [f"error: {told}", "  plan.total_steps (--steps)", "  call id: request-7"] == lines


def test_a_field_is_named_once_and_with_what_is_wrong(forge: Forge, fake: Fake) -> None:
    """Of many findings of one field, those that the message has not quoted are told; no line is a name alone."""
    findings = [f"rows.jsonl:{line}: blank; write a text" for line in range(1, 5)]
    fake.script.always = exceptions.DataUnavailableError(
        f"rows is not used; the first findings: {findings[0]} | {findings[1]}",
        violations=[exceptions.FieldViolation(field="plan.classification", description=one) for one in findings],
    )
    lines = forge("train", "--agent", "a", "--steps", "1", "--data", "rows.jsonl", "--scratch").stderr.splitlines()
    assert [f"  plan.classification (--task): {one}" for one in findings[2:]] == lines[1:-1]


def test_every_option_of_a_field_exists() -> None:
    """A command has the option, and the plan it fills has the field."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    commands = [*command.commands.values()]
    for one in commands:
        commands += one.commands.values() if isinstance(one, TyperGroup) else []
    options = {name for one in commands for param in one.params for name in param.opts}
    for field in [*errors._OPTIONS, *errors._SAME_NAME]:
        assert errors.option_for(field) in options, field
        if field.startswith("plan."):
            plans = (pretraining_pb2.PretrainingPlan.DESCRIPTOR, training_pb2.TrainingPlan.DESCRIPTOR)
            assert any(has_field(plan, field.split(".")[1:]) for plan in plans), field
    assert "--dataset" == errors.option_for("plan.datasets[2].weight")
    assert ["--data", "--environment"] == [
        errors.option_for(field) for field in ("classification.file.path", "reinforcement.environment")
    ]


def has_field(message: Descriptor, path: list[str]) -> bool:
    field = message.fields_by_name.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    return field.message_type is not None and has_field(field.message_type, path[1:])


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            exceptions.ArchitectureNotFoundError(
                "no resnet", violations=[exceptions.FieldViolation(field="plan.architecture", description="no resnet")]
            ),
            {
                "code": "FAILED_PRECONDITION",
                "reason": "ARCHITECTURE_NOT_FOUND",
                "message": "no resnet",
                "fields": [
                    {"field": "plan.architecture", "option": "--architecture", "description": "no resnet"},
                ],
                "call_id": "request-7",
            },
        ),
        (
            grpc.StatusCode.PERMISSION_DENIED,
            {"code": "PERMISSION_DENIED", "reason": "", "message": "no details", "fields": [], "call_id": ""},
        ),
    ],
)
def test_errors_as_json_are_one_object(
    forge: Forge, fake: Fake, failure: exceptions.ForgeError | grpc.StatusCode, told: dict[str, Any]
) -> None:
    """On stderr, so that stdout has results alone."""
    fake.script.always = failure
    result = forge("pretrain", "--steps", "1", "--json")
    assert ("", told) == (result.stdout, json.loads(result.stderr))


def test_a_failed_job_as_json_is_one_object(forge: Forge, fake: Fake) -> None:
    """Its end frame is a result, its failure an error."""
    failure = job_pb2.Failure(reason="TRAINING_DIVERGED", message="loss is nan at step 12")
    fake.history.end = job_pb2.End(state=job_pb2.JOB_STATE_FAILED, failure=failure)
    told = json.loads(forge("watch", JOB, "--json").stderr)
    assert ("TRAINING_DIVERGED", "loss is nan at step 12") == (told["reason"], told["message"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("watch", "nonsense"), "give jobs/UUID or the UUID"),
        (("cancel", "jobs/7"), "give jobs/UUID or the UUID"),
        (("reservations", "cancel", "jobs/7"), "give reservations/UUID or the UUID"),
        (("pretrain", "--steps", "1", "--reservation", "mine"), "give reservations/UUID or the UUID"),
        (("model", "GPT"), "is no name"),
        (("fetch", "a@b@c", "--out", "x"), "is no name"),
    ],
)
def test_what_can_be_no_name_is_told_in_words(forge: Forge, fake: Fake, words: tuple[str, ...], told: str) -> None:
    """A usage error without a pattern, and no call."""
    result = forge(*words)
    assert 2 == result.exit_code
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert "^" not in result.stderr
    assert [] == fake.script.calls


def test_a_deadline_is_exit_code_6(forge: Forge, fake: Fake) -> None:
    """--timeout bounds each call."""
    fake.script.gate = threading.Event()
    assert forge("model", "cognate-25m", "--timeout", "0.1").exit_code == 6


def test_plaintext_to_another_machine_is_refused() -> None:
    """Exit code 13, and the remedy."""
    result = Forge("10.0.0.1:7101")("models")
    assert result.exit_code == 13
    assert "give TLS credentials" in result.stderr


def test_ctrl_c_leaves_the_job_alone(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, and how to watch again."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cognateforge.cli.follow.told", interrupted)
    result = forge("watch", JOB)
    assert result.exit_code == 130
    assert f"forge watch {JOB}" in result.stderr


def test_version(forge: Forge) -> None:
    """The distribution's, as a command and as the usual option."""
    assert forge.json("version") == [{"version": forge("version").stdout.strip()}]
    assert forge("--version").stdout == f"forge {forge('version').stdout}"


@pytest.mark.parametrize("words", [(), ("train",)])
def test_help_has_its_short_name(forge: Forge, words: tuple[str, ...]) -> None:
    """-h is --help, of the program and of a command."""
    assert forge(*words, "-h").stdout == forge(*words, "--help").stdout
