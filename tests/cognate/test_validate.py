"""The gate on what is published: the same checks come out of the stored files, and nothing else passes for them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cognate_server.construct import CognateModelConstructor
from cognate_server.data.build import build_stream
from cognate_server.data_plan import data_plan
from cognate_server.plan import source_settings, with_defaults
from cognate_server.settings import PretrainingSettings
from cognate_server.validate import Published, gate
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import ArtifactCorruptError, DataUnavailableError, IncompatibleError
from cognateforge.layout import STATEMENT_NAME
from training_common.artifacts.statement import DATA_REPORT, Making, statement_of
from training_common.models.cognate_v1 import CognateV1, CognateV1Config, config_to_json, count_parameters, save_state
from training_common.settings import DataSettings

GENERATED = DataSettings()
BODY = {"create_us": 1, "code": {}, "data": [], "recovery": [], "kind": "foundation"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model that nobody has trained, with all that says what it was judged on."""
    folder = tmp_path_factory.mktemp("model")
    plan = pb.PretrainingPlan(total_steps=4, seed=5, batch_size=2, sequence_length=64)
    plan.datasets.add(dataset=pb.DATASET_FORGE_ARITHMETIC, weight=1)
    plan = with_defaults(plan)
    stream, data = build_stream(
        data_plan(plan), source_settings(GENERATED), tokenizer_file=folder / "tokenizer.json", folder=folder
    )
    config = CognateV1Config(
        vocabulary_size=len(stream.unigram_counts()),
        width=32,
        heads=4,
        feed_forward_width=48,
        memory_slots=6,
        memory_chunk=16,
    )
    model = CognateModelConstructor(config).construct(config, seed=0, unigram_counts=stream.unigram_counts())
    save_state(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_json(config)))
    (folder / DATA_REPORT).write_text(json.dumps(data.to_json()))
    making = Making(job="jobs/x", attempt=1, plan=plan, plan_bytes=plan.SerializeToString())
    (folder / STATEMENT_NAME).write_bytes(statement_of([], making, family="cognate-25m", body=BODY))
    return folder


@pytest.fixture
def version(made: Path, tmp_path: Path) -> Published:
    """A copy of it that a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return Published(name="cognate-25m@1", folder=folder)


def checked(version: Published) -> dict[str, float]:
    few = PretrainingSettings(reasoning_problems=2, reasoning_tokens=16)
    report = gate(version, GENERATED, few, expected=count_parameters(version.model().config))
    return {check.name: check.value for check in report.checks}


def test_the_same_files_and_data_give_the_same_checks(version: Published) -> None:
    """Twice the same numbers, in the gate's names, of which an untrained model's loss is the unigram's."""
    first = checked(version)
    assert first == checked(version)
    assert {"parameter_count", "weights_not_finite", "forge_arithmetic_exact_match"} < first.keys()
    assert count_parameters(version.model().config) == first["parameter_count"]


def test_other_weights_give_other_checks(version: Published) -> None:
    """They are measured, and not read out of the manifest."""
    before = checked(version)
    model = version.model()
    with torch.no_grad():
        model.embedding.weight.mul_(3)
        model.head.weight.normal_(std=0.5)
    save_state(model, version.folder / "model.safetensors")
    after = checked(version)
    assert before["validation_loss_below_unigram_loss"] != after["validation_loss_below_unigram_loss"]


def test_other_data_is_refused(version: Published) -> None:
    """The set is named with both digests, and where to put the right one."""
    report = json.loads((version.folder / DATA_REPORT).read_text())
    digest = report["sources"][0]["digest"]
    report["sources"][0]["digest"] = f"sha256:{'0' * 64}"
    (version.folder / DATA_REPORT).write_text(json.dumps(report))
    with pytest.raises(
        DataUnavailableError, match=rf"forge-arithmetic with digest sha256:0+, .*{digest}.*data\.folder"
    ):
        checked(version)


def test_other_rows_of_the_same_data_are_refused(version: Published) -> None:
    """A release that packs otherwise would measure something else under the same name."""
    report = json.loads((version.folder / DATA_REPORT).read_text())
    report["stream_digest"] = f"sha256:{'0' * 64}"
    (version.folder / DATA_REPORT).write_text(json.dumps(report))
    with pytest.raises(IncompatibleError, match="this release makes other rows"):
        checked(version)


def test_a_version_without_a_statement_is_refused(version: Published) -> None:
    """What it was judged on is nowhere said."""
    (version.folder / STATEMENT_NAME).unlink()
    with pytest.raises(IncompatibleError, match="cognate-25m@1 has no statement"):
        checked(version)


def test_a_plan_of_another_release_is_refused(version: Published) -> None:
    """A field that this release lacks may have decided about the data."""
    path = version.folder / STATEMENT_NAME
    statement = json.loads(path.read_bytes())
    statement["predicate"]["plan"]["fields"]["mixture_of_the_future"] = 3
    path.write_text(json.dumps(statement))
    with pytest.raises(IncompatibleError, match="cannot read the plan of cognate-25m@1"):
        checked(version)


def test_files_that_are_no_model_are_refused(version: Published) -> None:
    """Weights of another shape than the config says."""
    other = dataclasses.replace(version.model().config, width=64)
    save_state(CognateV1(other), version.folder / "model.safetensors")
    with pytest.raises(ArtifactCorruptError, match="cognate-25m@1: its files cannot be loaded"):
        checked(version)
