"""Pages that repeat what the code says are held to the code."""

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import ServiceDescriptorProto
from google.rpc import code_pb2

from agent_server.metrics import FLOORS, MEASURED
from cognateforge._vendor.buf.validate import validate_pb2
from cognateforge.errors.v1 import reasons_pb2
from cognateforge.policy.v1 import policy_pb2
from tools import contract_doc, metrics_doc

ROOT = Path(__file__).resolve().parent.parent


def test_the_metrics_page_is_fresh() -> None:
    """docs/metrics.md is what the tables of both services render to."""
    assert metrics_doc.render() == metrics_doc.TARGET.read_text(encoding="utf-8"), "run `make docs` and commit it"


def test_every_measured_metric_is_defined() -> None:
    """The names that are measured are those of the tables: read from the sources of all that measures."""
    server = ROOT / "agent_server"
    sources = [*(server / "objectives").glob("*.py"), *(server / "rl").glob("*.py"), server / "measurements.py"]
    text = "\n".join(source.read_text(encoding="utf-8") for source in [*sources, server / "evaluate.py"])
    defined = {*MEASURED, *FLOORS}
    assert set(re.findall(r'metric="([a-z0-9_]+)"', text)) <= defined
    assert [name for name in defined if f'"{name}"' not in text] == []


def test_the_reference_is_fresh() -> None:
    """docs/reference.md is what the committed descriptors render to."""
    assert contract_doc.render() == contract_doc.TARGET.read_text(encoding="utf-8"), "run `make docs` and commit it"


def test_the_reference_lists_every_reason() -> None:
    """The table of reasons is the contract's own, row by row and in its order: read here without the page's writer."""
    expected = []
    for value in reasons_pb2.Reason.DESCRIPTOR.values:
        if value.number == reasons_pb2.REASON_UNSPECIFIED:
            continue
        info = value.GetOptions().Extensions[reasons_pb2.info]
        again = "yes" if info.retryable else "-"
        name, status = value.name.removeprefix("REASON_"), code_pb2.Code.Name(info.code)
        expected.append(f"| {name} | {status} | {again} | {info.message} |")
    page = contract_doc.TARGET.read_text(encoding="utf-8")
    assert expected == re.findall(r"^\| [A-Z_]+ \| [A-Z_]+ \| (?:yes|-) \| .*? \|", page, re.MULTILINE)


def test_every_link_of_the_reference_leads_to_a_heading() -> None:
    """An anchor is a heading's text in small letters, without dots and slashes and with dashes for blanks."""
    page = contract_doc.TARGET.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9_-]", "", title.lower().replace(" ", "-")) for title in titles]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= set(anchors)


def test_the_reference_leaves_no_rule_out() -> None:
    """A rule that the page has no words for ends its writer; one that it has words for is told."""
    rules = validate_pb2.FieldRules(repeated=validate_pb2.RepeatedRules(max_items=8, min_items=1))
    assert ["at least 1 item", "at most 8 items"] == list(contract_doc.rules_in_words(rules))
    unknown = validate_pb2.FieldRules(string=validate_pb2.StringRules(contains="x"))
    with pytest.raises(SystemExit, match=r"string\.contains has no words"):
        list(contract_doc.rules_in_words(unknown))


def test_the_reference_is_not_written_from_comments_that_contradict_the_policy() -> None:
    """Who may call is told in the comment and in the policy: the writer compares them."""
    service = ServiceDescriptorProto(name="S")
    method = service.method.add(name="M", input_type=".x.A", output_type=".x.B")
    access = method.options.Extensions[policy_pb2.access]
    access.roles.append(policy_pb2.ROLE_OPERATOR)
    text = "Does it.\n\nCallers: operator. Repeat: safe.\nReasons: JOB_NOT_FOUND.\n"
    assert "- Callers: operator." in contract_doc.rpc(service, method, text)
    with pytest.raises(SystemExit, match="the policy 'operator'"):
        contract_doc.rpc(service, method, text.replace("operator", "viewer, operator"))
    with pytest.raises(SystemExit, match="NO_SUCH_REASON"):
        contract_doc.rpc(service, method, text.replace("JOB_NOT_FOUND", "NO_SUCH_REASON"))


def test_every_decision_is_in_the_index() -> None:
    """docs/adr/README.md names each record with the title and the status that the record itself states."""
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    records = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert records
    for record in records:
        text = record.read_text(encoding="utf-8")
        number, title = re.findall(r"\A# (\d{4}) (.+)", text)[0]
        status = re.findall(r"^Status: (.+)\.$", text, re.MULTILINE)[0]
        assert f"| [{number}]({record.name}) | {title} | {status} |" in index, record.name
