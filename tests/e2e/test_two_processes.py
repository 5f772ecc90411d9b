"""Jobs of two processes through both services: a real Cognate-25M that loses a process, and an agent made of it."""

import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exceptions import InvalidFieldError
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.support.few_rows import FEW_ROWS, write_few_rows

STEPS = 8
SETTINGS = {"WORKERS__SLOTS": "2", "WORKERS__THREADS": "1"}
# Scores of reasoning are no part of this, and take longer than the training.
FEW_PROBLEMS = {"PRETRAINING__REASONING_PROBLEMS": "1", "PRETRAINING__REASONING_TOKENS": "8"}


def start(cognate: CognateClient, processes: int) -> str:
    plan = cognate_v1.PretrainingPlan(
        total_steps=STEPS, seed=5, batch_size=3, sequence_length=64, checkpoint_interval_steps=3
    )
    plan.compute.processes = processes
    request = cognate_v1.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    return cognate.pretraining.StartPretraining(request).job.job.name


def processes_of(job: str) -> Mapping[str, psutil.Process]:
    """Return a job's processes by their rank, its agent's being ""."""
    found = [process for process in psutil.process_iter(["cmdline"]) if job in (process.info["cmdline"] or ())]
    return {process.environ().get("RANK", ""): process for process in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_of_two_processes_outlives_one_of_them_and_trains_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of a process costs the steps since the checkpoint; the losses are those of a job of one process."""
    monkeypatch.delenv("FORGE_DATA", raising=False)
    services = Services(tmp_path)
    try:
        first = services.start("cognate_server", address="127.0.0.1:0", settings={**SETTINGS, **FEW_PROBLEMS})
        with CognateClient(first.address) as cognate:
            alone = losses_alone(cognate)
            with pytest.raises(InvalidFieldError, match=r"plan\.compute\.processes"):
                start(cognate, 3)
            job = start(cognate, 2)
            seen = losses_with_a_loss(cognate, job)
            assert sorted(seen) == list(range(1, STEPS + 1))
            assert seen == pytest.approx(alone, rel=2e-3), "bfloat16 where the machine has it"
            name = cognate.pretraining.GetJob(cognate_v1.GetJobRequest(name=job)).job.job.artifact
        rows = str(write_few_rows(tmp_path / "data"))
        settings = {**SETTINGS, "COGNATE__ADDRESS": first.address, "DATA__FOLDER": rows}
        second = services.start("agent_server", address="127.0.0.1:0", settings=settings)
        with AgentClient(second.address) as agents:
            train_agent(agents, name)
    finally:
        services.stop()


def loss_in(frame: job_pb2.WatchFrame) -> Mapping[int, float]:
    """Return the step and its loss of a frame that tells of one."""
    progress = frame.event.progress
    loss = next((metric.value for metric in progress.metrics if metric.name == "loss"), None)
    return {} if loss is None else {progress.step: loss}


def losses_alone(cognate: CognateClient) -> Mapping[int, float]:
    """Train on one process until the last step, and leave out the rest."""
    job = start(cognate, 1)
    losses: dict[int, float] = {}
    for frame in cognate.watch_job(job):
        losses |= loss_in(frame)
        if len(losses) == STEPS:
            cognate.pretraining.CancelJob(cognate_v1.CancelJobRequest(request_id=str(uuid.uuid4()), name=job))
            break
    list(cognate.watch_job(job))
    return losses


def losses_with_a_loss(cognate: CognateClient, job: str) -> Mapping[int, float]:
    """Kill the second process after a checkpoint, and watch to the end."""
    losses: dict[int, float] = {}
    killed: psutil.Process | None = None
    for frame in cognate.watch_job(job):
        losses |= loss_in(frame)
        if frame.event.HasField("checkpoint") and killed is None:
            processes = processes_of(job)
            assert sorted(processes) == ["", "0", "1"]
            killed = processes["1"]
            killed.kill()
        if frame.HasField("end"):
            assert frame.end.state == job_pb2.JOB_STATE_SUCCEEDED, frame.end
    found = cognate.pretraining.GetJob(cognate_v1.GetJobRequest(name=job)).job.job
    assert found.attempt == 2
    assert killed is not None
    assert psutil.wait_procs(processes_of(job).values(), timeout=20)[1] == []
    return losses


def train_agent(agents: AgentClient, foundation: str) -> None:
    """Make an agent of the model, on two processes that hold a part each."""
    plan = agent_v1.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=agent_v1.FoundationBase(name=foundation, accept_experimental=True),
        classification=FEW_ROWS,
        adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW()),
        total_steps=2,
        batch_size=4,
        compute=job_pb2.Compute(processes=2, strategy=job_pb2.COMPUTE_STRATEGY_FSDP2),
    )
    started = agents.training.StartTraining(agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan))
    end = list(agents.watch_job(started.job.job.name))[-1].end
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="router@1")).agent
    assert agent.foundation == foundation
