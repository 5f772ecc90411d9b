"""Preferences: the loss of a pair against its formula, and what is measured with and without the untrained model."""

from __future__ import annotations

import math

import pytest
import torch

from agent_server.data.examples import Preferred
from agent_server.objectives.preference import PreferenceObjective
from tests.agent._language import BEGIN, END, BigramModel

PAIRS = [Preferred("ask", " good", " bad"), Preferred("ask again", " good good", " bad")]


def agent(seed: int = 1) -> BigramModel:
    model = BigramModel(["ask again good bad", "ask good"])
    with torch.no_grad():
        model.table_VX.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def log_p(model: BigramModel, prompt: str, answer: str) -> float:
    """Return the log probability of an answer and its end, token by token."""
    before, after = (list(encoding.tokens) for encoding in model.encode([prompt, answer]))
    tokens = [BEGIN, *before, *after, END]
    table = model.table_VX.detach().log_softmax(-1)
    return sum(float(table[tokens[i - 1], tokens[i]]) for i in range(1 + len(before), len(tokens)))


def test_the_loss_of_a_pair_follows_its_formula() -> None:
    """-log sigmoid(beta ((c - c0) - (r - r0))), the mean over pairs of unequal length."""
    base, model, objective = agent(1), agent(2), PreferenceObjective(beta=0.5)
    rows = objective.prepare(base, objective.encode(base, PAIRS, max_tokens=32))
    margins = [
        0.5
        * (
            (log_p(model, pair.prompt, pair.chosen) - log_p(base, pair.prompt, pair.chosen))
            - (log_p(model, pair.prompt, pair.rejected) - log_p(base, pair.prompt, pair.rejected))
        )
        for pair in PAIRS
    ]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    batch = objective.batch(rows)
    assert objective.units(batch) == 2
    assert float(objective.loss(model, batch).mean) == pytest.approx(expected, rel=1e-5)
    found = {m.metric: m.value for m in objective.measure(model, rows)}
    assert found["reward_margin"] == pytest.approx(sum(margins) / 2, rel=1e-4)
    assert found["preference_accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert {m.rows for m in objective.measure(model, rows)} == {2}


def test_the_untrained_model_prefers_nothing_to_itself() -> None:
    """Before the first step every margin is exactly 0 and the accuracy a half."""
    base, objective = agent(), PreferenceObjective()
    rows = objective.prepare(base, objective.encode(base, PAIRS, max_tokens=32))
    found = {m.metric: m.value for m in objective.measure(base, rows)}
    assert (found["preference_accuracy"], found["reward_margin"]) == (0.5, 0.0)
    assert found["loss"] == pytest.approx(math.log(2))


def test_without_the_untrained_model_only_likelihoods_are_compared() -> None:
    """A published agent has no base beside it: what needs one is absent, and cannot be trained on."""
    base, objective = agent(), PreferenceObjective()
    rows = objective.encode(base, PAIRS, max_tokens=32)
    found = {m.metric: m.value for m in objective.measure(base, rows)}
    likelier = [log_p(base, p.prompt, p.chosen) > log_p(base, p.prompt, p.rejected) for p in PAIRS]
    assert found == {"likelihood_accuracy": sum(likelier) / 2}
    with pytest.raises(ValueError, match="prepare"):
        objective.batch(rows)


def test_steps_raise_the_margin() -> None:
    """A few steps of descent make the preferred answers likelier than the base does, against the others."""
    base, model, objective = agent(), agent(), PreferenceObjective(beta=0.5)
    rows = objective.prepare(base, objective.encode(base, PAIRS, max_tokens=32))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        objective.loss(model, objective.batch(rows)).mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = {m.metric: m.value for m in objective.measure(model, rows)}
    assert found["preference_accuracy"] == 1.0
    assert found["reward_margin"] > 0.5


def test_answers_that_are_cut_are_counted() -> None:
    """Both texts of a pair are cut alone."""
    base, objective = agent(), PreferenceObjective()
    rows = objective.encode(base, PAIRS, max_tokens=3)
    assert objective.facts(rows) == {"pairs": 2, "pairs_cut": 1}
    assert max(map(objective.length, rows)) == 3
