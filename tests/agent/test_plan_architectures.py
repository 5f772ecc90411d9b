"""A plan is held against what its architecture declares, and every refusal names its field and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.settings import Setting, settings_of
from agent_server.plan import require_feasible
from agent_server.settings import AgentSettings, ModelSettings, require_model_folder
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import DataUnavailableError, ForgeError, IncompatibleError, InvalidFieldError
from training_common.settings import SettingsError

DECLARED = {
    "cell": Setting(description="x", default="gru", words=("gru", "lstm")),
    "width": Setting(description="x", default=256, minimum=8, maximum=4096),
    "dropout": Setting(description="x", default=0.2, minimum=0.0, maximum=0.9),
    "wide": Setting(description="x", default=False),
}


def given(**values: Any) -> list[pb.ArchitectureSetting]:
    kinds = {bool: "flag", int: "integer", float: "number", str: "word"}
    return [pb.ArchitectureSetting(name=name, **{kinds[type(value)]: value}) for name, value in values.items()]


def test_settings_are_filled_in() -> None:
    """What a plan leaves out has its default, and a whole number will do for a number."""
    expected = {"cell": "gru", "width": 16, "dropout": 0.0, "wide": False}
    assert settings_of("a", DECLARED, given(width=16, dropout=0)) == expected
    assert isinstance(settings_of("a", DECLARED, given(dropout=0))["dropout"], float)


@pytest.mark.parametrize(
    ("values", "field", "text"),
    [
        ({"cell": "gru", "depth": 3}, "settings[1].name", "has no setting 'depth'; it has: cell, width, dropout, wide"),
        ({"cell": "rnn"}, "settings[0].word", "must be one of the words gru, lstm, not 'rnn'; give it as `word`"),
        ({"width": 4}, "settings[0].integer", "must be a whole number from 8 to 4096, not 4"),
        ({"width": 16.0}, "settings[0].number", "a whole number from 8 to 4096, not 16.0; give it as `integer`"),
        ({"dropout": 0.95}, "settings[0].number", "must be a number from 0 to 0.9, not 0.95"),
        ({"wide": 1}, "settings[0].integer", "must be true or false, not 1; give it as `flag`"),
        ({"width": True}, "settings[0].flag", "must be a whole number"),
    ],
)
def test_a_setting_that_will_not_do_is_named(values: dict[str, Any], field: str, text: str) -> None:
    """Wrong names, kinds and values are told by their place in the plan."""
    with pytest.raises(InvalidFieldError) as caught:
        settings_of("a", DECLARED, given(**values))
    (violation,) = caught.value.violations
    assert violation.field == field
    assert text in violation.description


def plan(architecture: str, **parts: Any) -> pb.TrainingPlan:
    values: dict[str, Any] = {
        "agent": "a",
        "architecture": architecture,
        "classification": pb.ClassificationTask(generated=pb.GeneratedSource(seed=1)),
        "adaptation": pb.Adaptation(full=pb.FullAdaptation()),
        "optimization": pb.Optimization(adamw=pb.AdamW()),
        "total_steps": 1,
    }
    return pb.TrainingPlan(**(values | parts))


SCRATCH = {"scratch": pb.ScratchBase()}
FOLDER = {"model_folder": pb.ModelFolderBase(path="spoiled")}
LORA = pb.Adaptation(lora=pb.LoraAdaptation())


@pytest.mark.parametrize(
    ("made", "error", "field", "text"),
    [
        (plan("cognate", **SCRATCH), IncompatibleError, "plan.scratch", "is built on plan.foundation"),
        (
            plan("recurrent", foundation=pb.FoundationBase(name="cognate-25m")),
            IncompatibleError,
            "plan.foundation",
            "architecture recurrent is built on plan.scratch",
        ),
        (plan("recurrent", **SCRATCH, adaptation=LORA), IncompatibleError, "plan.adaptation.lora", "it has full, head"),
        (plan("multimodal", **SCRATCH, adaptation=LORA), IncompatibleError, "plan.adaptation.lora", "ask for full"),
        (
            plan("recurrent", **SCRATCH, settings=given(width=3)),
            InvalidFieldError,
            "plan.settings[0].integer",
            "from 8 to 4096",
        ),
        (
            plan("recurrent", agent_version=pb.AgentBase(name="a@1"), settings=given(width=16)),
            InvalidFieldError,
            "plan.settings",
            "leave them out",
        ),
        (plan("sequence_classifier", **FOLDER), DataUnavailableError, "plan.model_folder.path", "set models.folder"),
    ],
)
def test_a_plan_that_does_not_fit_its_architecture_is_refused(
    made: pb.TrainingPlan, error: type[ForgeError], field: str, text: str
) -> None:
    """Base, method and settings are checked before a row is written."""
    with pytest.raises(error) as caught:
        require_feasible(made, AgentArchitectureFactory(), AgentSettings())
    (violation,) = caught.value.violations
    assert violation.field == field
    assert text in violation.description


def test_a_setting_that_does_not_go_with_the_task_is_refused() -> None:
    """What an architecture says of settings and task together is told at the setting's place."""
    made = plan("recurrent", **SCRATCH, settings=given(width=16, bidirectional=True))
    made.dialogue.file.path = "talk.jsonl"
    with pytest.raises(InvalidFieldError) as caught:
        require_feasible(made, AgentArchitectureFactory(), AgentSettings())
    assert [v.field for v in caught.value.violations] == ["plan.settings[1]"]


def test_a_model_folder_is_looked_at_first(tmp_path: Path) -> None:
    """A folder that is missing or will not do is refused before the job is taken; a sound one is not."""
    factory, settings = AgentArchitectureFactory(), AgentSettings(models=ModelSettings(folder=tmp_path))
    with pytest.raises(DataUnavailableError, match=r"no folder spoiled below models\.folder"):
        require_feasible(plan("sequence_classifier", **FOLDER), factory, settings)
    hub = AgentSettings(models=ModelSettings(folder=tmp_path, hub=True))
    require_feasible(plan("sequence_classifier", **FOLDER), factory, hub)  # the worker will ask the hub
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for name, text in {"config.json": '{"model_type": "bert"}', "tokenizer.json": "{}"}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # no tensor: the server reads none
    require_feasible(plan("sequence_classifier", **FOLDER), factory, settings)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(IncompatibleError) as caught:
        require_feasible(plan("sequence_classifier", **FOLDER), factory, settings)
    assert [v.field for v in caught.value.violations] == ["plan.model_folder.path"]


def test_settings_of_models_are_checked_at_the_start(tmp_path: Path) -> None:
    """A folder that is not there stops the start, and so does a hub without a place for what it gives."""
    with pytest.raises(SettingsError, match=r"models.folder: .* is no folder"):
        require_model_folder(ModelSettings(folder=tmp_path / "none"))
    with pytest.raises(ValueError, match="set folder beside it"):
        ModelSettings(hub=True)
