"""Generation over kept keys and values, held to the full forward pass on every prefix."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cognate.test_model import log_probabilities, make_model
from training_common.models.cognate_v1 import CognateV1
from training_common.models.generation import Continuation, generate

# Around the borders of the memory's chunks of 8 tokens, and of one token alone.
LENGTHS = (1, 3, 7, 8, 9, 16, 21)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 20, (length,), generator=generator).tolist() for length in lengths]


def watch_hidden(model: CognateV1, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets every hidden state that is turned into logits."""
    seen: list[Tensor] = []
    logits = model.logits

    def watched(hidden: Tensor) -> Tensor:
        seen.append(hidden.clone())
        return logits(hidden)

    monkeypatch.setattr(model, "logits", watched)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("fixed_steps", [None, 1, 3])
@pytest.mark.parametrize("lengths", [*((length,) for length in LENGTHS), LENGTHS])
def test_every_step_equals_the_forward_pass_on_its_prefix(
    lengths: tuple[int, ...], fixed_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, core steps and tokens, for one prompt and for several of different lengths at once."""
    model, prompts = make_model().double(), prompts_of(*lengths)
    seen = watch_hidden(model, monkeypatch)
    found = generate(model, prompts, max_new_tokens=10, fixed_steps=fixed_steps)
    counted: set[int] = set()
    for row, (prompt, continuation) in enumerate(zip(prompts, found, strict=True)):
        whole = torch.tensor([[*prompt, *continuation.tokens]])
        expected = model(whole, fixed_steps=fixed_steps)
        for number, place in enumerate(range(len(prompt) - 1, whole.shape[1] - 1)):
            torch.testing.assert_close(seen[number][row], expected.hidden_BTD[0, place], rtol=1e-9, atol=1e-9)
        steps = expected.steps_BT[0, len(prompt) - 1 : -1].tolist()
        assert steps == list(continuation.steps)
        likeliest = model.log_probabilities(expected.hidden_BTD, expected.recall).argmax(-1)
        assert likeliest[0, len(prompt) - 1 : -1].tolist() == list(continuation.tokens)
        counted.update(steps)
    if fixed_steps is None and len(lengths) > 1:
        assert len(counted) > 1, "tokens that halt at different steps must be among them"


@torch.no_grad()
def test_float32_is_as_near_as_the_order_of_sums_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the type that models are served in, where a halting decision may not tip either."""
    model, prompts = make_model(), prompts_of(*LENGTHS)
    seen = watch_hidden(model, monkeypatch)
    found = generate(model, prompts, max_new_tokens=10)
    for row, (prompt, continuation) in enumerate(zip(prompts, found, strict=True)):
        expected = model(torch.tensor([[*prompt, *continuation.tokens]]))
        hidden = torch.stack([step[row] for step in seen])
        torch.testing.assert_close(hidden, expected.hidden_BTD[0, len(prompt) - 1 : -1], rtol=1e-4, atol=1e-5)
        assert expected.steps_BT[0, len(prompt) - 1 : -1].tolist() == list(continuation.steps)


@torch.no_grad()
def test_rows_go_on_from_a_memory() -> None:
    """What an earlier sequence left is read from the first token on."""
    model, (before, prompt) = make_model().double(), prompts_of(24, 5)
    memory = model(torch.tensor([before])).memory
    [found] = generate(model, [prompt], max_new_tokens=12, memory=memory)
    expected = log_probabilities(model, torch.tensor([[*prompt, *found.tokens]]), memory=memory)
    assert expected[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(found.tokens)
    assert found != generate(model, [prompt], max_new_tokens=12)[0]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on() -> None:
    """What a row says does not depend on which others are still there."""
    model, prompts = make_model(), prompts_of(*LENGTHS)
    free = generate(model, prompts, max_new_tokens=8)
    stop = free[2].tokens[3]
    stopped = generate(model, prompts, max_new_tokens=8, stop_token=stop)

    def cut(row: Continuation) -> Sequence[int]:
        before = list(itertools.takewhile(lambda token: token != stop, row.tokens))
        return [*before, stop][: len(row.tokens)]

    assert [cut(row) for row in free] == [list(row.tokens) for row in stopped]
    assert len({len(row.tokens) for row in stopped}) > 1


def test_sampling_follows_the_generator_and_the_temperature() -> None:
    """The same seed says the same; next to no temperature is greedy."""
    model, prompts = make_model(), prompts_of(5, 2)

    def sample(temperature: float, seed: int) -> list[Continuation]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompts, max_new_tokens=12, temperature=temperature, generator=generator)

    assert sample(3.0, 1) == sample(3.0, 1)
    assert sample(3.0, 1) != sample(3.0, 2)
    assert generate(model, prompts, max_new_tokens=12) == sample(1e-6, 1)


def test_no_prompt_and_no_new_token_are_nothing_to_do() -> None:
    """No model is run."""
    assert generate(make_model(), [], max_new_tokens=3) == []
    assert generate(make_model(), [[1]], max_new_tokens=0) == [Continuation(tokens=(), steps=())]


def test_arguments_out_of_range_are_named() -> None:
    """With what may be given instead."""
    model = make_model()
    with pytest.raises(ValueError, match="prompt 1 is empty: give it one token"):
        generate(model, [[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="fixed_steps must be within 1 and"):
        generate(model, [[1]], max_new_tokens=3, fixed_steps=9)
    with pytest.raises(ValueError, match="max_new_tokens must not be negative, got -1"):
        generate(model, [[1]], max_new_tokens=-1)
    with pytest.raises(ValueError, match="temperature must be 0 or above, got nan"):
        generate(model, [[1]], max_new_tokens=1, temperature=float("nan"))
