"""The agent service over a real connection: what it takes in, what it refuses, and the registry of agents."""

import asyncio
import dataclasses
import json
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from agent_server import tables
from agent_server.agents import Lifecycle, ways_to
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.cli.app import app
from cognateforge.client import AsyncAgentClient
from cognateforge.exceptions import (
    AgentNotFoundError,
    ArchitectureNotFoundError,
    ArtifactCorruptError,
    DataUnavailableError,
    FoundationNotFoundError,
    IllegalTransitionError,
    IncompatibleError,
    InvalidFieldError,
    InvalidPageTokenError,
    NotImplementedByServerError,
    OffsetOutOfRangeError,
    RequestIdReusedError,
    TooManyAliasesError,
    UnknownFieldError,
)
from cognateforge.job.v1 import job_pb2
from tests.support.published import FILES, FOUNDATION, PAYLOAD, open_registry, publish_agent
from tests.support.servers import running_agent, running_cognate
from training_common.artifacts import search
from training_common.artifacts.registry import ArtifactRow
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.models.fingerprints import COGNATE_V1_25M
from training_common.settings import DataSettings
from training_common.store.database import Database
from training_common.worker import WorkerAttempt


def new_id() -> str:
    return str(uuid.uuid4())


def start(**changes: Any) -> pb.StartTrainingRequest:
    """Return a request that is fine but for the given fields of its plan. None leaves a field out."""
    values = {
        "agent": "intent-router",
        "architecture": "cognate",
        "foundation": pb.FoundationBase(name="cognate-25m"),
        "classification": pb.ClassificationTask(generated=pb.GeneratedSource(seed=5)),
        "adaptation": pb.Adaptation(lora=pb.LoraAdaptation()),
        "optimization": pb.Optimization(adamw=pb.AdamW()),
        "total_steps": 40,
        **changes,
    }
    plan = pb.TrainingPlan(**{name: value for name, value in values.items() if value is not None})
    return pb.StartTrainingRequest(request_id=new_id(), plan=plan)


def from_file(path: str) -> dict[str, Any]:
    return {"classification": pb.ClassificationTask(file=pb.FileSource(path=path))}


async def jobs_stored(agents: AsyncAgentClient) -> int:
    return len((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)


# --- starting


async def test_a_started_job_is_queued_with_its_defaults(agents: AsyncAgentClient) -> None:
    """The answer holds the plan as it will run."""
    job = (await agents.training.StartTraining(start(seed=3))).job
    assert (job_pb2.JOB_STATE_QUEUED, 40, 0) == (job.job.state, job.job.total_steps, job.job.step)
    plan = job.plan
    assert (40, 3, 32, 100) == (plan.total_steps, plan.seed, plan.batch_size, plan.checkpoint_interval_steps)
    optimization = plan.optimization
    assert pytest.approx(1e-3) == optimization.peak_learning_rate
    assert (pb.SCHEDULE_COSINE, 4, 1.0) == (
        optimization.schedule,
        optimization.warmup_steps,
        optimization.gradient_clip_norm,
    )
    assert pytest.approx(0.01) == optimization.adamw.weight_decay
    assert (8, 16.0, 0.0) == (plan.adaptation.lora.rank, plan.adaptation.lora.alpha, plan.adaptation.lora.dropout)
    assert ("", "") == (job.foundation, job.foundation_digest)
    assert job == (await agents.training.GetJob(pb.GetJobRequest(name=job.job.name))).job


async def test_what_a_plan_says_is_kept(agents: AsyncAgentClient) -> None:
    """Defaults fill gaps only."""
    request = start(
        adaptation=pb.Adaptation(lora=pb.LoraAdaptation(rank=4, alpha=3), unfreeze_act_ltm=True),
        optimization=pb.Optimization(
            sgd=pb.Sgd(momentum=0.9),
            peak_learning_rate=0.25,
            schedule=pb.SCHEDULE_LINEAR,
            warmup_steps=7,
            gradient_clip_norm=2,
        ),
        batch_size=5,
        checkpoint_interval_steps=9,
        validation_interval_steps=11,
        max_tokens=64,
        data_limits=pb.DataLimits(max_refused_share=0.5),
    )
    plan = (await agents.training.StartTraining(request)).job.plan
    said = pb.TrainingPlan()
    said.CopyFrom(plan)
    said.MergeFrom(request.plan)
    assert said == plan


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.StartTrainingRequest(plan=start().plan), "request_id"),
        (pb.StartTrainingRequest(request_id="7", plan=start().plan), "request_id"),
        (pb.StartTrainingRequest(request_id=new_id()), "plan"),
        (start(agent=""), "plan.agent"),
        (start(agent="../router"), "plan.agent"),
        (start(agent="grokfast-router"), "plan.agent"),
        (start(architecture="grok_fast"), "plan.architecture"),
        (start(foundation=None), "plan.base"),
        (start(foundation=pb.FoundationBase(name="cognate-25m@0")), "plan.foundation.name"),
        (start(classification=None), "plan.task"),
        (start(classification=pb.ClassificationTask()), "plan.classification.source"),
        (
            start(classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=-1))),
            "plan.classification.generated.seed",
        ),
        (
            start(classification=pb.ClassificationTask(generated=pb.GeneratedSource(), max_rows_per_label=-1)),
            "plan.classification.max_rows_per_label",
        ),
        (
            start(classification=pb.ClassificationTask(generated=pb.GeneratedSource(), domains=["home", ""])),
            "plan.classification.domains[1]",
        ),
        (start(**from_file("../secret.jsonl")), "plan.classification.file.path"),
        (start(**from_file("rows/../../secret.jsonl")), "plan.classification.file.path"),
        (start(**from_file("/etc/hostname")), "plan.classification.file.path"),
        (start(**from_file("rows\0.jsonl")), "plan.classification.file.path"),
        (start(adaptation=None), "plan.adaptation"),
        (start(adaptation=pb.Adaptation()), "plan.adaptation.method"),
        (start(adaptation=pb.Adaptation(lora=pb.LoraAdaptation(rank=257))), "plan.adaptation.lora.rank"),
        (start(adaptation=pb.Adaptation(lora=pb.LoraAdaptation(rank=-1))), "plan.adaptation.lora.rank"),
        (start(adaptation=pb.Adaptation(lora=pb.LoraAdaptation(dropout=1))), "plan.adaptation.lora.dropout"),
        (start(adaptation=pb.Adaptation(lora=pb.LoraAdaptation(alpha=float("nan")))), "plan.adaptation.lora.alpha"),
        (start(optimization=None), "plan.optimization"),
        (start(optimization=pb.Optimization()), "plan.optimization.optimizer"),
        (start(optimization=pb.Optimization(sgd=pb.Sgd(momentum=1))), "plan.optimization.sgd.momentum"),
        (start(optimization=pb.Optimization(adam=pb.Adam(), schedule=9)), "plan.optimization.schedule"),  # type: ignore[arg-type]
        (
            start(optimization=pb.Optimization(adam=pb.Adam(), peak_learning_rate=float("inf"))),
            "plan.optimization.peak_learning_rate",
        ),
        (start(optimization=pb.Optimization(adam=pb.Adam(), warmup_steps=41)), "plan"),
        (start(total_steps=0), "plan.total_steps"),
        (start(total_steps=-40), "plan.total_steps"),
        (start(total_steps=10_000_001), "plan.total_steps"),
        (start(batch_size=-1), "plan.batch_size"),
        (start(seed=-1), "plan.seed"),
        (start(checkpoint_interval_steps=-1), "plan.checkpoint_interval_steps"),
    ],
)
async def test_bad_input_is_refused_by_field_and_writes_nothing(
    agents: AsyncAgentClient, request_: pb.StartTrainingRequest, field: str
) -> None:
    """INVALID_ARGUMENT names the field, and no row is written."""
    with pytest.raises(InvalidFieldError) as caught:
        await agents.training.StartTraining(request_)
    assert field in [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ({"foundation": None}, "plan.base: must be given: one of foundation, model_folder, scratch, agent_version"),
        ({"adaptation": None}, "plan.adaptation: must be given: one of "),
        ({"optimization": None}, "plan.optimization: must be given: one of adamw, adam, sgd"),
    ],
)
async def test_what_was_left_out_is_told_with_what_can_stand_there(
    agents: AsyncAgentClient, left_out: dict[str, None], told: str
) -> None:
    """Nobody has to look up what a plan may say."""
    with pytest.raises(InvalidFieldError, match=told):
        await agents.training.StartTraining(start(**left_out))


async def test_a_warm_up_that_was_left_out_is_not_blamed(agents: AsyncAgentClient) -> None:
    """Negative steps are below no warm-up that was given."""
    with pytest.raises(InvalidFieldError) as caught:
        await agents.training.StartTraining(start(total_steps=-4))
    assert ["plan.total_steps"] == [violation.field for violation in caught.value.violations]


def grokfast_on(path: str) -> pb.StartTrainingRequest:
    """Return a request whose message at `path` carries a field that the contract reserves."""
    request = start()
    message: Any = request
    for name in path.split(".") if path else ():
        message = getattr(message, name)
    # Field 101, length-delimited: what a contract with `string filter = 101` would send.
    message.MergeFromString(b"\xaa\x06\x08grokfast")
    return request


@pytest.mark.parametrize(
    "path", ["plan.optimization", "plan.optimization.adamw", "plan.adaptation.lora", "plan", "plan.classification", ""]
)
async def test_a_field_that_the_contract_does_not_have_is_refused(agents: AsyncAgentClient, path: str) -> None:
    """GrokFast, in particular, cannot be smuggled past a server that would ignore it in silence."""
    with pytest.raises(UnknownFieldError, match="field number 101") as caught:
        await agents.training.StartTraining(grokfast_on(path))
    assert [f"{path}.#101".lstrip(".")] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)


async def test_many_unknown_fields_are_counted_and_not_listed(
    agents: AsyncAgentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million bytes of them would keep the event loop for seconds if each were looked at."""
    monkeypatch.delattr("training_common.rpc.interceptor.UnknownFieldSet")
    request = start()
    request.MergeFromString(b"\x98\x3f\x01" * 300_000)
    with pytest.raises(UnknownFieldError, match="900000 bytes in fields that this server does not know"):
        await agents.training.StartTraining(request)
    assert 0 == await jobs_stored(agents)


async def test_an_architecture_that_is_not_installed_is_refused(agents: AsyncAgentClient) -> None:
    """FAILED_PRECONDITION, with what there is."""
    with pytest.raises(ArchitectureNotFoundError, match=r"'perceptron' is installed, there is: .*cognate") as caught:
        await agents.training.StartTraining(start(architecture="perceptron"))
    assert ["plan.architecture"] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)


@pytest.mark.parametrize(
    "task",
    [
        {"behavioural": pb.BehaviouralTask(file=pb.FileSource(path="rows.jsonl"))},
        {"dialogue": pb.DialogueTask(file=pb.FileSource(path="rows.jsonl"))},
        {"domain": pb.DomainTask(file=pb.FileSource(path="rows.jsonl"))},
        {"multi_agent": pb.MultiAgentTask(environment="pong", agents=2)},
    ],
    ids=lambda task: next(iter(task)),
)
async def test_a_task_that_the_architecture_does_not_serve_is_refused(
    agents: AsyncAgentClient, task: dict[str, Any]
) -> None:
    """UNIMPLEMENTED before a row is written, never a job that fails later."""
    with pytest.raises(
        NotImplementedByServerError, match=rf"plan\.{next(iter(task))}: .* it serves classification"
    ) as caught:
        architecture = "sequence_classifier"
        await agents.training.StartTraining(start(architecture=architecture, classification=None, **task))
    assert [f"plan.{next(iter(task))}"] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)


async def test_what_an_agent_goes_on_with_has_to_be_there_and_fit(agents: AsyncAgentClient, store: Path) -> None:
    """Refused at submission, where the base or the architecture is wrong; nothing is stored."""
    publish_agent(store)
    further: dict[str, Any] = {"foundation": None, "agent_version": pb.AgentBase(name="intent-router@7")}
    with pytest.raises(AgentNotFoundError, match="no agent intent-router@7"):
        await agents.training.StartTraining(start(**further))
    further["agent_version"] = pb.AgentBase(name="intent-router")
    with pytest.raises(IncompatibleError, match="intent-router@1 is of architecture cognate, not recurrent") as caught:
        await agents.training.StartTraining(start(**further, architecture="recurrent"))
    assert ["plan.architecture"] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)
    job = (await agents.training.StartTraining(start(**further))).job
    assert "agent_version" == job.plan.WhichOneof("base")


async def test_without_a_data_folder_no_file_is_found(agents: AsyncAgentClient) -> None:
    """The error says what to do instead."""
    told = r"no data folder is set on this server.*use generated rows"
    with pytest.raises(DataUnavailableError, match=told) as caught:
        await agents.training.StartTraining(start(**from_file("rows.jsonl")))
    assert ["plan.classification.file.path"] == [violation.field for violation in caught.value.violations]
    assert 0 == await jobs_stored(agents)


async def test_files_are_looked_for_inside_the_data_folder_only(tmp_path: Path) -> None:
    """A missing file is told by name, a link that leads out is refused, and a file that is there is taken."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "here.jsonl").write_text('{"text": "hello", "label": "greeting"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "secret", "label": "a"}\n')
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    settings = {"data": {"folder": folder}}
    async with running_agent(tmp_path / "agent", **settings) as server, AsyncAgentClient(server.address) as agents:
        with pytest.raises(DataUnavailableError, match=r"gone\.jsonl") as missing:
            await agents.training.StartTraining(start(**from_file("gone.jsonl")))
        assert ["plan.classification.file.path"] == [violation.field for violation in missing.value.violations]
        with pytest.raises(InvalidFieldError, match="leads out of the data folder") as caught:
            await agents.training.StartTraining(start(**from_file("link.jsonl")))
        assert ["plan.classification.file.path"] == [violation.field for violation in caught.value.violations]
        assert 0 == await jobs_stored(agents)
        await agents.training.StartTraining(start(**from_file("here.jsonl")))
        assert 1 == await jobs_stored(agents)


async def test_a_foundation_that_cognate_does_not_have_is_refused_while_it_answers(tmp_path: Path) -> None:
    """With Cognate away the job waits for it; the same request later has its first answer, whatever Cognate says."""
    request = start(foundation=pb.FoundationBase(name="cognate-25m@99"))
    away = {"address": f"unix:{tmp_path / 'nowhere'}", "ask_within_s": 1.0}
    async with (
        running_agent(tmp_path / "agent", cognate=away) as server,
        AsyncAgentClient(server.address) as agents,
    ):
        first = await agents.training.StartTraining(request)
        assert job_pb2.JOB_STATE_QUEUED == first.job.job.state
    async with (
        running_cognate(tmp_path / "cognate") as cognate,
        running_agent(tmp_path / "agent", cognate={"address": cognate.address, "ask_within_s": 10.0}) as server,
        AsyncAgentClient(server.address) as agents,
    ):
        assert first == await agents.training.StartTraining(request)
        request.request_id = new_id()
        with pytest.raises(FoundationNotFoundError, match="cognate-25m@99") as caught:
            await agents.training.StartTraining(request)
        assert ["plan.foundation.name"] == [violation.field for violation in caught.value.violations]
        assert 1 == await jobs_stored(agents)


async def test_a_silent_cognate_does_not_use_up_the_callers_deadline(tmp_path: Path) -> None:
    """The question takes half of what is left of it at most, and the submission is taken in."""
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    away = {"address": f"127.0.0.1:{silent.getsockname()[1]}", "ask_within_s": 60.0}
    async with running_agent(tmp_path / "agent", cognate=away) as server, AsyncAgentClient(server.address) as agents:
        started = await agents.training.StartTraining(start(), timeout=3.0)
        assert job_pb2.JOB_STATE_QUEUED == started.job.job.state
    silent.close()


async def test_the_same_request_returns_the_first_answer(agents: AsyncAgentClient) -> None:
    """Also when the job has moved on since; another plan under the same id is refused."""
    request = start()
    first = await agents.training.StartTraining(request)
    name = first.job.job.name
    await agents.training.CancelJob(pb.CancelJobRequest(request_id=new_id(), name=name))
    assert first == await agents.training.StartTraining(request)
    request.plan.seed = 1
    with pytest.raises(RequestIdReusedError):
        await agents.training.StartTraining(request)
    with pytest.raises(RequestIdReusedError, match="StartTraining"):
        await agents.training.CancelJob(pb.CancelJobRequest(request_id=request.request_id, name=name))
    assert 1 == await jobs_stored(agents)


async def test_racing_repeats_make_one_job(agents: AsyncAgentClient) -> None:
    """Sixteen copies of one request at the same time have one effect."""
    request = start()
    answers = await asyncio.gather(*(agents.training.StartTraining(request) for _ in range(16)))
    assert 1 == len({answer.job.job.name for answer in answers})
    assert 1 == await jobs_stored(agents)


async def test_a_refused_request_id_is_free_again(agents: AsyncAgentClient) -> None:
    """A refusal is no answer to replay: the corrected plan goes through under the same id."""
    request = start(architecture="perceptron")
    with pytest.raises(ArchitectureNotFoundError):
        await agents.training.StartTraining(request)
    request.plan.architecture = "cognate"
    assert job_pb2.JOB_STATE_QUEUED == (await agents.training.StartTraining(request)).job.job.state


async def test_a_job_is_steered_and_watched_to_its_end(agents: AsyncAgentClient) -> None:
    """The job calls answer with this service's own messages."""
    name = (await agents.training.StartTraining(start())).job.job.name
    paused = await agents.training.PauseJob(pb.PauseJobRequest(request_id=new_id(), name=name))
    resumed = await agents.training.ResumeJob(pb.ResumeJobRequest(request_id=new_id(), name=name))
    cancelled = await agents.training.CancelJob(pb.CancelJobRequest(request_id=new_id(), name=name))
    answers = [answer.job for answer in (paused, resumed, cancelled)]
    assert [pb.TrainingJob] * 3 == [type(job) for job in answers]
    assert [
        job_pb2.JOB_STATE_PAUSED,
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_CANCELLED,
    ] == [job.job.state for job in answers]
    frames = [frame async for frame in agents.watch_job(name)]
    assert [1, 2, 3, 4] == [frame.event.sequence for frame in frames[:-1]]
    assert job_pb2.JOB_STATE_CANCELLED == frames[-1].end.state
    assert [] == list((await agents.training.ListCheckpoints(pb.ListCheckpointsRequest(name=name))).checkpoints)
    assert [] == list((await agents.training.GetMetrics(pb.GetMetricsRequest(name=name))).series)


async def test_the_server_tells_what_it_can_do(agents: AsyncAgentClient) -> None:
    """Architectures with their tasks and the forward pass that they need; capabilities by name."""
    answer = await agents.training.ListArchitectures(pb.ListArchitecturesRequest())
    architectures = {architecture.name: architecture for architecture in answer.architectures}
    assert "dialogue" in architectures["cognate"].tasks
    assert COGNATE_V1_25M == architectures["cognate"].foundation_fingerprint
    assert not architectures["recurrent"].foundation_fingerprint
    info = (await agents.training.GetServerInfo(pb.GetServerInfoRequest())).info
    tasks = {f"task.{task}" for architecture in answer.architectures for task in architecture.tasks}
    assert ["engine.local", *sorted(tasks)] == list(info.capabilities)
    assert [("cognate", job_pb2.CIRCUIT_CLOSED, 0)] == [(p.name, p.circuit, p.failed) for p in info.peers]


async def test_the_circuit_to_cognate_is_told(tmp_path: Path) -> None:
    """Submissions while Cognate is away: they are taken, the circuit opens, and the server says so."""
    away = {"address": f"unix:{tmp_path / 'nobody'}", "ask_within_s": 5}
    async with (
        running_agent(tmp_path / "agent", cognate=away) as server,
        AsyncAgentClient(server.address, timeout_s=60) as client,
    ):
        for _ in range(8):
            await client.training.StartTraining(start())
        [peer] = (await client.training.GetServerInfo(pb.GetServerInfoRequest())).info.peers
        assert (job_pb2.CIRCUIT_OPEN, 5, 5, 3, 1) == (
            peer.circuit,
            peer.admitted,
            peer.failed,
            peer.refused,
            peer.opened,
        )
        assert 8 == await jobs_stored(client)
        run = CliRunner().invoke
        where = ["--cognate", server.address, "--agent-server", server.address]
        shown = await asyncio.to_thread(run, app, ["status", *where])
        assert "circuit to cognate open (5 of 5 calls failed, 3 held back, opened 1 times)" in shown.output


# --- the registry


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The folder of the service that the `agents` fixture runs."""
    return tmp_path / "agent"


async def get(agents: AsyncAgentClient, name: str) -> agent_pb2.Agent:
    return (await agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=name))).agent


async def alias(agents: AsyncAgentClient, alias: str, name: str, request_id: str = "") -> agent_pb2.Agent:
    request = agent_pb2.SetAliasRequest(request_id=request_id or new_id(), name=name, alias=alias)
    return (await agents.agents.SetAlias(request)).agent


def moves(store: Path) -> list[tuple[Any, ...]]:
    """Return the audit rows of aliases: alias, from, to, caller, request id."""
    database = Database(f"sqlite:///{store / 'store.db'}")
    t = tables.moves.c
    with database.read() as connection:
        query = sa.select(t.family, t.alias, t.from_version, t.version, t.caller, t.request_id).order_by(t.id)
        rows = [tuple(row) for row in connection.execute(query)]
    database.close()
    return rows


async def test_a_published_agent_tells_its_lineage(agents: AsyncAgentClient, store: Path) -> None:
    """By version or by its family alone, which stands for the newest version."""
    publish_agent(store)
    newest = publish_agent(store)
    agent = await get(agents, "intent-router")
    assert agent == await get(agents, "intent-router@2")
    assert ("intent-router@2", newest.digest, len(PAYLOAD)) == (agent.name, agent.digest, agent.size_bytes)
    assert ("cognate-25m@1", FOUNDATION, "jobs/x") == (agent.foundation, agent.foundation_digest, agent.job)
    assert (["greeting", "farewell"], 7, 11) == (list(agent.labels), agent.trainable_parameters, agent.total_parameters)
    assert [(name, len(content)) for name, content in FILES.items()] == [(f.path, f.size_bytes) for f in agent.files]
    assert [("accuracy_after", 0.5, 4)] == [(e.metric, e.value, e.rows) for e in agent.evaluations]
    assert [("forge-intents", "generated", 9)] == [(d.name, d.kind, d.rows) for d in agent.data]


async def test_an_unknown_agent_is_told_by_name(agents: AsyncAgentClient, store: Path) -> None:
    """No family, no version, no alias of that name."""
    publish_agent(store)
    for name in ("translator", "intent-router@2", "intent-router@production"):
        with pytest.raises(AgentNotFoundError, match=name):
            await get(agents, name)
        with pytest.raises(AgentNotFoundError, match=name):
            request = agent_pb2.FetchAgentRequest(name=name)
            [frame async for frame in agents.agents.FetchAgent(request, timeout=10)]


async def test_agents_with_many_labels_are_listed_without_them(agents: AsyncAgentClient, store: Path) -> None:
    """A page of the longest label lists is one message that a client takes; each agent has its labels."""
    labels = [f"{number:04d}{'x' * 120}" for number in range(4096)]
    for _ in range(8):
        publish_agent(store, labels=labels)
    listed = (await agents.agents.ListAgents(agent_pb2.ListAgentsRequest())).agents
    assert [[]] * 8 == [list(agent.labels) for agent in listed]
    assert labels == list((await get(agents, "intent-router@8")).labels)


async def test_agents_are_paged_newest_first_and_tokens_are_bound(agents: AsyncAgentClient, store: Path) -> None:
    """Pages neither lose nor repeat an agent; a family's token is not another's."""
    for family in ("intent-router", "translator", "intent-router", "intent-router"):
        publish_agent(store, family=family)
    everything = (await agents.agents.ListAgents(agent_pb2.ListAgentsRequest())).agents
    assert ["intent-router@3", "intent-router@2", "translator@1", "intent-router@1"] == [a.name for a in everything]
    request = agent_pb2.ListAgentsRequest(page_size=2, family="intent-router")
    first = await agents.agents.ListAgents(request)
    request.page_token = first.next_page_token
    second = await agents.agents.ListAgents(request)
    assert ["intent-router@3", "intent-router@2"] == [agent.name for agent in first.agents]
    assert (["intent-router@1"], "") == ([agent.name for agent in second.agents], second.next_page_token)
    with pytest.raises(InvalidPageTokenError):
        await agents.agents.ListAgents(
            agent_pb2.ListAgentsRequest(page_token=first.next_page_token, family="translator")
        )


async def test_an_alias_moves_and_every_move_is_kept(agents: AsyncAgentClient, store: Path) -> None:
    """The alias is found by every call that takes a name, and its history stays."""
    publish_agent(store)
    publish_agent(store)
    ids = [new_id() for _ in range(3)]
    assert ["production"] == list((await alias(agents, "production", "intent-router@1", ids[0])).aliases)
    assert "intent-router@1" == (await get(agents, "intent-router@production")).name
    moved = await alias(agents, "production", "intent-router@2", ids[1])
    assert ("intent-router@2", ["production"]) == (moved.name, list(moved.aliases))
    await alias(agents, "candidate", "intent-router@2", ids[2])
    listed = (await agents.agents.ListAgents(agent_pb2.ListAgentsRequest())).agents
    assert [("intent-router@2", ["candidate", "production"]), ("intent-router@1", [])] == [
        (agent.name, list(agent.aliases)) for agent in listed
    ]
    call = agents.agents.FetchAgent(agent_pb2.FetchAgentRequest(name="intent-router@production"), timeout=10)
    assert "intent-router@2" == [frame async for frame in call][0].header.agent.name  # noqa: RUF015
    assert [
        ("intent-router", "production", None, 1, "local", ids[0]),
        ("intent-router", "production", 1, 2, "local", ids[1]),
        ("intent-router", "candidate", None, 2, "local", ids[2]),
    ] == moves(store)


async def test_a_repeated_move_is_made_once(agents: AsyncAgentClient, store: Path) -> None:
    """A repeat that comes late does not move the alias back; another move under the same id is refused."""
    publish_agent(store)
    publish_agent(store)
    request_id = new_id()
    await alias(agents, "production", "intent-router@1", request_id)
    await alias(agents, "production", "intent-router@2")
    assert "intent-router@1" == (await alias(agents, "production", "intent-router@1", request_id)).name
    with pytest.raises(RequestIdReusedError):
        await alias(agents, "production", "intent-router@2", request_id)
    assert "intent-router@2" == (await get(agents, "intent-router@production")).name
    assert 2 == len(moves(store))


async def test_racing_moves_leave_one_chain(agents: AsyncAgentClient, store: Path) -> None:
    """Each move starts where the one before it ended, and the alias is where the last one went."""
    for _ in range(4):
        publish_agent(store)
    await asyncio.gather(*(alias(agents, "production", f"intent-router@{1 + n % 4}") for n in range(12)))
    chain = [(row[2], row[3]) for row in moves(store)]
    assert [None, *(to for _, to in chain[:-1])] == [before for before, _ in chain]
    assert f"intent-router@{chain[-1][1]}" == (await get(agents, "intent-router@production")).name


async def test_an_alias_points_at_a_published_version_only(agents: AsyncAgentClient, store: Path) -> None:
    """A version that is not there, an alias that looks like one, and a name without a version are refused."""
    publish_agent(store)
    with pytest.raises(AgentNotFoundError, match="intent-router@2"):
        await alias(agents, "production", "intent-router@2")
    for name, word, field in (
        ("intent-router", "production", "name"),
        ("intent-router@1", "2", "alias"),
        ("intent-router@1", "", "alias"),
        ("intent-router@production", "candidate", "name"),
    ):
        with pytest.raises(InvalidFieldError) as caught:
            await alias(agents, word, name)
        assert [field] == [violation.field for violation in caught.value.violations]
    assert [] == moves(store)
    assert [] == list((await get(agents, "intent-router")).aliases)


async def test_a_fetch_starts_at_any_byte_and_not_beyond_the_end(agents: AsyncAgentClient, store: Path) -> None:
    """The payload is the files one after the other; a fetch goes on inside any of them, and at the very end."""
    row = publish_agent(store)
    first, last = len(FILES["adapter.safetensors"]), len(PAYLOAD)
    for offset in (0, 1, 1 << 20, first - 1, first, first + 3, last - 1, last):
        request = agent_pb2.FetchAgentRequest(name=row.name, offset_bytes=offset)
        header, *frames = [frame async for frame in agents.agents.FetchAgent(request, timeout=10)]
        assert (row.manifest, row.digest) == (header.header.manifest, header.header.agent.digest)
        assert PAYLOAD[offset:] == b"".join(frame.chunk.data for frame in frames)
        for frame in frames:
            start_bytes = frame.chunk.offset_bytes
            assert PAYLOAD[start_bytes : start_bytes + len(frame.chunk.data)] == frame.chunk.data
    with pytest.raises(OffsetOutOfRangeError, match=f"{last} bytes"):
        request = agent_pb2.FetchAgentRequest(name=row.name, offset_bytes=last + 1)
        [frame async for frame in agents.agents.FetchAgent(request, timeout=10)]


def large_blob(store: Path) -> Path:
    """Return where the bytes of the one large file are."""
    [blob] = [
        path for path in (store / "artifacts" / "blobs").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    ]
    return blob


def _flip(blob: Path) -> None:
    content = bytearray(blob.read_bytes())
    content[1_000_000] ^= 1
    blob.write_bytes(content)


def _replace_by_a_folder(blob: Path) -> None:
    blob.unlink()
    blob.mkdir()


async def test_a_fetched_agent_is_the_published_one(agents: AsyncAgentClient, store: Path, tmp_path: Path) -> None:
    """Whole files under their names."""
    row = publish_agent(store)
    fetched = await agents.fetch_agent("intent-router", tmp_path / "out")
    assert row.digest == fetched.digest
    assert FILES == {name: (fetched.path / name).read_bytes() for name in FILES}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_flip, "adapter.safetensors"),
        (lambda blob: blob.write_bytes(blob.read_bytes()[:1_000_000]), "stored bytes end at 1000000 of 1536000"),
        (lambda blob: blob.unlink(), r"its stored bytes .* are missing"),
        (_replace_by_a_folder, r"its stored bytes .* Is a directory"),
    ],
    ids=["flipped", "short", "lost", "folder"],
)
async def test_what_is_no_longer_the_published_agent_is_an_error(
    agents: AsyncAgentClient, store: Path, tmp_path: Path, spoil: Callable[[Path], object], told: str
) -> None:
    """A byte that flipped, bytes that are missing and a lost file are told, and nothing of the file lands."""
    publish_agent(store)
    spoil(large_blob(store))
    with pytest.raises(ArtifactCorruptError, match=told) as caught:
        await agents.fetch_agent("intent-router", tmp_path / "out")
    assert "adapter.safetensors" in caught.value.message
    assert [] == list((tmp_path / "out").rglob("adapter.safetensors"))


def publish_as_a_worker_does(folder: Path, trained: Path) -> tuple[str, ArtifactRow]:
    """Take a job to VALIDATING and publish its result through the artifact manager; return the job's name too."""
    # These import torch, which no other test of this file needs.
    from agent_server.artifacts import AgentArtifactManager
    from agent_server.bases import Base
    from agent_server.data.processor import AgentDataProcessor
    from agent_server.evaluation import Evaluation
    from agent_server.train_config import from_plan
    from agent_server.trainer import AgentResult

    registry = open_registry(folder)
    jobs = JobStore(registry.database)
    [job] = jobs.page(states=(), before_id=None, limit=2)
    begun = jobs.begin_attempt("test")
    assert begun is not None
    attempt = WorkerAttempt(jobs.attempt(job.name, begun.attempt, begun.fencing_token), workdir=folder / "work")
    for state in (JobState.RUNNING, JobState.VALIDATING):
        attempt.move(state)
    plan = training_pb2.TrainingPlan.FromString(job.plan)
    config = {
        "training": dataclasses.asdict(from_plan(plan)),
        "adaptation": "LoRA of rank 8, alpha 16; ACT and LTM frozen",
        "merge_logit_change": 1e-7,
        "steps": 40,
        "weights_of_step": 40,
        "max_tokens": 128,
        "constraints_enforced": False,
    }
    (trained / "config.json").write_text(json.dumps(config))
    row = AgentArtifactManager(registry).publish(
        AgentResult(
            folder=trained,
            labels=("a", "b"),
            evaluations=(Evaluation(metric="accuracy_after", dataset="forge-intents/test", value=0.25, rows=8),),
            trainable_parameters=3,
            total_parameters=9,
            steps=40,
        ),
        plan=plan,
        base=Base(
            name="cognate-25m@4",
            digest=FOUNDATION,
            base_dir=folder,
            foundation="cognate-25m@4",
            foundation_digest=FOUNDATION,
        ),
        data=AgentDataProcessor(DataSettings()).prepare(training_pb2.TrainingPlan.FromString(job.plan)).manifest,
        attempt=attempt,
    )
    registry.database.close()
    return job.name, row


async def test_what_a_worker_publishes_is_served_in_whole(
    agents: AsyncAgentClient, store: Path, tmp_path: Path
) -> None:
    """The manifest that the manager writes holds everything that an agent's message tells, and ends the job."""
    await agents.training.StartTraining(start())
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "runtime").mkdir()
    (trained / "runtime" / "module.py").write_text("# a module\n")
    name, row = await asyncio.to_thread(publish_as_a_worker_does, store, trained)
    agent = await get(agents, "intent-router")
    assert ("intent-router@1", row.digest, name) == (agent.name, agent.digest, agent.job)
    assert ("cognate", "classification", ["a", "b"]) == (agent.architecture, agent.task, list(agent.labels))
    assert ("cognate-25m@4", FOUNDATION, 3, 9) == (
        agent.foundation,
        agent.foundation_digest,
        agent.trainable_parameters,
        agent.total_parameters,
    )
    assert [("forge-intents", "generated", 1204)] == [(d.name, d.kind, d.rows) for d in agent.data]
    job = (await agents.training.GetJob(pb.GetJobRequest(name=name))).job.job
    assert (job_pb2.JOB_STATE_SUCCEEDED, "intent-router@1") == (job.state, job.artifact)
    assert (DRAFT, "") == (agent.lifecycle, agent.parent)
    assert ["intent-router@1"] == await names(agents, task="classification", lifecycles=[DRAFT])
    fetched = (await agents.fetch_agent("intent-router", tmp_path / "out")).path
    assert "# a module\n" == (fetched / "runtime" / "module.py").read_text()
    card = (fetched / "README.md").read_text()
    for line in (
        "- Foundation: cognate-25m@4 (sha256:ffff",
        "- Trained parameters: 3 of 9 (LoRA of rank 8, alpha 16; ACT and LTM frozen)",
        "| accuracy_after | forge-intents/test | 0.2500 | 8 |",
        "- Licence of the data: generated by this project",
    ):
        assert line in card
    metrics = json.loads((fetched / "metrics.json").read_text())
    assert [("accuracy_after", 0.25)] == [(e["metric"], e["value"]) for e in metrics["evaluations"]]
    lineage = json.loads((fetched / "lineage.json").read_text())
    assert {"name": "cognate-25m@4", "digest": FOUNDATION} == lineage["foundation"]
    assert (name, "foundation", 40) == (lineage["job"], lineage["made_of"]["kind"], lineage["training"]["steps"])


async def test_a_repeated_move_gets_the_first_answer(agents: AsyncAgentClient, store: Path) -> None:
    """Whatever has moved since."""
    publish_agent(store)
    request_id = new_id()
    first = await alias(agents, "production", "intent-router@1", request_id)
    await alias(agents, "candidate", "intent-router@1")
    assert first == await alias(agents, "production", "intent-router@1", request_id.upper())
    assert ["candidate", "production"] == list((await get(agents, "intent-router@1")).aliases)


async def test_one_alias_too_many_is_refused(agents: AsyncAgentClient, store: Path) -> None:
    """An agent with more than the contract allows could not be told to anybody."""
    publish_agent(store)
    for number in range(64):
        await alias(agents, f"a{number}", "intent-router@1")
    with pytest.raises(TooManyAliasesError, match="64 aliases already"):
        await alias(agents, "a64", "intent-router@1")
    assert 64 == len((await get(agents, "intent-router@1")).aliases) == len(moves(store))


# --- lifecycles

DRAFT, CANDIDATE = agent_pb2.LIFECYCLE_DRAFT, agent_pb2.LIFECYCLE_CANDIDATE
PRODUCTION, RETIRED = agent_pb2.LIFECYCLE_PRODUCTION, agent_pb2.LIFECYCLE_RETIRED


async def lifecycle(
    agents: AsyncAgentClient, state: agent_pb2.Lifecycle.ValueType, name: str = "intent-router@1", request_id: str = ""
) -> agent_pb2.Agent:
    request = agent_pb2.SetLifecycleRequest(request_id=request_id or new_id(), name=name, lifecycle=state)
    return (await agents.agents.SetLifecycle(request)).agent


async def list_moves(agents: AsyncAgentClient, **query: Any) -> agent_pb2.ListMovesResponse:
    return await agents.agents.ListMoves(agent_pb2.ListMovesRequest(**{"family": "intent-router", **query}))


async def names(agents: AsyncAgentClient, **query: Any) -> list[str]:
    answer = await agents.agents.ListAgents(agent_pb2.ListAgentsRequest(**query))
    return [agent.name for agent in answer.agents]


def told(move: agent_pb2.Move) -> tuple[Any, ...]:
    """Return what a move is about."""
    if move.WhichOneof("kind") == "alias":
        return move.version, move.alias.alias, move.alias.from_version
    return move.version, move.lifecycle.from_lifecycle, move.lifecycle.to_lifecycle


LEGAL_MOVES = {
    (DRAFT, CANDIDATE),
    (CANDIDATE, PRODUCTION),
    (CANDIDATE, DRAFT),
    (PRODUCTION, CANDIDATE),
    (DRAFT, RETIRED),
    (CANDIDATE, RETIRED),
    (PRODUCTION, RETIRED),
    (RETIRED, DRAFT),
}
WAYS = {DRAFT: [], CANDIDATE: [CANDIDATE], PRODUCTION: [CANDIDATE, PRODUCTION], RETIRED: [RETIRED]}


@pytest.mark.parametrize("before", WAYS, ids=agent_pb2.Lifecycle.Name)
async def test_only_the_contracts_moves_are_made(
    agents: AsyncAgentClient, store: Path, before: agent_pb2.Lifecycle.ValueType
) -> None:
    """From every state to every state; a refusal names both and what is legal, and changes nothing."""
    for version, after in enumerate(WAYS, start=1):
        publish_agent(store)
        name = f"intent-router@{version}"
        assert DRAFT == (await get(agents, name)).lifecycle
        for state in WAYS[before]:
            assert state == (await lifecycle(agents, state, name)).lifecycle
        kept = len((await list_moves(agents)).moves)
        if (before, after) in LEGAL_MOVES:
            moved = await lifecycle(agents, after, name)
            assert moved == await get(agents, name)
            assert (after, kept + 1) == (moved.lifecycle, len((await list_moves(agents)).moves))
            continue
        words = [agent_pb2.Lifecycle.Name(state).removeprefix("LIFECYCLE_") for state in (before, after)]
        with pytest.raises(
            IllegalTransitionError, match=f"{name} is {words[0]} and cannot become {words[1]}"
        ) as caught:
            await lifecycle(agents, after, name)
        allowed = {agent_pb2.Lifecycle.Name(b).removeprefix("LIFECYCLE_") for a, b in LEGAL_MOVES if a == before}
        assert allowed == set(caught.value.metadata["allowed"].split(", "))
        assert ["lifecycle"] == [violation.field for violation in caught.value.violations]
        assert (before, kept) == ((await get(agents, name)).lifecycle, len((await list_moves(agents)).moves))


async def test_a_lifecycle_needs_a_version_and_a_state(agents: AsyncAgentClient, store: Path) -> None:
    """An alias may move meanwhile, so it names no version here."""
    publish_agent(store)
    with pytest.raises(AgentNotFoundError, match="intent-router@2"):
        await lifecycle(agents, CANDIDATE, "intent-router@2")
    for name, state, field in (
        ("intent-router", CANDIDATE, "name"),
        ("intent-router@production", CANDIDATE, "name"),
        ("intent-router@1", agent_pb2.LIFECYCLE_UNSPECIFIED, "lifecycle"),
        ("intent-router@1", 9, "lifecycle"),
    ):
        with pytest.raises(InvalidFieldError) as caught:
            await lifecycle(agents, state, name)  # type: ignore[arg-type]
        assert [field] == [violation.field for violation in caught.value.violations]
    assert [] == list((await list_moves(agents)).moves)


async def test_a_repeated_lifecycle_is_moved_once(agents: AsyncAgentClient, store: Path) -> None:
    """The repeat gets the first answer, whatever came since; the id is not for another move, or another call."""
    publish_agent(store)
    request_id = new_id()
    first = await lifecycle(agents, CANDIDATE, request_id=request_id)
    await lifecycle(agents, PRODUCTION)
    assert first == await lifecycle(agents, CANDIDATE, request_id=request_id)
    assert PRODUCTION == (await get(agents, "intent-router@1")).lifecycle
    with pytest.raises(RequestIdReusedError):
        await lifecycle(agents, RETIRED, request_id=request_id)
    with pytest.raises(RequestIdReusedError, match="SetLifecycle"):
        await alias(agents, "production", "intent-router@1", request_id)
    assert 2 == len((await list_moves(agents)).moves)


async def test_of_racing_lifecycles_each_starts_where_the_one_before_ended(
    agents: AsyncAgentClient, store: Path
) -> None:
    """Of many callers who want the same move one makes it."""
    publish_agent(store)
    done = await asyncio.gather(*(lifecycle(agents, CANDIDATE) for _ in range(8)), return_exceptions=True)
    assert 1 == sum(isinstance(answer, agent_pb2.Agent) for answer in done)
    assert 7 == sum(isinstance(answer, IllegalTransitionError) for answer in done)
    assert [(1, DRAFT, CANDIDATE)] == [told(move) for move in (await list_moves(agents)).moves]


async def test_moves_of_both_kinds_are_listed_newest_first_in_pages(agents: AsyncAgentClient, store: Path) -> None:
    """With who and when. New moves shift no page; a token is its family's."""
    publish_agent(store)
    publish_agent(store)
    publish_agent(store, family="translator")
    began_s = time.time()
    await lifecycle(agents, CANDIDATE)
    await alias(agents, "live", "intent-router@1")
    await lifecycle(agents, PRODUCTION)
    await lifecycle(agents, RETIRED, "translator@1")
    await alias(agents, "live", "intent-router@2")
    expected = [(2, "live", 1), (1, CANDIDATE, PRODUCTION), (1, "live", 0), (1, DRAFT, CANDIDATE)]
    everything = await list_moves(agents)
    assert (expected, "") == ([told(move) for move in everything.moves], everything.next_page_token)
    assert {"local"} == {move.caller for move in everything.moves}
    times = [move.time.ToMicroseconds() / 1e6 for move in everything.moves]
    assert began_s - 1 < times[-1] <= times[0] < time.time() + 1
    assert sorted(times, reverse=True) == times
    first = await list_moves(agents, page_size=3)
    await lifecycle(agents, CANDIDATE)
    second = await list_moves(agents, page_size=3, page_token=first.next_page_token)
    assert (expected, "") == ([told(move) for move in (*first.moves, *second.moves)], second.next_page_token)
    with pytest.raises(InvalidPageTokenError):
        await list_moves(agents, family="translator", page_token=first.next_page_token)
    with pytest.raises(AgentNotFoundError, match="nobody"):
        await list_moves(agents, family="nobody")


async def test_agents_are_listed_by_task_and_lifecycle(agents: AsyncAgentClient, store: Path) -> None:
    """Every filter alone and together, in pages that neither lose nor repeat one."""
    for family, task in (("a", "classification"), ("b", "dialogue"), ("a", "classification"), ("a", "extraction")):
        publish_agent(store, family=family, task=task)
    await lifecycle(agents, CANDIDATE, "a@1")
    await lifecycle(agents, CANDIDATE, "b@1")
    await lifecycle(agents, PRODUCTION, "b@1")
    assert ["a@2", "a@1"] == await names(agents, task="classification")
    assert ["b@1", "a@1"] == await names(agents, lifecycles=[CANDIDATE, PRODUCTION])
    assert ["a@3", "a@2"] == await names(agents, lifecycles=[DRAFT, DRAFT])
    assert ["a@1"] == await names(agents, lifecycles=[CANDIDATE, PRODUCTION], family="a")
    assert ["a@2"] == await names(agents, lifecycles=[DRAFT], task="classification")
    assert [] == await names(agents, task="dialogue", lifecycles=[RETIRED])
    query: dict[str, Any] = {"task": "classification", "page_size": 1}
    first = await agents.agents.ListAgents(agent_pb2.ListAgentsRequest(**query))
    assert (["a@2"], True) == ([agent.name for agent in first.agents], bool(first.next_page_token))
    assert ["a@1"] == await names(agents, **query, page_token=first.next_page_token)
    with pytest.raises(InvalidPageTokenError):
        await names(agents, task="dialogue", page_token=first.next_page_token)


async def test_versions_of_before_lifecycles_are_drafts(tmp_path: Path) -> None:
    """Also while no server has looked at them; after a start they are found by task and state."""
    async with running_agent(tmp_path / "agent") as server, AsyncAgentClient(server.address) as agents:
        publish_agent(tmp_path / "agent", recorded=False)
        publish_agent(tmp_path / "agent", recorded=False)
        assert DRAFT == (await get(agents, "intent-router@1")).lifecycle
        assert CANDIDATE == (await lifecycle(agents, CANDIDATE)).lifecycle
    async with running_agent(tmp_path / "agent") as server, AsyncAgentClient(server.address) as agents:
        assert ["intent-router@2"] == await names(agents, lifecycles=[DRAFT])
        assert ["intent-router@2", "intent-router@1"] == await names(agents, task="classification")


async def test_a_filtered_page_is_read_off_an_index(
    agents: AsyncAgentClient, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sorts nothing, and looks at no version of another task or state."""
    publish_agent(store)
    registry, asked = open_registry(store), list[tuple[str, Any]]()

    def note(_1: object, _2: object, statement: str, parameters: object, *_3: object) -> None:
        asked.append((statement, parameters))

    sa.event.listen(registry.database.engine, "before_cursor_execute", note)
    monkeypatch.setattr(search, "_FEW", 0)  # as if there were many
    for ways in (ways_to(task="dialogue"), ways_to(lifecycles=[Lifecycle.DRAFT]), ways_to(foundation="cognate-25m@1")):
        search.page(registry, search.Asked(ways=ways), limit=50, after=search.Place(99))
    sa.event.remove(registry.database.engine, "before_cursor_execute", note)
    plans = []
    with registry.database.engine.connect() as connection:
        for statement, parameters in asked:
            if statement.startswith("SELECT") and "ORDER BY" in statement:
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plans.append(" | ".join(row[3] for row in rows))
    registry.database.close()
    read = ("ix_agents_task", "ix_agents_lifecycle", "ix_agents_foundation")
    assert [True] * 3 == [name in plan for name, plan in zip(read, plans, strict=True)]
    assert not [plan for plan in plans if "TEMP B-TREE" in plan]
