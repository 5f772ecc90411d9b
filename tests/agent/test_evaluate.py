"""Measuring a published agent: as training measures, with labels that it does not know told apart."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from agent_server import evaluate as module
from agent_server import migrations
from agent_server.agents import Measured, record_agent
from agent_server.architectures.model import AgentModel
from agent_server.architectures.policy import PolicyArchitecture, PolicyRequest
from agent_server.data.examples import Labelled, Span, Tagged, texts_of
from agent_server.data.processor import AgentDataProcessor
from agent_server.evaluate import Order, evaluate, measure_on
from agent_server.optim import Optimization
from agent_server.rl.worlds import world_maker
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.client import AsyncAgentClient
from cognateforge.exceptions import DataUnavailableError, IncompatibleError, InvalidFieldError
from tests.agent._language import BigramModel
from tests.agent._support import MemoryAttempt, Rows, factory, prepared, write_foundation
from tests.support.published import open_registry
from tests.support.servers import running_agent
from training_common.artifacts.blobs import BlobStore
from training_common.digests import files_under
from training_common.settings import DataSettings
from training_common.side_process import ORDER_FILE, RESULT_FILE
from training_common.store.database import Database

CONFIG = AgentTrainConfig(
    agent="router", total_steps=60, batch_size=32, seed=3, evaluation_rows=0, optimization=Optimization(lr=1e-2)
)
GENERATED = pb.ClassificationTask(generated=pb.GeneratedSource(seed=1))


@pytest.fixture(scope="module")
def data() -> Rows:
    """The project's own set."""
    return AgentDataProcessor(DataSettings()).prepare_set("classification", GENERATED)


@pytest.fixture(scope="module")
def trained(data: Rows, tmp_path_factory: pytest.TempPathFactory) -> AgentResult:
    """An agent that has learnt a part of it."""
    root = tmp_path_factory.mktemp("evaluate")
    foundation = write_foundation(root / "foundation", list(texts_of(data.train)))
    return train_agent(CONFIG, foundation, data, MemoryAttempt(root), factory=factory())


@pytest.fixture(scope="module")
def model(trained: AgentResult) -> AgentModel:
    return factory().get("cognate").load(trained.folder).eval()


def figures(found: list[Measured]) -> dict[str, float]:
    return {measured.metric: measured.value for measured in found}


def test_the_figures_are_those_of_training(model: AgentModel, data: Rows, trained: AgentResult) -> None:
    """On the set that it was trained on, the result after training comes out again, to the bit."""
    found = measure_on(model, data, task="classification", wish=GENERATED, max_tokens=128)
    after = {e.metric: e.value for e in trained.evaluations}
    got = figures(found)
    assert [after["accuracy_after"], after["macro_f1_after"], after["majority_share"]] == [
        got["accuracy"],
        got["macro_f1"],
        got["majority_share"],
    ]
    assert {("forge-intents/test", len(data.test))} == {(m.dataset, m.rows) for m in found}
    assert "unknown_label_share" not in got


def test_labels_have_numbers_of_their_own_in_every_set(model: AgentModel, data: Rows) -> None:
    """A set that has them in another order, and one more, gives the same figures, and the share of the one more."""
    labels = ("another", *reversed(data.labels))
    test = [dataclasses.replace(row, label=len(data.labels) - row.label) for row in data.test]
    other = prepared(data.train, [*test, *(Labelled("a text", 0) for _ in range(len(test)))], labels=labels)
    found = figures(measure_on(model, other, task="classification", wish=GENERATED, max_tokens=128))
    expected = figures(measure_on(model, data, task="classification", wish=GENERATED, max_tokens=128))
    assert expected | {"unknown_label_share": 0.5} == found


def test_a_set_of_strange_labels_is_refused(model: AgentModel) -> None:
    """The field and the labels are named; a set without test rows is refused too."""
    strange = prepared([], [Labelled("a text", 0)], labels=("strange", "stranger"))
    with pytest.raises(IncompatibleError, match=r"none of the set's labels \(strange\)") as caught:
        measure_on(model, strange, task="classification", wish=GENERATED, max_tokens=128)
    assert ["classification"] == [violation.field for violation in caught.value.violations]
    with pytest.raises(DataUnavailableError, match="toy has no test rows"):
        measure_on(model, prepared([], []), task="classification", wish=GENERATED, max_tokens=128)


@pytest.mark.parametrize(
    ("architecture", "failure", "told"),
    [
        ("recurrent", OSError(errno.ENOSPC, "full"), os.EX_IOERR),
        ("recurrent", MemoryError(), os.EX_IOERR),
        ("a_plugin", OSError(errno.ENOSPC, "full"), os.EX_IOERR),
        (
            "a_plugin",
            ValueError("no\n\x1b[31m words"),
            "the plugin a_plugin cannot be measured: ValueError: no; correct",
        ),
        ("a_plugin", SystemExit("bye"), "SystemExit: bye"),
        ("recurrent", [Measured(metric="loss", dataset="d", value=float("nan"), rows=1)], "loss is not finite"),
    ],
)
def test_a_worker_tells_whose_fault_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, failure: Any, told: int | str
) -> None:
    """A plugin's is named, a full disk is an exit code of its own, and figures that are no numbers are none."""
    order = SimpleNamespace(body={"architecture": architecture}, threads=1)
    monkeypatch.setattr(module, "read_order", lambda _: order)
    for guard in ("guard_process", "require_separate"):
        monkeypatch.setattr(module, guard, lambda: None)
    (tmp_path / ORDER_FILE).write_text("{}")
    given = {"return_value": failure} if isinstance(failure, list) else {"side_effect": failure}
    monkeypatch.setattr(module, "evaluate", Mock(**given))
    code = module.main([str(tmp_path)])
    if isinstance(told, int):
        assert (told, False) == (code, (tmp_path / RESULT_FILE).exists())
    else:
        error = json.loads((tmp_path / RESULT_FILE).read_text())["error"]
        assert (0, "INCOMPATIBLE") == (code, error["reason"])
        assert told in error["message"]


def test_a_fault_of_our_own_is_no_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the worker as it is, and stands in the server's log."""
    monkeypatch.setattr(module, "read_order", lambda _: SimpleNamespace(body={"architecture": "cognate"}, threads=1))
    monkeypatch.setattr(module, "guard_process", lambda: None)
    monkeypatch.setattr(module, "evaluate", Mock(side_effect=ValueError("ours")))
    (tmp_path / ORDER_FILE).write_text("{}")
    with pytest.raises(ValueError, match="ours"):
        module.main([str(tmp_path)])


def test_spans_of_strange_slots_are_told_apart() -> None:
    """They are not missed by an agent that has never heard of them; the share is that of spans."""
    texts = ["to berlin", "from rome"]
    spans = [(Span(3, 9, "city"), Span(0, 2, "way")), (Span(5, 9, "city"),)]
    rows = [Tagged(text, found) for text, found in zip(texts, spans, strict=True)]
    tagger = BigramModel(texts, labels=("city",))
    wish = pb.ExtractionTask()
    found = measure_on(tagger, prepared([], rows), task="extraction", wish=wish, max_tokens=16)
    [share] = [measured for measured in found if measured.metric == "unknown_label_share"]
    assert (1 - 2 / 3, 3) == (share.value, share.rows)
    assert "slot_f1" in figures(found)
    with pytest.raises(IncompatibleError, match="city, way"):
        measure_on(BigramModel(texts, labels=("day",)), prepared([], rows), task="extraction", wish=wish, max_tokens=16)


def publish(folder: Path, result: Path, *, task: str, architecture: str) -> dict[str, Any]:
    """Publish a trained folder; return its manifest."""
    registry = open_registry(folder)
    files = [registry.blobs.put(path, path.relative_to(result).as_posix()) for path in files_under(result)]
    body = {
        "architecture": architecture,
        "task": task,
        "labels": [],
        "parent": {"name": "", "digest": ""},
        "parameters": {"trainable": 1, "total": 1},
        "evaluations": [],
        "data": [],
    }
    with registry.database.write() as connection:
        row = registry.publish(connection, family="router", state="PUBLISHED", job="jobs/x", files=files, body=body)
        record_agent(connection, row)
    registry.database.close()
    return row.body


def test_a_policy_is_measured_in_its_environment(tmp_path: Path) -> None:
    """Whole episodes; an environment of other spaces, or none at all, is refused by its field."""
    world = world_maker("reinforcement", "CartPole-v1", 1, modules=())()
    request = PolicyRequest(agents=world.agents, coordination="independent", seed=1, settings={"hidden_size": 8})
    world.close()
    folder = tmp_path / "policy"
    folder.mkdir()
    PolicyArchitecture().build_policy(request).save(folder, extra={"training": {"seed": 1}})
    database = Database(f"sqlite:///{tmp_path / 'store.db'}")
    database.upgrade(Path(migrations.__file__).parent)
    database.close()
    body = publish(tmp_path, folder, task="reinforcement", architecture="policy")

    def measured(environment: str, number: int) -> list[Measured]:
        wish = pb.ReinforcementTask(environment=environment, evaluation_episodes=3)
        order = Order(
            body=body,
            request=pb.EvaluateAgentRequest(reinforcement=wish),
            data=DataSettings(),
            hub_dir=tmp_path,
            modules=(),
            blobs=BlobStore(tmp_path / "artifacts"),
            threads=1,
        )
        return evaluate(order, tmp_path / str(number))

    found = measured("CartPole-v1", 1)
    assert [("return", "CartPole-v1", 3)] == [(m.metric, m.dataset, m.rows) for m in found]
    assert found[0].value >= 1
    with pytest.raises(IncompatibleError, match="MountainCar-v0") as caught:
        measured("MountainCar-v0", 2)
    assert ["reinforcement.environment"] == [violation.field for violation in caught.value.violations]
    with pytest.raises(InvalidFieldError) as unknown:
        measured("Nowhere-v9", 3)
    assert ["reinforcement.environment"] == [violation.field for violation in unknown.value.violations]


@pytest.mark.slow
async def test_a_real_worker_measures_a_published_agent(
    trained: AgentResult, tmp_path: Path, no_drain_notice: None
) -> None:
    """From the request over the wire to the row beside the manifest, and what the worker refuses comes back."""
    (tmp_path / "rows").mkdir()
    settings = {"data": {"folder": tmp_path / "rows"}}
    async with (
        running_agent(tmp_path / "agent", **settings) as server,
        AsyncAgentClient(server.address, timeout_s=120) as agents,
    ):
        publish(tmp_path / "agent", trained.folder, task="classification", architecture="cognate")
        request = pb.EvaluateAgentRequest(request_id=str(uuid.uuid4()), name="router@1", classification=GENERATED)
        answer = await agents.training.EvaluateAgent(request, timeout=120)
        after = {e.metric: e.value for e in trained.evaluations}
        assert after["accuracy_after"] == {e.metric: e.value for e in answer.evaluations}["accuracy"]
        agent = (await agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="router@1"))).agent
        assert list(answer.evaluations) == list(agent.evaluations)
        request.request_id = str(uuid.uuid4())
        request.classification.file.path = "gone.jsonl"
        with pytest.raises(DataUnavailableError, match=r"gone\.jsonl") as caught:
            await agents.training.EvaluateAgent(request, timeout=120)
        assert ["classification.file.path"] == [violation.field for violation in caught.value.violations]
        rows = [{"text": f"text {i}", "label": ("odd", "even")[i % 2], "split": "test"} for i in range(8)]
        rows += [{**row, "text": f"more {row['text']}", "split": "train"} for row in rows]
        (tmp_path / "rows" / "strange.jsonl").write_text("\n".join(map(json.dumps, rows)))
        request.request_id = str(uuid.uuid4())
        request.classification.file.path = "strange.jsonl"
        with pytest.raises(IncompatibleError, match=r"even, odd"):
            await agents.training.EvaluateAgent(request, timeout=120)
