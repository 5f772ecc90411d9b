"""Cognate's forward pass against slow, plain references, and the promises in its file's head."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cognate_server import fused
from cognate_server.construct import (
    SPECIFICATION,
    SPECIFIED_PARAMETERS,
    CognateModelConstructor,
    ConstructionError,
    log_frequency,
)
from training_common.models.cognate_v1 import (
    FORGETTING,
    NORM_EPSILON,
    ROPE_BASE,
    ArchitectureMismatchError,
    CognateV1,
    CognateV1Config,
    MemoryState,
    Operations,
    architecture_fingerprint,
    config_from_json,
    config_to_json,
    count_parameters,
    load_state,
    save_state,
)

TINY = CognateV1Config(vocabulary_size=50, width=32, heads=4, feed_forward_width=48, memory_slots=6, memory_chunk=8)


def make_model(seed: int = 0, config: CognateV1Config = TINY) -> CognateV1:
    """A model with random values everywhere, the zero-started head included, so that every part is seen."""
    counts = torch.arange(1, config.vocabulary_size + 1)
    model = CognateModelConstructor(config).construct(config, seed=seed, unigram_counts=counts)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "head.weight" or name.startswith(("memory.", "halting.")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def log_probabilities(model: CognateV1, tokens: Tensor, **options: Any) -> Tensor:
    output = model(tokens, **options)
    return model.log_probabilities(output.hidden_BTD, output.recall)


def assert_same_memory(actual: MemoryState, expected: MemoryState) -> None:
    for name, part in expected.tensors().items():
        torch.testing.assert_close(actual.tensors()[name], part, atol=1e-5, rtol=1e-4)


def make_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocabulary_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt()


# The reference: one row, one token, one head at a time.


def reference_rotate(x_K: Tensor, position: int) -> Tensor:
    half = len(x_K) // 2
    rotated = torch.empty_like(x_K)
    for pair in range(half):
        angle = position * ROPE_BASE ** (-2 * pair / len(x_K))
        left, right = x_K[pair], x_K[pair + half]
        rotated[pair] = left * math.cos(angle) - right * math.sin(angle)
        rotated[pair + half] = right * math.cos(angle) + left * math.sin(angle)
    return rotated


Table = dict[int, Any]


def reference_block(block: Any, x_D: Tensor, position: int, keys: Table, values: Table, visible: list[int]) -> Tensor:
    """One token through one block; its own key and value are put into the tables first."""
    heads = block.attention.heads
    query, key, value = block.attention.query_key_value.weight.mv(rms(x_D) * block.attention_norm.scale_D).chunk(3)
    keys[position] = [reference_rotate(rms(k), position) for k in key.chunk(heads)]
    values[position] = value.chunk(heads)
    mixed = []
    for head, q in enumerate(query.chunk(heads)):
        q = reference_rotate(rms(q), position)
        scores = torch.stack([q.dot(keys[other][head]) / math.sqrt(len(q)) for other in visible])
        weights = scores.exp() / scores.exp().sum()
        mixed.append(sum(w * values[other][head] for w, other in zip(weights, visible, strict=True)))
    x_D = x_D + block.attention.output.weight.mv(torch.cat(mixed))
    inner = rms(x_D) * block.feed_forward_norm.scale_D
    gate, up = block.feed_forward.gate_up.weight.mv(inner).chunk(2)
    after: Tensor = x_D + block.feed_forward.down.weight.mv(gate * torch.sigmoid(gate) * up)
    return after


@dataclass
class Slot:
    """What the reference keeps in a slot."""

    token: int
    strength: float
    trace_D: Tensor
    key_D: Tensor


def reference_write(model: CognateV1, held: list[Slot], tokens: list[int], chunk: list[Tensor]) -> list[Slot]:
    """The write of LongTermMemory's docstring, token by token: what is held ages, and the strongest stay."""
    memory = model.memory
    kept = [Slot(slot.token, slot.strength - FORGETTING, slot.trace_D, slot.key_D) for slot in held]
    total = model.head_bias_V.exp().sum().log()
    for token, x_D in zip(tokens, map(rms, chunk), strict=True):
        surprise = total - model.head_bias_V[token]
        gate = torch.sigmoid(memory.write_gate(x_D)[0] + memory.surprise_scale * surprise)
        kept.append(Slot(token, float(gate.log()), memory.write_value.weight.mv(x_D), memory.write_key.weight.mv(x_D)))
    return sorted(kept, key=lambda slot: -slot.strength)[: model.config.memory_slots]


def reference_read(memory: Any, x_D: Tensor, held: list[Slot]) -> Tensor:
    x_D = rms(x_D)
    query = memory.read_query.weight.mv(x_D).chunk(memory.heads)
    shown = [slot.trace_D for slot in held] + list(memory.initial_MD[len(held) :])
    keys = [
        memory.read_key.weight.mv(row + address).chunk(memory.heads)
        for row, address in zip(shown, memory.addresses_MD, strict=True)
    ]
    values = [memory.read_value.weight.mv(row).chunk(memory.heads) for row in shown]
    gates = torch.sigmoid(memory.read_gate(x_D))
    mixed = []
    for head in range(memory.heads):
        q = rms(query[head])
        scores = torch.stack([q.dot(rms(key[head])) / math.sqrt(len(q)) for key in keys])
        weights = scores.exp() / scores.exp().sum()
        mixed.append(gates[head] * sum(w * value[head] for w, value in zip(weights, values, strict=True)))
    read: Tensor = memory.read_output.weight.mv(torch.cat(mixed))
    return read


def reference_mixture(memory: Any, hidden_D: Tensor, own_V: Tensor, held: list[Slot]) -> Tensor:
    """Log probabilities of the next token: the head's, and what the slots hold."""
    if not held:
        return own_V.log_softmax(-1)
    queries = memory.read_query.weight.mv(rms(hidden_D)).chunk(memory.heads)
    weights = []
    for slot in held:
        keys = slot.key_D.chunk(memory.heads)
        pairs = zip(queries, keys, strict=True)
        vote = sum(float(rms(query).dot(rms(key))) for query, key in pairs)
        weights.append(math.exp(vote / math.sqrt(memory.heads * len(hidden_D)) + slot.strength))
    part = float(torch.sigmoid(memory.head_gate(rms(hidden_D))[0]))
    mixed_V = (1 - part) * own_V.softmax(-1)
    for slot, weight in zip(held, weights, strict=True):
        mixed_V[slot.token] += part * weight / sum(weights)
    return mixed_V.log()


def reference_forward(
    model: CognateV1, tokens: list[int], segments: list[int] | None = None
) -> tuple[Tensor, Tensor, list[int], list[Slot]]:
    """Log probabilities, halting weights, step counts and what the memory holds after one row."""
    config = model.config
    segments = segments or [0] * len(tokens)
    visible = [[o for o in range(t + 1) if segments[o] == segments[t]] for t in range(len(tokens))]
    stream = [rms(model.embedding.weight[token]) for token in tokens]
    for block in model.prelude:
        keys: Table = {}
        values: Table = {}
        stream = [reference_block(block, x, t, keys, values, visible[t]) for t, x in enumerate(stream)]
    held: list[list[Slot]] = [[]]
    for start in range(0, len(tokens), config.memory_chunk):
        piece = slice(start, start + config.memory_chunk)
        held.append(reference_write(model, held[-1], tokens[piece], stream[piece]))
    tables: list[tuple[Table, Table]] = [({}, {}) for _ in model.core]
    state, spent, output = list(stream), [0.0] * len(tokens), [torch.zeros(config.width) for _ in tokens]
    halting = torch.zeros(len(tokens), config.max_steps)
    steps = [0] * len(tokens)
    active = list(range(len(tokens)))
    for step in range(config.max_steps):
        for index, block in enumerate([None, *model.core]):
            for t in active:
                if block is None:
                    state[t] = state[t] + model.inject_D * stream[t] + model.step_vectors_ND[step]
                    state[t] = state[t] + reference_read(model.memory, state[t], held[t // config.memory_chunk])
                else:
                    keys, values = tables[index - 1]
                    state[t] = reference_block(block, state[t], t, keys, values, visible[t])
        for t in list(active):
            p = float(torch.sigmoid(model.halting(rms(state[t]))[0]))
            halts = spent[t] + p >= 1 - config.halting_epsilon or step == config.max_steps - 1
            halting[t, step] = 1 - spent[t] if halts else p
            output[t] = output[t] + halting[t, step] * state[t]
            spent[t], steps[t] = spent[t] + p, step + 1
            if halts:
                active.remove(t)
    for block in model.coda:
        keys, values = {}, {}
        output = [reference_block(block, x, t, keys, values, visible[t]) for t, x in enumerate(output)]
    hidden = [rms(x) * model.final_norm.scale_D for x in output]
    logits = [model.embedding.weight @ (model.head.weight @ x) + model.head_bias_V for x in hidden]
    found = [
        reference_mixture(model.memory, x, own_V, held[t // config.memory_chunk])
        for t, (x, own_V) in enumerate(zip(hidden, logits, strict=True))
    ]
    return torch.stack(found), halting, steps, held[-1]


@pytest.mark.parametrize("computing", [Operations(), fused.choose()], ids=["torch", "fastest"])
@pytest.mark.parametrize("segments", [None, [0] * 7 + [1] * 6 + [2] * 7])
@torch.no_grad()
def test_forward_equals_the_plain_reference(segments: list[int] | None, computing: Operations) -> None:
    """Attention, ACT with its remainder, memory writes and reads: all equal a loop over single tokens."""
    model, tokens = make_model(), make_tokens(1, 20)
    model.compute_with(computing)
    segment_ids = None if segments is None else torch.tensor([segments])
    output = model(tokens, segment_ids_BT=segment_ids)
    log_p, halting, steps, held = reference_forward(model, tokens[0].tolist(), segments)
    assert output.steps_BT[0].tolist() == steps
    assert len(set(steps)) > 1, "the reference must see tokens that halt at different steps"
    torch.testing.assert_close(output.halting_BTN[0], halting, atol=1e-5, rtol=1e-4)
    assert output.memory.tokens_BM[0].tolist() == [slot.token for slot in held]
    strengths = torch.tensor([slot.strength for slot in held])
    torch.testing.assert_close(output.memory.strength_BM[0], strengths, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        output.memory.trace_BMD[0], torch.stack([slot.trace_D for slot in held]), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        model.log_probabilities(output.hidden_BTD, output.recall)[0], log_p, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_no_earlier_logit_moves_when_a_later_token_changes() -> None:
    """Causal through attention, pondering and memory, at every position and across chunks."""
    model, tokens = make_model(), make_tokens(2, 24)
    before = log_probabilities(model, tokens)
    for position in (1, 7, 8, 15, 23):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % TINY.vocabulary_size
        after = log_probabilities(model, changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


@torch.no_grad()
def test_the_memory_carries_a_chunk_to_later_chunks_only() -> None:
    """With attention cut by segments, the only way from chunk 0 to chunk 1 is the memory."""
    model, tokens = make_model(), make_tokens(1, 16)
    segment_ids = torch.tensor([[0] * 8 + [1] * 8])
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % TINY.vocabulary_size

    def difference(**options: Any) -> float:
        first = log_probabilities(model, tokens, segment_ids_BT=segment_ids, **options)
        second = log_probabilities(model, changed, segment_ids_BT=segment_ids, **options)
        return float((second - first)[0, 8:].abs().max())

    assert difference() > 1e-4
    assert difference(read_memory=False) == 0


@torch.no_grad()
def test_carried_memory_equals_one_long_sequence() -> None:
    """Two sequences of whole chunks, with the state handed on, write what one sequence writes."""
    model, tokens = make_model(), make_tokens(2, 16)
    segment_ids = torch.tensor([[0] * 8 + [1] * 8]).expand(2, -1)
    whole = model(tokens, segment_ids_BT=segment_ids).memory
    first = model(tokens[:, :8])
    second = model(tokens[:, 8:], memory=first.memory.detach())
    # Positions restart, which rotary attention does not see.
    assert_same_memory(second.memory, whole)


@torch.no_grad()
def test_right_padding_changes_nothing() -> None:
    """Utterances of different lengths give, padded into one batch, what each gives alone; padding never ponders."""
    model, tokens = make_model(), make_tokens(3, 20)
    lengths = [20, 11, 3]
    valid = torch.arange(20) < torch.tensor(lengths).unsqueeze(1)
    together = model(tokens.masked_fill(~valid, 0), valid_BT=valid)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(together.hidden_BTD[row, :length], alone.hidden_BTD[0], atol=1e-5, rtol=1e-4)
        assert_same_memory(together.memory.map(lambda part, row=row: part[row : row + 1]), alone.memory)
        assert together.steps_BT[row, length:].tolist() == [0] * (20 - length)
    torch.testing.assert_close(together.halting_BTN.sum(-1), valid.float())


@torch.no_grad()
def test_a_row_of_padding_leaves_the_memory_as_it_was() -> None:
    """What is held after an empty row is what was held before it, bit for bit, and no weaker."""
    model = make_model()
    state = model(make_tokens(1, 16, seed=5)).memory
    valid = torch.zeros(1, 16, dtype=torch.bool)
    output = model(make_tokens(1, 16), memory=state, valid_BT=valid)
    assert all(torch.equal(part, output.memory.tensors()[name]) for name, part in state.tensors().items())
    assert bool(output.hidden_BTD.isfinite().all())


@torch.no_grad()
def test_the_most_surprising_tokens_are_kept_and_the_older_ones_give_way() -> None:
    """With gates that see surprise alone: a chunk's rarest stay, and equal ones of later chunks take their place."""
    counts = torch.ones(TINY.vocabulary_size)
    counts[:10] = 1_000
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=counts)
    rare = [list(range(20 + 10 * chunk, 26 + 10 * chunk)) for chunk in range(3)]
    chunks = [torch.tensor([[1, *tokens, 2]]) for tokens in rare]
    state = model.memory.start(1)
    for tokens_BT, expected in zip(chunks, rare, strict=True):
        state = model(tokens_BT, memory=state).memory
        assert state.tokens_BM[0].tolist() == expected
    state = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 20]]), memory=state).memory
    assert state.tokens_BM[0].tolist() == [20, *rare[2][:5]], (
        "common tokens are weaker than rare ones of the last chunk"
    )
    written = model(torch.tensor([[1, 2]]), statistics=True).memory_statistics
    assert written.slot_utilization == pytest.approx(2 / 6)
    assert written.read_entropy_nats == 0, "nothing was held that could be read"


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_fixed_steps_switch_adaptive_computation_off(steps: int) -> None:
    """Every token takes exactly so many steps, and the last one has all the weight."""
    output = make_model()(make_tokens(2, 9), fixed_steps=steps)
    assert output.steps_BT.unique().tolist() == [steps]
    assert output.halting_BTN.unique(dim=0).shape[0] == 1
    assert output.halting_BTN[0, 0].tolist() == [float(n == steps - 1) for n in range(TINY.max_steps)]


def test_fixed_steps_beyond_the_most_are_refused() -> None:
    """The message names the range."""
    with pytest.raises(ValueError, match="within 1 and 4, got 5"):
        make_model()(make_tokens(1, 4), fixed_steps=5)


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping halted tokens stays differentiable: autograd agrees with nudging parameters of every part."""
    model = make_model().double()
    tokens = make_tokens(2, 17)
    surprise_V = model.surprises()  # a measure of the data, held still: no gradient goes through it
    monkeypatch.setattr(model, "surprises", lambda: surprise_V)

    def objective() -> Tensor:
        output = model(tokens)
        targets = tokens[:, 1:]
        logits = model.logits(output.hidden_BTD[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        losses = output.recall.map(lambda part: part[:, :-1]).mixed_losses(losses, targets)
        halting = output.halting_BTN.mean((0, 1)).square().sum()
        loss: Tensor = losses.mean() + halting
        return loss

    objective().backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = float(objective())
            parameter.add_(direction, alpha=-2e-6)
            below = float(objective())
            parameter.add_(direction, alpha=1e-6)
        assert parameter.grad is not None, name
        expected = (above - below) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_cognate_25m_has_exactly_the_specified_parameters() -> None:
    """24,998,668, by formula and by counting the module."""
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in CognateV1(CognateV1Config()).parameters())
    assert (counted, count_parameters(SPECIFICATION)) == (SPECIFIED_PARAMETERS, SPECIFIED_PARAMETERS)


def test_the_first_loss_is_that_of_the_unigram() -> None:
    """The head starts at zero and the bias at the log frequency, so no context is read yet."""
    counts = torch.arange(TINY.vocabulary_size)
    model = CognateModelConstructor(TINY).construct(TINY, seed=0, unigram_counts=counts)
    logits = model.logits(model(make_tokens(1, 9)).hidden_BTD)
    torch.testing.assert_close(logits.log_softmax(-1), log_frequency(counts).expand(1, 9, -1))
    assert float(log_frequency(counts).exp().sum()) == pytest.approx(1)


def test_construction_is_a_function_of_the_seed() -> None:
    """Equal seeds give equal bits whatever the global random state; another seed gives another model."""
    first, second, other = make_model(0), make_model(0), make_model(1)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_a_construction_error_names_every_deviation() -> None:
    """Two wrong sizes and counts of another vocabulary are three parts of one message."""
    wrong = CognateV1Config(width=256, max_steps=3)
    with pytest.raises(ConstructionError) as caught:
        CognateModelConstructor().construct(wrong, seed=0, unigram_counts=torch.ones(7))
    assert len(caught.value.deviations) == 3
    for part in ("width is 256, the specification says 512", "max_steps is 3", "shape (7,)"):
        assert part in str(caught.value)


def test_weights_survive_a_file(tmp_path: Path) -> None:
    """What is saved loads bit for bit, through safetensors alone; the config survives as JSON."""
    model = make_model()
    save_state(model, tmp_path / "model.safetensors")
    loaded = CognateV1(config_from_json(json.loads(json.dumps(config_to_json(TINY)))))
    load_state(loaded, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """Equal shapes are not enough: the fingerprint covers what no shape shows."""
    save_state(make_model(), tmp_path / "model.safetensors")
    other = CognateV1Config(**{**_sizes(TINY), "halting_epsilon": 0.02})
    with pytest.raises(ArchitectureMismatchError, match="is of architecture"):
        load_state(CognateV1(other), tmp_path / "model.safetensors")


def test_the_fingerprint_of_cognate_25m_is_frozen() -> None:
    """Published models name it: if this test fails, write a new version instead of editing this one."""
    frozen = "5ac00c7b9216302edaa9fafda335154ff61c7825e6bf5df04fad976b0eb247bf"
    assert architecture_fingerprint(SPECIFICATION) == frozen
    assert architecture_fingerprint(TINY) != frozen


@pytest.mark.parametrize(
    ("field", "value"), [("width", 0), ("heads", 3), ("max_steps", -1), ("halting_epsilon", 1.5), ("memory_slots", 0)]
)
def test_a_config_error_names_its_field(field: str, value: float) -> None:
    """A config that cannot be built says which field is wrong."""
    with pytest.raises(ValueError, match=field):
        CognateV1Config(**{**_sizes(TINY), field: value})


def test_a_config_file_of_another_version_is_refused() -> None:
    """Version 2, or an unknown field, is not read as version 1."""
    with pytest.raises(ArchitectureMismatchError, match="v2"):
        config_from_json({**config_to_json(TINY), "semantics_version": 2})
    with pytest.raises(ArchitectureMismatchError, match="experts"):
        config_from_json({**config_to_json(TINY), "experts": 8})


def _sizes(config: CognateV1Config) -> dict[str, Any]:
    return {
        name: value for name, value in config_to_json(config).items() if name not in ("family", "semantics_version")
    }
