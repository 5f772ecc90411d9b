"""Exported folders, opened by transformers, safetensors and tokenizers where nothing of this project is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from agent_server.architectures import causal_lm_model, sequence_classifier_model
from agent_server.architectures.encoders import EncoderAgent
from agent_server.architectures.model import AgentModel, collate
from agent_server.runtime.text_parts import is_causal
from cognateforge.cli.app import app
from cognateforge.exceptions import ArtifactCorruptError, LocalStorageError, NotImplementedByServerError
from cognateforge.export import folder as folder_export
from cognateforge.export import open_artifact, write_folder
from cognateforge.export.folder import TOKEN_HEADS
from tests.agent._support import write_foundation
from tests.agent.model_folders import write_model_folder
from tests.agent.test_model_folders import TEXTS, disturb, request
from tests.agent.test_package import ISOLATED
from tests.support.fetched import write_manifest
from training_common.models import cognate_v1
from training_common.models.cognate_v1 import CognateV1

# Of several lengths, so that padding counts.
READ = ("pay", "fly the plane to my airport tomorrow", "sing a song", "play some music, and pay for the ticket")
# kind, task, pooling
CASES = [
    *(("bert", "classification", pooling) for pooling in ("auto", "first", "last")),
    ("roberta", "classification", "auto"),
    ("gpt2", "classification", "auto"),
    ("llama", "classification", "mean"),
    ("bert", "extraction", "auto"),
    ("llama", "extraction", "auto"),
    ("gpt2", "dialogue", ""),
    ("llama", "dialogue", ""),
]
# Opens each folder as its card says, and writes what it gives; every import of the project raises.
OPENING = """
import json, os, sys, torch, transformers
from safetensors.torch import save_file
root, names, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name in names:
    folder = os.path.join(root, name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kind = "AutoModelForCausalLM" if "dialogue" in name else "AutoModelForTokenClassification"
    model, info = getattr(transformers, kind).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    tokenizer.pad_token_id = 0
    given = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = model.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    found = {"logits": logits.contiguous(), "mask": given["attention_mask"]}
    save_file(found, os.path.join(root, name + ".found"))
assert not {"agent_server", "cognate_server", "cognateforge", "training_common"} & set(sys.modules)
"""


def isolated(script: str, *arguments: str, into: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as `python -I` would where this project is not installed, neither by a path nor by a .pth file."""
    (into / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-I", "-S", "-B", "-c", ISOLATED, sysconfig.get_path("purelib")]
    command += [str(into / "script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={"PATH": ""})


def publish_like(model: AgentModel, folder: Path, architecture: str) -> Path:
    """Write what a publication and a fetch leave of an agent."""
    folder.mkdir()
    model.save(folder, extra={"max_tokens": 32, "labels": list(getattr(model, "labels", ()))})
    (folder / "package.json").write_text(json.dumps({"output": model.output.value}), encoding="utf-8")
    (folder / "README.md").write_text("# toy\n\n## Running it\n\n    run.py\n\n## Limits\n\nMany.\n", encoding="utf-8")
    write_manifest(folder, name="toy@3", architecture=architecture, kind="agent", task=model.task)
    return folder


def build(folder: Path, kind: str, task: str, pooling: str) -> AgentModel:
    """Return an agent that was changed as training would, in all of its parts."""
    if task == "dialogue":
        model: AgentModel = causal_lm_model.build(request(folder, task))
    else:
        model = sequence_classifier_model.build(request(folder, task, settings={"pooling": pooling}))
    disturb(model)
    if isinstance(model, EncoderAgent):
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
        if task == "classification":
            model.text_scale.measure(
                torch.randn(9, model.encoder.width, generator=torch.Generator().manual_seed(6)) * 3
            )
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A model folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model_folder(root / kind, kind, TEXTS) for kind in ("bert", "roberta", "gpt2", "llama")}


@pytest.fixture(scope="module")
def exported(
    folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, AgentModel]]:
    """Export an agent of each case, and open all of them in one fresh process."""
    root = tmp_path_factory.mktemp("exports")
    models = {}
    for kind, task, pooling in CASES:
        name = f"{kind}-{task}-{pooling}"
        models[name] = build(folders[kind], kind, task, pooling)
        architecture = "causal_lm" if task == "dialogue" else "sequence_classifier"
        fetched = publish_like(models[name], root / f"{name}.fetched", architecture)
        write_folder(open_artifact(fetched), root / name)
    done = isolated(OPENING, str(root), json.dumps(list(models)), json.dumps(READ), into=root)
    assert done.returncode == 0, done.stderr
    return root, models


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
@torch.no_grad()
def test_transformers_opens_an_export_and_gives_the_agents_logits(
    exported: tuple[Path, dict[str, AgentModel]], case: tuple[str, str, str]
) -> None:
    """With its plain classes, where nothing of this project is; a folded scale differs by its rounding alone."""
    root, models = exported
    name = "-".join(case)
    model, found = models[name], safetensors.torch.load_file(root / f"{name}.found")
    batch = collate([encoding.tokens for encoding in model.encode(READ)])
    expected, logits, mask = model(batch), found["logits"], found["mask"]
    if case[1] == "classification":
        pooling = folder_export._pooling({"encoder": {"pooling": case[2]}}, {"model_type": case[0]})
        assert folder_export._OF_A_TEXT[pooling] in (root / name / "README.md").read_text()
        rules = {
            "first": lambda: logits[:, 0],
            "last": lambda: logits[range(len(logits)), mask.sum(1) - 1],
            "mean": lambda: (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        }
        torch.testing.assert_close(rules[pooling](), expected, rtol=1e-4, atol=1e-4)
        assert rules[pooling]().argmax(-1).tolist() == expected.argmax(-1).tolist()
        assert not torch.equal(expected[0], expected[1])
        return
    prefix = mask.shape[1] - batch.tokens_BT.shape[1] - (1 if case[0] == "bert" else 0)
    mine = logits[:, prefix : prefix + batch.tokens_BT.shape[1]]
    torch.testing.assert_close(mine[batch.valid_BT], expected[batch.valid_BT], rtol=1e-5, atol=1e-5)


def test_an_export_tells_its_labels_and_how_it_is_opened(exported: tuple[Path, dict[str, AgentModel]]) -> None:
    """config.json names them, the card has the lines to open it, and no weight is other than safetensors."""
    root, _ = exported
    config = json.loads((root / "bert-extraction-auto" / "config.json").read_text())
    assert ["O", "B-pay", "I-pay", "B-travel", "I-travel", "B-music", "I-music"] == list(config["id2label"].values())
    config = json.loads((root / "bert-classification-auto" / "config.json").read_text())
    assert ["pay", "travel", "music"] == list(config["id2label"].values())
    assert ["BertForTokenClassification"] == config["architectures"]
    card = (root / "gpt2-dialogue-" / "README.md").read_text()
    assert ("AutoModelForCausalLM.from_pretrained(FOLDER)" in card, "Running it" in card) == (True, False)
    assert card.startswith("# toy")
    assert "## Limits" in card
    names = {path.name for path in (root / "gpt2-dialogue-").rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "embedding_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("model_type", sorted(TOKEN_HEADS))
@torch.no_grad()
def test_a_token_classifier_is_its_encoder_and_one_linear_map(model_type: str) -> None:
    """Of each type that is exported: the parts have the names of the table, and there is nothing between them."""
    config = transformers.AutoConfig.for_model(model_type, **SMALL, num_labels=3)
    if model_type == "distilbert":
        config = transformers.AutoConfig.for_model(
            model_type, dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=32
        )
        config.num_labels = 3
    torch.manual_seed(0)
    auto: Any = transformers
    model = auto.AutoModelForTokenClassification.from_config(config).eval()
    head = TOKEN_HEADS[model_type]
    assert head.kind == type(model).__name__
    encoder, linear = getattr(model, head.prefix), getattr(model, head.head)
    assert isinstance(linear, nn.Linear)
    assert linear.bias is not None
    nn.init.normal_(linear.bias)
    tokens, mask = torch.tensor([[1, 5, 9, 0], [1, 7, 8, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    hidden = encoder(input_ids=tokens, attention_mask=mask)[0]
    assert torch.equal(linear(hidden), model(input_ids=tokens, attention_mask=mask).logits)
    plain = auto.AutoModel.from_config(config)
    assert set(plain.state_dict()) >= {f"{name}" for name in encoder.state_dict()}
    assert is_causal(config) == (model_type in folder_export._CAUSAL)


def test_what_transformers_has_no_form_for_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """With the reason and what to do instead; nothing is written."""
    model = sequence_classifier_model.build(request(folders["bert"], adaptation="bottleneck"))
    fetched = publish_like(model, tmp_path / "fetched", "sequence_classifier")
    with pytest.raises(NotImplementedByServerError, match=r"no layer for .*bottleneck.*run\.py answers for it"):
        write_folder(open_artifact(fetched), tmp_path / "out")
    model = sequence_classifier_model.build(request(folders["bert"]))
    fetched = publish_like(model, tmp_path / "other", "sequence_classifier")
    config = json.loads((fetched / "base" / "config.json").read_text())
    (fetched / "base" / "config.json").write_text(json.dumps({**config, "model_type": "modernbert"}))
    write_manifest(fetched, name="toy@3", architecture="sequence_classifier", kind="agent", task="classification")
    with pytest.raises(NotImplementedByServerError, match="no classifier of modernbert"):
        write_folder(open_artifact(fetched), tmp_path / "out")
    assert {"fetched", "other"} == {path.name for path in tmp_path.iterdir()}


def test_a_refused_export_leaves_nothing_that_was_fetched_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fetches, is refused, and a second version can be exported to the same place."""

    def fetch(_session: object, name: str, folder: Path, *_: object) -> None:
        folder.mkdir()  # what another fetch has left would be in the way
        (folder / "weights.bin").write_bytes(b"weights")
        write_manifest(folder, name=name, architecture="recurrent")
        if name == "toy@1":
            (folder / "weights.bin").write_bytes(b"Weights")

    monkeypatch.setattr("cognateforge.cli.export.fetch_any", fetch)
    export = ["--format", "folder", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, ["export", "toy@1", *export])
    assert (refused.exit_code != 0, list(tmp_path.iterdir())) == (True, [])
    assert "weights.bin" in refused.stderr
    done = CliRunner().invoke(app, ["export", "toy@2", *export])
    assert (done.exit_code, [path.name for path in tmp_path.iterdir()]) == (0, ["out"]), done.stderr


def test_a_foundation_model_opens_where_nothing_of_the_project_is(tmp_path: Path) -> None:
    """safetensors and tokenizers read it alone, and the forward pass beside it gives the model's logits."""
    fetched = write_foundation(tmp_path / "fetched", TEXTS)
    (fetched / "cognate_v1.py").write_bytes(Path(cognate_v1.__file__).read_bytes())
    write_manifest(fetched, name="cognate-25m@1", kind="foundation", architecture={"name": "cognate_v1"})
    write_folder(open_artifact(fetched), tmp_path / "out")
    script = """
import importlib.util, json, sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
folder = Path(sys.argv[1])
with safe_open(folder / "model.safetensors", framework="pt") as file:
    assert len(list(file.keys())) > 0
tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("pay for the ticket").ids
spec = importlib.util.spec_from_file_location("cognate_v1", folder / "cognate_v1.py")
module = sys.modules["cognate_v1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.CognateV1(module.config_from_json(json.loads((folder / "config.json").read_text())))
module.load_state(model, folder / "model.safetensors")
with torch.no_grad():
    tokens_BT = torch.tensor([tokens])
    save_file({"tokens": tokens_BT, "logits": model.logits(model.eval()(tokens_BT).hidden_BTD)}, sys.argv[2])
"""
    done = isolated(script, str(tmp_path / "out"), str(tmp_path / "found"), into=tmp_path)
    assert done.returncode == 0, done.stderr
    model = CognateV1(cognate_v1.config_from_json(json.loads((fetched / "config.json").read_text())))
    cognate_v1.load_state(model, fetched / "model.safetensors")
    found = safetensors.torch.load_file(tmp_path / "found")
    with torch.no_grad():
        expected = model.logits(model.eval()(found["tokens"]).hidden_BTD)
    # That process may use another number of threads.
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path) -> None:
    """The file is named, nothing is written, and what is there is not written over."""
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    with pytest.raises(LocalStorageError, match="forge fetch"):
        open_artifact(fetched)
    (fetched / "weights.bin").write_bytes(b"weights")
    write_manifest(fetched, name="toy@1", architecture="recurrent")
    write_folder(open_artifact(fetched), tmp_path / "out")
    assert b"weights" == (tmp_path / "out" / "weights.bin").read_bytes()
    with pytest.raises(LocalStorageError, match="is there already"):
        write_folder(open_artifact(fetched), tmp_path / "out")
    (fetched / "weights.bin").write_bytes(b"Weights")
    with pytest.raises(ArtifactCorruptError, match=r"weights\.bin"):
        open_artifact(fetched)
    assert {"fetched", "out"} == {path.name for path in tmp_path.iterdir()}
