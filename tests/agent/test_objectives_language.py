"""Texts: which tokens are trained with what weight, what is cut, and what is made of written answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agent_server.adaptation import Adaptation
from agent_server.architectures.factory import AgentArchitectureFactory, BuildRequest
from agent_server.architectures.model import collate
from agent_server.data.examples import Segment, Written
from agent_server.objectives.base import Measurement
from agent_server.objectives.language import LanguageObjective, ModelWriter
from agent_server.objectives.texts import EncodedText, encode_prompt
from agent_server.runtime.allowed_actions import masked_action
from agent_server.train_config import Constraints
from cognateforge.exceptions import InvalidFieldError
from tests.agent._language import BEGIN, END, BigramModel

WORDS = "a b c d e f g h"


def written(*pieces: str, weight: float = 1.0, accepted: Any = None) -> Written:
    """Return a text; pieces that begin with "!" are trained."""
    segments = tuple(Segment(piece.removeprefix("!"), piece.startswith("!")) for piece in pieces)
    return Written(segments, weight=weight, accepted=accepted)


def values(found: list[Measurement]) -> dict[str, float]:
    return {one.metric: one.value for one in found}


def trained_words(model: BigramModel, row: EncodedText) -> list[str]:
    return [model.words[t] for t, weight in zip(row.targets, row.weights, strict=True) if weight]


@pytest.fixture
def model() -> BigramModel:
    return BigramModel([WORDS, " " + WORDS])


def test_trained_pieces_and_the_end_after_them_are_predicted(model: BigramModel) -> None:
    """A prompt is only read; the answer and the end token are trained with the text's weight."""
    (row,) = LanguageObjective("question_answering").encode(
        model, [written("a b", "! c", "! d", weight=0.5, accepted=["c d"])], max_tokens=16
    )
    assert ["<begin>", "a", " b", " c", " d", "<end>"] == [model.words[t] for t in row.tokens]
    assert [0.0, 0.0, 0.0, 0.5, 0.5, 0.5] == row.weights
    assert row.prompt == 3
    assert (row.cut, row.lost) == (False, 0)


def test_each_turn_of_an_agent_ends(model: BigramModel) -> None:
    """In a dialogue every turn of the agent is trained, and its end token with it."""
    (row,) = LanguageObjective("dialogue").encode(model, [written("a", "! b", " c", "! d e")], max_tokens=16)
    assert [" b", "<end>", " d", " e", "<end>"] == trained_words(model, row)
    assert [-1, -1, 0, 0, 1, 1, 1] == row.turns
    # What is read stays the plain text: the end of the first turn is predicted where the next turn begins.
    assert ["<begin>", "a", " b", " c", " d", " e", "<end>"] == [model.words[t] for t in row.tokens]


def test_the_loss_is_the_weighted_mean_over_trained_tokens(model: BigramModel) -> None:
    """Against the plain sum, over rows of unequal weight and length."""
    objective = LanguageObjective("question_answering")
    with torch.no_grad():
        model.table_VX.normal_(generator=torch.Generator().manual_seed(1))
    rows = objective.encode(model, [written("a", "! b"), written("a b c", "! d e f", weight=0.25)], max_tokens=16)
    batch = objective.batch(rows)
    log_p = model.table_VX.detach().log_softmax(-1)
    total, units = 0.0, 0.0
    for row in rows:
        for last, token, weight in zip(row.tokens, row.tokens[1:], row.weights[1:], strict=False):
            total -= weight * float(log_p[last, token])
            units += weight
    assert objective.units(batch) == units == 2 + 4 * 0.25
    loss = objective.loss(model, batch)
    assert float(loss.mean.detach()) == pytest.approx(total / units)
    assert loss.counts["tokens"] == 6
    found = values(objective.measure(model, rows))
    assert found["loss"] == pytest.approx(total / units)
    assert found["perplexity"] == pytest.approx(math.exp(total / units))


def test_a_batch_without_trained_tokens_has_a_loss_of_zero(model: BigramModel) -> None:
    """It still reaches the parameters, and metrics that nothing was measured for are absent."""
    objective = LanguageObjective("question_answering")
    rows = objective.encode(model, [written("a b"), written("a", "! b", weight=0.0)], max_tokens=16)
    batch = objective.batch(rows)
    assert objective.units(batch) == 0
    loss = objective.loss(model, batch)
    loss.mean.backward()  # type: ignore[no-untyped-call]
    assert loss.mean == 0
    assert model.table_VX.grad is not None
    assert not model.table_VX.grad.any()
    assert objective.rates(loss.counts, 0.0) == {}
    assert objective.measure(model, rows) == []
    assert objective.facts(rows)["texts_untrained"] == 2


@pytest.mark.parametrize(
    ("most", "kept", "lost"),
    [
        (10, ["<begin>", "a", " b", " c", " d", " e", " f", "<end>"], 0),
        (6, ["<begin>", " c", " d", " e", " f", "<end>"], 0),  # the prompt loses its beginning
        (4, ["<begin>", " e", " f", "<end>"], 0),
        (3, ["<begin>", " e", " f"], 1),  # then the answer its end
        (2, ["<begin>", " e"], 2),
    ],
)
def test_prompts_are_cut_from_the_left_and_answers_from_the_right(
    model: BigramModel, most: int, kept: list[str], lost: int
) -> None:
    """What is trained stays as long as it can, and what is lost is counted."""
    objective = LanguageObjective("question_answering")
    (row,) = objective.encode(model, [written("a b c d", "! e f")], max_tokens=most)
    assert kept == [model.words[t] for t in row.tokens]
    assert lost == row.lost
    assert row.cut == (most < 8)
    assert objective.facts([row]) == {
        "texts": 1,
        "texts_cut": int(most < 8),
        "texts_untrained": 0,
        "trained_tokens_lost": lost,
    }


def test_a_quarter_is_kept_of_a_prompt(model: BigramModel) -> None:
    """An answer that would fill all the room leaves it this much."""
    (row,) = LanguageObjective("tool_calling").encode(model, [written("a b c d", "!" + " e f g h" * 4)], max_tokens=12)
    assert row.prompt == 3
    assert ["<begin>", " c", " d", " e"] == [model.words[t] for t in row.tokens[:4]]
    assert len(row.tokens) == 12
    assert row.lost == 17 - 9


def test_one_token_is_too_little_room(model: BigramModel) -> None:
    """The first token is never predicted, so a text of one has nothing to train: the field is named."""
    with pytest.raises(InvalidFieldError) as refused:
        LanguageObjective("domain").encode(model, [written("!a")], max_tokens=1)
    assert [violation.field for violation in refused.value.violations] == ["max_tokens"]


@pytest.mark.parametrize("most", [2, 3, 5, 8, 50])
def test_documents_lose_nothing(model: BigramModel, most: int) -> None:
    """Over all parts of a long document every token and its end are predicted once, in order."""
    rows = LanguageObjective("domain").encode(model, [written("!a b c d e f g h")], max_tokens=most)
    assert ["a", " b", " c", " d", " e", " f", " g", " h", "<end>"] == [
        word for row in rows for word in trained_words(model, row)
    ]
    assert all(len(row.tokens) <= most and row.weights[0] == 0 for row in rows)
    assert rows[0].tokens[0] == BEGIN
    assert [rows[i].tokens[-1] for i in range(len(rows) - 1)] == [row.tokens[0] for row in rows[1:]]


def test_a_long_dialogue_keeps_its_turns_whole_in_the_measure(model: BigramModel) -> None:
    """Parts repeat half of the one before; a turn over two of them is one turn, and every token counts once."""
    text = written("a b", "! c d e", " f", "! g h a b")
    (whole,) = LanguageObjective("dialogue").encode(model, [text], max_tokens=50)
    parts = LanguageObjective("dialogue").encode(model, [text], max_tokens=6)
    assert len(parts) > 1
    assert trained_words(model, whole) == [word for part in parts for word in trained_words(model, part)]
    with torch.no_grad():
        model.table_VX.normal_(generator=torch.Generator().manual_seed(1))
    objective = LanguageObjective("dialogue")
    one, several = (
        {m.metric: (pytest.approx(m.value), m.rows) for m in objective.measure(model, rows)}
        for rows in ([whole], parts)
    )
    assert one["turn_loss"] == several["turn_loss"]
    assert one["turn_loss"][1] == 2
    assert one["loss"][0] == several["loss"][0]


def test_the_loss_of_turns_weighs_turns_alike(model: BigramModel) -> None:
    """Mean over turns of the mean over their tokens, here of a sure long turn and an unsure short one."""
    model.learn("a b c d e")
    objective = LanguageObjective("dialogue")
    (row,) = objective.encode(model, [written("a", "! b c d e", " f", "! g")], max_tokens=50)
    found = values(objective.measure(model, [row]))
    log_p = model.table_VX.detach().log_softmax(-1)
    losses = [-float(log_p[a, b]) for a, b in zip(row.tokens, row.targets[1:], strict=False)]
    sure, unsure = losses[1:6], losses[6:8]
    assert found["turn_loss"] == pytest.approx((sum(sure) / 5 + sum(unsure) / 2) / 2)
    assert found["loss"] == pytest.approx((sum(sure) + sum(unsure)) / 7)


def test_logits_at_chosen_places_are_those_of_all() -> None:
    """A recurrent network computes them alone."""
    architecture = AgentArchitectureFactory().get("recurrent")
    settings = {name: setting.default for name, setting in architecture.settings.items()} | {"width": 16}
    tokenizer = architecture.learn_tokenizer([WORDS], settings)
    request = BuildRequest(task="domain", adaptation=Adaptation(), seed=1, settings=settings, tokenizer=tokenizer)
    network = architecture.build(request).eval()
    batch = collate([list(encoding.tokens) for encoding in network.encode([WORDS, "a b"])])
    torch.testing.assert_close(network.logits_at(batch, batch.valid_BT), network(batch)[batch.valid_BT])


def test_answers_are_written_and_rated() -> None:
    """A model that knows one of two answers scores a half; the end token ends what it writes."""
    model = BigramModel(["q1 q2 yes no indeed"])
    model.learn("q1 yes")
    model.learn("q2 yes indeed")
    objective = LanguageObjective("question_answering")
    rows = objective.encode(
        model,
        [written("q1", "! yes", accepted=["Yes!"]), written("q2", "! no", accepted=["no", "yes"])],
        max_tokens=16,
    )
    model.table_VX.data[model.numbers[" yes"], END] = 0.0  # it always goes on
    model.table_VX.data[model.numbers[" yes"], model.numbers[" indeed"]] = 9.0
    assert [" yes indeed"] * 2 == objective.write(model, rows)
    found = {m.metric: m for m in objective.measure(model, rows)}
    assert found["exact_match"].value == 0.0
    assert found["token_f1"].value == pytest.approx(2 / 3)
    assert found["token_f1"].rows == 2


def test_answers_are_written_to_a_bounded_sample() -> None:
    """The loss is of all rows, the metrics of answers of so many, always the same ones."""
    model = BigramModel([f"q{i} yes" for i in range(9)])
    objective = LanguageObjective("question_answering", generated_rows=4, answer_tokens=3)
    rows = objective.encode(
        model, [written(f"q{i}", "! yes", accepted=["yes"]) for i in range(9)] + [written("q0", "! yes")], max_tokens=9
    )
    found = {m.metric: m.rows for m in objective.measure(model, rows)}
    assert found == {"loss": 10, "perplexity": 10, "exact_match": 4, "token_f1": 4}
    assert values(objective.measure(model, rows)) == values(objective.measure(model, rows))


def test_answers_fit_into_the_context() -> None:
    """Of a prompt that leaves no room for an answer the last tokens are read."""
    model = BigramModel(["a b c d e f yes"], context=6)
    seen: list[int] = []
    generate = model.generate

    def listen(prompts: Any, *, max_tokens: int, stop: Any = ()) -> list[list[int]]:
        seen.extend(len(prompt) for prompt in prompts)
        return generate(prompts, max_tokens=max_tokens, stop=stop)

    model.generate = listen  # type: ignore[method-assign]
    objective = LanguageObjective("question_answering", answer_tokens=3)
    rows = objective.encode(model, [written("a b c d e f", "! yes", accepted=["yes"])], max_tokens=100)
    assert len(rows[0].tokens) == 6
    objective.write(model, rows)
    assert seen == [3]


def test_calls_are_rated_as_trees_beside_never_calling() -> None:
    """One of two answers is a right call; never to call is right where no tool fits."""
    model = BigramModel(["ask [ f(x=1)]", "none"])
    model.learn("ask[f(x=1)]")
    functions = [{"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}]
    call = {"category": "simple_python", "functions": functions, "ground_truth": [{"f": {"x": [1]}}]}
    idle = {"category": "irrelevance", "functions": functions, "ground_truth": None}
    objective = LanguageObjective("tool_calling")
    rows = objective.encode(
        model, [written("ask", "![f(x=1)]", accepted=call), written("ask", "!none", accepted=idle)], max_tokens=32
    )
    assert values(objective.measure(model, rows))["ast_match"] == 0.5
    assert [("no_call_share", 0.5, 2)] == [(m.metric, m.value, m.rows) for m in objective.floor(rows)]


def demonstrations() -> list[Written]:
    turns = [("go", "search[x]"), ("go", "search[y]"), ("end", "finish[x]"), ("say", "nothing")]
    return [written(ask, f"!\nAction: {action}", accepted=action) for ask, action in turns]


def behaving() -> BigramModel:
    model = BigramModel(["go", "end", "say", "nothing\nAction: search[x] finish[y] buy[]"])
    model.learn("go\nAction: search[x]", "end\nAction: search[x]")
    return model


def test_actions_are_rated_by_kind_and_as_a_whole() -> None:
    """A model that always searches for x; turns without an action are compared with nothing."""
    model, objective = behaving(), LanguageObjective("behavioural")
    rows = objective.encode(model, demonstrations(), max_tokens=32)
    found = {m.metric: (m.value, m.rows) for m in objective.measure(model, rows) if "loss" not in m.metric}
    del found["perplexity"]
    assert found == {"action_kind_accuracy": (2 / 3, 3), "action_exact_match": (1 / 3, 3)}
    assert [("majority_share", 2 / 3, 3)] == [(m.metric, m.value, m.rows) for m in objective.floor(rows)]


def test_violations_are_of_the_named_kinds_or_those_demonstrated() -> None:
    """Without a list what was demonstrated is allowed."""
    for allowed, share in (((), 0.0), (("finish",), 1.0), (("finish", "search"), 0.0)):
        model, objective = (
            behaving(),
            LanguageObjective("behavioural", constraints=Constraints(allowed_actions=allowed)),
        )
        rows = objective.encode(model, demonstrations(), max_tokens=32)
        assert values(objective.measure(model, rows))["violation_share"] == share


def test_a_mask_leaves_the_likeliest_allowed_action() -> None:
    """The kind is chosen among the allowed ones, the rest is the model's own; what keeps to them stays as it is."""
    model = behaving()
    model.table_VX.data[model.numbers[":"], model.numbers[" buy"]] = 5.0
    model.table_VX.data[model.numbers[":"], model.numbers[" finish"]] = 6.0
    model.table_VX.data[model.numbers["["], model.numbers["x"]] = 9.0
    objective = LanguageObjective(
        "behavioural", constraints=Constraints(allowed_actions=("buy", "finish")), mask_actions=True
    )
    rows = objective.encode(model, demonstrations()[:2], max_tokens=32)
    assert ["\nAction: finish[x]"] * 2 == objective.write(model, rows)
    assert values(objective.measure(model, rows))["violation_share"] == 0.0
    objective.mask_actions = False
    assert ["\nAction: search[x]"] * 2 == objective.write(model, rows)


def test_a_turn_that_begins_no_action_is_given_one() -> None:
    """Under a mask an agent has to act."""
    model = behaving()
    prompt = encode_prompt(model, [Segment("say")], max_tokens=8)
    assert prompt == [BEGIN, model.numbers["say"]]
    writer = ModelWriter(model, max_tokens=4)
    assert masked_action(writer, prompt, "nothing", ["search"]) == "nothing\nAction: search[x]"
    assert masked_action(writer, prompt, "nothing", []) == "nothing"


def test_the_divergence_from_the_untrained_model_is_zero_before_training() -> None:
    """And it grows with a change, pulls back towards the base, and leaves the loss alone without a weight."""
    model = behaving()
    objective = LanguageObjective("behavioural", constraints=Constraints())
    rows = objective.prepare(model.eval(), objective.encode(model, demonstrations(), max_tokens=32))
    batch = objective.batch(rows)
    units = objective.units(batch)
    before = objective.loss(model, batch)
    assert objective.rates(before.counts, units)["kl_to_base"] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        model.table_VX.add_(torch.randn(model.table_VX.shape, generator=torch.Generator().manual_seed(1)))
    plain = objective.loss(model, batch)
    kl = objective.rates(plain.counts, units)["kl_to_base"]
    assert kl > 0.01
    objective.kl_weight = 2.0
    held = objective.loss(model, batch)
    assert float((held.mean - plain.mean).detach()) == pytest.approx(2 * kl, rel=1e-4)


def test_the_divergence_is_a_lower_bound_of_the_whole() -> None:
    """Against the full sum over a vocabulary that is larger than what is kept of it."""
    model = BigramModel([" ".join(f"w{i}" for i in range(60))])
    with torch.no_grad():
        model.table_VX.normal_(generator=torch.Generator().manual_seed(1))
    objective = LanguageObjective("domain", kl_weight=1.0)
    rows = objective.prepare(model.eval(), objective.encode(model, [written("!w1 w2 w3")], max_tokens=8))
    base = model.table_VX.detach().log_softmax(-1)
    with torch.no_grad():
        model.table_VX.normal_(generator=torch.Generator().manual_seed(2))
    own = model.table_VX.detach().log_softmax(-1)
    last = rows[0].tokens[:-1]
    full = float((base[last].exp() * (base[last] - own[last])).sum(-1).mean())
    batch = objective.batch(rows)
    kl = objective.rates(objective.loss(model, batch).counts, objective.units(batch))["kl_to_base"]
    assert 0.3 * full < kl < full
