"""Training an agent: better than the best constant answer, resumable bit for bit, stopped on request."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from agent_server.adaptation import Adaptation, Lora
from agent_server.data.examples import Labelled, texts_of
from agent_server.data.processor import AgentDataProcessor
from agent_server.evaluation import TrainingOrder
from agent_server.objectives.classification import score
from agent_server.optim import Optimization
from agent_server.predict import Classifier, main
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    ArchitectureNotFoundError,
    ArtifactCorruptError,
    DataUnavailableError,
    IncompatibleError,
    TrainingDivergedError,
)
from tests.agent._support import MemoryAttempt, Rows, factory, measured, toy_rows, weights, write_foundation
from training_common.attempt import AttemptStopped, StopKind
from training_common.settings import DataSettings

DATA = toy_rows()
CONFIG = AgentTrainConfig(
    agent="toy-router",
    foundation="tiny@1",
    foundation_digest="sha256:" + "0" * 64,
    total_steps=24,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(lora=Lora(rank=2, dropout=0.2)),
    optimization=Optimization(lr=1e-2),
    checkpoint_interval_steps=10,
    progress_interval_steps=4,
)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(tmp_path_factory.mktemp("trainer") / "foundation", list(texts_of(DATA.train)))


def run(foundation: Path, attempt: MemoryAttempt, config: AgentTrainConfig = CONFIG, data: Rows = DATA) -> AgentResult:
    return train_agent(config, foundation, data, attempt, factory=factory())


@pytest.mark.parametrize("adaptation", [Adaptation(), Adaptation(lora=Lora(rank=4))])
def test_a_trained_agent_beats_the_best_constant_answer(
    foundation: Path, tmp_path: Path, adaptation: Adaptation
) -> None:
    """On rows that one word decides, a tiny random foundation learns the words, fully trained or by LoRA."""
    result = run(
        foundation, MemoryAttempt(tmp_path), dataclasses.replace(CONFIG, adaptation=adaptation, total_steps=60)
    )
    got = measured(result)
    assert got["majority_share"] == 0.5
    assert got["accuracy_before"] < 0.7
    assert got["accuracy_after"] > 0.85
    assert got["macro_f1_after"] > 0.8
    assert {"toy/test", "toy/validation"} == {evaluation.dataset for evaluation in result.evaluations}


def test_forge_intents_are_learnt_beyond_the_majority(tmp_path: Path) -> None:
    """On the project's own set, with new wordings in its test, a tiny random foundation beats a constant answer."""
    plan = pb.TrainingPlan(classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=1)))
    data = AgentDataProcessor(DataSettings()).prepare(plan)
    foundation = write_foundation(tmp_path / "foundation", list(texts_of(data.train)))
    config = dataclasses.replace(CONFIG, total_steps=80, batch_size=32, evaluation_rows=0)
    result = train_agent(config, foundation, data, MemoryAttempt(tmp_path), factory=factory())
    got = measured(result)
    assert data.manifest.facts["test_majority_share"] == got["majority_share"]
    assert got["majority_share"] < 0.1
    assert got["accuracy_before"] < 0.25
    assert got["accuracy_after"] > 3 * got["majority_share"]
    assert {"forge-intents/test", "forge-intents/validation"} == {e.dataset for e in result.evaluations}


def test_progress_says_what_was_measured(foundation: Path, tmp_path: Path) -> None:
    """Rows come at the first, every fourth and the last step; validation accuracy only where it was measured."""
    attempt = MemoryAttempt(tmp_path)
    run(foundation, attempt)
    assert [step for step, _ in attempt.rows] == [1, 4, 6, 8, 12, 16, 18, 20, 24]
    always = {
        "loss",
        "learning_rate",
        "gradient_norm",
        "samples_per_s",
        "train_accuracy",
        "seconds_left",
        "peak_memory_bytes",
    }
    for step, metrics in attempt.rows:
        expected = always | ({"loss_slope"} if step >= 20 else set())
        if step in (6, 12, 18):
            expected |= {"validation_accuracy", "validation_macro_f1", "validation_loss", "generalization_gap"}
        assert expected == set(metrics)
        if "validation_loss" in metrics:
            assert metrics["generalization_gap"] == metrics["validation_loss"] - metrics["loss"]  # type: ignore[operator]
    assert [checkpoint.step for checkpoint in attempt.checkpoints] == [10, 20, 24]


@pytest.mark.parametrize("stop_at", [4, 12])
def test_a_paused_run_ends_like_an_uninterrupted_one(foundation: Path, tmp_path: Path, stop_at: int) -> None:
    """PAUSE saves a checkpoint, and the attempt that goes on from it ends with the same bits and the same figures."""
    whole = run(foundation, MemoryAttempt(tmp_path / "whole"))
    cut = MemoryAttempt(tmp_path / "cut", stop_at=stop_at)
    with pytest.raises(AttemptStopped) as stopped:
        run(foundation, cut)
    assert StopKind.PAUSE is stopped.value.kind
    assert stop_at == cut.checkpoints[-1].step
    torch.rand(7)  # another process has another random state
    resumed = run(foundation, dataclasses.replace(cut, stop_at=None))
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert whole.evaluations == resumed.evaluations


def test_a_crash_after_a_checkpoint_loses_only_the_steps_since(foundation: Path, tmp_path: Path) -> None:
    """An attempt that died between two checkpoints is repeated from the older one, to the same bits."""
    whole = run(foundation, MemoryAttempt(tmp_path / "whole"))
    died = MemoryAttempt(tmp_path / "died", stop_at=16, stop_kind=StopKind.REVOKED)
    with pytest.raises(AttemptStopped):
        run(foundation, died)
    assert [checkpoint.step for checkpoint in died.checkpoints] == [10]
    resumed = run(foundation, dataclasses.replace(died, stop_at=None, rows=[]))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("kind", [StopKind.CANCEL, StopKind.REVOKED])
def test_a_cancelled_run_leaves_no_checkpoint(foundation: Path, tmp_path: Path, kind: StopKind) -> None:
    """CANCEL and REVOKED end the attempt where it stands."""
    attempt = MemoryAttempt(tmp_path, stop_at=4, stop_kind=kind)
    with pytest.raises(AttemptStopped) as stopped:
        run(foundation, attempt)
    assert kind is stopped.value.kind
    assert attempt.checkpoints == []


def test_a_stop_is_heeded_while_measuring(foundation: Path, tmp_path: Path) -> None:
    """A pause that comes before the first step saves step 0, and costs nothing of the result."""
    attempt = MemoryAttempt(tmp_path / "cut", stop_at=0)
    with pytest.raises(AttemptStopped):
        run(foundation, attempt)
    assert [checkpoint.step for checkpoint in attempt.checkpoints] == [0]
    resumed = run(foundation, dataclasses.replace(attempt, stop_at=None))
    whole = run(foundation, MemoryAttempt(tmp_path / "whole"))
    assert whole.evaluations == resumed.evaluations


def test_a_checkpoint_of_another_plan_is_refused(foundation: Path, tmp_path: Path) -> None:
    """A checkpoint goes on only with the configuration that it was made with."""
    attempt = MemoryAttempt(tmp_path)
    run(foundation, attempt)
    with pytest.raises(ArtifactCorruptError, match="another training plan"):
        run(foundation, attempt, dataclasses.replace(CONFIG, seed=4))


def test_the_foundation_is_left_as_it_was(foundation: Path, tmp_path: Path) -> None:
    """With LoRA, only the blocks' linear maps differ from the foundation's; frozen parts are the same bits."""
    result = run(foundation, MemoryAttempt(tmp_path))
    base = safetensors.torch.load_file(foundation / "model.safetensors")
    agent = weights(result)
    changed = {name for name, value in base.items() if not torch.equal(value, agent[f"foundation.{name}"])}
    maps = ("attention.query_key_value.weight", "attention.output.weight", "gate_up.weight", "down.weight")
    assert changed
    assert all(name.startswith(("prelude.", "core.", "coda.")) and name.endswith(maps) for name in changed)


def test_the_folder_is_complete(foundation: Path, tmp_path: Path) -> None:
    """Weights, configuration, tokenizer and what runs them; parameters as they were counted."""
    result = run(foundation, MemoryAttempt(tmp_path))
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.py", "package.json", "probe.safetensors"} < {
        path.name for path in result.folder.iterdir()
    }
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert list(DATA.labels) == config["labels"]
    assert ("tiny@1", result.trainable_parameters) == (config["foundation"], config["trainable_parameters"])


def test_a_published_folder_classifies(
    foundation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was exported answers as the trained agent was measured, from Python and from the command."""
    result = run(foundation, MemoryAttempt(tmp_path), dataclasses.replace(CONFIG, total_steps=60))
    classifier = Classifier(result.folder, factory=factory())
    answers = classifier.classify(list(texts_of(DATA.test)))
    right = sum(DATA.labels[row.label] == answer.label for row, answer in zip(DATA.test, answers, strict=True))
    assert measured(result)["accuracy_after"] == pytest.approx(right / len(DATA.test))
    assert all(1 / len(DATA.labels) <= answer.probability <= 1 for answer in answers)
    assert len(classifier.classify([""])) == 1
    monkeypatch.setattr("agent_server.predict.AgentArchitectureFactory", factory)
    assert main([str(result.folder), "please pay my bill", "fly today"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in printed] == ["pay", "travel"]
    assert main([str(tmp_path), "a text"]) == 1
    assert "ARTIFACT_CORRUPT" in capsys.readouterr().err


def test_the_command_without_arguments_says_how(tmp_path: Path) -> None:
    """`python -m agent_server.predict` prints its usage."""
    command = [sys.executable, "-m", "agent_server.predict"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (2, "usage: python -m agent_server.predict FOLDER TEXT...\n")


def test_a_foundation_that_is_not_finite_makes_no_agent(tmp_path: Path) -> None:
    """A loss that is not finite before the first step ends the run with its class, and no artifact."""
    broken = tmp_path / "broken"
    write_foundation(broken, list(texts_of(DATA.train)))
    state = safetensors.torch.load_file(broken / "model.safetensors")
    with safetensors.safe_open(broken / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    state["final_norm.scale_D"].fill_(float("inf"))
    safetensors.torch.save_file(state, broken / "model.safetensors", metadata=header)
    with pytest.raises(TrainingDivergedError, match="loss_before on toy/test is nan: what it begins with"):
        run(broken, MemoryAttempt(tmp_path))
    assert not (tmp_path / "agent").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train": []}, "toy has no train rows"),
        ({"test": []}, "toy has no test rows"),
        ({"validation": [Labelled("a text", 3)]}, "toy has validation rows whose label is not among its 3"),
        (
            {"labels": ["a"], "train": [Labelled("t", 0)], "validation": [], "test": [Labelled("t", 0)]},
            "toy has 1 labels",
        ),
    ],
)
def test_unusable_data_is_named(foundation: Path, tmp_path: Path, change: dict[str, list[object]], reason: str) -> None:
    """Data that cannot be trained on is refused before anything is built."""
    with pytest.raises(DataUnavailableError, match=reason):
        run(foundation, MemoryAttempt(tmp_path), data=dataclasses.replace(DATA, **change))  # type: ignore[arg-type]


def test_an_unknown_architecture_or_task_is_refused(foundation: Path, tmp_path: Path) -> None:
    """Both are named together with what there is."""
    with pytest.raises(ArchitectureNotFoundError, match="no agent architecture 'nowhere' is installed"):
        run(foundation, MemoryAttempt(tmp_path), dataclasses.replace(CONFIG, architecture="nowhere"))
    with pytest.raises(IncompatibleError, match=r"serves classification, .*, not multi_agent"):
        run(foundation, MemoryAttempt(tmp_path), dataclasses.replace(CONFIG, task="multi_agent"))


def test_without_validation_rows_nothing_is_validated(foundation: Path, tmp_path: Path) -> None:
    """A set without validation rows trains, and reports no validation accuracy."""
    attempt = MemoryAttempt(tmp_path)
    result = run(foundation, attempt, data=dataclasses.replace(DATA, validation=[]))
    assert "validation_accuracy" not in measured(result)
    assert not any("validation_accuracy" in metrics for _, metrics in attempt.rows)


def test_every_epoch_holds_every_row_once() -> None:
    """The order is a function of seed and step, differs between epochs, and loses no row."""
    rows = list(range(53))

    def order() -> TrainingOrder[int]:
        return TrainingOrder(rows, length=lambda row: 1 + row % 7, batch_size=5, seed=1)

    shared = order()
    epochs = [[row for step in range(11) for row in shared.rows_of(11 * epoch + step)] for epoch in range(2)]
    assert list(range(53)) == sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert shared.rows_of(13) == order().rows_of(13)


def test_scores_agree_with_a_plain_reference() -> None:
    """Macro-F1 is the mean over the labels that occur; an answer that no row has counts against precision alone."""
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (3, 0)]
    f1 = []
    for label in (0, 1, 3):
        hits = sum(pair == (label, label) for pair in pairs)
        answered, labelled = sum(a == label for _, a in pairs), sum(t == label for t, _ in pairs)
        precision, recall = hits / answered if answered else 0.0, hits / labelled
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    accuracy, macro_f1 = score(Counter(pairs))
    assert accuracy == 3 / 6
    assert macro_f1 == pytest.approx(sum(f1) / 3)
