"""The real sets, every row of them: measured counts, and each trap that they are known for."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agent_server.data.calls import literal
from agent_server.data.examples import PreparedData, Written
from agent_server.objectives.metrics.actions import parse_action
from agent_server.objectives.metrics.calls import ast_match
from tests.agent.data_support import prepare
from tests.data_fixtures import figures, real_data

FIREACT = "agent/fireact/multitask_multimethod.jsonl"
BFCL = "agent/bfcl/single_and_multi_turn.jsonl"
PUBMEDQA = "agent/pubmedqa/ori_pqal.jsonl"
SGD = "agent/sgd"


def _all(data: PreparedData[Any]) -> list[Any]:
    return [*data.train, *data.validation, *data.test]


def _rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _answers(rows: Sequence[Written]) -> list[str]:
    return [row.segments[-1].text for row in rows]


def test_fireact_tells_success_in_two_spellings() -> None:
    """42 of its trajectories failed, one is there twice, and what nobody did is not learnt."""
    folder = real_data()
    expected = figures(folder)["agent"]["fireact"]
    failed = expected["reward_False"] + expected["reward_0"]
    data = prepare(folder, "behavioural", FIREACT)
    assert (expected["rows"], 0, {"repeated_text": 1}) == (
        data.report.rows_read, data.report.rows_refused, data.report.left_out,
    )  # fmt: skip
    succeeded = expected["reward_1"] + expected["reward_True"]
    assert {"0": failed, "1": succeeded - 1} == data.manifest.facts["rewards"]
    assert {"search", "finish"} == set(_kinds(data))
    # Of 3,880 turns under the assistant's name eight do not act: five of them are the environment's.
    assert 8 == data.manifest.facts["turns_without_action"]
    assert not any(" Observation:" in answer[:14] for answer in _answers(_all(data)))
    good = prepare(folder, "behavioural", FIREACT, successes_only=True)
    assert {"no_success": failed, "repeated_text": 1} == good.report.left_out
    weighted = prepare(folder, "behavioural", FIREACT, weight_by_reward=True)
    assert {0.0, 1.0} == {row.weight for row in _all(weighted)}
    assert sum(row.weight == 0 for row in _all(weighted)) == len(_all(data)) - len(_all(good))


def _kinds(data: PreparedData[Written]) -> dict[str, int]:
    kinds: Any = data.manifest.facts["action_kinds"]
    return dict(kinds)


def test_fireact_keeps_each_question_in_one_split() -> None:
    """263 questions have several trajectories; two begin with the agent, and five do not alternate."""
    folder = real_data()
    data = prepare(folder, "behavioural", FIREACT)
    expected = figures(folder)["agent"]["fireact"]
    asked = [
        {row.segments[0].text.partition("\nAgent:")[0].removeprefix("User: ") for row in part}
        for part in (data.train, data.validation, data.test)
    ]
    assert not (asked[0] - {""}) & asked[1] | (asked[0] - {""}) & asked[2] | asked[1] & asked[2]
    first = [row for row in _all(data) if row.segments[0].text == "Agent:"]
    assert expected["first_role_assistant"] == len(first)
    turns = Counter(len(row["messages"]) for row in _rows(folder / FIREACT))
    assert 25 == max(turns)


def test_fireacts_actions_are_those_that_the_metric_reads() -> None:
    """What a turn is trained to write is what it is measured by."""
    data = prepare(real_data(), "behavioural", FIREACT)
    for row in _all(data):
        assert parse_action(row.segments[-1].text) == parse_action(str(row.accepted)) is not None


def test_sgd_has_every_span_of_both_speakers() -> None:
    """The schemas beside the dialogues are no rows, and every span says one of its turn's action values."""
    folder = real_data()
    expected = figures(folder)["agent"]["sgd"]
    data = prepare(folder, "extraction", SGD)
    dialogues = expected["train_dialogues"] + expected["dev_dialogues"]
    assert (dialogues, dialogues, {}) == (data.report.rows_read, data.report.rows_kept, data.report.left_out)
    assert expected["train_dialogues"] == data.manifest.rows["train"]
    tagged = _all(data)
    assert expected["slot_spans"] == sum(len(row.spans) for row in tagged)
    values = [
        {value for frame in turn["frames"] for action in frame["actions"] for value in action["values"]}
        for name in ("train_sample.jsonl", "dev_sample.jsonl")
        for row in _rows(folder / SGD / name)
        for turn in row["turns"]
    ]
    spoken = {value for turn in values for value in turn}
    assert all(row.text[span.start : span.end] in spoken for row in tagged for span in row.spans)
    assert len(values) == len(tagged)
    slots: Any = data.manifest.facts["slots_without_training"]
    assert set(slots) < set(data.labels)


def test_sgd_is_measured_on_half_of_its_development_dialogues() -> None:
    """The system's turns are trained, the user's are not, and a dialogue is in one split."""
    folder = real_data()
    expected = figures(folder)["agent"]["sgd"]
    data = prepare(folder, "dialogue", SGD)
    assert expected["train_dialogues"] == len(data.train)
    assert expected["dev_dialogues"] == len(data.validation) + len(data.test)
    assert "halved_validation" == data.manifest.facts["test_rows"]
    system = sum(
        turn["speaker"] == "SYSTEM"
        for name in ("train_sample.jsonl", "dev_sample.jsonl")
        for row in _rows(folder / SGD / name)
        for turn in row["turns"]
    )
    assert system == sum(piece.trained for row in _all(data) for piece in row.segments)
    alone = prepare(folder, "dialogue", f"{SGD}/train_sample.jsonl")
    assert ("hashed", expected["train_dialogues"]) == (alone.manifest.facts["test_rows"], alone.report.rows_kept)


def test_pubmedqas_documents_keep_their_separators() -> None:
    """A row with a paragraph separator is one row."""
    folder = real_data()
    expected = figures(folder)["agent"]["pubmedqa"]
    data = prepare(folder, "domain", PUBMEDQA)
    assert (expected["rows"], expected["official_test"]) == (data.report.rows_kept, len(data.test))
    raw = (folder / PUBMEDQA).read_text(encoding="utf-8")
    assert expected["rows"] + 1 == len(raw.splitlines())
    assert 1 == sum(row.segments[0].text.count("\u2029") for row in _all(data)) == raw.count("\u2029")


def test_bfcls_written_calls_are_accepted_by_the_metric() -> None:
    """Of every category: the calls that are learnt are right answers, and no call is right where none fits."""
    folder = real_data()
    expected = figures(folder)["agent"]["bfcl"]
    data = prepare(folder, "tool_calling", BFCL)
    assert (expected["rows"], expected["rows"], 0) == (
        data.report.rows_read, data.report.rows_kept, data.report.rows_refused,
    )  # fmt: skip
    assert {name: count for name, count in expected.items() if name != "rows"} == data.manifest.facts["categories"]
    rows = _all(data)
    wrong = [row for row in rows if not ast_match(row.segments[-1].text, _accepted(row))]
    assert [] == wrong
    counted = Counter(str(_accepted(row)["category"]) for row in rows)
    assert expected["simple_java"] == counted["simple_java"]
    assert counted["multi_turn_base"] > 3 * expected["multi_turn_base"]
    assert expected["irrelevance"] == sum(_accepted(row)["ground_truth"] is None for row in rows)
    assert ["multi_turn_func_doc.jsonl", "single_and_multi_turn.jsonl"] == [
        file["name"] for file in data.manifest.files
    ]


def _accepted(row: Written) -> dict[str, Any]:
    accepted: Any = row.accepted
    return dict(accepted)


def test_bfcls_requests_are_in_one_split_each() -> None:
    """The same words with other tools are other rows of the same split; the types of tools are left as they are."""
    folder = real_data()
    data = prepare(folder, "tool_calling", BFCL)
    asked = [
        {row.segments[0].text.partition("\nUser: ")[2].removesuffix("\nAgent:").casefold() for row in part}
        for part in (data.train, data.validation, data.test)
    ]
    assert all(not one & other for one, other in itertools.combinations(asked, 2))
    rows = list(_rows(folder / BFCL))
    texts = Counter(" ".join(message["content"] for turn in row["question"] for message in turn) for row in rows)
    assert sum(count > 1 for count in texts.values()) > 50
    types = {"dict", "float", "any", "tuple", "HashMap"}
    prompts = "".join(row.segments[0].text for row in data.train)
    assert all(f'"type":{literal(name)}' in prompts for name in types)
