"""Pages that repeat what the code says are held to the code."""

import re
from pathlib import Path

from google.rpc import code_pb2

from agent_server.metrics import EVALUATIONS
from cognateforge.errors.v1 import reasons_pb2
from tools import metrics_doc

ROOT = Path(__file__).resolve().parent.parent


def test_the_metrics_page_is_fresh() -> None:
    """docs/metrics.md is what the tables of both services render to."""
    assert metrics_doc.render() == metrics_doc.TARGET.read_text(encoding="utf-8"), "run `make docs` and commit it"


def test_every_recorded_evaluation_is_defined() -> None:
    """The names that the trainer records are those of the table: read from its source, where "when" is a moment."""
    source = (ROOT / "agent_server" / "trainer.py").read_text(encoding="utf-8")
    recorded = set()
    for name in re.findall(r'_record\(f?"([a-z0-9_{}]+)"', source):
        recorded |= {name.replace("{when}", when) for when in ("before", "after")}
    assert recorded == set(EVALUATIONS)


def test_the_contract_page_lists_every_reason() -> None:
    """docs/contract.md's table of reasons is the contract's own, row by row and in its order."""
    expected = []
    for value in reasons_pb2.Reason.DESCRIPTOR.values:
        if value.number == reasons_pb2.REASON_UNSPECIFIED:
            continue
        info = value.GetOptions().Extensions[reasons_pb2.info]
        again = "yes" if info.retryable else "-"
        expected.append(f"| {value.name.removeprefix('REASON_')} | {code_pb2.Code.Name(info.code)} | {again} |")
    page = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    assert expected == re.findall(r"^\| [A-Z_]+ \| [A-Z_]+ \| (?:yes|-) \|$", page, re.MULTILINE)


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
