"""Both services over buckets of a real S3 server: fetched across the exchange, trained, published, measured."""

import json
import uuid
from pathlib import Path

import pytest

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.support.s3 import S3Server
from tests.support.stored import Stored
from tests.support.tiny_cognate import publish_tiny_cognate
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import sha256_bytes, sha256_file
from training_common.store.database import Database

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
            settings={**options, "ARTIFACTS__URL": f"{url}/cognate"},
        )
        second = services.start(
            "agent_server",
            address="127.0.0.1:0",
            settings={**options, "ARTIFACTS__URL": f"{url}/agent", "COGNATE__ADDRESS": first.address},
        )
        with CognateClient(first.address) as cognate, AgentClient(second.address) as agents:
            model = publish(tmp_path, Stored(files_dir=tmp_path, url=f"{url}/cognate", options=s3.options))
            fetch(cognate, model, tmp_path / "model")
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


def publish(folder: Path, stored: Stored) -> ArtifactRow:
    """Publish a small foundation into the bucket, as a worker of Cognate does with a whole one."""
    database = Database(f"sqlite:///{folder / 'cognate' / 'store.db'}")
    row = publish_tiny_cognate(ArtifactRegistry(database, stored.open()), folder / "made")
    database.close()
    return row


def fetch(cognate: CognateClient, model: ArtifactRow, folder: Path) -> None:
    """Fetch a model, in one piece and from the middle."""
    told = cognate.models.GetModel(model_pb2.GetModelRequest(name=model.name)).model
    assert whole(cognate.fetch_model(model.name, folder).path, told.digest)
    rest = cognate.models.FetchModel(model_pb2.FetchModelRequest(name=model.name, offset_bytes=told.size_bytes - 5))
    assert 5 == sum(len(frame.chunk.data) for frame in rest if frame.HasField("chunk"))


def train(agents: AgentClient, model: ArtifactRow, folder: Path) -> agent_pb2.Agent:
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
