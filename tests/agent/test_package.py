"""A package answers where nothing of this project is installed, and what is not the trained model is not written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch
from torch import Tensor

import training_common.models
from agent_server.adaptation import Adaptation, Lora
from agent_server.architectures.model import AgentModel, collate
from agent_server.data.examples import texts_of
from agent_server.optim import Optimization
from agent_server.package import (
    RUNTIMES,
    check_differs,
    check_equal,
    copy_licences,
    probe_batch,
    probe_logits,
    requirements,
    write_package,
)
from agent_server.predict import Classifier
from agent_server.runtime import run
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import train_agent
from cognateforge.exceptions import IntegrityCheckFailedError
from tests.agent._support import MemoryAttempt, factory, toy_rows, write_foundation

DATA = toy_rows()
CONFIG = AgentTrainConfig(
    agent="toy-router",
    total_steps=40,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(lora=Lora(rank=2)),
    optimization=Optimization(lr=1e-2),
)
# Runs a file as Python would without this project: no user or .pth paths, only the standard library and one folder of
# installed packages, and an import of the project's own raises.
ISOLATED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"agent_server", "cognate_server", "cognateforge", "training_common"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
sys.path.append(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(tmp_path_factory.mktemp("package") / "foundation", list(texts_of(DATA.train)))


@pytest.fixture(scope="module")
def trained(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an agent as the trainer leaves it, in an interpreter that keeps what it compiles, as workers do."""
    attempt = MemoryAttempt(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        yield train_agent(CONFIG, foundation, DATA, attempt, factory=factory()).folder


@pytest.fixture
def package(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, somewhere else."""
    return Path(shutil.copytree(trained, tmp_path / "fetched"))


def isolated(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a Python file where this project is not installed."""
    command = [sys.executable, "-I", "-S", "-B", "-c", ISOLATED, sysconfig.get_path("purelib"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, input=given)


def model_of(folder: Path) -> AgentModel:
    return factory().get("cognate").load(folder).eval()


def test_a_package_answers_where_nothing_of_the_project_is_installed(package: Path, tmp_path: Path) -> None:
    """In a fresh process it gives the trained model's logits, bit for bit, and its answers."""
    texts = list(texts_of(DATA.test))
    model = model_of(package)
    rows = [encoding.tokens for encoding in model.encode(texts)]
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, runpy, sys, torch, safetensors.torch\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "run = runpy.run_path(folder / 'run.py')\n"
        "agent = run['Agent'](folder)\n"
        "texts = json.loads(sys.stdin.read())\n"
        "with torch.inference_mode():\n"
        "    batch = run['collate']([agent.model.encode(text)[0] for text in texts])\n"
        "    logits = {'real': agent.model(*batch), 'comparable': agent.model.comparable(*batch)}\n"
        "safetensors.torch.save_file(logits, sys.argv[2])\n"
        "print(json.dumps([agent.answer(text) for text in texts]))\n"
        "assert not {'agent_server', 'cognateforge', 'training_common'} & set(sys.modules)\n",
        encoding="utf-8",
    )
    done = isolated(script, package, tmp_path / "logits.safetensors", given=json.dumps(texts))
    assert (0, "") == (done.returncode, done.stderr)
    found = safetensors.torch.load_file(tmp_path / "logits.safetensors")
    with torch.no_grad():
        assert torch.equal(found["real"], model(collate(rows)))
        assert torch.equal(found["comparable"], model.comparable_logits(collate(rows)))
        alone = [model(collate([row]))[0].softmax(-1) for row in rows]
    answers = json.loads(done.stdout)
    assert [model.labels[int(row.argmax())] for row in alone] == [answer["label"] for answer in answers]
    assert [float(row.max()) for row in alone] == pytest.approx([answer["probability"] for answer in answers])


def test_the_command_answers_texts_and_checks_itself(package: Path) -> None:
    """Arguments, or lines of the standard input; each answer is a line of JSON. The check tells a changed weight."""
    texts = [row.text for row in DATA.test[:6]]
    done = isolated(package / "run.py", *texts)
    assert (0, "") == (done.returncode, done.stderr)
    expected = [answer.label for answer in Classifier(package, factory=factory()).classify(texts)]
    assert expected == [json.loads(line)["label"] for line in done.stdout.splitlines()]
    assert len(set(expected)) > 1
    assert done.stdout == isolated(package / "run.py", given="\n".join(texts)).stdout
    checked = isolated(package / "run.py", "--check")
    assert (0, True) == (checked.returncode, json.loads(checked.stdout)["equal"])
    tensors = safetensors.torch.load_file(package / "model.safetensors")
    tensors["head.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, package / "model.safetensors")
    checked = isolated(package / "run.py", "--check")
    assert (1, False) == (checked.returncode, json.loads(checked.stdout)["equal"])


def test_the_command_tells_in_a_line_what_is_wrong(package: Path) -> None:
    """Text that no tokenizer reads, and a package whose weights were cut off: no traceback, and another exit code."""
    good = isolated(package / "run.py", "--max-new-tokens", "7", "pay")
    assert 0 == good.returncode
    done = isolated(package / "run.py", "pay", "\udcff")
    assert (2, 1) == (done.returncode, len(done.stderr.splitlines())), done.stderr
    assert "run.py: text 2 cannot be answered: " in done.stderr
    os.truncate(package / "model.safetensors", 100)
    done = isolated(package / "run.py", "pay")
    assert (2, "", 1) == (done.returncode, done.stdout, len(done.stderr.splitlines())), done.stderr
    assert "is damaged, fetch the agent again: " in done.stderr


def test_a_language_model_writes_no_more_than_it_can_read(package: Path) -> None:
    """Beyond its context it would read positions that it does not have, or nothing of the prompt."""
    config = json.loads((package / "config.json").read_text(encoding="utf-8"))
    (package / "config.json").write_text(json.dumps(config | {"max_tokens": 8}), encoding="utf-8")
    agent = run.Agent(package)
    agent.model = cast("run.Model", Counting())
    assert {"text": "123", "answer": "4567"} == agent.answer("123")
    for tokens in (7, 0, -5):
        with pytest.raises(ValueError, match="--max-new-tokens must be from 1 to 6"):
            agent.answer("123", max_new_tokens=tokens)


def test_a_package_holds_its_modules_byte_for_byte_and_no_row(package: Path) -> None:
    """Of the project it has the frozen forward pass and what the entry needs; of the data nothing."""
    assert {
        "config.json",
        "model.safetensors",
        "package.json",
        "probe.safetensors",
        "requirements.txt",
        "run.py",
        "tokenizer.json",
    } == {path.name for path in package.iterdir() if path.is_file()}
    models, runtime = Path(training_common.models.__file__).parent, Path(run.__file__).parent
    sources = {"bottlenecks.py": runtime.parent, "cognate_v1.py": models, "cognate_agent.py": runtime}
    assert sources.keys() == {path.name for path in (package / "runtime").iterdir()}
    for name, place in sources.items():
        assert (place / name).read_bytes() == (package / "runtime" / name).read_bytes()
    assert (runtime / "run.py").read_bytes() == (package / "run.py").read_bytes()
    texts = [text.encode() for text in texts_of([*DATA.train, *DATA.test]) if len(text) > 20]
    held = b"".join(path.read_bytes() for path in package.rglob("*") if path.is_file())
    assert not [text for text in texts if text in held]


def test_requirements_are_the_installed_versions(package: Path) -> None:
    """Exact ones, of the packages that the entry imports, without the local part that another index gives."""
    lines = (package / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert ["torch", "safetensors", "tokenizers"] == [line.partition("==")[0] for line in lines[1:]]
    assert f"tokenizers=={version('tokenizers')}" in lines
    assert not [line for line in requirements(["torch"]).splitlines() if "+" in line]


def test_what_learnt_nothing_is_not_packed(foundation: Path, package: Path, tmp_path: Path) -> None:
    """Equal to the model before its first step: nothing is left in the folder."""
    (package / "probe.safetensors").unlink()
    model = model_of(package)
    with pytest.raises(IntegrityCheckFailedError, match="no nearer to the trained model's"):
        write_package(package, model, model, architecture="cognate")
    assert not (package / "probe.safetensors").exists()
    still = dataclasses.replace(CONFIG, total_steps=2, optimization=Optimization(lr=1e-30, weight_decay=0.0))
    attempt = MemoryAttempt(tmp_path)
    with pytest.raises(IntegrityCheckFailedError, match="no nearer to the trained model's"):
        train_agent(still, foundation, DATA, attempt, factory=factory())


@pytest.mark.parametrize("broken", ["weights", "module"])
def test_a_package_that_runs_otherwise_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The check loads what lies in the folder: wrong weights and a drifted module are both found."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(trained / name, folder / name)
    model, untrained = model_of(folder), model_of(folder)
    with torch.no_grad():
        untrained.head_parameters()[0].add_(1)
    if broken == "weights":
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["head.bias"][0] += 1e-3
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    else:
        drifted = tmp_path / "cognate_agent.py"
        source = (Path(run.__file__).parent / "cognate_agent.py").read_text(encoding="utf-8")
        drifted.write_text(source.replace("self.head((features", "2 * self.head((features"), encoding="utf-8")
        files = tuple(drifted if file.name == drifted.name else file for file in RUNTIMES["cognate"].files)
        monkeypatch.setitem(RUNTIMES, "cognate", dataclasses.replace(RUNTIMES["cognate"], files=files))
    with pytest.raises(IntegrityCheckFailedError, match=r"loaded by its own run\.py, gives other logits"):
        write_package(folder, model, untrained, architecture="cognate")


def test_an_architecture_without_a_runtime_is_packed_without_an_entry(trained: Path, tmp_path: Path) -> None:
    """A plugin's agents are published all the same, and can still be checked."""
    folder = tmp_path / "made"
    folder.mkdir()
    shutil.copyfile(trained / "config.json", folder / "config.json")
    model, untrained = model_of(trained), model_of(trained)
    with torch.no_grad():
        untrained.head_parameters()[0].add_(1)
    write_package(folder, model, untrained, architecture="a_plugin")
    assert {"config.json", "package.json", "probe.safetensors"} == {path.name for path in folder.iterdir()}


def test_nearness_decides_where_a_model_hardly_moved(trained: Path) -> None:
    """Both lie within the tolerance of each other, and the untrained one is refused all the same. So is NaN."""
    model = model_of(trained)
    logits = probe_logits(model, probe_batch(model))
    untrained = logits + 1e-6
    assert check_differs(logits + 1e-8, trained=logits, untrained=untrained) < 1e-5
    for tampered in (untrained, untrained.clone(), logits + 6e-7, logits * float("nan")):
        with pytest.raises(IntegrityCheckFailedError, match="before its first step"):
            check_differs(tampered, trained=logits, untrained=untrained)
    assert check_equal(untrained, trained=logits) < 1e-5
    for wrong in (logits + 1, logits * float("nan")):
        with pytest.raises(IntegrityCheckFailedError, match="away from the trained model's"):
            check_equal(wrong, trained=logits)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([0, 0, 0, 0], []),
        ([1, 2, 0, 3], [("city", "new york"), ("day", "today")]),
        ([1, 1, 0, 0], [("city", "new"), ("city", "york")]),
        ([2, 2, 0, 4], [("city", "new york"), ("day", "today")]),
        ([1, 4, 4, 0], [("city", "new"), ("day", "york for")]),
    ],
)
def test_tags_become_spans(tags: list[int], expected: list[tuple[str, str]]) -> None:
    """Beginnings begin, insides go on; an inside without its beginning begins as well."""
    text, offsets = "new york for today", [(0, 3), (4, 8), (9, 12), (13, 18)]
    found = list(run.spans(text, offsets, tags, ("city", "day")))
    assert expected == [(span["label"], span["text"]) for span in found]
    assert all(text[span["start"] : span["end"]] == span["text"] for span in found)


class Counting:
    """A language model that goes on counting, up to 9."""

    output, labels, begin_token, end_token = "language", (), 0, 9

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [int(digit) for digit in text], [(i, i + 1) for i in range(len(text))]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(str, tokens))

    def __call__(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        return torch.nn.functional.one_hot((tokens_BT + 1) % 10, 10).float()

    comparable = __call__


def test_a_language_model_goes_on_with_the_prompt(package: Path) -> None:
    """Until its end token, or for as many tokens as were allowed; an empty prompt is a text that only begins."""
    agent = run.Agent(package)
    agent.model = cast("run.Model", Counting())
    assert {"text": "123", "answer": "45678"} == agent.answer("123")
    assert {"text": "123", "answer": "45"} == agent.answer("123", max_new_tokens=2)
    assert {"text": "", "answer": "12"} == agent.answer("", max_new_tokens=2)
    logits = run.compared(agent.model, *run.collate([[1, 2, 3], [7]]))
    assert [4, 8] == logits.argmax(-1).tolist()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("agent/clinc/rows.jsonl", ["clinc_CC-BY-3.0.txt"]),
        ("agent/clinc", ["clinc_CC-BY-3.0.txt"]),
        ("agent/sgd/rows.jsonl", ["CC_sgd_and_others.txt"]),
        ("agent/own/rows.jsonl", ["LICENSE"]),
        ("agent/by/rows.jsonl", []),
        ("loose.jsonl", ["loose_MIT.txt"]),
        ("", []),
    ],
)
def test_the_licence_of_a_set_goes_with_it(tmp_path: Path, path: str, expected: list[str]) -> None:
    """From beside the rows, from a folder above, or from a folder of licences by the set's name; never a stranger's."""
    data = write(
        tmp_path / "data",
        {
            "agent/clinc/rows.jsonl": "",
            "agent/sgd/rows.jsonl": "",
            "agent/own/rows.jsonl": "",
            "agent/own/LICENSE": "own",
            "agent/by/rows.jsonl": "",
            "loose.jsonl": "",
            "licenses/clinc_CC-BY-3.0.txt": "clinc",
            "licenses/CC_sgd_and_others.txt": "sgd",
            "licenses/loose_MIT.txt": "loose",
        },
    )
    write(tmp_path, {"LICENSE": "outside"})
    out = tmp_path / "package"
    out.mkdir()
    assert expected == copy_licences(data, path, out)
    copied = {file.name: file.read_text(encoding="utf-8") for file in out.rglob("*") if file.is_file()}
    assert expected == sorted(copied)
    assert [] == copy_licences(None, path, out)


def test_a_licence_is_a_file_of_the_data_folder(tmp_path: Path) -> None:
    """What a link brings from elsewhere would be handed on with the package; a folder or a pipe cannot be copied."""
    data = write(tmp_path / "data", {"agent/set/rows.jsonl": "", "agent/set/COPYING": "own"})
    write(tmp_path, {"secret.txt": "secret"})
    (data / "agent" / "set" / "LICENSE").symlink_to(tmp_path / "secret.txt")
    below = data / "agent" / "set" / "licenses"
    (below / "set_folder").mkdir(parents=True)
    (below / "set_link.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(below / "set_pipe.txt")
    out = tmp_path / "package"
    out.mkdir()
    assert ["COPYING"] == copy_licences(data, "agent/set/rows.jsonl", out)
    assert ["COPYING"] == [file.name for file in (out / "licences").iterdir()]
