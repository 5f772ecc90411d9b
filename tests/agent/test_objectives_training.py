"""Every text task through the trainer, on a tiny Cognate: it is learnt, and a resumed run is the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from agent_server.adaptation import Adaptation, Lora
from agent_server.architectures.cognate_model import BEGIN, END, CognateTagger, CognateWriter, build, load
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentModel, collate
from agent_server.data.examples import Preferred, Segment, Span, Tagged, Written, texts_of
from agent_server.metrics import EVALUATIONS, METRICS
from agent_server.objectives import build as objectives
from agent_server.objectives.language import LanguageObjective
from agent_server.optim import Optimization
from agent_server.runtime.run import Agent
from agent_server.train_config import AgentTrainConfig, Constraints
from agent_server.trainer import train_agent
from cognateforge.exceptions import IncompatibleError
from tests.agent._support import TINY, Rows, ToldAttempt, factory, measured, prepared, write_foundation
from training_common.attempt import AttemptStopped

_COLOURS = ("red", "green", "blue", "white")
_CITIES = ("Rome", "New York", "Oslo")


def _written(prompt: str, answer: str, accepted: Any = None) -> Written:
    return Written((Segment(prompt), Segment(answer, trained=True)), accepted=accepted)


def _answers() -> list[Written]:
    return [
        _written(
            f"Question: which colour has {_COLOURS[i % 4]} paint?\nAnswer:", f" {_COLOURS[i % 4]}", [_COLOURS[i % 4]]
        )
        for i in range(40)
    ]


def _calls() -> list[Written]:
    functions = [{"name": "paint", "parameters": {"properties": {"in": {"type": "string"}}, "required": ["in"]}}]
    return [
        _written(
            f"Paint it {_COLOURS[i % 4]}.\n",
            f"[paint(in='{_COLOURS[i % 4]}')]",
            {
                "category": "simple_python",
                "functions": functions,
                "ground_truth": [{"paint": {"in": [_COLOURS[i % 4]]}}],
            },
        )
        for i in range(40)
    ]


def _actions() -> list[Written]:
    actions = [
        (f"find {c}", f"search[{c}]") if i % 2 else (f"take {c}", f"finish[{c}]") for i, c in enumerate(_COLOURS)
    ]
    return [_written(f"Task: {ask}\n", f"Thought: so.\nAction: {do}", do) for ask, do in actions * 10]


def _dialogues() -> list[Written]:
    return [
        Written(
            (
                Segment("User: hello\nAgent:"),
                Segment(" good day", trained=True),
                Segment(f"\nUser: one {_COLOURS[i % 4]} please\nAgent:"),
                Segment(f" here is {_COLOURS[i % 4]}", trained=True),
            )
        )
        for i in range(40)
    ]


def _documents() -> list[Written]:
    return [
        Written((Segment(f"The {_COLOURS[i % 4]} house is {_COLOURS[i % 4]}. " * 6, trained=True),)) for i in range(40)
    ]


def _spans() -> list[Tagged]:
    rows = []
    for i in range(60):
        text, city = f"a flight to {_CITIES[i % 3]} on day {i % 5}", _CITIES[i % 3]
        rows.append(Tagged(text, (Span(12, 12 + len(city), "city"), Span(len(text) - 1, len(text), "day"))))
    return rows


def _pairs() -> list[Preferred]:
    return [Preferred(f"Say {_COLOURS[i % 4]}:", f" {_COLOURS[i % 4]}", " grey") for i in range(40)]


def data_of(task: str) -> Rows:
    makers: Mapping[str, Callable[[], list[Any]]] = {
        "behavioural": _actions,
        "dialogue": _dialogues,
        "domain": _documents,
        "question_answering": _answers,
        "tool_calling": _calls,
        "extraction": _spans,
        "preference": _pairs,
    }
    examples = makers[task]()
    labels = ("city", "day") if task == "extraction" else ()
    return prepared(examples[:-12], examples[-8:], examples[-12:-8], labels=labels)


TASKS = ("behavioural", "dialogue", "domain", "question_answering", "tool_calling", "extraction", "preference")
CONFIG = AgentTrainConfig(
    agent="toy",
    total_steps=32,
    batch_size=8,
    seed=3,
    adaptation=Adaptation(),
    optimization=Optimization(lr=1e-2),
    checkpoint_interval_steps=12,
    progress_interval_steps=5,
    validation_interval_steps=24,
    evaluation_rows=8,
    max_tokens=64,
)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Cognate on disk, whose tokenizer has the tokens that texts begin and end with."""
    texts = [text for task in TASKS for text in texts_of(data_of(task).train)]
    folder = write_foundation(tmp_path_factory.mktemp("objectives") / "foundation", texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BEGIN, END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these tasks has an answer of more tokens than this; an untrained model would go on for long."""
    monkeypatch.setattr(objectives, "LanguageObjective", functools.partial(LanguageObjective, answer_tokens=32))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_learnt_and_goes_on_bit_for_bit(foundation: Path, tmp_path: Path, task: str) -> None:
    """The loss on test rows falls, the task's score rises; paused and resumed, weights and figures are the same."""
    config, data = dataclasses.replace(CONFIG, task=task), data_of(task)
    if task == "behavioural":
        config = dataclasses.replace(config, constraints=Constraints())
    attempt = ToldAttempt(tmp_path / "whole")
    whole = train_agent(config, foundation, data, attempt, factory=factory())
    found = measured(whole)
    assert found["loss_after"] < 0.6 * found["loss_before"]
    scores = {
        "behavioural": "action_kind_accuracy",
        "question_answering": "token_f1",
        "tool_calling": "ast_match",
        "extraction": "slot_f1",
        "preference": "preference_accuracy",
    }
    if task in scores:
        assert found[f"{scores[task]}_after"] > 0.9 > found[f"{scores[task]}_before"]
    assert set(found) <= EVALUATIONS.keys()
    assert {name for _, metrics in attempt.rows for name in metrics} <= METRICS.keys()
    assert ["rows_encoded"] == [kind for kind, _ in attempt.events]

    cut = ToldAttempt(tmp_path / "cut", stop_at=10)
    with pytest.raises(AttemptStopped):
        train_agent(config, foundation, data, cut, factory=factory())
    torch.rand(7)
    resumed = train_agent(config, foundation, data, dataclasses.replace(cut, stop_at=None), factory=factory())
    expected, got = (safetensors.torch.load_file(run.folder / "model.safetensors") for run in (whole, resumed))
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert whole.evaluations == resumed.evaluations


def test_low_rank_updates_learn_to_write(foundation: Path, tmp_path: Path) -> None:
    """Merged on export, read back, and able to answer."""
    config = dataclasses.replace(
        CONFIG, task="question_answering", adaptation=Adaptation(lora=Lora(rank=4)), optimization=Optimization(lr=3e-2)
    )
    result = train_agent(config, foundation, data_of("question_answering"), ToldAttempt(tmp_path), factory=factory())
    found = measured(result)
    assert found["loss_after"] < 0.7 * found["loss_before"]
    model = load(result.folder)
    assert isinstance(model, CognateWriter)
    objective = LanguageObjective("question_answering", answer_tokens=8)
    example = data_of("question_answering").test[0]
    written = objective.write(model, objective.encode(model, [example], max_tokens=64))
    answer = Agent(result.folder).answer(example.segments[0].text, max_new_tokens=8)
    assert [answer["answer"]] == written


def test_an_agent_that_writes_goes_on_with_another_task(foundation: Path, tmp_path: Path) -> None:
    """Documents first, dialogues next: the second begins where the first ended, and what is forgotten is measured."""
    domain = dataclasses.replace(CONFIG, task="domain", total_steps=10)
    first = train_agent(domain, foundation, data_of("domain"), ToldAttempt(tmp_path / "first"), factory=factory())
    dialogue = dataclasses.replace(CONFIG, task="domain", total_steps=10, rehearsal_share=0.25)
    result = train_agent(
        dialogue,
        None,
        data_of("dialogue"),
        ToldAttempt(tmp_path / "second"),
        agent_dir=first.folder,
        rehearsal=data_of("domain"),
        factory=factory(),
    )
    found = measured(result)
    assert found["earlier_loss_before"] == measured(first)["loss_after"]
    assert found["forgetting"] == found["earlier_loss_after"] - found["earlier_loss_before"]


def writer(foundation: Path) -> AgentModel:
    return build(BuildRequest(task="dialogue", adaptation=Adaptation(), seed=1, base_dir=foundation)).eval()


def test_a_writer_is_the_foundation_with_its_memory(foundation: Path) -> None:
    """Its log probabilities are the foundation's own, at chosen places too, and choose what is written."""
    model = writer(foundation)
    assert isinstance(model, CognateWriter)
    encodings = model.encode(["The red house is red. " * 4, "The blue house"])
    prompts = [[model.begin_token, *encoding.tokens] for encoding in encodings]
    batch = collate(prompts)
    with torch.no_grad():
        log_p_BTV = model(batch)
        output = model.foundation(batch.tokens_BT, valid_BT=batch.valid_BT)
        expected_BTV = model.foundation.log_probabilities(output.hidden_BTD, output.recall)
        at_NV = model.logits_at(batch, batch.valid_BT)
    torch.testing.assert_close(log_p_BTV[batch.valid_BT], expected_BTV[batch.valid_BT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_p_BTV[batch.valid_BT], at_NV, atol=1e-6, rtol=1e-6)
    written = model.generate(prompts, max_tokens=12)
    assert written == AgentModel.generate(model, prompts, max_tokens=12)
    stop = written[0][3]
    assert model.generate(prompts[:1], max_tokens=12, stop=[stop])[0] == written[0][: written[0].index(stop)]
    assert model.decode([model.begin_token, *encodings[1].tokens, model.end_token]) == "The blue house"


def test_a_writers_memory_is_trained_through(foundation: Path) -> None:
    """What the memory recalls has a gradient without a NaN, and it is that of the mixture."""
    model = writer(foundation)
    batch = collate([[model.begin_token, *model.encode(["The red house is red. " * 6])[0].tokens]])
    loss = -model(batch)[:, :-1].gather(-1, batch.tokens_BT[:, 1:, None]).mean()
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
    weight = model.base_model().head.weight  # type: ignore[union-attr]
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_a_tagger_sees_one_token_ahead_and_no_padding(foundation: Path) -> None:
    """A token's logits depend on the next token, not on what follows it, and not on the rows beside it."""
    request = BuildRequest(task="extraction", adaptation=Adaptation(), seed=1, base_dir=foundation, labels=("city",))
    model = build(request).eval()
    assert isinstance(model, CognateTagger)
    row = list(model.encode(["a flight to Rome on day 2"])[0].tokens)
    with torch.no_grad():
        alone = model(collate([row]))[0]
        beside = model(collate([row, row * 2]))[0, : len(row)]
        changed = model(collate([[*row[:-1], row[0]]]))[0]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[:-2], changed[:-2], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(alone[-2], changed[-2])
    assert alone.shape == (len(row), 3)


def test_a_tokenizer_without_its_control_tokens_is_refused(tmp_path: Path) -> None:
    """Without them a text neither begins nor ends."""
    folder = write_foundation(tmp_path / "bare", ["a b c"])
    with pytest.raises(IncompatibleError, match="tokenizer lacks"):
        build(BuildRequest(task="domain", adaptation=Adaptation(), seed=1, base_dir=folder))
