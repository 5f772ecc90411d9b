"""Both services over buckets of a real S3 server: trained, published, fetched across the exchange, measured."""

import json
import uuid
from pathlib import Path

import pytest

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.support.s3 import S3Server
from tests.support.stored import Stored
from training_common.digests import sha256_bytes, sha256_file

GENERATED = agent_v1.ClassificationTask(generated=agent_v1.GeneratedSource(seed=1), max_rows_per_label=2)


def new_id() -> str:
    return str(uuid.uuid4())


def whole(folder: Path, digest: str) -> bool:
    """Whether a fetched folder is what a manifest of that digest names."""
    manifest = (folder / MANIFEST_NAME).read_bytes()
    files = json.loads(manifest)["files"]
    return sha256_bytes(manifest) == digest and all(sha256_file(folder / f["path"]) == f["digest"] for f in files)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_and_an_agent_live_in_buckets(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No artifact touches a service's own folder, and the digests that are fetched are those that were published."""
    monkeypatch.delenv("FORGE_DATA", raising=False)
    url, services = s3.new_url(), Services(tmp_path)
    options = {f"ARTIFACTS__OPTIONS__{name.upper()}": value for name, value in s3.options.items()}
    try:
        first = services.start(
            "cognate_server",
            address="127.0.0.1:0",
            # Scores of reasoning are no part of this, and take longer than the training.
            settings={**options, "ARTIFACTS__URL": f"{url}/cognate", "PRETRAINING__REASONING_PROBLEMS": "1"},
        )
        second = services.start(
            "agent_server",
            address="127.0.0.1:0",
            settings={**options, "ARTIFACTS__URL": f"{url}/agent", "COGNATE__ADDRESS": first.address},
        )
        with CognateClient(first.address) as cognate, AgentClient(second.address) as agents:
            model = pretrain(cognate, tmp_path)
            agent = train(agents, model, tmp_path)
            request = agent_v1.EvaluateAgentRequest(request_id=new_id(), name=agent.name, classification=GENERATED)
            measured = agents.training.EvaluateAgent(request, timeout=120).evaluations
            assert "accuracy" in {evaluation.metric for evaluation in measured}
    finally:
        services.stop()
    assert [] == [path for name in ("cognate", "agent") for path in (tmp_path / name).glob("artifacts*")]
    keys = Stored(files_dir=tmp_path, url=url, options=s3.options).keys()
    assert {"cognate/manifests/cognate-25m/1.json", "agent/manifests/router/1.json"} <= set(keys)
    logs = "".join(log.read_text() for log in tmp_path.rglob("*.log"))
    assert s3.options["secret_access_key"] not in logs


def pretrain(cognate: CognateClient, folder: Path) -> model_pb2.FoundationModel:
    """Make a model and fetch it, in one piece and from the middle."""
    plan = cognate_v1.PretrainingPlan(total_steps=2, seed=5, batch_size=2, sequence_length=64)
    request = cognate_v1.StartPretrainingRequest(request_id=new_id(), plan=plan)
    job = cognate.pretraining.StartPretraining(request).job.job.name
    end = list(cognate.watch_job(job))[-1].end
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
    model = cognate.models.GetModel(model_pb2.GetModelRequest(name="cognate-25m@1")).model
    fetched = cognate.fetch_model(model.name, folder / "model")
    assert whole(fetched.path, model.digest)
    rest = cognate.models.FetchModel(model_pb2.FetchModelRequest(name=model.name, offset_bytes=model.size_bytes - 5))
    assert 5 == sum(len(frame.chunk.data) for frame in rest if frame.HasField("chunk"))
    return model


def train(agents: AgentClient, model: model_pb2.FoundationModel, folder: Path) -> agent_pb2.Agent:
    """Make an agent of the model and fetch it."""
    plan = agent_v1.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=agent_v1.FoundationBase(name=model.name, accept_experimental=True),
        classification=GENERATED,
        adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW()),
        total_steps=2,
        batch_size=4,
    )
    started = agents.training.StartTraining(agent_v1.StartTrainingRequest(request_id=new_id(), plan=plan))
    end = list(agents.watch_job(started.job.job.name))[-1].end
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="router@1")).agent
    assert (agent.foundation, agent.foundation_digest) == (model.name, model.digest)
    assert whole(agents.fetch_agent(agent.name, folder / "fetched").path, agent.digest)
    return agent
