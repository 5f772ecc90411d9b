"""`sequence_classifier` and `causal_lm`: model folders of transformers, adapted, written, and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agent_server.adaptation import Adaptation, Bottleneck, Freezing, Lora, count_parameters, merge_checked
from agent_server.architectures import causal_lm_model as writer_model
from agent_server.architectures import sequence_classifier_model as classifier_model
from agent_server.architectures.causal_lm import CausalLmArchitecture
from agent_server.architectures.encoders import EncoderAgent
from agent_server.architectures.factory import AgentArchitecture, BuildRequest
from agent_server.architectures.model import AgentBatch, AgentModel, collate
from agent_server.architectures.sequence_classifier import SequenceClassifierArchitecture
from agent_server.architectures.transformers_model import PretrainedEncoder, read_base
from agent_server.bases import resolve
from agent_server.data.examples import Segment, Written, texts_of
from agent_server.optim import Optimization
from agent_server.settings import ModelSettings
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import AgentResult, train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import ArtifactCorruptError, DataUnavailableError, IncompatibleError
from tests.agent._support import MemoryAttempt, Rows, measured, prepared, toy_rows
from tests.agent.model_folders import write_model_folder
from training_common.attempt import AttemptStopped

ROWS = toy_rows()
TEXTS = list(texts_of(ROWS.train))
CLASSIFIER, WRITER = SequenceClassifierArchitecture(), CausalLmArchitecture()
KINDS = ("bert", "roberta", "gpt2", "llama")
METHODS = {
    "full": Adaptation(),
    "lora": Adaptation(lora=Lora(rank=2)),
    "dora": Adaptation(lora=Lora(rank=2, weight_decomposed=True)),
    "head": Adaptation(head=True),
    "freezing": Adaptation(freezing=Freezing(trained_blocks=1)),
    "bottleneck": Adaptation(bottleneck=Bottleneck(width=4)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model_folder(root / kind, kind, TEXTS) for kind in KINDS}


def request(folder: Path | None, task: str = "classification", adaptation: str = "full", **more: Any) -> BuildRequest:
    architecture: AgentArchitecture = CLASSIFIER if task in CLASSIFIER.tasks else WRITER
    settings = {name: setting.default for name, setting in architecture.settings.items()} | more.pop("settings", {})
    labels = ("pay", "travel", "music") if task in CLASSIFIER.tasks else ()
    return BuildRequest(
        task=task, adaptation=METHODS[adaptation], seed=3, base_dir=folder, labels=labels, settings=settings, **more
    )


def classifier(folder: Path, **more: Any) -> EncoderAgent:
    return classifier_model.build(request(folder, **more)).eval()


def encoder_of(model: EncoderAgent) -> PretrainedEncoder:
    assert isinstance(model.encoder, PretrainedEncoder)
    return model.encoder


def batch_of(model: AgentModel, texts: Sequence[str]) -> AgentBatch:
    return collate([encoding.tokens for encoding in model.encode(texts)])


def disturb(model: AgentModel) -> None:
    """Change what is trained, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["classification", "extraction"])
@torch.no_grad()
def test_a_row_is_read_alike_alone_and_among_others(folders: Mapping[str, Path], kind: str, task: str) -> None:
    """Neither padding nor the frame of special tokens shifts what is said of a text, and a text may be empty."""
    model = CLASSIFIER.build(request(folders[kind], task)).eval()
    texts = ["pay the bill", "fly", "", "sing a song for me this day"]
    together = model(batch_of(model, texts))
    assert bool(torch.isfinite(together).all())
    for row, text in enumerate(texts):
        alone = model(batch_of(model, [text]))[0]
        got = together[row] if task == "classification" else together[row, : len(model.encode([text])[0].tokens)]
        alone = alone if task == "classification" else alone[: len(got)]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    outputs = 3 if task == "classification" else 7
    assert together.shape[-1] == outputs


def test_the_frame_is_the_folders_own(folders: Mapping[str, Path]) -> None:
    """Encodings are the text's alone, with offsets; special tokens in a text are text; truncation is not heeded."""
    model = classifier(folders["bert"])
    (encoding,) = model.encode(["pay </s> my bill and my other bill"])
    assert not {0, 1, 2} & set(encoding.tokens)
    assert len(encoding.tokens) > 4
    assert encoding.offsets[-1][1] == len("pay </s> my bill and my other bill")
    framed, valid = encoder_of(model).text.framed(collate([[10, 11], [12]]), suffix=[2])
    assert framed.tolist() == [[1, 10, 11, 2], [1, 12, 2, 0]]
    assert valid.tolist() == [[True] * 4, [True, True, True, False]]
    contexts = {kind: CLASSIFIER.build(request(folders[kind])).context for kind in ("bert", "roberta", "gpt2")}
    assert contexts == {"bert": 62, "roberta": 61, "gpt2": 64}
    with pytest.raises(IncompatibleError, match="a text has 63 tokens and the base reads 62"):
        model(collate([[10] * 63]))


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@torch.no_grad()
def test_pooling_is_what_the_setting_says(folders: Mapping[str, Path], pooling: str) -> None:
    """Each word takes the tokens it names, of a text of two tokens between two special ones."""
    model = classifier(folders["bert"], settings={"pooling": pooling})
    batch = collate([[10, 11], [10, 11, 12]])
    hidden, _ = encoder_of(model)._hidden(batch)
    expected = {"first": hidden[0, 0], "last": hidden[0, 3], "mean": hidden[0, :4].mean(0)}[pooling]
    torch.testing.assert_close(model.encoder.pooled(batch)[0], expected)


WRITTEN = [
    (kind, task, method)
    for kind, task in (("bert", "classification"), ("gpt2", "extraction"), ("gpt2", "dialogue"), ("llama", "domain"))
    for method in METHODS
    if task in CLASSIFIER.tasks or method != "head"  # a language model has no head of its own
]


@pytest.mark.parametrize(("kind", "task", "method"), WRITTEN)
def test_every_method_is_written_and_read_back(
    folders: Mapping[str, Path], tmp_path: Path, kind: str, task: str, method: str
) -> None:
    """What is trained is what the method says; merged, saved and loaded, the agent gives the same logits exactly."""
    architecture: AgentArchitecture = CLASSIFIER if task in CLASSIFIER.tasks else WRITER
    assert method.replace("dora", "lora") in architecture.adaptations
    model = architecture.build(request(folders[kind], task, method)).eval()
    trained = {name for name, p in model.base_model().named_parameters() if p.requires_grad}
    whole = len(dict(model.base_model().named_parameters()))
    assert {"full": len(trained) == whole, "head": not trained}.get(method, 0 < len(trained) < whole)
    texts = ["pay the bill now", "fly"]
    batch = batch_of(model, texts)
    before = model(batch).detach()
    disturb(model)
    after = model(batch).detach()
    assert not torch.equal(before, after)
    change = merge_checked(model.base_model(), lambda: model(batch).detach())
    assert (change > 0) == ("ora" in method)
    merged = model(batch).detach()
    model.save(tmp_path, extra={"agent": "a", "max_tokens": 8})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["task"], config["agent"]) == (architecture.name, task, "a")
    again = architecture.load(tmp_path)
    assert torch.equal(again(batch), merged)
    assert [e.tokens for e in again.encode(texts)] == [e.tokens for e in model.encode(texts)]
    assert count_parameters(again).total == count_parameters(model).total


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_loads_what_was_written(folders: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    """The folder `base` is a model folder of transformers, tokenizer included, and gives the agent's logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = writer_model.build(request(folders[kind], "dialogue")).eval()
    disturb(model)
    model.save(tmp_path, extra={})
    theirs: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"), local_files_only=True)
    tokens = AutoTokenizer.from_pretrained(str(tmp_path / "base"), local_files_only=True)("pay the bill")["input_ids"]
    prefix = len(model.text.prefix)
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0, prefix:]
        assert torch.equal(model(batch_of(model, ["pay the bill"]))[0], logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_writing_with_the_cache_is_writing_without(folders: Mapping[str, Path], kind: str) -> None:
    """Prompts of several lengths are continued as the plain loop does, and stop at a stop token."""
    model = WRITER.build(request(folders[kind], "dialogue")).eval()
    prompts = [encoding.tokens for encoding in model.encode(["pay", "fly the plane to my airport", "sing a"])]
    expected = AgentModel.generate(model, prompts, max_tokens=8)
    assert model.generate(prompts, max_tokens=8) == expected
    assert {len(row) for row in expected} == {8}
    stop = expected[1][3]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert model.generate(prompts, max_tokens=8, stop=[stop]) == cut
    assert len(model.generate([[]], max_tokens=3)[0]) <= 3
    assert isinstance(model.decode(expected[0]), str)


def test_writing_ends_with_the_context(folders: Mapping[str, Path]) -> None:
    """A row that fills its positions is cut off there; the others go on to their own length."""
    model = WRITER.build(request(folders["gpt2"], "dialogue")).eval()
    long, short = [10] * 60, [10, 11]
    written = model.generate([long, short, [10] * 64], max_tokens=8)
    assert [len(row) for row in written] == [4, 8, 0]
    assert written[1] == model.generate([short], max_tokens=8)[0]


def test_equal_seeds_build_equal_agents(folders: Mapping[str, Path]) -> None:
    """Head and adapters are a function of the seed, whatever torch's own generator did before."""

    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        state = torch.get_rng_state()
        model = CLASSIFIER.build(dataclasses.replace(request(folders["bert"], adaptation="lora"), seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return dict(model.state_dict())

    first, again, other = built(1), built(1), built(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# Training

CONFIG = AgentTrainConfig(
    agent="toy-router",
    total_steps=30,
    batch_size=8,
    seed=3,
    optimization=Optimization(lr=5e-3),
    checkpoint_interval_steps=10,
    progress_interval_steps=5,
    validation_interval_steps=1000,  # at the end alone: what recovery does about a bad one is tested elsewhere
    settings={"pooling": "auto", "dropout": 0.1},
    architecture="sequence_classifier",
)


def dialogues() -> Rows:
    rows = [
        Written((Segment(f"user: {text}\n"), Segment(("pay", "travel", "music")[row.label], trained=True)))
        for row in ROWS.train
        for text in [row.text]
    ]
    return prepared(rows[:64], rows[64:80], rows[80:96], name="toy-talk")


def train(config: AgentTrainConfig, folder: Path, attempt: MemoryAttempt, data: Rows = ROWS) -> AgentResult:
    return train_agent(config, folder, data, attempt)


@pytest.mark.parametrize(("method", "steps"), [("full", 80), ("lora", 300)])
def test_a_classifier_learns(folders: Mapping[str, Path], tmp_path: Path, method: str, steps: int) -> None:
    """A random encoder learns the words that decide, and beats the best constant answer."""
    config = dataclasses.replace(
        CONFIG, adaptation=METHODS[method], total_steps=steps, optimization=Optimization(lr=1e-2)
    )
    got = measured(train(config, folders["bert"], MemoryAttempt(tmp_path)))
    assert got["accuracy_after"] > got["majority_share"] + 0.2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"adaptation": METHODS["lora"]}),
        ("gpt2", {"architecture": "causal_lm", "task": "dialogue", "settings": {}}),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    folders: Mapping[str, Path], tmp_path: Path, kind: str, changes: Mapping[str, Any]
) -> None:
    """Stopped half-way and gone on with, dropout included, the agent's files are the same bytes."""
    config = dataclasses.replace(CONFIG, **changes)
    data = ROWS if config.task == "classification" else dialogues()
    straight = train(config, folders[kind], MemoryAttempt(tmp_path / "straight"), data)
    attempt = MemoryAttempt(tmp_path / "cut", stop_at=15)
    with pytest.raises(AttemptStopped):
        train(config, folders[kind], attempt, data)
    attempt.stop_at = None
    torch.manual_seed(99)
    resumed = train(config, folders[kind], attempt, data)
    for path in ("model.safetensors", "base/model.safetensors"):
        assert (straight.folder / path).read_bytes() == (resumed.folder / path).read_bytes()
    assert measured(straight) == measured(resumed)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_writer_learns(folders: Mapping[str, Path], tmp_path: Path, kind: str) -> None:
    """The loss of the agent's turns falls."""
    config = dataclasses.replace(CONFIG, architecture="causal_lm", task="dialogue", settings={}, total_steps=40)
    got = measured(train(config, folders[kind], MemoryAttempt(tmp_path), dialogues()))
    assert got["loss_after"] < got["loss_before"] - 1


def test_an_agent_is_trained_further(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """With the same labels its head goes on; with others it is new, on the same encoder."""
    first = train(CONFIG, folders["bert"], MemoryAttempt(tmp_path / "first"))
    kept = classifier_model.build_on(first.folder, request(None, adaptation="bottleneck"))
    trained = classifier_model.load(first.folder)
    assert torch.equal(kept.head.weight, trained.head.weight)
    other = classifier_model.build_on(first.folder, dataclasses.replace(request(None), labels=("x", "y")))
    assert other.head.weight.shape == (2, 32)
    batch = collate([[10, 11]])
    assert torch.equal(other.encoder.eval()(batch), trained.encoder(batch))
    result = train_agent(CONFIG, None, ROWS, MemoryAttempt(tmp_path / "second"), agent_dir=first.folder)
    assert measured(result)["accuracy_before"] == measured(first)["accuracy_after"]


# Folders that will not do


def resolved(folder: Path, *, model_digest: str = "") -> Any:
    plan = pb.TrainingPlan(model_folder=pb.ModelFolderBase(path=folder.name))
    return resolve(
        plan,
        fetch=lambda: pytest.fail("no foundation is needed"),
        registry=None,  # type: ignore[arg-type]
        cache_dir=folder,
        models=ModelSettings(folder=folder.parent),
        model_digest=model_digest,
    )


@pytest.fixture
def copied(folders: Mapping[str, Path], tmp_path: Path) -> Path:
    """A folder of its own to spoil."""
    return write_model_folder(tmp_path / "spoiled", "bert", TEXTS)


def test_a_folder_is_named_by_its_digest(copied: Path) -> None:
    """The digest is of every file that is read, and a job goes on only with the folder that it began with."""
    base = resolved(copied)
    assert (base.name, base.base_dir, base.foundation) == ("spoiled", copied, "")
    (copied / "README.md").write_text("not read", encoding="utf-8")
    assert resolved(copied, model_digest=base.digest).digest == base.digest
    (copied / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(IncompatibleError, match="and this job began with"):
        resolved(copied, model_digest=base.digest)


def spoil(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    match what:
        case "auto_map":
            text = json.dumps(config | {"auto_map": {"AutoModel": "mine.Model"}})
            (folder / "config.json").write_text(text, encoding="utf-8")
        case "no model_type":
            (folder / "config.json").write_text("{}", encoding="utf-8")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "torn":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no safetensors":
            weights.write_bytes(b"PK\x03\x04 a zip")
        case "missing shard":
            weights.unlink()
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("auto_map", IncompatibleError, "has an auto_map, which runs code of the folder"),
        ("no model_type", IncompatibleError, "names no model_type"),
        ("no tokenizer", DataUnavailableError, "has no tokenizer.json"),
        ("pickle", IncompatibleError, "only as pytorch_model.bin, whose loading can run code; save them as safe"),
        ("no weights", DataUnavailableError, "has no model.safetensors"),
        ("torn", DataUnavailableError, "model.safetensors has"),
        ("no safetensors", DataUnavailableError, "is no safetensors file, or is torn"),
        ("missing shard", DataUnavailableError, "lacks model-00001-of-00002.safetensors"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    copied: Path, what: str, error: type[Exception], text: str
) -> None:
    """Missing, torn and pickled weights, and a folder's own code, are told apart, each with its remedy."""
    spoil(copied, what)
    with pytest.raises(error, match=f"spoiled.*{text}"):
        resolved(copied)


def test_a_model_without_a_language_head_is_told_as_one(tmp_path: Path) -> None:
    """For a task that writes; a folder that lacks more than the head is told by its weights."""
    folder = write_model_folder(tmp_path / "roberta", "roberta", TEXTS)
    with pytest.raises(IncompatibleError, match=r"was saved without a language head \(it lacks lm_head"):
        read_base(folder, "roberta", language=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(IncompatibleError, match=r"has no weights of the right shape for .*; use a folder"):
        read_base(folder, "roberta", language=True)


def test_other_models_are_incompatible(folders: Mapping[str, Path], copied: Path) -> None:
    """An encoder does not write; weights that a model lacks are named; a tokenizer must fit its embeddings."""
    with pytest.raises(IncompatibleError, match="is a bert, whose tokens see what is behind them"):
        WRITER.build(request(folders["bert"], "dialogue"))
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(IncompatibleError, match=r"has no weights of the right shape for encoder\.layer\.2"):
        CLASSIFIER.build(request(copied))
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}), encoding="utf-8")
    with pytest.raises(IncompatibleError, match="cannot be loaded as AutoModel"):
        CLASSIFIER.build(request(copied))


def test_an_agent_of_another_kind_is_corrupt(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Loading a model folder, or an agent whose weights are another's, is refused."""
    with pytest.raises(ArtifactCorruptError, match="holds no sequence_classifier agent"):
        CLASSIFIER.load(folders["bert"])
    model = CLASSIFIER.build(request(folders["bert"]))
    model.save(tmp_path, extra={})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"labels": ["a"]}), encoding="utf-8")
    with pytest.raises(ArtifactCorruptError, match="size mismatch"):
        CLASSIFIER.load(tmp_path)
