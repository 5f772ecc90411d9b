"""Every built-in architecture is packed with a runtime that gives its logits, and exported where it is one graph."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from torch import nn

from agent_server import export
from agent_server.adaptation import Adaptation, Bottleneck, merge_checked
from agent_server.architectures.causal_lm import CausalLmArchitecture
from agent_server.architectures.cognate import CognateArchitecture
from agent_server.architectures.factory import (
    AgentArchitecture,
    AgentArchitectureFactory,
    BuildRequest,
    FoundationRequirement,
)
from agent_server.architectures.multimodal import MultimodalArchitecture
from agent_server.architectures.policy import PolicyArchitecture, PolicyRequest
from agent_server.architectures.recurrent import RecurrentArchitecture
from agent_server.architectures.sequence_classifier import SequenceClassifierArchitecture
from agent_server.data.examples import Segment, texts_of
from agent_server.export import export_agent, main
from agent_server.objectives.language import ModelWriter
from agent_server.objectives.metrics import actions
from agent_server.objectives.texts import encode_prompt
from agent_server.package import RUNTIMES, probe_batch, probe_logits, write_package
from agent_server.rl.spaces import AgentSpaces, Space
from agent_server.runtime.allowed_actions import masked_action
from cognateforge.exceptions import (
    ArtifactCorruptError,
    IntegrityCheckFailedError,
    LocalStorageError,
    NotImplementedByServerError,
)
from tests.agent._support import toy_rows, write_foundation
from tests.agent.model_folders import write_model_folder
from tests.agent.test_package import isolated

TEXTS = list(texts_of(toy_rows().train))
ARCHITECTURES: Mapping[str, AgentArchitecture] = {
    architecture.name: architecture
    for architecture in (
        CognateArchitecture(FoundationRequirement(name="cognate_v1")),
        RecurrentArchitecture(),
        SequenceClassifierArchitecture(),
        CausalLmArchitecture(),
        MultimodalArchitecture(),
    )
}
SMALL = {"width": 16, "vocabulary_size": 300, "layers": 2, "features": 3, "projection": 4}
BOTTLENECK = Adaptation(bottleneck=Bottleneck(width=4))
LABELS = ("pay", "travel", "music")
# Architecture, task, adaptation, model folder ("" from scratch), settings.
Case = tuple[str, str, Adaptation, str, dict[str, Any]]
CASES: Mapping[str, Case] = {
    "cognate-classes": ("cognate", "classification", Adaptation(), "cognate", {}),
    "cognate-tags": ("cognate", "extraction", BOTTLENECK, "cognate", {}),
    "cognate-language": ("cognate", "dialogue", Adaptation(), "cognate", {}),
    "recurrent-classes": ("recurrent", "classification", BOTTLENECK, "", {"bidirectional": True}),
    "recurrent-tags": ("recurrent", "extraction", Adaptation(), "", {"cell": "lstm", "bidirectional": True}),
    "recurrent-language": ("recurrent", "dialogue", Adaptation(), "", {"bidirectional": False}),
    "bert-classes": ("sequence_classifier", "classification", Adaptation(), "bert", {}),
    "roberta-tags": ("sequence_classifier", "extraction", BOTTLENECK, "roberta", {}),
    "gpt2-classes": ("sequence_classifier", "classification", Adaptation(), "gpt2", {}),
    "bert-first": ("sequence_classifier", "classification", Adaptation(), "bert", {"pooling": "first"}),
    "gpt2-language": ("causal_lm", "dialogue", Adaptation(), "gpt2", {}),
    "llama-language": ("causal_lm", "dialogue", BOTTLENECK, "llama", {}),
    "multimodal-recurrent": ("multimodal", "classification", Adaptation(), "", {}),
    "multimodal-bert": ("multimodal", "classification", Adaptation(), "bert", {}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What agents stand on."""
    root = tmp_path_factory.mktemp("bases")
    found = {kind: write_model_folder(root / kind, kind, TEXTS) for kind in ("bert", "roberta", "gpt2", "llama")}
    return {**found, "cognate": write_foundation(root / "cognate", TEXTS, speaks=True)}


@pytest.fixture(scope="module")
def packages(bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the package of a case, made when it is first asked for. Making it runs it, and compares bit for bit."""
    root, made = tmp_path_factory.mktemp("packages"), dict[str, Path]()

    def package(name: str) -> Path:
        if name not in made:
            made[name] = root / name
            made[name].mkdir()
            pack(made[name], CASES[name], bases)
        return made[name]

    return package


def pack(folder: Path, case: Case, bases: Mapping[str, Path], *, allowed_actions: Sequence[str] = ()) -> None:
    name, task, adaptation, base, given = case
    architecture = ARCHITECTURES[name]
    settings = {key: setting.default for key, setting in architecture.settings.items()}
    settings |= {key: value for key, value in (SMALL | given).items() if key in settings}
    request = BuildRequest(
        task=task,
        adaptation=adaptation,
        seed=3,
        base_dir=bases.get(base),
        labels=LABELS if task in ("classification", "extraction") else (),
        settings=settings,
        tokenizer="" if base else architecture.learn_tokenizer(TEXTS, settings),
    )
    untrained, model = architecture.build(request).eval(), architecture.build(request).eval()
    disturb(model)
    merge_checked(model.base_model(), lambda: torch.zeros(1))
    model.save(folder, extra={"max_tokens": 96})
    write_package(folder, model, untrained, architecture=name, allowed_actions=allowed_actions)


def disturb(model: nn.Module) -> None:
    """Change what is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.mark.parametrize("name", ["cognate-language", "recurrent-language", "gpt2-language"])
def test_a_package_keeps_to_the_actions_that_its_training_enforced(
    name: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    """Where it runs elsewhere, as where it was measured: under the mask it takes the same action."""
    folder, kinds = tmp_path / "agent", ["finish", "search"]
    folder.mkdir()
    pack(folder, CASES[name], bases, allowed_actions=kinds)
    done = isolated(folder / "run.py", "--max-new-tokens", "8", "pay")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answer"]
    assert not actions.violates(answer, kinds), answer

    model = ARCHITECTURES[CASES[name][0]].load(folder).eval()
    writer = ModelWriter(model, max_tokens=8)
    prompt = encode_prompt(model, [Segment("pay")], max_tokens=87)
    with torch.no_grad():
        free = model.decode(writer.go_on(prompt))
        assert actions.violates(free, kinds)
        assert answer == masked_action(writer, prompt, free, kinds)


def policy(folder: Path, *, coordination: str = "shared_parameters", several: bool = True) -> None:
    box = Space(kind="box", shape=(3,), low=(-1.0, None, 0.0), high=(1.0, None, None))
    spaces = {"observation": box, "action": Space(kind="discrete", counts=(4,), starts=(2,))}
    agents = [AgentSpaces(name=name, **spaces) for name in (("a", "b") if several else ("only",))]
    if not several:
        agents = [AgentSpaces(name="only", observation=box, action=box)]
    settings = {"hidden_size": 8, "normalize_observations": True}
    request = PolicyRequest(agents=agents, coordination=coordination, seed=1, settings=settings)
    untrained, model = (PolicyArchitecture().build_policy(request).eval() for _ in range(2))
    disturb(model)
    folder.mkdir()
    model.save(folder, extra={})
    write_package(folder, model, untrained, architecture="policy")


ANSWERS = """
import json, pathlib, runpy, sys
for line in sys.stdin:
    folder, given = json.loads(line)
    run = runpy.run_path(f"{folder}/run.py")
    agent = run["Agent"](pathlib.Path(folder))
    checked = agent.check()
    print(json.dumps([checked["distance"], checked["equal"], agent.answer(given, max_new_tokens=5)]))
assert not {"agent_server", "cognateforge", "training_common"} & set(sys.modules)
"""


def test_every_package_answers_elsewhere(packages: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process without this project: the recorded logits to the bit, and answers of each kind."""
    for coordination in ("shared_parameters", "centralized_critic", "independent"):
        policy(tmp_path / coordination, coordination=coordination)
    policy(tmp_path / "single", several=False)
    asked = {packages(name): "please pay my bill" for name in CASES}
    for name in ("multimodal-recurrent", "multimodal-bert"):
        asked[packages(name)] = json.dumps({"text": "please pay my bill", "features": [0.5, 1, 2]})
    for coordination in ("shared_parameters", "centralized_critic", "independent"):
        asked[tmp_path / coordination] = json.dumps({"b": [0.1, 0.2, 0.3]})
    asked[tmp_path / "single"] = "[0.1, 0.2, 0.3]"
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS, encoding="utf-8")
    given = "\n".join(json.dumps([str(folder), text]) for folder, text in asked.items())
    done = isolated(script, given=given)
    assert 0 == done.returncode, done.stderr
    found = dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))
    assert {(0.0, True)} == {(distance, equal) for distance, equal, _ in found.values()}
    answers = {folder.name: answer for folder, (_, _, answer) in found.items()}
    for name in ("cognate-classes", "recurrent-classes", "bert-first", "multimodal-bert"):
        assert answers[name]["label"] in LABELS
    for name in ("cognate-tags", "recurrent-tags", "roberta-tags"):
        assert all(span["label"] in LABELS for span in answers[name]["spans"])
    for name in ("cognate-language", "recurrent-language", "gpt2-language", "llama-language"):
        assert isinstance(answers[name]["answer"], str)
    assert all({"b"} == answers[name]["action"].keys() <= {"b"} for name in ("shared_parameters", "independent"))
    assert answers["shared_parameters"]["action"]["b"] in range(2, 6)
    for observation in ("left", "[0.1]", "[NaN, 0.2, 0.3]", '{"a": 1}'):
        refused = isolated(tmp_path / "single" / "run.py", observation)
        assert (2, "", 1) == (refused.returncode, refused.stdout, len(refused.stderr.splitlines())), refused.stderr
    bounded = answers["single"]["action"]
    assert 3 == len(bounded)
    assert -1 <= bounded[0] <= 1


@pytest.mark.parametrize("name", CASES)
def test_a_package_holds_what_its_runtime_needs(packages: Callable[[str], Path], name: str) -> None:
    """Byte for byte, and no more."""
    folder, runtime = packages(name), RUNTIMES[CASES[name][0]]
    assert {file.name: file.read_bytes() for file in runtime.files} == {
        file.name: file.read_bytes() for file in (folder / "runtime").iterdir()
    }


def factory() -> AgentArchitectureFactory:
    return AgentArchitectureFactory(given=ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("recurrent-classes", "onnx"),
        ("recurrent-tags", "onnx"),
        ("bert-classes", "torch"),
        ("bert-classes", "onnx"),
        pytest.param("roberta-tags", "onnx", marks=pytest.mark.slow),
        pytest.param("gpt2-classes", "torch", marks=pytest.mark.slow),
    ],
)
def test_an_export_gives_the_trained_logits(
    packages: Callable[[str], Path], tmp_path: Path, name: str, form: str
) -> None:
    """For rows of any number and length: in each form that is read again by what others read it with."""
    exported = export_agent(packages(name), tmp_path / f"model.{form}", form, factory=factory())
    assert exported.distance <= 1e-4 < exported.untrained_distance
    assert (tmp_path / f"model.{form}").stat().st_size == exported.size_bytes > 0
    assert [f"model.{form}"] == [path.name for path in tmp_path.iterdir()]


def test_what_killed_exports_have_left_goes_with_the_next_one(packages: Callable[[str], Path], tmp_path: Path) -> None:
    """A folder that nobody holds is removed; one whose export runs, one just made, and those of other files stay."""
    made = {name: tmp_path / name for name in ("killed", "runs", "young", "other")}
    for name, folder in made.items():
        place = folder.with_name(f".{'other' if name == 'other' else 'model.onnx'}.exporting-{name}")
        place.mkdir()
        (place / "model.onnx").write_bytes(b"half")
        if name != "young":
            os.utime(place, (0, 0))
        made[name] = place
    held = os.open(made["runs"], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    export_agent(packages("recurrent-classes"), tmp_path / "model.onnx", "onnx", factory=factory())
    os.close(held)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model.onnx", made["runs"].name, made["young"].name, made["other"].name}


def test_an_export_of_other_weights_is_not_written(
    packages: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the untrained model's, nor a weight that has changed: nothing is left at the place."""
    folder = Path(shutil.copytree(packages("recurrent-classes"), tmp_path / "package"))
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    probe = safetensors.torch.load_file(folder / "probe.safetensors")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["head.bias"][0] += 0.1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(IntegrityCheckFailedError, match="away from the trained model's"):
        export_agent(folder, out, "onnx", factory=factory())
    # Within the tolerance of the trained model, and equal to the untrained one.
    model = ARCHITECTURES["recurrent"].load(folder)
    logits = probe_logits(model, probe_batch(model))
    probe |= {"logits": logits + 1e-6, "untrained_logits": logits}
    safetensors.torch.save_file(probe, folder / "probe.safetensors")
    with pytest.raises(IntegrityCheckFailedError, match="before its first step"):
        export_agent(folder, out, "onnx", factory=factory())
    assert [] == list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("error", "free", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1 << 30, "No space left on device; free some space"),
        (RuntimeError("unexpected pos 64"), 0, "no space left on device; free some space"),
        (OSError(errno.EACCES, "Permission denied"), 0, "Permission denied; choose another place"),
    ],
)
def test_a_full_disk_is_told_and_what_was_there_stays(
    packages: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    free: int,
    told: str,
) -> None:
    """It is no fault of the architecture, also where a library tells of it in words of its own."""
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    out.write_bytes(b"an earlier one")
    monkeypatch.setattr("agent_server.export.AgentArchitectureFactory", factory)
    monkeypatch.setattr(export, "_FORMS", {"onnx": (Mock(side_effect=error), Mock())})
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr("training_common.faults.shutil.disk_usage", lambda path: usage)
    assert 1 == main([str(packages("recurrent-classes")), str(out), "--format", "onnx"])
    assert f"error: {out} cannot be written: {told}" in capsys.readouterr().err
    assert ([out], b"an earlier one") == (list(out.parent.iterdir()), out.read_bytes())


def test_an_export_takes_no_folders_place(packages: Callable[[str], Path], tmp_path: Path) -> None:
    """A place that cannot be replaced is told of, and nothing is left beside it."""
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(LocalStorageError, match="choose another place"):
        export_agent(packages("recurrent-classes"), tmp_path / "model.onnx", "onnx", factory=factory())
    assert [tmp_path / "model.onnx"] == list(tmp_path.iterdir())


def test_what_is_no_graph_is_not_exported(
    packages: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cognate's steps depend on each token; a folder without a package is named; the command tells both."""
    with pytest.raises(NotImplementedByServerError, match="with a fixed number of steps it is another function"):
        export_agent(packages("cognate-classes"), tmp_path / "model.pt2", "torch", factory=factory())
    with pytest.raises(NotImplementedByServerError, match="texts of one length; ONNX has recurrent layers"):
        export_agent(packages("recurrent-classes"), tmp_path / "model.pt2", "torch", factory=factory())
    with pytest.raises(ArtifactCorruptError, match="holds no package"):
        export_agent(tmp_path, tmp_path / "model.pt2", "torch", factory=factory())
    with pytest.raises(LocalStorageError, match="is no folder: create it"):
        export_agent(packages("recurrent-classes"), tmp_path / "none" / "model.onnx", "onnx", factory=factory())
    torn = Path(shutil.copytree(packages("recurrent-classes"), tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ArtifactCorruptError, match=r"torn: .* incomplete metadata"):
        export_agent(torn, tmp_path / "model.onnx", "onnx", factory=factory())
    monkeypatch.setattr("agent_server.export.AgentArchitectureFactory", factory)
    assert 1 == main([str(tmp_path), str(tmp_path / "model.pt2"), "--format", "torch"])
    assert "ARTIFACT_CORRUPT: " in capsys.readouterr().err
    assert 0 == main([str(packages("recurrent-classes")), str(tmp_path / "model.onnx"), "--format", "onnx"])
    assert "onnx" == json.loads(capsys.readouterr().out)["format"]
