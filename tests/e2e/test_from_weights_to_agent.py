"""Both services as processes, a real Cognate-25M, and an agent made of it: what no part can show alone."""

import json
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.client.lineage import Lineage, Trust
from cognateforge.client.manifest import MANIFEST_NAME
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from cognateforge.signatures import make_keys
from deploy.services import Services
from tests.support.few_rows import FEW_ROWS, write_few_rows
from training_common.digests import sha256_bytes

Frames = list[job_pb2.WatchFrame]


class Watch:
    """A watch in a thread; `until` waits for an event and keeps all that came before."""

    def __init__(self, frames: Iterator[job_pb2.WatchFrame]) -> None:
        self.seen: Frames = []
        self._queue: queue.Queue[job_pb2.WatchFrame | Exception] = queue.Queue()
        threading.Thread(target=self._read, args=(frames,), daemon=True).start()

    def _read(self, frames: Iterator[job_pb2.WatchFrame]) -> None:
        try:
            for frame in frames:
                self._queue.put(frame)
        except Exception as error:
            self._queue.put(error)

    def until(self, wanted: Callable[[job_pb2.WatchFrame], bool]) -> job_pb2.WatchFrame:
        """Return the first frame from now on that is wanted. The end frame ends the wait in any case."""
        while True:
            frame = self._queue.get(timeout=240)
            if isinstance(frame, Exception):
                raise frame
            self.seen.append(frame)
            if wanted(frame):
                return frame
            assert not frame.HasField("end"), f"the job ended before: {frame.end}"


def is_checkpoint(frame: job_pb2.WatchFrame) -> bool:
    return frame.event.HasField("checkpoint")


def is_progress(frame: job_pb2.WatchFrame) -> bool:
    return frame.event.HasField("progress")


def worker_of(job: str) -> psutil.Process:
    """Return the process of a job's worker."""
    return next(process for process in psutil.process_iter(["cmdline"]) if job in (process.info["cmdline"] or ()))


@contextmanager
def both_services(folder: Path) -> Iterator[tuple[Services, CognateClient, AgentClient]]:
    services = Services(folder)
    try:
        first, second = services.start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
        with CognateClient(first.address) as cognate, AgentClient(second.address) as agents:
            yield services, cognate, agents
    finally:
        services.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_outlives_its_server_and_its_worker_and_becomes_an_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of server and worker cost neither an event nor the job; the agent names the digest that was published.

    Both services sign, and the agent service takes only what Cognate's key has signed.
    """
    monkeypatch.delenv("FORGE_DATA", raising=False)
    # Scores of reasoning are no part of this, and take longer than the training.
    monkeypatch.setenv("COGNATE_SERVER_PRETRAINING__REASONING_PROBLEMS", "1")
    monkeypatch.setenv("COGNATE_SERVER_PRETRAINING__REASONING_TOKENS", "8")
    monkeypatch.setenv("AGENT_SERVER_DATA__FOLDER", str(write_few_rows(tmp_path / "data")))
    monkeypatch.setenv("COGNATE_SERVER_ARTIFACTS__URL", str(tmp_path / "models"))
    keys = {name: make_keys(tmp_path / f"{name}-keys") for name in ("cognate", "agent")}
    for name, pair in keys.items():
        monkeypatch.setenv(f"{name.upper()}_SERVER_ARTIFACTS__SIGNING_KEY_FILE", str(pair.private))
    monkeypatch.setenv("AGENT_SERVER_COGNATE__PROVENANCE", "require")
    monkeypatch.setenv("AGENT_SERVER_COGNATE__PUBLIC_KEY_FILES", str(keys["cognate"].public))
    with both_services(tmp_path) as (services, cognate, agents):
        # Long enough that the worker is still in training when the server has started anew.
        plan = cognate_v1.PretrainingPlan(
            total_steps=24, seed=3, batch_size=2, sequence_length=64, checkpoint_interval_steps=6
        )
        plan.curriculum.SetInParent()
        request = cognate_v1.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
        job = cognate.pretraining.StartPretraining(request).job.job.name
        watch = Watch(cognate.watch_job(job))

        watch.until(is_checkpoint)
        server = services.running[0]
        server.process.kill()
        server.process.wait()
        worker = worker_of(job)
        services.start("cognate_server", address=server.address, settings={})
        watch.until(is_checkpoint)
        assert worker_of(job).pid == worker.pid, "the worker went on without its server"

        worker.kill()
        second = watch.until(lambda frame: frame.event.HasField("attempt_started")).event.attempt_started
        assert second.attempt == 2
        # The worker may have saved once more before it was killed: the newest one counts.
        saved = [frame.event.checkpoint.step for frame in watch.seen if is_checkpoint(frame)][-1]
        assert watch.until(is_progress).event.progress.step == saved + 1
        end = watch.until(lambda frame: frame.HasField("end")).end
        assert end.state == job_pb2.JOB_STATE_SUCCEEDED, end
        assert end.last_sequence == watch.seen[-2].event.sequence
        sequences = [frame.event.sequence for frame in watch.seen if frame.HasField("event")]
        assert sequences == list(range(1, end.last_sequence + 1)), "nothing is lost or doubled"

        name = cognate.pretraining.GetJob(cognate_v1.GetJobRequest(name=job)).job.job.artifact
        assert (tmp_path / "models" / "manifests" / "cognate-25m" / "1.json").exists()
        assert not (tmp_path / "cognate" / "artifacts").exists(), "its worker publishes where the settings say"
        model = cognate.models.GetModel(model_pb2.GetModelRequest(name=name)).model
        assert model.architecture.parameter_count == 24_998_668
        fetched = cognate.fetch_model(name, tmp_path / "model").path
        assert {"README.md", "cognate_v1.py", "config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in fetched.iterdir()
        }
        card = cognate.models.GetModelCard(model_pb2.GetModelCardRequest(name=name)).markdown
        assert card == (fetched / "README.md").read_text()
        measured = {result.metric: result for result in model.results}
        assert f"| validation_loss | {measured['validation_loss'].dataset} |" in card
        assert {"forge_arithmetic_exact_match", "forge_twohop_f1", "validation_loss_memory_off"} <= measured.keys()
        assert accepted_by_tool(fetched, keys["cognate"].public)
        data = json.loads((fetched / "data.json").read_text())
        assert data["curriculum"] == {"steps": 12, "initial_competence": 0.1}
        reports = [source["report"] for source in data["sources"]]
        assert [(found["rows_read"], found["rows_kept"], found["findings"]) for found in reports] == [
            (2000, 2000, [])
        ] * 2
        _holds_again(cognate, model)
        job = _train(agents, model, tmp_path)
        _is_held(cognate, model.name, job)
        chain = Lineage(cognate, agents, [pair.public for pair in keys.values()]).of_agent("router@1")
        assert [
            ("router@1", Trust.VERIFIED, keys["agent"].fingerprint),
            (name, Trust.VERIFIED, keys["cognate"].fingerprint),
        ] == [(step.name, step.trust, step.trust_detail) for step in chain.steps()]
        assert accepted_by_tool(tmp_path / "fetched", keys["agent"].public)


def _holds_again(cognate: CognateClient, model: model_pb2.FoundationModel) -> None:
    """Run the gate on the stored files: it measures what the job has measured, in another number of threads."""
    request = cognate_v1.ValidateModelRequest(request_id=str(uuid.uuid4()), name=model.name)
    found = cognate.pretraining.ValidateModel(request, timeout=300).checks
    assert [(check.name, check.passed) for check in model.checks] == [(check.name, check.passed) for check in found]
    assert [check.value for check in found] == pytest.approx(
        [check.value for check in model.checks], rel=1e-3, abs=1e-3
    )
    assert found == cognate.pretraining.ValidateModel(request).checks, "the same wish has the same answer"


def accepted_by_tool(folder: Path, public_key: Path) -> bool:
    """Whether the command-line tool of OpenSSF model signing takes a fetched folder."""
    signature = str(folder / "model.sig")
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature]
    command += ["--public_key", str(public_key), "--ignore-paths", signature, str(folder)]
    return subprocess.run(command, check=False).returncode == 0


def _is_held(cognate: CognateClient, model: str, job: str) -> None:
    """Wait until Cognate knows what was made of the model: the job told it itself, the agent is told soon after."""
    seen: set[str] = set()
    while "router@1" not in seen or job in seen:
        told = cognate.models.ListDependents(model_pb2.ListDependentsRequest(name=model)).dependents
        seen = {one.name for one in told}
        assert seen, "from before it was fetched there was no moment at which the model could be collected"
        time.sleep(0.2)


def _train(agents: AgentClient, model: model_pb2.FoundationModel, folder: Path) -> str:
    """Make an agent of the model, hold its digests against those that were published, and return the job's name."""
    plan = agent_v1.TrainingPlan(
        agent="router",
        architecture="cognate",
        foundation=agent_v1.FoundationBase(name=model.name, accept_experimental=True),
        classification=FEW_ROWS,
        adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
        optimization=agent_v1.Optimization(adamw=agent_v1.AdamW()),
        total_steps=3,
        batch_size=8,
    )
    started = agents.training.StartTraining(agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan))
    frames = list(agents.watch_job(started.job.job.name))
    assert frames[-1].end.state == job_pb2.JOB_STATE_SUCCEEDED, frames[-1].end
    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="router@1")).agent
    assert (agent.foundation, agent.foundation_digest) == (model.name, model.digest)
    measured = {evaluation.metric for evaluation in agent.evaluations}
    assert {"accuracy_before", "accuracy_after", "majority_share"} <= measured
    fetched = agents.fetch_agent("router@1", folder / "fetched")
    assert sha256_bytes((fetched.path / MANIFEST_NAME).read_bytes()) == agent.digest
    return started.job.job.name
