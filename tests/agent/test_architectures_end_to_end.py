"""Architectures in a real server with real workers: the plugin of docs/architectures.md, a smuggler, a model folder."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent_server.predict import Classifier
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.client import AgentClient
from cognateforge.exceptions import DataUnavailableError
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.agent.model_folders import write_model_folder
from tests.agent.plugins import ECHO, write_package

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "architectures.md"


FORWARD = "    def forward(self, batch):\n"
# In every step, with its failure hidden.
LATE = """        try:
            __import__("cognate_" + "server.losses")
        except BaseException:
            pass
"""
# A child of a child, whose parent has ended, and which is called by the name of its job's plugin.
FORK = """        import subprocess
        import sys
        sleeps = "import time; time.sleep(600)"
        starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeps!r}, 'leftover'])"
        subprocess.run([sys.executable, "-c", starts], check=True)
        subprocess.Popen([sys.executable, "-c", sleeps, "leftover"])
"""


def variant(name: str, description: str, model: str, old: str, new: str) -> dict[str, str]:
    """Return the files of the page's plugin under another name and with a change."""
    assert old in model
    files = {f"{name}/__init__.py": description, f"{name}/model.py": model.replace(old, new)}
    return {path: text.replace("hashed_words", name) for path, text in files.items()}


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentClient]:
    """A server with the plugin of the page, and a broken one beside it."""
    page = PAGE.read_text(encoding="utf-8")
    description, model = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    site = tmp_path / "site"
    files = {"hashed_words/__init__.py": description, "hashed_words/model.py": model}
    write_package(site, "hashed_words", files, {"hashed_words": "hashed_words:HashedWords"})
    broken = {"broken_plugin.py": f"{ECHO}\nraise SystemExit('bye')"}
    write_package(site, "broken", broken, {"echo": "broken_plugin:Echo"})
    changed = {
        "late_words": (FORWARD, FORWARD + LATE),
        "wide_words": ("nn.Linear(width, len(labels))", "nn.Linear(width, len(labels) + 1)"),
        "fork_words": ("    def head_parameters(self):\n", "    def head_parameters(self):\n" + FORK),
    }
    for name, (old, new) in changed.items():
        write_package(site, name, variant(name, description, model, old, new), {name: f"{name}:HashedWords"})
    (tmp_path / "models").mkdir()
    write_model_folder(tmp_path / "models" / "tiny", "bert", ["book a flight", "play a song"])
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    services = Services(tmp_path / "var")
    try:
        settings = {"MODELS__FOLDER": str(tmp_path / "models")}
        server = services.start("agent_server", address="127.0.0.1:0", settings=settings)
        with AgentClient(server.address) as client:
            yield client
    finally:
        services.stop()


def submit(agents: AgentClient, **parts: Any) -> str:
    """Submit a job on generated rows and return its name."""
    plan = training_pb2.TrainingPlan(
        agent="router",
        classification=training_pb2.ClassificationTask(generated=training_pb2.GeneratedSource(seed=1)),
        adaptation=training_pb2.Adaptation(full=training_pb2.FullAdaptation()),
        optimization=training_pb2.Optimization(adamw=training_pb2.AdamW(), peak_learning_rate=0.01),
        **parts,
    )
    request = training_pb2.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
    return agents.training.StartTraining(request).job.job.name


def ended(agents: AgentClient, job: str) -> job_pb2.End:
    """Return how a job ended."""
    return next(frame.end for frame in agents.watch_job(job) if frame.HasField("end"))


@pytest.mark.slow
def test_a_third_partys_architecture_is_trained_and_published(agents: AgentClient, tmp_path: Path) -> None:
    """The server tells of both plugins, trains with the sound one, and its agent answers from its files."""
    listed = agents.training.ListArchitectures(training_pb2.ListArchitecturesRequest())
    (mine,) = [item for item in listed.architectures if item.name == "hashed_words"]
    assert [(s.name, s.integer, s.maximum) for s in mine.settings] == [("buckets", 1024, 65536), ("width", 32, 1024)]
    assert list(mine.bases) == [training_pb2.BASE_KIND_SCRATCH]
    assert [(p.name, p.value, p.reason) for p in listed.problems] == [("echo", "broken_plugin:Echo", "SystemExit: bye")]

    job = submit(
        agents,
        architecture="hashed_words",
        scratch=training_pb2.ScratchBase(),
        total_steps=60,
        settings=[training_pb2.ArchitectureSetting(name="width", integer=16)],
    )
    end = ended(agents, job)
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end

    name = agents.training.GetJob(training_pb2.GetJobRequest(name=job)).job.job.artifact
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent
    measured = {evaluation.metric: evaluation.value for evaluation in agent.evaluations}
    assert measured["accuracy_after"] > measured["majority_share"] + 0.2
    folder = tmp_path / "agent"
    folder.mkdir()
    stored = tmp_path / "var" / "agent" / "artifacts"
    for file in agent.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(next(stored.rglob(f"*{file.digest.removeprefix('sha256:')}*")).read_bytes())
    classifier = Classifier(folder)
    assert dict(classifier.model.named_parameters())["vectors.weight"].shape == (1024, 16)
    assert classifier.classify(["book a flight to Oslo"])[0].label in classifier.labels


@pytest.mark.slow
def test_an_import_in_the_middle_of_training_ends_the_job(agents: AgentClient) -> None:
    """A plugin that reaches for pretraining in its forward pass, unseen by text and build, publishes nothing."""
    job = submit(agents, architecture="late_words", scratch=training_pb2.ScratchBase(), total_steps=3)
    end = ended(agents, job)
    assert end.state == job_pb2.JOB_STATE_FAILED
    failed = agents.training.GetJob(training_pb2.GetJobRequest(name=job)).job.job
    assert "reached for" in failed.failure.message
    assert not agents.agents.ListAgents(agent_pb2.ListAgentsRequest()).agents


@pytest.mark.slow
def test_more_logits_than_labels_are_no_agent(agents: AgentClient) -> None:
    """A head that is too wide would train and score; it is refused before the first step, and nothing is published."""
    job = submit(agents, architecture="wide_words", scratch=training_pb2.ScratchBase(), total_steps=3)
    assert ended(agents, job).state == job_pb2.JOB_STATE_FAILED
    failed = agents.training.GetJob(training_pb2.GetJobRequest(name=job)).job.job
    assert failed.step == 0
    assert re.search(
        r"wide_words gives logits of shape \[2, (\d+)\] .* need \[2, \d+\]; correct", failed.failure.message
    )
    assert not agents.agents.ListAgents(agent_pb2.ListAgentsRequest()).agents


@pytest.mark.slow
def test_what_a_plugin_started_ends_with_its_worker(agents: AgentClient) -> None:
    """A child, and a child's orphan, are gone when the job has ended; the job succeeds."""
    job = submit(agents, architecture="fork_words", scratch=training_pb2.ScratchBase(), total_steps=3)
    assert ended(agents, job).state == job_pb2.JOB_STATE_SUCCEEDED
    assert psutil.wait_procs(leftovers(), timeout=20)[1] == []


def leftovers() -> list[psutil.Process]:
    """Return what the plugin has started and still runs."""
    mine = [p for p in psutil.process_iter(["cmdline", "status"]) if (p.info["cmdline"] or [""])[-1] == "leftover"]
    return [process for process in mine if process.info["status"] != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_model_folder_becomes_an_agent(agents: AgentClient) -> None:
    """A worker finds the folder in the settings, and the job keeps its digest."""
    folder = training_pb2.ModelFolderBase(path="tiny")
    job = submit(agents, architecture="sequence_classifier", model_folder=folder, total_steps=3)
    end = ended(agents, job)
    assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
    done = agents.training.GetJob(training_pb2.GetJobRequest(name=job)).job
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=done.job.artifact)).agent
    assert {"base/config.json", "base/model.safetensors", "base/tokenizer.json"} <= {f.path for f in agent.files}
    with pytest.raises(DataUnavailableError, match="no folder other below"):
        submit(
            agents,
            architecture="sequence_classifier",
            model_folder=training_pb2.ModelFolderBase(path="other"),
            total_steps=3,
        )
