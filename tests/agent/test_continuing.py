"""Training goes on from a published agent, and what an earlier set taught is rehearsed and looked after."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import agent_server.migrations
from agent_server.adaptation import Adaptation
from agent_server.artifacts import ancestors
from agent_server.bases import Base, resolve
from agent_server.data.examples import Labelled, texts_of
from agent_server.foundation import Foundation
from agent_server.optim import Optimization
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from tests.agent._support import MemoryAttempt, Rows, factory, measured, prepared, toy_rows, write_foundation
from tests.support.published import FILES, open_registry, publish_agent
from training_common.artifacts.statement import Ancestor
from training_common.digests import sha256_file

EARLIER = toy_rows()
CONFIG = AgentTrainConfig(
    agent="toy-router",
    total_steps=40,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(),
    optimization=Optimization(lr=1e-2),
)
# The same labels, told by other words: what is learnt here is paid for there.
_TOLD = (("cash", "fee"), ("train", "road"), ("band", "choir"))


def later_rows() -> Rows:
    rows = [Labelled(f"{'the ' * (i % 3)}{_TOLD[i % 3][i // 3 % 2]} today {i}", (i + 1) % 3) for i in range(120)]
    return prepared(rows[:90], rows[90:], name="later", labels=EARLIER.labels)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    texts = [*texts_of(EARLIER.train), *texts_of(later_rows().train)]
    return write_foundation(tmp_path_factory.mktemp("continuing") / "foundation", texts)


@pytest.fixture(scope="module")
def first(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> AgentResult:
    """An agent that has learnt the earlier set."""
    workdir = tmp_path_factory.mktemp("first")
    return train_agent(CONFIG, foundation, EARLIER, MemoryAttempt(workdir), factory=factory())


BELOW = Base(foundation="cognate-25m@1", foundation_digest="sha256:f")


def told(folder: Path, made_of: list[dict[str, str]]) -> str:
    """Write a statement into a version's folder, and return its digest."""
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps({"predicate": {"made_of": made_of}}))
    return sha256_file(folder / "provenance.json")


def test_ancestors_are_told_with_their_statements(tmp_path: Path) -> None:
    """The nearest first. Of the foundation below an agent, that agent's own statement tells."""
    of_foundation, other = told(tmp_path / "foundation", []), f"sha256:{'0' * 64}"
    bottom = {"role": "foundation", "name": "cognate-25m@1", "digest": "sha256:f", "statement": of_foundation}
    on_foundation = pb.TrainingPlan(foundation=pb.FoundationBase(name="cognate-25m"))
    base = Base(
        name="cognate-25m@1",
        digest="sha256:f",
        base_dir=tmp_path / "foundation",
        foundation="cognate-25m@1",
        foundation_digest="sha256:f",
    )
    assert [bottom] == [dataclasses.asdict(one) for one in ancestors(on_foundation, base)]

    of_agent = told(tmp_path / "agent", [bottom, {**bottom, "digest": other}])
    on_agent = pb.TrainingPlan(agent_version=pb.AgentBase(name="router"))
    base = Base(
        name="router@1",
        digest="sha256:a",
        agent_dir=tmp_path / "agent",
        foundation="cognate-25m@1",
        foundation_digest="sha256:f",
    )
    nearest = {"role": "agent", "name": "router@1", "digest": "sha256:a", "statement": of_agent}
    assert [nearest, bottom] == [dataclasses.asdict(one) for one in ancestors(on_agent, base)]


def test_ancestors_without_statements_are_told_all_the_same(tmp_path: Path) -> None:
    """Versions of releases before have none; a model folder's own files are no statement of ours."""
    told(tmp_path / "folder", [])
    on_folder = pb.TrainingPlan(model_folder=pb.ModelFolderBase(path="bert"))
    base = Base(name="bert", digest="sha256:b", base_dir=tmp_path / "folder")
    assert [Ancestor(role="model_folder", name="bert", digest="sha256:b")] == ancestors(on_folder, base)
    (tmp_path / "old").mkdir()
    on_agent = pb.TrainingPlan(agent_version=pb.AgentBase(name="router"))
    base = Base(
        name="router@1",
        digest="sha256:a",
        agent_dir=tmp_path / "old",
        foundation="cognate-25m@1",
        foundation_digest="sha256:f",
    )
    assert ["", ""] == [one.statement for one in ancestors(on_agent, base)]
    assert [] == ancestors(pb.TrainingPlan(scratch=pb.ScratchBase()), Base())


def test_an_agent_goes_on_where_it_was(first: AgentResult, tmp_path: Path) -> None:
    """With the same labels head and features stay: before its first step it answers as it was published."""
    config = dataclasses.replace(CONFIG, total_steps=2)
    result = train_agent(config, None, EARLIER, MemoryAttempt(tmp_path), agent_dir=first.folder, factory=factory())
    assert measured(result)["accuracy_before"] == measured(first)["accuracy_after"]
    assert measured(result)["macro_f1_before"] == measured(first)["macro_f1_after"]


def test_other_labels_get_a_head_of_their_own(first: AgentResult, tmp_path: Path) -> None:
    """The base goes on, the head begins anew."""
    labels = ("pay", "travel")
    data = prepared(
        [row for row in EARLIER.train if row.label < 2],
        [row for row in EARLIER.test if row.label < 2],
        labels=labels,
    )
    result = train_agent(CONFIG, None, data, MemoryAttempt(tmp_path), agent_dir=first.folder, factory=factory())
    assert result.labels == labels
    assert measured(result)["accuracy_after"] > 0.85


def test_rehearsal_keeps_what_was_learnt(first: AgentResult, tmp_path: Path) -> None:
    """Forgetting is measured with and without rehearsal, and is the score before minus the score after."""

    def later(share: float) -> dict[str, float]:
        config = dataclasses.replace(CONFIG, rehearsal_share=share)
        attempt = MemoryAttempt(tmp_path / str(share))
        return measured(
            train_agent(
                config, None, later_rows(), attempt, agent_dir=first.folder, rehearsal=EARLIER, factory=factory()
            )
        )

    without, with_rows = later(0.0), later(0.5)
    for found in (without, with_rows):
        assert found["earlier_accuracy_before"] == measured(first)["accuracy_after"]
        assert found["forgetting"] == found["earlier_accuracy_before"] - found["earlier_accuracy_after"]
        assert found["accuracy_after"] > 0.8
    assert without["forgetting"] > 0.2
    assert with_rows["forgetting"] < without["forgetting"] / 2


def test_forgetting_is_of_the_published_agent(first: AgentResult, tmp_path: Path) -> None:
    """With one label more the head begins anew: what is forgotten is what the published agent could do, by its labels.

    Where it did not know the earlier set's labels, nothing was measured before, and nothing is told of forgetting.
    """
    labels = ("other", *reversed(EARLIER.labels))
    swapped = [dataclasses.replace(row, label=len(EARLIER.labels) - row.label) for row in later_rows().train]
    data = prepared([*swapped[:80], *[Labelled("other words", 0)] * 10], swapped[80:], name="wider", labels=labels)

    def on(earlier: Rows, name: str) -> dict[str, float]:
        attempt = MemoryAttempt(tmp_path / name)
        return measured(
            train_agent(CONFIG, None, data, attempt, agent_dir=first.folder, rehearsal=earlier, factory=factory())
        )

    test = [dataclasses.replace(row, label=len(EARLIER.labels) - row.label) for row in EARLIER.test]
    found = on(prepared([], test, name="earlier", labels=labels), "known")
    assert found["earlier_accuracy_before"] == measured(first)["accuracy_after"]
    assert found["forgetting"] == found["earlier_accuracy_before"] - found["earlier_accuracy_after"]
    strange = on(prepared([], [*test, Labelled("other", 0)], name="earlier", labels=labels), "strange")
    assert "earlier_accuracy_after" in strange
    assert not {"earlier_accuracy_before", "forgetting"} & set(strange)


def test_an_agent_is_unpacked_once_and_whole(tmp_path: Path) -> None:
    """Jobs side by side share the files; a damaged copy is made anew, and damaged bytes of the store are refused."""
    registry = open_registry(tmp_path)
    registry.database.upgrade(Path(agent_server.migrations.__file__).parent)
    row = publish_agent(tmp_path)
    plan = pb.TrainingPlan(architecture="cognate", agent_version=pb.AgentBase(name="intent-router"))

    def base() -> Base:
        return resolve(plan, fetch=no_foundation, registry=registry, cache_dir=tmp_path / "cache")

    with ThreadPoolExecutor(8) as pool:
        waited_for = [pool.submit(base) for _ in range(16)]
        folders = {one.result().agent_dir for one in waited_for}
    [folder] = folders
    assert folder is not None
    name, content = next(iter(FILES.items()))
    (folder / name).write_bytes(content[:-1])
    assert base().agent_dir == folder
    assert (folder / name).read_bytes() == content
    assert row.digest == base().digest
    registry.database.close()


def no_foundation() -> Foundation:
    raise AssertionError("an agent needs no foundation")
