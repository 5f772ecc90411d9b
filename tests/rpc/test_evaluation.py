"""EvaluateAgent over a real connection: a real worker process for each, ended with its callers, and kept results."""

import asyncio
import contextlib
import errno
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import psutil
import pytest
import sqlalchemy as sa

from agent_server import tables
from agent_server.agents import Measured, keep_evaluations
from agent_server.evaluating import Evaluator
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.artifact.v1 import storage_pb2
from cognateforge.client import AsyncAgentClient
from cognateforge.exceptions import (
    AgentNotFoundError,
    DataUnavailableError,
    DeadlineExceededError,
    ForgeError,
    IncompatibleError,
    InternalError,
    InvalidFieldError,
    RequestIdReusedError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.support.published import open_registry, publish_agent
from tests.support.servers import running_agent
from tests.support.waiting import until

# What stands in for the worker: it counts its starts, starts a process of its own, and does what the seed says.
WORKER = """
import base64, json, os, pathlib, signal, subprocess, sys, time
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.artifact.v1 import storage_pb2

folder = pathlib.Path(sys.argv[1])
order = json.loads((folder / "order.json").read_text())
request = pb.EvaluateAgentRequest.FromString(base64.b64decode(order["request"]))
seed, place = request.classification.generated.seed, pathlib.Path({place!r})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(place)])
(place / f"started-{{os.getpid()}}").write_text(str(child.pid))
if seed == 1:
    while not (place / "go").exists():
        time.sleep(0.01)
if seed == 2:
    error = {{"reason": "DATA_UNAVAILABLE", "message": "no rows", "fields": [["classification.file.path", "is empty"]]}}
    (folder / "result.json").write_text(json.dumps({{"error": error}}))
    child.kill()
    sys.exit(0)
if seed == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 4:
    sys.exit("a secret of the library")
if seed == 5:
    (folder / "result.json").write_text("{{" + '"evaluations": [')
    child.kill()
    sys.exit(os.EX_IOERR)
child.kill()
rows = 4 + len(list(place.glob("started-*")))
measured = {{"metric": "accuracy", "dataset": "forge-intents/test", "value": 0.5, "rows": rows}}
(folder / "result.json").write_text(json.dumps({{"result": [measured]}}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that workers of this test write into."""
    folder = tmp_path / "place"
    folder.mkdir()
    (tmp_path / "stand_in_worker.py").write_text(WORKER.format(place=str(folder)), encoding="utf-8")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr("agent_server.server.Evaluator", Watched)
    return folder


class Watched(Evaluator):
    """Evaluates with the worker that stands in."""

    newest: ClassVar[Evaluator]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named, module="stand_in_worker")
        Watched.newest = self


@asynccontextmanager
async def serving(tmp_path: Path, **settings: Any) -> AsyncIterator[AsyncAgentClient]:
    async with (
        running_agent(tmp_path / "agent", **settings) as server,
        AsyncAgentClient(server.address, timeout_s=60) as agents,
    ):
        yield agents


def request(seed: int = 0, name: str = "intent-router@1", request_id: str = "") -> pb.EvaluateAgentRequest:
    task = pb.ClassificationTask(generated=pb.GeneratedSource(seed=seed))
    return pb.EvaluateAgentRequest(request_id=request_id or str(uuid.uuid4()), name=name, classification=task)


def started(place: Path) -> list[tuple[int, int]]:
    """Return the process ids of every worker so far, and of what it has started."""
    found = []
    for file in place.glob("started-*"):
        with contextlib.suppress(ValueError):  # it is just being written
            found.append((int(file.name.partition("-")[2]), int(file.read_text())))
    return found


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def evaluations(agents: AsyncAgentClient) -> list[tuple[str, float]]:
    agent = (await agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="intent-router@1"))).agent
    return [(evaluation.metric, evaluation.value) for evaluation in agent.evaluations]


async def test_a_result_is_kept_beside_the_manifests_own(tmp_path: Path, place: Path) -> None:
    """In the order of their measurement, in every answer that tells of the agent; the manifest stays as it was."""
    async with serving(tmp_path) as agents:
        digest = publish_agent(tmp_path / "agent").digest
        answer = await agents.training.EvaluateAgent(request())
        assert [("accuracy", "forge-intents/test", 0.5, 5)] == [
            (e.metric, e.dataset, e.value, e.rows) for e in answer.evaluations
        ]
        await agents.training.EvaluateAgent(request())
        assert [("accuracy_after", 0.5), ("accuracy", 0.5), ("accuracy", 0.5)] == await evaluations(agents)
        [listed] = (await agents.agents.ListAgents(agent_pb2.ListAgentsRequest())).agents
        assert ([4, 5, 6], digest) == ([e.rows for e in listed.evaluations], listed.digest)
        assert not list((tmp_path / "agent" / "evaluations").iterdir())


async def test_an_answer_holds_the_newest_evaluations_that_fit(tmp_path: Path, place: Path) -> None:
    """64 in all, as the contract says: the manifest's own stay."""
    async with serving(tmp_path) as agents:
        row = publish_agent(tmp_path / "agent")
        registry = open_registry(tmp_path / "agent")
        found = [Measured(metric="m", dataset="d", value=float(number), rows=1) for number in range(100)]
        with registry.database.write() as connection:
            keep_evaluations(connection, row, found, caller="c", request_id=str(uuid.uuid4()))
        registry.database.close()
        told = await evaluations(agents)
    assert [("accuracy_after", 0.5), *(("m", float(number)) for number in range(37, 100))] == told


async def test_a_repeated_request_waits_for_the_first_and_then_gets_its_answer(tmp_path: Path, place: Path) -> None:
    """One worker runs, whoever asks; also after a restart. Another set under the same id is refused, at any time."""
    wish = request(1)
    async with serving(tmp_path) as agents:
        publish_agent(tmp_path / "agent")
        calls = [asyncio.ensure_future(agents.training.EvaluateAgent(wish)) for _ in range(4)]
        await until(lambda: len(started(place)) == 1)
        with pytest.raises(RequestIdReusedError, match="EvaluateAgent"):
            await agents.training.EvaluateAgent(request(0, request_id=wish.request_id))
        assert not any(call.done() for call in calls)
        (place / "go").touch()
        answers = await asyncio.gather(*calls)
        assert [answers[0]] * 4 == answers
        assert answers[0] == await agents.training.EvaluateAgent(wish)
        with pytest.raises(RequestIdReusedError, match="EvaluateAgent"):
            await agents.training.EvaluateAgent(request(0, request_id=wish.request_id))
    async with serving(tmp_path) as agents:
        wish.request_id = wish.request_id.upper()
        assert answers[0] == await agents.training.EvaluateAgent(wish)
        assert 2 == len(await evaluations(agents))
    assert 1 == len(started(place))


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_an_evaluation_ends_with_its_last_caller(tmp_path: Path, place: Path, way: str) -> None:
    """With all that it has started, and nothing is kept; the same request begins anew."""
    async with serving(tmp_path) as agents:
        publish_agent(tmp_path / "agent")
        wish, timeout_s = request(1), 60.0 if way == "cancel" else 3.0
        first = asyncio.ensure_future(agents.training.EvaluateAgent(wish, timeout=timeout_s))
        await until(lambda: len(started(place)) == 1)
        second = asyncio.ensure_future(agents.training.EvaluateAgent(wish, timeout=60))
        await until(lambda: Watched.newest.callers == 2)
        pids = [pid for pair in started(place) for pid in pair]
        if way == "cancel":
            first.cancel()
        with pytest.raises((asyncio.CancelledError, DeadlineExceededError)):
            await first
        await until(lambda: Watched.newest.callers == 1)
        assert all(map(alive, pids)), "the second caller still waits"
        second.cancel()
        await until(lambda: not any(map(alive, pids)))
        await until(lambda: not list((tmp_path / "agent" / "evaluations").iterdir()))
        assert 1 == len(await evaluations(agents))
        (place / "go").touch()
        assert 1 == len((await agents.training.EvaluateAgent(wish)).evaluations)


async def test_there_are_only_so_many_at_once(tmp_path: Path, place: Path) -> None:
    """One more is refused with the setting's name; a place is free again when one has ended."""
    async with serving(tmp_path, evaluation={"at_once": 2}) as agents:
        publish_agent(tmp_path / "agent")
        calls = [asyncio.ensure_future(agents.training.EvaluateAgent(request(1))) for _ in range(2)]
        await until(lambda: len(started(place)) == 2)
        with pytest.raises(ResourceExhaustedError, match=r"2 at once \(the setting evaluation\.at_once\)"):
            await agents.training.EvaluateAgent(request(), timeout=1)
        (place / "go").touch()
        await asyncio.gather(*calls)
        assert (await agents.training.EvaluateAgent(request())).evaluations
    assert 3 == len(started(place))


@pytest.mark.parametrize(
    ("seed", "error", "match"),
    [
        (2, DataUnavailableError, "no rows"),
        (3, UnavailableError, "ended by SIGKILL"),
        (4, InternalError, "internal error"),
        (5, ResourceExhaustedError, "make room on the disk"),
    ],
)
async def test_a_failed_evaluation_is_told_and_keeps_nothing(
    tmp_path: Path, place: Path, seed: int, error: type[ForgeError], match: str
) -> None:
    """What the worker refuses arrives with its fields, and its request id stays free."""
    async with serving(tmp_path) as agents:
        publish_agent(tmp_path / "agent")
        wish = request(seed)
        with pytest.raises(error, match=match) as caught:
            await agents.training.EvaluateAgent(wish, timeout=5)
        if seed == 2:
            assert ["classification.file.path"] == [violation.field for violation in caught.value.violations]
        assert "secret" not in str(caught.value)
        assert 1 == len(await evaluations(agents))
        assert (await agents.training.EvaluateAgent(request(0, request_id=wish.request_id))).evaluations


async def test_a_version_that_is_collected_meanwhile_gets_no_result(tmp_path: Path, place: Path) -> None:
    """The caller learns that it is gone, whatever its worker made of it, and nothing is kept of what nobody can get."""
    async with serving(tmp_path, artifacts={"keep_newest": 1}) as agents:
        publish_agent(tmp_path / "agent")
        publish_agent(tmp_path / "agent")
        call = asyncio.ensure_future(agents.training.EvaluateAgent(request(1)))
        await until(lambda: len(started(place)) == 1)
        collect = storage_pb2.CollectArtifactsRequest(request_id=str(uuid.uuid4()), names=["intent-router@1"])
        await agents.storage.CollectArtifacts(collect)
        (place / "go").touch()
        with pytest.raises(AgentNotFoundError, match="intent-router@1 was collected"):
            await call
        registry = open_registry(tmp_path / "agent")
        with registry.database.read() as connection:
            assert [] == connection.execute(sa.select(tables.evaluations)).all()
        registry.database.close()


async def test_a_full_disk_is_told_and_the_next_call_goes_on(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own part of an evaluation meets it first: no worker is started."""
    async with serving(tmp_path) as agents:
        publish_agent(tmp_path / "agent")
        with monkeypatch.context() as full:
            error = OSError(errno.ENOSPC, "No space left on device")
            full.setattr("training_common.side_process.tempfile.mkdtemp", Mock(side_effect=error))
            with pytest.raises(ResourceExhaustedError, match="make room on the disk"):
                await agents.training.EvaluateAgent(request(), timeout=5)
        assert [] == started(place)
        assert (await agents.training.EvaluateAgent(request())).evaluations


async def test_what_cannot_be_evaluated_starts_no_worker(tmp_path: Path, place: Path) -> None:
    """An agent that is not there, a set of another task, no set at all, and two."""
    async with serving(tmp_path) as agents:
        publish_agent(tmp_path / "agent")
        with pytest.raises(AgentNotFoundError, match="intent-router@2"):
            await agents.training.EvaluateAgent(request(name="intent-router@2"))
        dialogue = pb.DialogueTask(file=pb.FileSource(path="rows.jsonl"))
        wrong = pb.EvaluateAgentRequest(request_id=str(uuid.uuid4()), name="intent-router@1", dialogue=dialogue)
        with pytest.raises(IncompatibleError, match="was trained for classification") as caught:
            await agents.training.EvaluateAgent(wrong)
        assert ["dialogue"] == [violation.field for violation in caught.value.violations]
        both = request()
        both.dialogue.CopyFrom(dialogue)
        for bad in (both, pb.EvaluateAgentRequest(request_id=str(uuid.uuid4()), name="intent-router@1")):
            with pytest.raises(InvalidFieldError):
                await agents.training.EvaluateAgent(bad)
    assert [] == started(place)
