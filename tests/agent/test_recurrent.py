"""`recurrent` and `multimodal`: networks from scratch, with a tokenizer of their own rows and features beside texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from agent_server.adaptation import Adaptation, Bottleneck, Freezing
from agent_server.architectures import multimodal_model
from agent_server.architectures.factory import AgentArchitecture, BuildRequest
from agent_server.architectures.model import AgentBatch, AgentModel, collate
from agent_server.architectures.multimodal import MultimodalArchitecture
from agent_server.architectures.recurrent import RecurrentArchitecture
from agent_server.data.examples import Labelled, Segment, Written, texts_of
from agent_server.optim import Optimization
from agent_server.runtime.text_parts import RecurrentLayer
from agent_server.train_config import AgentTrainConfig
from agent_server.trainer import train_agent
from cognateforge.exceptions import DataUnavailableError, IncompatibleError
from tests.agent._support import MemoryAttempt, Rows, measured, prepared, toy_rows
from tests.agent.model_folders import write_model_folder
from training_common.attempt import AttemptStopped

ROWS = toy_rows()
TEXTS = list(texts_of(ROWS.train))
RECURRENT, MULTIMODAL = RecurrentArchitecture(), MultimodalArchitecture()
SMALL = {"width": 16, "vocabulary_size": 300, "layers": 2}
TOKENIZER = RECURRENT.learn_tokenizer(TEXTS, SMALL)


def settings(architecture: AgentArchitecture, **given: Any) -> dict[str, Any]:
    return {name: setting.default for name, setting in architecture.settings.items()} | SMALL | given


def request(task: str = "classification", architecture: AgentArchitecture = RECURRENT, **given: Any) -> BuildRequest:
    labels = ("pay", "travel", "music") if task in ("classification", "extraction") else ()
    return BuildRequest(
        task=task,
        adaptation=Adaptation(),
        seed=3,
        labels=labels,
        settings=settings(architecture, **given),
        tokenizer=TOKENIZER,
    )


def batch_of(model: AgentModel, texts: Sequence[str]) -> AgentBatch:
    return collate([encoding.tokens for encoding in model.encode(texts)])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@torch.no_grad()
def test_two_directions_are_those_of_torch(cell: str) -> None:
    """A layer that turns rows around gives what torch's bidirectional one gives for packed rows."""
    torch.manual_seed(0)
    layer = RecurrentLayer(cell, 5, 3, bidirectional=True)
    assert layer.backwards is not None
    theirs = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](5, 3, batch_first=True, bidirectional=True)
    for name, parameter in layer.forwards.named_parameters():
        getattr(theirs, name).copy_(parameter)
    for name, parameter in layer.backwards.named_parameters():
        getattr(theirs, f"{name}_reverse").copy_(parameter)
    x, lengths = torch.randn(3, 6, 5), [6, 1, 4]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True, total_length=6)
    got = layer(x, valid)
    torch.testing.assert_close(got[valid], expected[valid])


@pytest.mark.parametrize("task", ["classification", "extraction", "dialogue"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@torch.no_grad()
def test_a_row_is_read_alike_alone_and_among_others(task: str, cell: str) -> None:
    """Padding changes nothing, in either direction, and a text may be empty."""
    model = RECURRENT.build(request(task, cell=cell, bidirectional=task != "dialogue")).eval()
    texts = ["pay the bill", "", "sing a song for me this day"]
    together = model(batch_of(model, texts))
    assert bool(torch.isfinite(together).all())
    for row, text in enumerate(texts):
        alone, tokens = model(batch_of(model, [text]))[0], len(model.encode([text])[0].tokens)
        shorten = slice(None) if task == "classification" else slice(tokens)
        torch.testing.assert_close(together[row][shorten], alone[shorten], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("width", [0, 4])
def test_writing_from_the_state_is_writing_anew(cell: str, width: int) -> None:
    """Prompts of several lengths are continued as the plain loop does, bottlenecks included, until a stop token."""
    built = dataclasses.replace(
        request("dialogue", cell=cell), adaptation=Adaptation(bottleneck=Bottleneck(width=width) if width else None)
    )
    model = RECURRENT.build(built).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # further apart than rounding
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    prompts = [encoding.tokens for encoding in model.encode(["pay", "fly the plane to my airport", "sing a"])]
    expected = AgentModel.generate(model, prompts, max_tokens=8)
    assert model.generate(prompts, max_tokens=8) == expected
    stop = expected[1][3] if len(expected[1]) > 3 else 0
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert model.generate(prompts, max_tokens=8, stop=[stop]) == cut
    assert len(model.generate([[]], max_tokens=3)[0]) <= 3
    assert model.decode(model.encode(["sing a song"])[0].tokens) == "sing a song"


def test_the_tokenizer_is_that_of_the_texts() -> None:
    """The same texts give the same tokenizer, within the setting's size; every text comes back as it was."""
    assert RECURRENT.learn_tokenizer(iter(TEXTS), SMALL) == TOKENIZER
    model = RECURRENT.build(request("dialogue"))
    (encoding,) = model.encode(["<|end|> żółw 🐢"])
    assert model.end_token not in encoding.tokens
    assert max(encoding.tokens) < 300
    assert model.decode(encoding.tokens) == "<|end|> żółw 🐢"


def test_what_comes_next_is_not_read_from_behind() -> None:
    """A bidirectional network for a task that writes is refused, by the plan's check and by the builder."""
    (violation,) = RECURRENT.violations("dialogue", settings(RECURRENT, bidirectional=True))
    assert violation.field == "bidirectional"
    assert not RECURRENT.violations("classification", settings(RECURRENT, bidirectional=True))
    with pytest.raises(IncompatibleError, match="leave the setting bidirectional out"):
        RECURRENT.build(request("domain", bidirectional=True))
    with pytest.raises(IncompatibleError, match="needs texts to learn its tokenizer from"):
        RECURRENT.build(dataclasses.replace(request(), tokenizer=""))


# Training

CONFIG = AgentTrainConfig(
    agent="toy-router",
    architecture="recurrent",
    total_steps=40,
    batch_size=8,
    seed=3,
    optimization=Optimization(lr=1e-2),
    checkpoint_interval_steps=10,
    progress_interval_steps=5,
    validation_interval_steps=1000,  # at the end alone: what recovery does about a bad one is tested elsewhere
    settings=settings(RECURRENT),
)


def dialogues() -> Rows:
    rows = [
        Written((Segment(f"user: {row.text}\n"), Segment(("pay", "travel", "music")[row.label], trained=True)))
        for row in ROWS.train
    ]
    return prepared(rows[:64], rows[64:80], rows[80:96], name="toy-talk")


def seen(*, seed: int = 0) -> Rows:
    """Rows whose label is told by two features alone, of very different scale; a third feature never moves."""
    generator = torch.Generator().manual_seed(seed)

    def row(i: int) -> Labelled:
        large, small = torch.randn(2, generator=generator).tolist()
        text = TEXTS[i]
        return Labelled(text, int(large > 0) + int(small > 0), (1e4 + 1e3 * large, 1e-2 * small, 7.0))

    rows = [row(i) for i in range(160)]
    return prepared(rows[:112], rows[112:], labels=("no", "one", "two"), name="toy-pictures")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_classifier_learns(tmp_path: Path, cell: str) -> None:
    """From random values it learns the words that decide, and is published with its tokenizer."""
    config = dataclasses.replace(CONFIG, settings=settings(RECURRENT, cell=cell, bidirectional=True))
    result = train_agent(config, None, ROWS, MemoryAttempt(tmp_path))
    assert measured(result)["accuracy_after"] > measured(result)["majority_share"] + 0.3
    assert {file.name for file in result.folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("task", ["classification", "dialogue"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, task: str) -> None:
    """Stopped half-way and gone on with, dropout and tokenizer included, the agent's files are the same bytes."""
    config, data = dataclasses.replace(CONFIG, task=task), ROWS if task == "classification" else dialogues()
    straight = train_agent(config, None, data, MemoryAttempt(tmp_path / "straight"))
    attempt = MemoryAttempt(tmp_path / "cut", stop_at=15)
    with pytest.raises(AttemptStopped):
        train_agent(config, None, data, attempt)
    attempt.stop_at = None
    torch.manual_seed(99)
    resumed = train_agent(config, None, data, attempt)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (straight.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    assert measured(straight) == measured(resumed)
    if task == "dialogue":
        assert measured(straight)["loss_after"] < measured(straight)["loss_before"] - 1


@pytest.mark.parametrize("method", ["full", "head", "freezing", "bottleneck"])
def test_an_agent_is_trained_further(tmp_path: Path, method: str) -> None:
    """A published agent goes on by every method that is listed; a writer can become a classifier."""
    first = train_agent(CONFIG, None, ROWS, MemoryAttempt(tmp_path / "first"))
    adaptation = {
        "full": Adaptation(),
        "head": Adaptation(head=True),
        "freezing": Adaptation(freezing=Freezing()),
        "bottleneck": Adaptation(bottleneck=Bottleneck(width=4)),
    }[method]
    config = dataclasses.replace(CONFIG, adaptation=adaptation, total_steps=4)
    second = train_agent(config, None, ROWS, MemoryAttempt(tmp_path / "second"), agent_dir=first.folder)
    assert measured(second)["accuracy_before"] == measured(first)["accuracy_after"]
    third = RECURRENT.build_on(second.folder, request("extraction"))
    assert third(collate([[1, 2]])).shape == (1, 2, 7)


@pytest.mark.parametrize("base", ["scratch", "bert"])
def test_features_beside_a_text_are_read(tmp_path: Path, base: str) -> None:
    """What only the features tell is learned, whatever their scale; the agent comes back with the same logits."""
    data = seen()
    folder = None if base == "scratch" else write_model_folder(tmp_path / base, base, TEXTS)
    config = dataclasses.replace(
        CONFIG,
        architecture="multimodal",
        settings=settings(MULTIMODAL, features=3, projection=16),
        total_steps=60,
    )
    result = train_agent(config, folder, data, MemoryAttempt(tmp_path))
    assert measured(result)["accuracy_after"] > measured(result)["majority_share"] + 0.2
    stored = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    assert stored["encoder"]["kind"] == ("recurrent" if base == "scratch" else "transformers")
    again = multimodal_model.build_on(result.folder, dataclasses.replace(request(), labels=("a", "b")))
    assert again.head.weight.shape[0] == 2


def test_rows_without_their_features_are_refused(tmp_path: Path) -> None:
    """Rows that lack features, or have another number of them, are named with what the agent reads."""
    config = dataclasses.replace(CONFIG, architecture="multimodal", settings=settings(MULTIMODAL, features=3))
    with pytest.raises(IncompatibleError, match="rows have 0 features and the agent reads 3"):
        train_agent(config, None, ROWS, MemoryAttempt(tmp_path / "none"))
    data = seen()
    uneven = [dataclasses.replace(row, features=row.features[: 2 + i % 2]) for i, row in enumerate(data.train)]
    with pytest.raises(DataUnavailableError, match="rows have 2 and 3 features"):
        train_agent(config, None, dataclasses.replace(data, train=uneven), MemoryAttempt(tmp_path / "uneven"))
