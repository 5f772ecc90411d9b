"""What a user does with both services, by the client library of whichever release runs it: it imports nothing else.

python client_walk.py COGNATE AGENT MODEL FOLDER; the last line tells what was seen, as JSON.
"""

import json
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.client import AgentClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2


def plan_of(model: str) -> training_pb2.TrainingPlan:
    """Return an agent of two steps."""
    return training_pb2.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=training_pb2.FoundationBase(name=model, accept_experimental=True),
        classification=training_pb2.ClassificationTask(
            generated=training_pb2.GeneratedSource(seed=1), max_rows_per_label=2
        ),
        adaptation=training_pb2.Adaptation(lora=training_pb2.LoraAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW()),
        total_steps=2,
        batch_size=4,
    )


def walk(cognates: CognateClient, agents: AgentClient, model: str, folder: Path) -> dict[str, object]:
    """Look at the model, make an agent of it, follow that, and fetch both."""
    news = cognates.watch_models()
    first = next(news)
    news.close()
    request = training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan_of(model))
    job = agents.training.StartTraining(request).job.job.name
    # The same wish again, as after an answer that was lost.
    again = agents.training.StartTraining(request).job.job.name
    events, end = [], job_pb2.End()
    for frame in agents.watch_job(job):
        events += [frame.event] if frame.HasField("event") else []
        end = frame.end if frame.HasField("end") else end
    listed = [entry.job.name for entry in agents.training.ListJobs(training_pb2.ListJobsRequest(page_size=100)).jobs]
    made = next(event.artifact_published.name for event in events if event.HasField("artifact_published"))
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=made)).agent
    fetched = cognates.fetch_model(model, folder / "model"), agents.fetch_agent(made, folder / "agent")
    return {
        "client": version("cognateforge"),
        "cognate": cognates.pretraining.GetServerInfo(pretraining_pb2.GetServerInfoRequest()).info.version,
        "agent": agents.training.GetServerInfo(training_pb2.GetServerInfoRequest()).info.version,
        "first_news": first.published.name if isinstance(first, model_pb2.ModelEvent) else "",
        "job": [job == again, job in listed, job_pb2.JobState.Name(end.state)],
        "contiguous": [event.sequence for event in events] == list(range(1, len(events) + 1)),
        "foundation": [agent.foundation, agent.foundation_digest == fetched[0].digest],
        "models": [entry.name for entry in cognates.models.ListModels(model_pb2.ListModelsRequest()).models],
        "fetched": [one.name for one in fetched],
        "digest": fetched[1].digest == agent.digest,
    }


if __name__ == "__main__":
    where = [*sys.argv[1:3]]
    with CognateClient(where[0]) as cognates, AgentClient(where[1]) as agents:
        print(json.dumps(walk(cognates, agents, sys.argv[3], Path(sys.argv[4]))))
