"""Methods of adaptation train what they say, begin as the base, merge or are read back into equal logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from agent_server import estimates
from agent_server.adaptation import (
    MERGE_TOLERANCE,
    Adaptation,
    Bottleneck,
    Freezing,
    Lora,
    ParameterCount,
    adapt,
    count_parameters,
    merge_checked,
    merge_lora,
)
from agent_server.architectures.cognate import CognateArchitecture
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentModel
from agent_server.bottlenecks import bottleneck_width, bottlenecks, install_bottlenecks
from agent_server.objectives.base import Batch
from agent_server.objectives.classification import ClassificationObjective
from agent_server.plan import with_defaults
from agent_server.settings import AgentSettings
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import IncompatibleError, IntegrityCheckFailedError
from tests.agent._support import TINY, toy_rows, write_foundation
from training_common.models.cognate_v1 import count_parameters as count_cognate

LABELS = tuple(str(i) for i in range(3))
OBJECTIVE = ClassificationObjective()
BLOCKS = TINY.prelude_blocks + TINY.core_blocks + TINY.coda_blocks
BLOCK = 4 * TINY.width**2 + 3 * TINY.width * TINY.feed_forward_width + 2 * TINY.width
METHODS = [
    Adaptation(),
    Adaptation(lora=Lora(rank=2)),
    Adaptation(lora=Lora(rank=2, weight_decomposed=True)),
    Adaptation(head=True),
    Adaptation(freezing=Freezing(trained_blocks=2)),
    Adaptation(bottleneck=Bottleneck(width=4)),
]
Build = Callable[[Adaptation], AgentModel]


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk."""
    return write_foundation(
        tmp_path_factory.mktemp("adaptation") / "foundation", [row.text for row in toy_rows().train]
    )


def request(adaptation: Adaptation, foundation: Path | None = None) -> BuildRequest:
    return BuildRequest(task="classification", adaptation=adaptation, seed=0, base_dir=foundation, labels=LABELS)


@pytest.fixture
def build(foundation: Path) -> Build:
    """Return a function that builds an agent on it."""
    return lambda adaptation: CognateArchitecture().build(request(adaptation, foundation))


def batch_for(model: AgentModel) -> Batch:
    return OBJECTIVE.batch(OBJECTIVE.encode(model, toy_rows().train[:16], max_tokens=64))


def logits_of(model: AgentModel) -> Tensor:
    with torch.no_grad():
        return OBJECTIVE.comparable(model.eval(), batch_for(model))


def train_a_little(model: AgentModel, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    batch = batch_for(model)
    for _ in range(steps):
        optimizer.zero_grad()
        OBJECTIVE.loss(model, batch).mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def counted(model: AgentModel) -> tuple[int, int]:
    count = count_parameters(model)
    return count.trainable, count.total


def test_lora_touches_every_linear_layer_of_the_blocks(build: Build) -> None:
    """Each attention and feed-forward map has an adapter that gets a gradient; nothing else of the base does."""
    model = build(Adaptation(lora=Lora(rank=2)))
    OBJECTIVE.loss(model, batch_for(model)).mean.backward()  # type: ignore[no-untyped-call]
    base = dict(model.base_model().named_parameters())
    moved = {name for name, p in base.items() if p.grad is not None and bool(p.grad.any())}
    # B starts at zero, so A gets a gradient only from the second step on.
    assert {name for name in base if "lora_B" in name} == moved
    assert 4 * BLOCKS == len(moved)


def test_parameters_are_counted(build: Build) -> None:
    """The counts are those of arithmetic, for every method."""
    D, ff, rank, width = TINY.width, TINY.feed_forward_width, 2, 4
    head = 2 * D * len(LABELS) + len(LABELS)
    total = count_cognate(TINY) + head
    outputs = BLOCKS * (3 * D + D + 2 * ff + D)
    low_rank = BLOCKS * rank * ((D + 3 * D) + (D + D) + (D + 2 * ff) + (ff + D))
    behind = BLOCKS * (D * width + width + width * D + D)
    assert (head + low_rank, total + low_rank) == counted(build(Adaptation(lora=Lora(rank=rank))))
    dora = Adaptation(lora=Lora(rank=rank, weight_decomposed=True))
    assert (head + low_rank + outputs, total + low_rank + outputs) == counted(build(dora))
    assert (head, total) == counted(build(Adaptation(head=True)))
    assert (head + 2 * BLOCK, total) == counted(build(Adaptation(freezing=Freezing(trained_blocks=2))))
    assert (head + behind, total + behind) == counted(build(Adaptation(bottleneck=Bottleneck(width=width))))
    language_head = D * D + TINY.vocabulary_size  # a classifier reads no next-token logits
    assert ParameterCount(trainable=total - language_head, total=total) == count_parameters(
        build(Adaptation(unfreeze_act_ltm=True))
    )


@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
def test_an_untrained_agent_is_its_base_under_a_head(build: Build, adaptation: Adaptation) -> None:
    """No method changes what the base computes before the first step."""
    plain = build(Adaptation(head=True))
    torch.testing.assert_close(logits_of(build(adaptation)), logits_of(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
def test_only_what_is_trained_moves(build: Build, adaptation: Adaptation) -> None:
    """After some steps every trained tensor that the task reads has moved, and no other one has."""
    model = build(adaptation)
    before = copy.deepcopy(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    train_a_little(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == moved


def test_the_last_blocks_are_counted_from_the_end(build: Build) -> None:
    """Freezing trains the coda before the core, and leaves embeddings, norm and adaptive parts as they are."""
    model = build(Adaptation(freezing=Freezing()))
    trained = {name for name, p in model.base_model().named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("coda.") for name in trained)
    model = build(Adaptation(freezing=Freezing(trained_blocks=2), unfreeze_act_ltm=True))
    parts = {name.split(".")[0] for name, p in model.base_model().named_parameters() if p.requires_grad}
    assert {"core", "coda", "memory", "halting", "inject_D", "step_vectors_ND"} == parts


def test_what_the_base_lacks_is_named() -> None:
    """Low-rank updates need linear layers, bottlenecks blocks, and no more blocks are trained than there are."""
    for adaptation, reason in (
        (Adaptation(lora=Lora()), "needs linear layers"),
        (Adaptation(bottleneck=Bottleneck()), "needs blocks"),
        (Adaptation(freezing=Freezing(trained_blocks=9)), "trained_blocks is 9 and the base has 0 blocks"),
    ):
        with pytest.raises(IncompatibleError, match=reason):
            adapt(nn.GRU(2, 2), adaptation, linear_layers=[], seed=0)


LORAS = [
    Lora(rank=1),
    Lora(rank=4, alpha=1.5),
    Lora(rank=3, dropout=0.5),
    Lora(rank=2, weight_decomposed=True),
    Lora(rank=3, alpha=1.5, dropout=0.3, weight_decomposed=True),
]


@pytest.mark.parametrize("lora", LORAS)
def test_merging_keeps_the_logits(build: Build, lora: Lora) -> None:
    """A trained adapter model and its merged self agree within the stated tolerance, and no adapter is left."""
    model = build(Adaptation(lora=lora))
    before = logits_of(model)
    train_a_little(model)
    trained = logits_of(model)
    assert not torch.allclose(before, trained, atol=0.01)
    assert merge_checked(model.base_model(), lambda: logits_of(model)) <= MERGE_TOLERANCE
    bound = MERGE_TOLERANCE * max(1.0, float(trained.abs().max()))
    torch.testing.assert_close(logits_of(model), trained, rtol=0, atol=bound)
    assert not [name for name in model.state_dict() if "lora" in name or "base_layer" in name]


def test_magnitudes_are_trained_beside_directions(build: Build) -> None:
    """DoRA has a magnitude for every output, which begins as the norm of its weights and moves."""
    model = build(Adaptation(lora=Lora(rank=2, weight_decomposed=True)))
    layer = model.base_model().get_submodule("coda.0.attention.output")
    assert isinstance(layer, LoraLinear)
    magnitude = next(p for name, p in layer.named_parameters() if "magnitude" in name)
    norms = torch.linalg.vector_norm(layer.get_base_layer().get_parameter("weight").detach(), dim=1)
    torch.testing.assert_close(magnitude.detach(), norms)
    train_a_little(model)
    assert not torch.allclose(magnitude.detach(), norms)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_merge_that_moves_the_logits_is_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch, decomposed: bool
) -> None:
    """A wrong scale, as a fault in the merge would leave, is found by the logits."""
    model = build(Adaptation(lora=Lora(rank=2, weight_decomposed=decomposed)))
    train_a_little(model)
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, adapter: 2 * right(layer, adapter))
    with pytest.raises(IntegrityCheckFailedError, match="merging the low-rank updates moved the logits"):
        merge_checked(model.base_model(), lambda: logits_of(model))


@pytest.mark.parametrize("adaptation", [Adaptation(), Adaptation(bottleneck=Bottleneck())])
def test_without_low_rank_updates_nothing_is_merged(build: Build, adaptation: Adaptation) -> None:
    """Full training has nothing to merge, and bottlenecks cannot be."""
    assert merge_lora(build(adaptation).base_model()) == 0


@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
def test_a_saved_agent_is_read_back(build: Build, adaptation: Adaptation, tmp_path: Path) -> None:
    """Whatever was trained, the folder gives the same logits bit for bit; bottlenecks are put back on the way."""
    model = build(adaptation)
    train_a_little(model)
    merge_lora(model.base_model())
    expected = logits_of(model)
    model.save(tmp_path, extra={})
    assert torch.equal(expected, logits_of(CognateArchitecture().load(tmp_path)))


def test_bottlenecks_are_trained_further(build: Build, tmp_path: Path) -> None:
    """An agent with bottlenecks goes on with them, full or frozen training too; another width is refused by name."""
    model = build(Adaptation(bottleneck=Bottleneck(width=4)))
    train_a_little(model)
    model.save(tmp_path, extra={})
    expected, architecture = logits_of(model), CognateArchitecture()

    def trained(adaptation: Adaptation) -> set[str]:
        again = architecture.build_on(tmp_path, request(adaptation))
        torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=1e-5)
        return {name for name, p in again.base_model().named_parameters() if p.requires_grad}

    behind = {name for name, _ in model.base_model().named_parameters() if "bottleneck" in name}
    assert 4 * BLOCKS == len(behind)
    assert behind == trained(Adaptation(bottleneck=Bottleneck(width=4)))
    assert behind < trained(Adaptation())
    assert {name for name in behind if name.startswith("coda.")} < trained(Adaptation(freezing=Freezing()))
    assert set() == trained(Adaptation(head=True))
    assert all("lora_" in name and "bottleneck" not in name for name in trained(Adaptation(lora=Lora(rank=2))))
    with pytest.raises(IncompatibleError, match=r"width is 8, .* has bottlenecks of width 4"):
        trained(Adaptation(bottleneck=Bottleneck(width=8)))


def memory(adaptation: pb.Adaptation, **optimization: Any) -> Mapping[str, int]:
    asked = pb.TrainingPlan(
        adaptation=adaptation, optimization=pb.Optimization(**optimization), total_steps=9, batch_size=32
    )
    return estimates.memory(with_defaults(asked), CognateArchitecture(), AgentSettings())


def test_memory_is_estimated_by_what_is_trained() -> None:
    """Parameters, and what rows leave behind, follow the method; parts and early stopping count too."""
    everything, low_rank = pb.Adaptation(full=pb.FullAdaptation()), pb.Adaptation(lora=pb.LoraAdaptation())
    full, lora = memory(everything), memory(low_rank)
    assert (4 * 23_074_304, 8 * 23_074_304) == (full["gradients"], full["optimizer"])
    assert (4 * 317_440, 4 * 25_316_108) == (lora["gradients"], lora["weights"])
    rows = [
        memory(adaptation)["activations"]
        for adaptation in (
            pb.Adaptation(head=pb.HeadAdaptation()),
            pb.Adaptation(freezing=pb.FreezingAdaptation()),
            pb.Adaptation(freezing=pb.FreezingAdaptation(trained_blocks=3)),
            pb.Adaptation(bottleneck=pb.BottleneckAdaptation()),
            pb.Adaptation(lora=pb.LoraAdaptation(weight_decomposed=True)),
        )
    ]
    assert sorted(set(rows)) == rows
    unfrozen = memory(pb.Adaptation(head=pb.HeadAdaptation(), unfreeze_act_ltm=True))
    assert {rows[3]} == {full["activations"], lora["activations"], unfrozen["activations"]}
    assert lora["activations"] == 4 * memory(low_rank, accumulation_steps=4)["activations"]
    assert "best_weights" not in full
    assert full["gradients"] == memory(everything, early_stopping=pb.EarlyStopping())["best_weights"]


class Twice(nn.Module):
    """A block that gives a tuple and takes a keyword, run twice by its owner, as layers of transformers may be."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        return self.linear(x) * scale, "beside"


def test_a_block_keeps_its_call_and_what_it_returns() -> None:
    """Class, names and signature stay; the first of a tuple goes through the bottleneck, at every run."""
    block, x = Twice(), torch.randn(2, 3)
    names = {name for name, _ in block.named_parameters()}
    expected = block(x, scale=2.0)[0]
    install_bottlenecks([block], 4, features=3)
    [bottleneck] = bottlenecks([block])
    assert (Twice, 4, names) == (type(block), bottleneck_width([block]), names & dict(block.named_parameters()).keys())
    got, beside = block(x, scale=2.0)
    assert torch.equal(expected, got)
    assert beside == "beside"
    nn.init.normal_(bottleneck.up.weight)
    hidden = nn.functional.gelu(expected @ bottleneck.down.weight.T + bottleneck.down.bias)
    torch.testing.assert_close(block(x, scale=2.0)[0], expected + hidden @ bottleneck.up.weight.T)
    again = copy.deepcopy(block)
    assert torch.equal(block(block(x)[0])[0], again(again(x)[0])[0])
    assert bottlenecks([again])[0] is not bottleneck


def test_a_block_that_gives_no_tensor_is_refused() -> None:
    """What a bottleneck cannot stand behind is named by its class."""

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    block = Odd()
    install_bottlenecks([block], 2, features=3)
    with pytest.raises(TypeError, match="Odd gives dict"):
        block(torch.ones(1, 3))


def test_bottlenecks_can_be_exported() -> None:
    """`torch.export` follows what stands behind a block."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    install_bottlenecks(list(model), 2, features=3)
    for bottleneck in bottlenecks(list(model)):
        nn.init.normal_(bottleneck.up.weight)
    x = torch.randn(4, 3)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def _gpt2() -> tuple[nn.Module, list[str], Sequence[nn.Module], Any]:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model: Any = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=16))
    model.eval()
    layers = [name for name, module in model.h.named_modules(prefix="h") if type(module).__name__ == "Conv1D"]
    return model, layers, list(model.h), torch.randint(0, 31, (2, 7))


def _bert() -> tuple[nn.Module, list[str], Sequence[nn.Module], Any]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=31,
        max_position_embeddings=16,
    )  # fmt: skip
    model: Any = BertModel(config)
    model.eval()
    layers = [name for name, m in model.encoder.named_modules(prefix="encoder") if isinstance(m, nn.Linear)]
    return model, layers, list(model.encoder.layer), torch.randint(0, 31, (2, 7))


@pytest.mark.parametrize("make", [_gpt2, _bert], ids=["gpt2", "bert"])
@pytest.mark.parametrize("adaptation", METHODS, ids=lambda one: one.describe())
def test_models_of_transformers_are_adapted(
    make: Callable[[], tuple[nn.Module, list[str], Sequence[nn.Module], Any]], adaptation: Adaptation
) -> None:
    """Every method serves a GPT-2, whose maps are no linear layers of torch, and a BERT.

    Nothing changes at first, the trained tensors get gradients, and what is merged gives the same again.
    """
    model, layers, blocks, tokens = make()
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
    adapt(model, adaptation, linear_layers=layers, blocks=blocks, features=16, unused_prefixes=("pooler.",), seed=0)
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert bool(trained) != adaptation.head
    if adaptation.head:
        return
    optimizer, wanted = torch.optim.Adam(trained, lr=1e-2), torch.randn(expected.shape)
    for _ in range(3):
        optimizer.zero_grad()
        (model(tokens).last_hidden_state * wanted).mean().backward()
        optimizer.step()
    assert not [p for p in trained if p.grad is None]
    moved = model(tokens).last_hidden_state.detach()
    assert not torch.allclose(moved, expected, atol=1e-3)
    with torch.no_grad():
        assert merge_checked(model, lambda: model(tokens).last_hidden_state) <= MERGE_TOLERANCE
