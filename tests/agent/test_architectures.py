"""What the built-in architectures say of themselves, and what Cognate's builds."""

from __future__ import annotations

import ast
import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import agent_server
from agent_server.adaptation import Adaptation, Bottleneck, Freezing, Lora, adapt, count_parameters
from agent_server.architectures.cognate import COGNATE_25M, CognateArchitecture
from agent_server.architectures.factory import BUILT_IN, GROUP, AgentArchitectureFactory, BuildRequest
from agent_server.data.examples import texts_of
from cognateforge.exceptions import (
    ArtifactCorruptError,
    IncompatibleError,
    NotImplementedByServerError,
)
from tests.agent._support import TINY, toy_rows, write_foundation
from training_common.models.cognate_v1 import (
    ACT_PREFIXES,
    LTM_PREFIXES,
    CognateV1,
    CognateV1Config,
    architecture_fingerprint,
    config_to_json,
)
from training_common.models.fingerprints import COGNATE_V1_25M

METHODS = (
    Adaptation(),
    Adaptation(lora=Lora(rank=8)),
    Adaptation(lora=Lora(rank=2, weight_decomposed=True)),
    Adaptation(head=True),
    Adaptation(freezing=Freezing(trained_blocks=2)),
    Adaptation(bottleneck=Bottleneck(width=7)),
)


def request(base_dir: Path, adaptation: Adaptation, *, task: str = "classification", seed: int = 0) -> BuildRequest:
    return BuildRequest(task=task, adaptation=adaptation, seed=seed, base_dir=base_dir, labels=("a", "b"))


def test_what_is_built_in_is_listed_for_other_programs_too() -> None:
    """The distribution's entry points are those of the factory, and each gives an architecture of its name."""
    project = tomllib.loads((Path(agent_server.__file__).parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"][GROUP] == BUILT_IN
    made = AgentArchitectureFactory()
    assert all(made.get(name).name == name for name in BUILT_IN)


def test_the_fingerprint_is_that_of_the_architecture() -> None:
    """The constant that processes without torch use equals the computed fingerprint of Cognate-25M."""
    assert f"sha256:{architecture_fingerprint(CognateV1Config())}" == COGNATE_V1_25M
    assert COGNATE_25M.fingerprint == COGNATE_V1_25M


@pytest.mark.parametrize("unfreeze", [False, True])
@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
def test_the_sizes_are_those_of_the_architecture(adaptation: Adaptation, unfreeze: bool) -> None:
    """What processes without torch count with equals what is trained of Cognate-25M, and what there is in all."""
    adaptation = dataclasses.replace(adaptation, unfreeze_act_ltm=unfreeze)
    with torch.device("meta"):
        model = CognateV1(CognateV1Config())
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        adapt(
            model,
            adaptation,
            linear_layers=[name for name in layers if name.startswith(("prelude.", "core.", "coda."))],
            blocks=[*model.prelude, *model.core, *model.coda],
            features=model.config.width,
            adaptive_prefixes=ACT_PREFIXES + LTM_PREFIXES,
            unused_prefixes=("head.", "head_bias_V"),
            seed=0,
        )
    assert count_parameters(model) == CognateArchitecture().parameters(adaptation)


def test_no_module_of_the_agent_service_names_the_filter() -> None:
    """Names, imports and texts are free of it, but for the one module that refuses it. Docstrings may speak of it."""
    root = Path(agent_server.__file__).parent
    found = {
        f"{path.relative_to(root)}: {text[:60]}"
        for path in sorted(root.rglob("*.py"))
        if path != root / "architectures" / "refusal.py"
        for text in _code_texts(ast.parse(path.read_text(encoding="utf-8")))
        if "grok" in text.lower() or text.split(".")[0] == "cognate_server"
    }
    assert set() == found


def _code_texts(tree: ast.Module) -> Sequence[str]:
    """Return every name, import and text of a module, without docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            texts.append(node.module or "")
        for field in ("id", "attr", "name", "arg"):
            value = getattr(node, field, None)
            texts += [value] if isinstance(value, str) else []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            texts.append(node.value)
    return texts


@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
@pytest.mark.parametrize("unfreeze", [False, True])
def test_act_and_ltm_are_frozen_unless_asked(tmp_path: Path, adaptation: Adaptation, unfreeze: bool) -> None:
    """The halting unit and the memory are trained only where the request says so, whatever the method."""
    foundation = write_foundation(tmp_path / "foundation", list(texts_of(toy_rows().train)))
    adaptation = dataclasses.replace(adaptation, unfreeze_act_ltm=unfreeze)
    model = CognateArchitecture().build(request(foundation, adaptation))
    trained = {name for name, p in model.base_model().named_parameters() if p.requires_grad}
    adaptive = {name for name in trained if name.startswith(ACT_PREFIXES + LTM_PREFIXES)}
    expected = {
        name
        for name, _ in model.base_model().named_parameters()
        if unfreeze and name.startswith(ACT_PREFIXES + LTM_PREFIXES)
    }
    assert expected == adaptive
    assert bool(trained - adaptive) != adaptation.head
    assert not any("memory" in name and "lora" in name for name, _ in model.named_parameters())


def test_another_architecture_is_incompatible(tmp_path: Path) -> None:
    """A folder whose configuration is not cognate_v1's is refused by name, not by a stack trace of torch."""
    foundation = write_foundation(tmp_path / "foundation", ["a text"])
    config = (foundation / "config.json").read_text(encoding="utf-8").replace('"cognate"', '"other"')
    (foundation / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(IncompatibleError, match="other"):
        CognateArchitecture().build(request(foundation, Adaptation()))


def test_a_task_without_a_head_is_not_implemented(tmp_path: Path) -> None:
    """What the contract knows and the architecture does not serve is said to be so."""
    foundation = write_foundation(tmp_path / "foundation", ["a text"])
    with pytest.raises(NotImplementedByServerError, match="reinforcement"):
        CognateArchitecture().build(request(foundation, Adaptation(), task="reinforcement"))


def test_a_folder_of_another_kind_is_no_agent(tmp_path: Path) -> None:
    """Loading a foundation's folder as an agent is refused."""
    foundation = write_foundation(tmp_path / "foundation", ["a text"])
    assert config_to_json(TINY)["family"] == "cognate"
    with pytest.raises(ArtifactCorruptError, match="no cognate agent"):
        CognateArchitecture().load(foundation)


@pytest.mark.parametrize("adaptation", [Adaptation(lora=Lora(rank=2)), Adaptation(bottleneck=Bottleneck(width=4))])
def test_equal_seeds_build_equal_agents(tmp_path: Path, adaptation: Adaptation) -> None:
    """The untrained head and the adapters are a function of the seed, whatever torch's own generator did before."""
    foundation = write_foundation(tmp_path / "foundation", list(texts_of(toy_rows().train)))

    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        model = CognateArchitecture().build(request(foundation, adaptation, seed=seed))
        return dict(model.state_dict())

    first, again, other = built(1), built(1), built(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
