"""Short jobs of both services for light workers, and what became of them."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient, FetchedArtifact
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.job.v1 import job_pb2
from tests.upgrade.client_walk import plan_of

Client = CognateClient | AgentClient


def start(client: Client, *, steps: int, step_ms: int, checkpoint_every: int = 5, model: str = "cognate-25m") -> str:
    """Submit a job and return its name."""
    request_id = str(uuid.uuid4())
    times: dict[str, Any] = {"total_steps": steps, "seed": step_ms, "checkpoint_interval_steps": checkpoint_every}
    if isinstance(client, CognateClient):
        plan = cognate_v1.PretrainingPlan(**times)
        request = cognate_v1.StartPretrainingRequest(request_id=request_id, plan=plan)
        return client.pretraining.StartPretraining(request).job.job.name
    agent_plan = plan_of(model)
    agent_plan.MergeFrom(agent_v1.TrainingPlan(**times))
    return client.training.StartTraining(
        agent_v1.StartTrainingRequest(request_id=request_id, plan=agent_plan)
    ).job.job.name


def get(client: Client, name: str) -> job_pb2.Job:
    """Return a job."""
    if isinstance(client, CognateClient):
        return client.pretraining.GetJob(cognate_v1.GetJobRequest(name=name)).job.job
    return client.training.GetJob(agent_v1.GetJobRequest(name=name)).job.job


def steer(client: Client, verb: str, name: str) -> None:
    """Pause, Resume or Cancel a job."""
    module = cognate_v1 if isinstance(client, CognateClient) else agent_v1
    stub = client.pretraining if isinstance(client, CognateClient) else client.training
    request = getattr(module, f"{verb}JobRequest")(name=name, request_id=str(uuid.uuid4()))
    getattr(stub, f"{verb}Job")(request)


def wait_for(client: Client, name: str, state: job_pb2.JobState.ValueType, *, timeout_s: float = 60) -> None:
    """Wait until a job is in a state. Errors: AssertionError, after so many seconds."""
    give_up = time.monotonic() + timeout_s
    while (found := get(client, name)).state != state:
        assert time.monotonic() < give_up, f"{name} is {job_pb2.JobState.Name(found.state)}"
        time.sleep(0.05)


def fetch(client: Client, name: str, folder: Path) -> FetchedArtifact:
    """Fetch a model or an agent."""
    return client.fetch_model(name, folder) if isinstance(client, CognateClient) else client.fetch_agent(name, folder)


def client_of(service: str, where: Any) -> Client:
    """Return a client of a service. where: its address, or a Discovery."""
    return CognateClient(where) if service == "cognate" else AgentClient(where)


@dataclass(frozen=True)
class Watched:
    """What a watch of a job has told, to its end."""

    events: list[job_pb2.JobEvent]
    end: job_pb2.End

    @property
    def contiguous(self) -> bool:
        """Whether every event came, once and in order, and the end is the last of them."""
        seen = [event.sequence for event in self.events]
        return seen == list(range(1, len(seen) + 1)) and self.end.last_sequence == len(seen)

    @property
    def succeeded(self) -> int:
        """How often the job became SUCCEEDED."""
        return sum(event.state_change.to == job_pb2.JOB_STATE_SUCCEEDED for event in self.events)

    @property
    def published(self) -> list[str]:
        """Names of the versions that it published."""
        return [event.artifact_published.name for event in self.events if event.HasField("artifact_published")]

    @property
    def handed_over(self) -> int:
        """How often a server that was stopped handed it over."""
        return sum(event.note.kind == "handed_over" for event in self.events)

    @property
    def attempts(self) -> int:
        """How many workers it had."""
        return sum(event.HasField("attempt_started") for event in self.events)


def watch(client: Client, name: str, *, until_step: int | None = None) -> Watched:
    """Watch a job to its end, or until it has made so many steps."""
    events: list[job_pb2.JobEvent] = []
    end = job_pb2.End()
    frames = client.watch_job(name)
    for frame in frames:
        if frame.HasField("end"):
            end = frame.end
        elif frame.HasField("event"):
            events.append(frame.event)
            if until_step is not None and frame.event.progress.step >= until_step:
                break
    frames.close()  # type: ignore[attr-defined]
    return Watched(events, end)
