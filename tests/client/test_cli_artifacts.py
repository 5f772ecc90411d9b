"""Lists by filter and order, cards, comparisons and exports of the forge command, against a real server."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from cognateforge.agent.v1 import agent_pb2
from cognateforge.artifact.v1 import artifact_pb2, storage_pb2
from cognateforge.cli.diff import agent_facts, compare, model_facts
from cognateforge.exchange.v1 import model_pb2
from tests.client.fakes import CARD, Fake, FakeAgents
from tests.client.test_cli import Forge

DIGEST = f"sha256:{'a' * 64}"
FILTERS = (
    *("--family", "cognate-25m", "--data", "gsm8k", "--result", "gsm8k_exact_match@gsm8k/validation>=0.1"),
    *("--result", "validation_loss <= 3", "--since", "2d", "--before", "2027-01-01T00:00:00Z"),
    *("--tier", "archive", "--tier", "standard", "--pinned", "--damaged"),
)


@pytest.fixture
def forge(fake: Fake) -> Forge:
    """The command line, pointed at the fake server."""
    return Forge(fake.address)


def asked(fake: Fake) -> Any:
    return fake.script.calls[-1].request


def test_texts_of_others_do_not_command_a_terminal(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label or a set's name may hold what clears a screen, turns a line around, or is markup to the table's maker."""
    evil = "\x1b[2J\x9b1m\u202e[/bold][link=x]name"
    agent = agent_pb2.Agent(name="intent-router@3", digest=DIGEST, labels=[evil], task=evil)
    monkeypatch.setattr(FakeAgents, "_agent", lambda _self: agent)
    told = [
        forge("agent", "intent-router@3"),
        forge("agents"),
        forge("agents", "diff", "intent-router@3", "intent-router@3", "--all"),
        forge("agent", "intent-router@3", "--json"),
    ]
    for result in told:
        assert 0 == result.exit_code
        assert "[/bold][link=x]name" in result.stdout
        assert not {"\x1b", "\x9b", "\u202e"} & {*result.stdout}
    assert [evil] == json.loads(told[-1].stdout)["labels"]


@pytest.mark.parametrize("command", ["pin", "unpin", "archive", "restore", "collect"])
@pytest.mark.parametrize("name", ["cognate-25m", "router@production", "cognate-25m@0", "../x@1"])
def test_what_is_no_version_is_told_in_words(forge: Forge, fake: Fake, command: str, name: str) -> None:
    """A family, an alias and what can be no name are refused before a server answers with its pattern."""
    result = forge("artifacts", command, name)
    assert 2 == result.exit_code
    assert "is no version: give its family and number, as in cognate-25m@7" in " ".join(
        result.stderr.replace("\u2502", "").split()
    )
    assert [] == fake.script.calls


def test_a_file_of_a_strange_name_does_not_command_a_terminal(forge: Forge, tmp_path: Path) -> None:
    """Whoever is asked to verify a folder does not know yet whom it is from."""
    (tmp_path / "manifest.json").write_bytes(b'{"name":"x\\u001b[2J@1","schema":"cognateforge.manifest/1","files":[]}')
    (tmp_path / "\x07\x1b[2Jstranger").write_bytes(b"")
    result = forge("verify", str(tmp_path), "--public-key", "nothing.pem")
    assert 0 != result.exit_code
    assert not {"\x1b", "\x07"} & {*result.stderr}
    assert "stranger" in result.stderr


@pytest.mark.parametrize("command", [("models",), ("models", "list"), ("agents",), ("agents", "list")])
def test_a_list_is_asked_for_by_filter_and_order(forge: Forge, fake: Fake, command: tuple[str, ...]) -> None:
    """Every option is a field of the request; without any, none is set but the order."""
    before_s = time.time()
    assert 0 == forge(*command, *FILTERS, "--order", "size", "--ascending").exit_code
    request = asked(fake)
    wanted = request.filter
    assert (request.family, wanted.data, wanted.data_digest) == ("cognate-25m", "gsm8k", "")
    assert (wanted.pinned, wanted.damaged) == (True, True)
    assert [storage_pb2.TIER_ARCHIVE, storage_pb2.TIER_STANDARD] == list(wanted.tiers)
    assert [
        artifact_pb2.ResultFilter(metric="gsm8k_exact_match", dataset="gsm8k/validation", at_least=0.1),
        artifact_pb2.ResultFilter(metric="validation_loss", at_most=3),
    ] == list(wanted.results)
    assert -2 < wanted.create_time_from.ToSeconds() - (before_s - 2 * 86_400) < 60
    assert "2027-01-01T00:00:00Z" == wanted.create_time_before.ToJsonString()
    assert (artifact_pb2.ORDER_KEY_SIZE, True) == (request.order.key, request.order.ascending)
    forge(*command, "--data", DIGEST)
    assert (asked(fake).filter.data, asked(fake).filter.data_digest) == ("", DIGEST)
    forge(*command)
    assert artifact_pb2.ArtifactFilter() == asked(fake).filter
    assert artifact_pb2.ArtifactOrder(key=artifact_pb2.ORDER_KEY_CREATE_TIME) == asked(fake).order


def test_lists_have_filters_of_their_own(forge: Forge, fake: Fake) -> None:
    """Models their state; agents task, lifecycle and the model they were made of."""
    forge("models", "--state", "ready", "--state", "experimental")
    assert [model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_EXPERIMENTAL] == list(asked(fake).states)
    forge("agents", "--foundation", "cognate-25m@7", "--task", "dialogue", "--lifecycle", "draft")
    request = asked(fake)
    assert ("cognate-25m@7", "dialogue") == (request.foundation, request.task)
    assert [agent_pb2.LIFECYCLE_DRAFT] == list(request.lifecycles)


def test_a_list_by_a_result_shows_it(forge: Forge, fake: Fake) -> None:
    """In a column of its own."""
    lines = forge("models", "--order", "gsm8k_exact_match@gsm8k/validation").stdout.splitlines()
    assert lines[0].rstrip().endswith("gsm8k_exact_match")
    assert "0.125" == lines[1].split()[-1]
    order = asked(fake).order
    expected = (artifact_pb2.ORDER_KEY_RESULT, "gsm8k_exact_match", "gsm8k/validation", False)
    assert expected == (order.key, order.metric, order.dataset, order.ascending)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--result", "accuracy", "METRIC>=VALUE"),
        ("--result", "accuracy>0.5", "METRIC>=VALUE"),
        ("--result", "accuracy>=much", "METRIC>=VALUE"),
        ("--result", "accuracy>=nan", "METRIC>=VALUE"),
        ("--result", "accuracy@>=1", "METRIC>=VALUE"),
        ("--order", "accuracy", "created, size, or METRIC@SET"),
        ("--order", "accuracy@", "created, size, or METRIC@SET"),
        ("--since", "yesterday", "how long ago"),
        ("--before", "5x", "how long ago"),
        ("--family", "Cognate", "is no name"),
    ],
)
def test_what_cannot_be_asked_is_told_in_words(forge: Forge, fake: Fake, option: str, value: str, told: str) -> None:
    """The option is named, with what it takes, and no server is asked."""
    result = forge("models", option, value)
    assert 2 == result.exit_code
    words = " ".join(result.stderr.split())
    assert told in words
    assert option in words
    assert [] == [call for call in fake.script.calls if call.method == "ListModels"]


def test_a_card_is_shown(forge: Forge, fake: Fake) -> None:
    """Rendered for a reader, as it is for a program; of a model or an agent, whichever has the name."""
    shown = forge("card", "cognate-25m@7").stdout
    assert "A card" in shown
    assert "| --- |" not in shown
    assert CARD == forge("card", "cognate-25m@7", "--raw").stdout
    assert [{"name": "intent-router@3", "markdown": CARD}] == forge.json("card", "intent-router@3", "--kind", "agent")


def test_an_export_is_made_of_a_name_or_a_folder(forge: Forge, fake: Fake, tmp_path: Path) -> None:
    """What is fetched for it goes again; a folder that was fetched stays."""
    out = tmp_path / "image.tar"
    [told] = forge.json("export", "cognate-25m@7", "--format", "oci", "--out", str(out))
    assert (told["name"], told["path"], told["size_bytes"]) == ("cognate-25m@7", str(out), out.stat().st_size)
    with tarfile.open(out) as tar:
        assert {"oci-layout", "index.json"} <= set(tar.getnames())
    forge("fetch", "cognate-25m@7", "--out", str(tmp_path / "fetched"))
    again = forge("export", str(tmp_path / "fetched"), "--format", "oci", "--tar", "--out", str(tmp_path / "b"))
    assert f"{tmp_path / 'b'}\n" == again.stdout
    assert out.read_bytes() == (tmp_path / "b").read_bytes()
    forge("export", str(tmp_path / "fetched"), "--format", "folder", "--out", str(tmp_path / "folder"))
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == {p.name for p in (tmp_path / "folder").iterdir()}
    assert {"image.tar", "b", "fetched", "folder"} == {path.name for path in tmp_path.iterdir()}
    asked_before = len(fake.script.calls)
    for taken in (out, tmp_path / ".."):
        refused = forge("export", "cognate-25m@7", "--format", "oci", "--out", str(taken))
        assert (13, True) == (refused.exit_code, "is there already" in refused.stderr)
    assert asked_before == len(fake.script.calls)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("A B", "--format", "oci"), 2, "is no name"),
        (("nothing", "--format", "oci"), 3, "no model nothing"),
        (("cognate-25m", "--format", "folder", "--tar"), 2, "is for --format oci"),
        (("cognate-25m", "--format", "folder", "--licence", "MIT"), 2, "is for --format oci"),
    ],
)
def test_an_export_that_cannot_be_made_leaves_nothing(
    forge: Forge, tmp_path: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    """The reason is told, and no file is left."""
    result = forge("export", *words, "--out", str(tmp_path / "out"))
    assert (code, True) == (result.exit_code, told in result.stderr), result.stderr
    assert [] == list(tmp_path.iterdir())


def model(version: int, **more: Any) -> model_pb2.FoundationModel:
    made: dict[str, Any] = {
        "name": f"cognate-25m@{version}",
        "state": model_pb2.MODEL_STATE_READY,
        "digest": DIGEST,
        "architecture": model_pb2.Architecture(name="cognate_v1", parameter_count=7),
        "steps": 100,
        "data": [artifact_pb2.DataSource(name="gsm8k", kind="folder", rows=9, digest=DIGEST)],
        "checks": [artifact_pb2.Check(name="memory_gain_nats", value=0.5, passed=True)],
        "results": [artifact_pb2.Result(metric="validation_loss", dataset="gsm8k/validation", value=2.5, rows=16)],
        "files": [artifact_pb2.File(path="data.json", size_bytes=1, digest=DIGEST)],
    }
    return model_pb2.FoundationModel(**{**made, **more})


def test_two_models_are_compared_field_by_field() -> None:
    """Data, settings, results with their difference, checks, files, recoveries: what was added, removed or changed."""
    manifest: dict[str, Any] = {
        "training": {"seed": 1, "peak_learning_rate": 0.002, "curriculum": {"steps": 5}, "validation": {"loss": 2.5}},
        "grokfast": {"alpha": 0.98, "lambda": 2.0, "departures": []},
        "code": {"version": "1", "digest": DIGEST},
    }
    other = {**manifest, "training": {**manifest["training"], "seed": 2, "curriculum": None}}
    other["recovery"] = [{"step": 4, "detector": "loss_spike", "action": "lower lambda"}]
    right = model(
        8,
        steps=150,
        checks=[artifact_pb2.Check(name="memory_gain_nats", value=-0.25, passed=False)],
        results=[artifact_pb2.Result(metric="validation_loss", dataset="gsm8k/validation", value=2.25, rows=16)],
        files=[artifact_pb2.File(path="README.md", size_bytes=1, digest=DIGEST)],
    )
    found = compare(model_facts(model(7), manifest), model_facts(right, other))
    changed = [
        (one.section, one.field, one.a, one.b, one.change, one.difference) for one in found if one.change != "same"
    ]
    assert changed == [
        ("version", "name", "cognate-25m@7", "cognate-25m@8", "changed", None),
        ("training", "steps", 100, 150, "changed", 50),
        ("training", "seed", 1, 2, "changed", 1),
        ("training", "curriculum.steps", 5, None, "removed", None),
        ("training", "curriculum", None, None, "added", None),
        ("result", "validation_loss@gsm8k/validation", 2.5, 2.25, "changed", -0.25),
        ("check", "memory_gain_nats", 0.5, -0.25, "changed", -0.75),
        ("check", "memory_gain_nats passed", True, False, "changed", None),
        ("file", "data.json", DIGEST, None, "removed", None),
        ("file", "README.md", None, DIGEST, "added", None),
        ("recovery", "1", None, "step 4: loss_spike, lower lambda", "added", None),
    ]
    same = {(one.section, one.field) for one in found if one.change == "same"}
    assert {("architecture", "parameter_count"), ("data", "gsm8k rows"), ("grokfast", "lambda")} <= same
    # What validation measured is told once, as a result.
    assert not [one for one in found if one.field.startswith("validation.")]


def test_two_agents_are_compared_field_by_field() -> None:
    """The newest of several results with one name stands; without a manifest, what the service tells is compared."""

    def agent(version: int, *values: float, **more: Any) -> agent_pb2.Agent:
        measured = [agent_pb2.Evaluation(metric="accuracy", dataset="toy/test", value=value) for value in values]
        return agent_pb2.Agent(name=f"router@{version}", task="classification", evaluations=measured, **more)

    left = agent(1, 0.25, 0.5, foundation="cognate-25m@7", labels=["a"])
    right = agent(2, 0.75, foundation="cognate-25m@8", labels=["a", "b"], lifecycle=agent_pb2.LIFECYCLE_DRAFT)
    found = [one for one in compare(agent_facts(left, {}), agent_facts(right, {})) if one.change != "same"]
    assert [("accuracy@toy/test", 0.5, 0.75, 0.25)] == [
        (one.field, one.a, one.b, one.difference) for one in found if one.section == "result"
    ]
    fields = ["name", "lifecycle", "labels", "foundation", "accuracy@toy/test"]
    assert fields == [one.field for one in found]


def test_the_commands_show_what_differs(forge: Forge, fake: Fake) -> None:
    """Nothing of a version and itself, all of it where that is asked for; a service without provenance is enough."""
    assert [] == forge.json("models", "diff", "cognate-25m@7", "cognate-25m")
    assert [] == forge.json("agents", "diff", "intent-router@3", "intent-router@production")
    everything = forge.json("models", "diff", "cognate-25m@7", "cognate-25m@7", "--all")
    assert {"same"} == {line["change"] for line in everything}
    [result] = [line for line in everything if line["section"] == "result"]
    assert {"a": 0.125, "b": 0.125} == {name: result[name] for name in ("a", "b")}
    table = forge("models", "diff", "cognate-25m@7", "cognate-25m@7", "--all").stdout
    assert "gsm8k_exact_match@gsm8k/validation" in table
    assert 3 == forge("models", "diff", "cognate-25m@7", "nothing").exit_code
    assert json.loads(forge("agents", "diff", "nobody", "nobody", "--json").stderr)["reason"] == "AGENT_NOT_FOUND"
