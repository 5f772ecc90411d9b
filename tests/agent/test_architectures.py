"""Architectures are found by entry point, listed without torch, and never bring pretraining's filter in."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import agent_server
from agent_server.adaptation import Adaptation, Lora, adapt, count_parameters
from agent_server.architectures.cognate import COGNATE_25M, CognateArchitecture
from agent_server.architectures.factory import GROUP, AgentArchitectureFactory
from cognateforge.exceptions import (
    ArchitectureNotFoundError,
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

BUILT_IN = "agent_server.architectures.cognate:CognateArchitecture"
PLUGIN = """
class Echo:
    name = "echo"
    tasks = ("classification",)
    description = "Says what it heard."
    required_architecture = None

    def build(self, **_):
        raise NotImplementedError

    def load(self, folder):
        raise NotImplementedError
"""


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Return a function that makes entry points look installed, and a module `echo_plugin` with them."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(entry_points: Sequence[tuple[str, str]], plugin: str = "") -> None:
        (tmp_path / "echo_plugin.py").write_text(plugin, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "echo_plugin", raising=False)
        importlib.invalidate_caches()
        found = [metadata.EntryPoint(name=name, value=value, group=GROUP) for name, value in entry_points]
        monkeypatch.setattr(metadata, "entry_points", lambda *, group: found if group == GROUP else [])

    return put


def test_a_plugin_stands_beside_the_built_in(install: Install) -> None:
    """What is installed is listed, sorted by name."""
    install([("echo", "echo_plugin:Echo"), ("cognate", BUILT_IN)], PLUGIN)
    made = AgentArchitectureFactory()
    assert [architecture.name for architecture in made] == ["cognate", "echo"]
    assert made.problems == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemError('boom')", "SystemError: boom"),
        ("class Echo: pass", "is not an AgentArchitecture"),
        (PLUGIN.replace('"echo"', '"other"'), "it calls itself 'other'"),
        (PLUGIN.replace('("classification",)', "()"), "it serves no task"),
        (PLUGIN.replace("Says what it heard.", ""), "its description must have"),
    ],
)
def test_a_broken_plugin_is_reported_and_leaves_the_others_alone(install: Install, source: str, reason: str) -> None:
    """A plugin's fault is named with the plugin; the built-in still works, and asking for the plugin says why not."""
    install([("echo", "echo_plugin:Echo"), ("cognate", BUILT_IN)], source)
    made = AgentArchitectureFactory()
    assert list(made.architectures) == ["cognate"]
    assert [problem.name for problem in made.problems] == ["echo"]
    assert reason in made.problems[0].reason
    with pytest.raises(ArchitectureNotFoundError, match="there is: cognate; its plugin failed"):
        made.get("echo")


@pytest.mark.parametrize(
    ("name", "value", "source"),
    [
        ("grokfast", "echo_plugin:Echo", PLUGIN),
        ("echo", "echo_plugin:GrokFastEcho", PLUGIN),
        ("echo", "echo_plugin:Echo", PLUGIN.replace("Says what", "Uses Grok-Fast on what")),
        ("echo", "echo_plugin:Echo", "from cognate_server import grokfast\nraise SystemExit('it ran')"),
    ],
)
def test_a_plugin_with_grokfast_is_refused_before_it_runs(install: Install, name: str, value: str, source: str) -> None:
    """Pretraining's filter cannot come in by a plugin: by name, by text or by import."""
    install([(name, value)], source)
    made = AgentArchitectureFactory()
    assert made.architectures == {}
    assert "mentions GrokFast, which belongs to pretraining alone" in made.problems[0].reason


def test_a_plugin_cannot_take_the_built_ins_name(install: Install) -> None:
    """Of two architectures with one name the project's own is kept."""
    install([("cognate", "echo_plugin:Echo"), ("cognate", BUILT_IN)], PLUGIN.replace('"echo"', '"cognate"'))
    made = AgentArchitectureFactory()
    assert isinstance(made.get("cognate"), CognateArchitecture)
    assert [problem.value for problem in made.problems] == ["echo_plugin:Echo"]


def test_listing_imports_no_torch() -> None:
    """A server process can list and describe architectures without torch, peft or tokenizers."""
    program = (
        "import sys\n"
        "from agent_server.architectures.factory import AgentArchitectureFactory\n"
        "from agent_server.architectures.cognate import CognateArchitecture\n"
        "import agent_server.foundation, agent_server.train_config\n"
        "[a.description for a in AgentArchitectureFactory(given=[CognateArchitecture()])]\n"
        "print(sorted({'torch', 'peft', 'tokenizers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_fingerprint_is_that_of_the_architecture() -> None:
    """The constant that processes without torch use equals the computed fingerprint of Cognate-25M."""
    assert f"sha256:{architecture_fingerprint(CognateV1Config())}" == COGNATE_V1_25M
    assert COGNATE_25M.fingerprint == COGNATE_V1_25M


@pytest.mark.parametrize("unfreeze", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(rank=8)])
def test_the_sizes_are_those_of_the_architecture(lora: Lora | None, unfreeze: bool) -> None:
    """What processes without torch count with equals what is trained of Cognate-25M, and what there is in all."""
    adaptation = Adaptation(lora=lora, unfreeze_act_ltm=unfreeze)
    with torch.device("meta"):
        model = CognateV1(CognateV1Config())
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        adapt(
            model,
            adaptation,
            linear_layers=[name for name in layers if name.startswith(("prelude.", "core.", "coda."))],
            adaptive_prefixes=ACT_PREFIXES + LTM_PREFIXES,
            unused_prefixes=("head.", "head_bias_V"),
            seed=0,
        )
    assert count_parameters(model) == CognateArchitecture().parameters(adaptation)


def test_no_module_of_the_agent_service_names_the_filter() -> None:
    """Names, imports and texts are free of it, but for the factory's refusal. Docstrings may speak of it."""
    root = Path(agent_server.__file__).parent
    found = {
        f"{path.relative_to(root)}: {text[:60]}"
        for path in sorted(root.rglob("*.py"))
        if path != root / "architectures" / "factory.py"
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


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_act_and_ltm_are_frozen_unless_asked(tmp_path: Path, lora: Lora | None, unfreeze: bool) -> None:
    """The halting unit and the memory are trained only where the request says so, whatever the method."""
    foundation = write_foundation(tmp_path / "foundation", [text for text, _ in toy_rows().train])
    adaptation = Adaptation(lora=lora, unfreeze_act_ltm=unfreeze)
    model = CognateArchitecture().build(
        foundation_dir=foundation, task="classification", labels=["a", "b"], adaptation=adaptation, seed=0
    )
    trained = {name for name, p in model.base_model().named_parameters() if p.requires_grad}
    adaptive = {name for name in trained if name.startswith(ACT_PREFIXES + LTM_PREFIXES)}
    expected = {
        name
        for name, _ in model.base_model().named_parameters()
        if unfreeze and name.startswith(ACT_PREFIXES + LTM_PREFIXES)
    }
    assert expected == adaptive
    assert bool(trained - adaptive)
    assert not any("memory" in name and "lora" in name for name, _ in model.named_parameters())


def test_another_architecture_is_incompatible(tmp_path: Path) -> None:
    """A folder whose configuration is not cognate_v1's is refused by name, not by a stack trace of torch."""
    foundation = write_foundation(tmp_path / "foundation", ["a text"])
    config = (foundation / "config.json").read_text(encoding="utf-8").replace('"cognate"', '"other"')
    (foundation / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(IncompatibleError, match="other"):
        CognateArchitecture().build(
            foundation_dir=foundation, task="classification", labels=["a", "b"], adaptation=Adaptation(), seed=0
        )


def test_a_task_without_a_head_is_not_implemented(tmp_path: Path) -> None:
    """What the contract knows and the architecture does not serve is said to be so."""
    with pytest.raises(NotImplementedByServerError, match="dialogue"):
        CognateArchitecture().build(
            foundation_dir=tmp_path, task="dialogue", labels=["a", "b"], adaptation=Adaptation(), seed=0
        )


def test_a_folder_of_another_kind_is_no_agent(tmp_path: Path) -> None:
    """Loading a foundation's folder as an agent is refused."""
    foundation = write_foundation(tmp_path / "foundation", ["a text"])
    assert config_to_json(TINY)["family"] == "cognate"
    with pytest.raises(ArtifactCorruptError, match="no cognate agent"):
        CognateArchitecture().load(foundation)


def test_equal_seeds_build_equal_agents(tmp_path: Path) -> None:
    """The untrained head and the adapters are a function of the seed, whatever torch's own generator did before."""
    foundation = write_foundation(tmp_path / "foundation", [text for text, _ in toy_rows().train])

    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        model = CognateArchitecture().build(
            foundation_dir=foundation,
            task="classification",
            labels=["a", "b"],
            adaptation=Adaptation(lora=Lora(rank=2)),
            seed=seed,
        )
        return dict(model.state_dict())

    first, again, other = built(1), built(1), built(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
