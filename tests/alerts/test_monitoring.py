"""What lies in deploy/monitoring and docs/runbooks is whole: rules with tests and pages, dashboards that fit both."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from typer.core import TyperGroup
from typer.main import get_command

from agent_server import telemetry as agent_telemetry
from cognate_server import telemetry as cognate_telemetry
from cognateforge.alerts import KINDS
from cognateforge.alerts.model import DETECTORS
from cognateforge.cli.app import app
from cognateforge.client import services
from deploy.monitoring import dashboards
from tests.support.prometheus import program
from training_common.telemetry.catalog import CATALOG, Kind

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy/monitoring"
RULES = sorted((MONITORING / "prometheus/rules").glob("*.yml"))
UNIT_TESTS = sorted((MONITORING / "prometheus/tests").glob("*.yml"))
RUNBOOKS = ROOT / "docs/runbooks"
ALERTMANAGER = MONITORING / "alertmanager/alertmanager.yml"
COMMAND = get_command(app)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


def test_the_rules_are_rules() -> None:
    """As promtool reads them, duplicates counted as errors."""
    run(program("promtool"), "check", "rules", *RULES)
    run(program("promtool"), "check", "config", MONITORING / "prometheus/prometheus.yml")


def test_the_rules_do_what_their_unit_tests_say() -> None:
    """Each fires on the series of its trouble, and on no others."""
    run(program("promtool"), "test", "rules", *UNIT_TESTS)


def test_every_rule_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    """By name and severity: the case is named after both."""
    cases = {case["name"]: case for file in UNIT_TESTS for case in yaml.safe_load(file.read_text())["tests"]}
    assert {f"{rule['alert']} {rule['labels']['severity']}" for rule in ALERTS} == set(cases)
    for name, case in cases.items():
        alert, severity = name.split()
        labels = (f'alertname="{alert}"', f'severity="{severity}"')
        told = [str(test["exp_samples"]) for test in case["promql_expr_test"]]
        fires = [all(label in samples for label in labels) for samples in told]
        assert {True, False} == set(fires), name


def test_every_alert_says_what_it_is_and_where_help_stands() -> None:
    """summary, description and a runbook, under a severity that Alertmanager's routes know."""
    for rule in ALERTS:
        assert {"summary", "description", "runbook_url"} == set(rule["annotations"]), rule["alert"]
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_alert_has_a_page_and_every_page_an_alert() -> None:
    """With its four parts, in their order."""
    assert {rule["alert"] for rule in ALERTS} == {page.stem for page in RUNBOOKS.glob("*.md")}
    for page in RUNBOOKS.glob("*.md"):
        headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        assert [page.stem, "Meaning", "Impact", "How to look", "How to mend"] == headings
        # Commands that were run together into a paragraph cannot be copied, and no test reads them.
        assert re.search(r"^## How to look\n\n(    \S.*\n)+", page.read_text(), re.MULTILINE), page.stem


def test_the_built_in_alerts_are_among_the_rules() -> None:
    """Under the same names, each with a severity of the rule's: a runbook serves both."""
    severities = {(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS}
    assert {(kind.name, kind.severity.value) for kind in KINDS.values()} <= severities


def test_every_way_in_which_training_goes_wrong_has_a_rule_and_a_built_in_alert() -> None:
    """Each detector of either recovery manager, a run that is given up, and a worker that is lost."""
    expressions = [rule["expr"] for rule in ALERTS]
    told = {
        detector
        for expression in expressions
        for alternatives in re.findall(r'detector=~?"([^"]*)"', expression)
        for detector in alternatives.split("|")
    }
    managers = {detector for detector, _ in (*cognate_telemetry.RECOVERIES, *agent_telemetry.RECOVERIES) if detector}
    assert len(managers) > 8
    assert managers == told == set(DETECTORS)
    for failure in ('reason="TRAINING_DIVERGED"', 'reason="RETRY_BUDGET_SPENT"', "forge_attempts_lost_total"):
        assert any(failure in expression for expression in expressions), failure


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of every `forge` command of a page, without comments."""
    for line in re.findall(r"^    (forge .+)$", page, re.MULTILINE) + re.findall(r"`(forge [^`]+)`", page):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    """Commands of `forge` with their options, and methods that grpcurl calls."""
    for words in commands(page.read_text()):
        command = COMMAND
        rest = words[1:]
        while rest and isinstance(command, TyperGroup) and not rest[0].startswith("-"):
            if rest[0] in ("backup", "backups", "restore"):  # of the servers' own packages
                break
            name, rest = rest[0], rest[1:]
            assert name in command.commands, (page.stem, name)
            command = command.commands[name]
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        if words[1] != "backups":
            assert {word for word in rest if word.startswith("--")} <= known, (page.stem, words)
    methods = {f"{one.full_name}/{method.name}" for one in services.COGNATE for method in one.methods}
    called = re.findall(r"(cognateforge\.[\w.]+/\w+)", page.read_text())
    assert set(called) <= methods


def test_links_and_metrics_of_the_pages_exist() -> None:
    """Pages that a page links to, and the metrics of training that it tells to look at."""
    defined = set(re.findall(r"^\| `([a-z0-9_]+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    evaluated = {f"validation_{name}" for name in defined}
    for page in RUNBOOKS.glob("*.md"):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (page.parent / link).is_file(), (page.stem, link)
        assert set(re.findall(r"--metric ([a-z0-9_]+)", text)) <= defined | evaluated, page.stem


# Queries

SUFFIXES = ("_bucket", "_count", "_sum")
BASE = {metric.name: metric for metric in CATALOG}
# What Prometheus adds, and the bound of a histogram's bucket.
ADDED = {"instance", "job", "le"}


def queries() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for make in dashboards.DASHBOARDS:
        for row in make().rows:
            for panel in row.panels:
                for expr, _ in panel.queries:
                    yield f"{make().uid}: {panel.title}", expr


def test_every_query_is_about_metrics_and_labels_of_the_catalogue() -> None:
    """A name that the servers do not expose would never fire, and never draw."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for where, expr in queries():
        for name, chosen in re.findall(r"\b(forge[a-z0-9_:]*)(?:\{([^}]*)\})?", re.sub(r'"forge-[^"]*"', '""', expr)):
            if ":" in name:
                assert name in recorded, (where, name)
                continue
            suffix = next((one for one in SUFFIXES if name.endswith(one)), "")
            metric = BASE.get(name.removesuffix(suffix)) or BASE[name]
            assert bool(suffix) == (metric.kind is Kind.HISTOGRAM), (where, name)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", chosen))
            assert labels <= {"service", *metric.labels, *ADDED}, (where, name, labels)


def test_counters_are_read_as_counters() -> None:
    """Of a counter only its growth means anything; what a series that is new holds is growth too."""
    for where, expr in queries():
        for name, metric in BASE.items():
            for place in re.finditer(rf"\b{name}\b(?:\{{[^}}]*\}})?", expr):
                grows = expr[place.end() : place.end() + 1] == "["
                compared = "unless" in expr[place.end() : place.end() + 12] or "offset" in expr[place.end() :][:8]
                if metric.kind is Kind.COUNTER:
                    assert grows or compared, (where, name)


# Dashboards


@pytest.mark.parametrize("make", dashboards.DASHBOARDS)
def test_a_dashboard_is_fresh(make: Any) -> None:
    """The JSON is what the script writes."""
    dashboard = make()
    written = dashboards.path_of(dashboard).read_text(encoding="utf-8")
    assert dashboards.render(dashboard) == written, "run python deploy/monitoring/dashboards.py and commit it"


@pytest.mark.parametrize("make", dashboards.DASHBOARDS)
def test_every_panel_says_what_it_shows(make: Any) -> None:
    """Unit, description, thresholds, queries by the data source's variable; no two have one number or one place."""
    dashboard = make().to_json()
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith(".")
        assert defaults["unit"]
        assert defaults["thresholds"]["steps"]
        assert panel["targets"]
        assert {"${datasource}"} == {one["datasource"]["uid"] for one in (panel, *panel["targets"])}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_alerts_that_a_panel_names_exist() -> None:
    """And the metrics of training that it draws."""
    named = {
        name
        for file in (MONITORING / "grafana").glob("*.json")
        for name in re.findall(r"Forge[A-Z]\w+", file.read_text())
    }
    assert named <= {rule["alert"] for rule in ALERTS}
    page = (ROOT / "docs/metrics.md").read_text()
    drawn = re.findall(
        r'metric=\\"(\w+)\\"', "".join(file.read_text() for file in (MONITORING / "grafana").glob("*.json"))
    )
    assert set(drawn) <= set(re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.MULTILINE))


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Yield what of ours is not in theirs, or is another value there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from differences(value, theirs[key], f"{path}.{key}") if key in theirs else [f"{path}.{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{path}[{place}]")
    elif ours != theirs:
        yield path


@pytest.mark.parametrize("file", sorted((MONITORING / "grafana").glob("*.json")), ids=lambda file: file.stem)
def test_a_dashboard_fits_grafanas_published_schema(file: Path) -> None:
    """Read and written by the types that Grafana generates from it, everything is still there: no key is unknown."""
    model = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="grafana-foundation-sdk is not installed"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()

    def again(dashboard: dict[str, Any]) -> Any:
        return json.loads(JSONEncoder().encode(model.Dashboard.from_json(copy.deepcopy(dashboard))))

    dashboard = json.loads(file.read_text())
    assert [] == list(differences(dashboard, again(dashboard)))
    wrong = copy.deepcopy(dashboard)
    wrong["panels"][1]["fieldConfig"]["defaults"]["colour"] = "red"
    assert [".panels[1].fieldConfig.defaults.colour"] == list(differences(wrong, again(wrong)))


# Alertmanager


def test_alertmanagers_configuration_is_one() -> None:
    """As amtool reads it, and without a secret in it."""
    run(program("amtool"), "check-config", ALERTMANAGER)
    text = ALERTMANAGER.read_text()
    assert [] == re.findall(r"^[^#]*(?:password|token|credentials|_key):", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "severity", "receiver"),
    [
        ("ForgeServiceAbsent", "critical", "on-call"),
        ("ForgeDiskNearlyFull", "critical", "on-call"),
        ("ForgeDiskNearlyFull", "warning", "operators"),
        ("ForgeLossTrend", "warning", "operators"),
    ],
)
def test_an_alert_reaches_who_should_look(name: str, severity: str, receiver: str) -> None:
    """What is critical goes to whom is on call, all else to the operators."""
    labels = [f"alertname={name}", f"severity={severity}", "service=agent"]
    config = f"--config.file={ALERTMANAGER}"
    assert [receiver] == run(program("amtool"), "config", "routes", "test", config, *labels).split()


def test_names_in_alertmanagers_matchers_are_alerts() -> None:
    """A misspelt one would silence nothing, and nobody would see it."""
    words: Sequence[str] = re.findall(r'alertname[=!~]+"([^"]+)"', ALERTMANAGER.read_text())
    named: set[str] = set()
    for word in words:
        match = re.fullmatch(r"Forge\(([\w|]+)\)", word)
        named |= {f"Forge{end}" for end in match[1].split("|")} if match else set(word.split("|"))
    assert named - {"Forge.+"} <= {rule["alert"] for rule in ALERTS}
