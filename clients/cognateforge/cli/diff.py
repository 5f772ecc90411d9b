"""Two versions side by side: `forge models diff` and `forge agents diff`.

What is compared is what the service tells of each version and, where it serves that, the version's manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cognateforge.cli.names import check_artifact_name
from cognateforge.cli.session import Session, command

if TYPE_CHECKING:
    from cognateforge.artifact.v1.artifact_pb2 import Provenance
    from cognateforge.cli.session import Row

# In the order in which they are told. What the manifest tells under another name stands in the message.
_SECTIONS = (
    "version",
    "architecture",
    "tokenizer",
    "data",
    "training",
    "grokfast",
    "result",
    "check",
    "file",
    "recovery",
)
_SAME = "same"
# Longer values are cut in a table; JSON has them whole.
_CELL_CHARS = 60

Name = Annotated[str, typer.Argument(callback=check_artifact_name)]
All = Annotated[bool, typer.Option("--all", help="Also what is the same in both.")]
# By section and field.
Facts = dict[tuple[str, str], Any]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field of two versions. change: same, changed, added or removed. difference: b less a, of two numbers."""

    section: str
    field: str
    a: Any = None
    b: Any = None
    change: str = _SAME
    difference: float | None = None


def register_models(below: typer.Typer) -> None:
    """Add `forge models diff`."""

    @command(below)
    def diff(session: Session, a: Name, b: Name, everything: All = False) -> None:
        """Compare two foundation models field by field: data, settings, results, checks, files, recoveries."""
        from cognateforge.exchange.v1 import model_pb2

        stub = session.cognate_client.models

        def facts(name: str) -> Facts:
            model = stub.GetModel(model_pb2.GetModelRequest(name=name)).model
            request = model_pb2.GetModelProvenanceRequest(name=model.name)
            return model_facts(model, _manifest(lambda: stub.GetModelProvenance(request).provenance))

        _show(session, a, b, compare(facts(a), facts(b)), everything=everything)


def register_agents(below: typer.Typer) -> None:
    """Add `forge agents diff`."""

    @command(below)
    def diff(session: Session, a: Name, b: Name, everything: All = False) -> None:
        """Compare two agents field by field: base, data, settings, results, files, recoveries."""
        from cognateforge.agent.v1 import agent_pb2

        stub = session.agent_client.agents

        def facts(name: str) -> Facts:
            agent = stub.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent
            request = agent_pb2.GetAgentProvenanceRequest(name=agent.name)
            return agent_facts(agent, _manifest(lambda: stub.GetAgentProvenance(request).provenance))

        _show(session, a, b, compare(facts(a), facts(b)), everything=everything)


def _manifest(ask: Callable[[], Provenance]) -> Mapping[str, Any]:
    """Return a version's manifest, empty where the service does not hand it out."""
    from cognateforge.exceptions import NotImplementedByServerError

    try:
        raw = ask().manifest
    except NotImplementedByServerError:
        return {}
    found: Mapping[str, Any] = json.loads(raw) if raw else {}
    return found


# --- what is known of a version


def model_facts(model: Any, manifest: Mapping[str, Any]) -> Facts:
    """Return what is known of a foundation model."""
    from cognateforge.cli.plain import to_plain

    plain = to_plain(model)
    found: Facts = {("version", name): plain[name] for name in ("name", "state", "digest", "job", "size_bytes")}
    found |= {("architecture", name): value for name, value in plain.get("architecture", {}).items()}
    found["tokenizer", "digest"] = plain["tokenizer_digest"]
    found |= {("training", name): plain[name] for name in ("steps", "tokens")}
    found |= dict(_results(plain["results"]))
    for check in plain["checks"]:
        found["check", check["name"]] = check.get("value")
        found["check", f"{check['name']} passed"] = check["passed"]
    return found | _common(plain, manifest)


def agent_facts(agent: Any, manifest: Mapping[str, Any]) -> Facts:
    """Return what is known of an agent."""
    from cognateforge.cli.plain import to_plain

    plain = to_plain(agent)
    named = ("name", "lifecycle", "digest", "job", "size_bytes", "aliases")
    found: Facts = {("version", name): plain[name] for name in named}
    told = ("architecture", "task", "labels", "foundation", "foundation_digest", "parent")
    found |= {("architecture", name): plain[name] for name in told}
    found |= {("architecture", name): plain[name] for name in ("trainable_parameters", "total_parameters")}
    found |= dict(_results(plain["evaluations"]))
    return found | _common(plain, manifest)


def _common(plain: Mapping[str, Any], manifest: Mapping[str, Any]) -> Facts:
    found: Facts = {("version", "create_time"): plain.get("create_time")}
    for source in plain["data"]:
        found |= {("data", f"{source['name']} {part}"): source[part] for part in ("kind", "rows", "digest")}
    found |= {("file", file["path"]): file["digest"] for file in plain["files"]}
    # Of training, what was measured on sets is among the results already.
    measured = ("validation", "reasoning", "acceleration")
    for section in ("training", "grokfast", "code"):
        parts = manifest.get(section) or {}
        flat = _flat({name: value for name, value in parts.items() if name not in measured})
        found |= {("version" if section == "code" else section, _under(section, name)): v for name, v in flat}
    for number, event in enumerate(manifest.get("recovery") or (), start=1):
        found["recovery", str(number)] = f"step {event['step']}: {event['detector'] or 'stable'}, {event['action']}"
    return found


def _under(section: str, name: str) -> str:
    return f"code.{name}" if section == "code" else name


def _results(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield what was measured; of several with one name the newest stands."""
    for one in results:
        yield ("result", f"{one['metric']}@{one['dataset']}"), one["value"]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


# --- what differs


def compare(a: Facts, b: Facts) -> list[Difference]:
    """Return every field of either version, section by section, as the first one has them."""
    found = [_difference(*key, a, b) for key in dict.fromkeys([*a, *b])]
    return sorted(found, key=lambda one: _SECTIONS.index(one.section))


def _difference(section: str, field: str, a: Facts, b: Facts) -> Difference:
    key = section, field
    left, right = a.get(key), b.get(key)
    if key not in a or key not in b:
        change = "added" if key in b else "removed"
    else:
        change = _SAME if left == right or _both_nan(left, right) else "changed"
    difference = _less(right, left) if change == "changed" else None
    return Difference(section=section, field=field, a=left, b=right, change=change, difference=difference)


def _less(b: Any, a: Any) -> float | None:
    """Return b less a, of two numbers whose difference is one."""
    difference: float = b - a if _is_number(a) and _is_number(b) else math.nan
    return difference if math.isfinite(difference) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _both_nan(left: Any, right: Any) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in (left, right))


def _show(session: Session, a: str, b: str, found: Sequence[Difference], *, everything: bool) -> None:
    from google.protobuf.empty_pb2 import Empty

    shown = [one for one in found if everything or one.change != _SAME]
    if session.as_json:
        for one in shown:
            session.emit({name: value for name, value in asdict(one).items() if value is not None})
        return
    rows: list[Row] = [
        (Empty(), {}, (one.section, one.field, _cell(one.a), _cell(one.b), one.change, _signed(one.difference)))
        for one in shown
    ]
    session.table(("section", "field", a, b, "change", "difference"), rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _CELL_CHARS else f"{text[: _CELL_CHARS - 1]}\u2026"


def _signed(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"{difference:+d}" if isinstance(difference, int) else f"{difference:+.6g}"
