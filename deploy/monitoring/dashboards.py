"""Writes Grafana's dashboards: one over both services, one for each.

    python deploy/monitoring/dashboards.py

The JSON beside it is what Grafana takes; a test holds it to this file, and every query to a real Prometheus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "grafana"
# Dashboards of Grafana 10 and later; newer ones bring it up to date when they load it.
SCHEMA_VERSION = 39
_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GOOD, BAD, ODD = "green", "red", "orange"

Json = dict[str, Any]
# A colour, and from which value on; None is the lowest.
Threshold = tuple[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel. queries: PromQL, and what its series are called. unit: Grafana's name of it. words: for values."""

    title: str
    description: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "timeseries"
    thresholds: Sequence[Threshold] = ((GOOD, None),)
    width: int = 8
    stacked: bool = False
    lowest: float | None = 0
    highest: float | None = None
    words: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """In rows of the grid."""
        return 4 if self.kind == "stat" else 8

    def to_json(self, number: int, x: int, y: int) -> Json:
        """Return it as Grafana's JSON."""
        defaults: Json = {
            "unit": self.unit,
            "color": {"mode": "thresholds" if self.kind == "stat" else "palette-classic"},
            "thresholds": {
                "mode": "absolute",
                "steps": [{"color": color, "value": value} for color, value in self.thresholds],
            },
            "mappings": self._mappings(),
        }
        if self.kind == "timeseries":
            defaults["custom"] = self._lines()
        optional = {"min": self.lowest, "max": self.highest}
        defaults |= {name: value for name, value in optional.items() if value is not None}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": _DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": self._options(),
            "targets": [
                {
                    "refId": chr(ord("A") + place),
                    "datasource": _DATASOURCE,
                    "editorMode": "code",
                    "expr": expr,
                    "legendFormat": legend,
                    "range": self.kind == "timeseries",
                    "instant": self.kind == "stat",
                }
                for place, (expr, legend) in enumerate(self.queries)
            ],
        }

    def _lines(self) -> Json:
        limits = len(self.thresholds) > 1
        return {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if self.stacked else 0,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "line" if limits else "off"},
        }

    def _mappings(self) -> list[Json]:
        if not self.words:
            return []
        options = {
            value: {"text": text, "color": color, "index": place}
            for place, (value, (text, color)) in enumerate(self.words.items())
        }
        return [{"type": "value", "options": options}]

    def _options(self) -> Json:
        if self.kind == "stat":
            return {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "orientation": "auto",
                "textMode": "value_and_name",
                "colorMode": "value",
                "graphMode": "none",
                "justifyMode": "auto",
            }
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels below a heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A whole dashboard. variables: beside the data source; their names, headings and queries."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[tuple[str, str, str]] = ()

    def to_json(self) -> Json:
        """Return it as Grafana's JSON, for an import or for provisioning."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["cognateforge"],
            "timezone": "browser",
            "editable": True,
            "graphTooltip": 1,
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "timepicker": {},
            "fiscalYearStartMonth": 0,
            "liveNow": False,
            "weekStart": "",
            "links": [
                {
                    "type": "dashboards",
                    "title": "Services",
                    "tags": ["cognateforge"],
                    "asDropdown": False,
                    "icon": "external link",
                    "includeVars": False,
                    "keepTime": True,
                    "targetBlank": False,
                    "tooltip": "",
                    "url": "",
                }
            ],
            "annotations": {"list": []},
            "templating": {"list": [_datasource_variable(), *map(_query_variable, self.variables)]},
            "panels": self._panels(),
        }

    def _panels(self) -> list[Json]:
        panels: list[Json] = []
        y = 0
        for row in self.rows:
            heading = {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": []}
            panels.append({**heading, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}})
            y, x, tallest = y + 1, 0, 0
            for panel in row.panels:
                if x + panel.width > _COLUMNS:
                    y, x, tallest = y + tallest, 0, 0
                panels.append(panel.to_json(len(panels) + 1, x, y))
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest
        return panels


def _datasource_variable() -> Json:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
        "regex": "",
        "options": [],
        "skipUrlSync": False,
    }


def _query_variable(variable: tuple[str, str, str]) -> Json:
    name, label, query = variable
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": query,
        "hide": 0,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "options": [],
        "current": {"text": ["All"], "value": ["$__all"]},
        "skipUrlSync": False,
    }


SHARE: Json = {"unit": "percentunit"}
AWAY = {"0": ("no", BAD), "1": ("yes", GOOD)}
RISKY: Sequence[Threshold] = ((GOOD, None), (BAD, 1))


def _service_row(where: str) -> Row:
    """What the alerts about a service look at. where: labels that choose it."""
    return Row(
        title="Now",
        panels=[
            Panel(
                title="Serving",
                description="Whether each server's health says SERVING. Alert: ForgeNotServing.",
                queries=[(f"forge_serving{{{where}}}", "{{service}} {{instance}}")],
                kind="stat",
                thresholds=((BAD, None), (GOOD, 1)),
                words=AWAY,
                width=4,
            ),
            Panel(
                title="Store takes writes",
                description="Whether the database took the last write and answers reads. Alert: ForgeStoreAway.",
                queries=[(f"forge_store_up{{{where}}}", "{{service}} {{instance}}")],
                kind="stat",
                thresholds=((BAD, None), (GOOD, 1)),
                words=AWAY,
                width=4,
            ),
            Panel(
                title="Alerts that fire",
                description="All of the rules in deploy/monitoring/prometheus, by severity.",
                queries=[
                    (
                        f'sum(ALERTS{{alertstate="firing", severity="{severity}", alertname=~"Forge.+", {where}}}) '
                        "or vector(0)",
                        severity,
                    )
                    for severity in ("critical", "warning")
                ],
                kind="stat",
                thresholds=RISKY,
                width=4,
            ),
            Panel(
                title="Jobs that train",
                description="Jobs whose state is RUNNING.",
                queries=[(f'max by (service) (forge_jobs{{state="RUNNING", {where}}})', "{{service}}")],
                kind="stat",
                width=4,
            ),
            Panel(
                title="Jobs out of sight",
                description="Jobs with a worker of which there is no recent sign. Alert: ForgeJobsUnobserved.",
                queries=[(f"max by (service) (forge_jobs_unobserved{{{where}}})", "{{service}}")],
                kind="stat",
                thresholds=RISKY,
                width=4,
            ),
            Panel(
                title="Damaged versions",
                description="Published versions with files that are not what was published. "
                "Alert: ForgeArtifactsDamaged.",
                queries=[(f"max by (service) (forge_artifacts_damaged{{{where}}})", "{{service}}")],
                kind="stat",
                thresholds=RISKY,
                width=4,
            ),
        ],
    )


def _calls_row(where: str, by: str) -> Row:
    legend = f"{{{{service}}}} {{{{{by}}}}}" if by != "service" else "{{service}}"
    group = "service" if by == "service" else f"service, {by}"
    return Row(
        title="Calls",
        panels=[
            Panel(
                title="Calls",
                description="Calls that have ended, each second.",
                queries=[(f"sum by ({group}) (rate(forge_rpc_calls_total{{{where}}}[$__rate_interval]))", legend)],
                unit="reqps",
            ),
            Panel(
                title="Share of calls that fail by the service's fault",
                description="Of all calls of five minutes and of an hour; the objective is 0.1 % in a month. "
                "Alert: ForgeErrorRate.",
                queries=[
                    (f"forge:rpc_errors:ratio_rate5m{{{where}}}", "{{service}} 5 min"),
                    (f"forge:rpc_errors:ratio_rate1h{{{where}}}", "{{service}} 1 h"),
                ],
                thresholds=((GOOD, None), (ODD, 0.001), (BAD, 0.0144)),
                **SHARE,
            ),
            Panel(
                title="Errors by reason",
                description="Calls that ended in an error, callers' own mistakes included, each second.",
                queries=[
                    (
                        f"sum by (service, reason) (rate(forge_rpc_errors_total{{{where}}}[$__rate_interval]))",
                        "{{service}} {{reason}}",
                    )
                ],
                unit="reqps",
            ),
            Panel(
                title="Latency, 99th percentile",
                description="Time from a unary call's arrival to its answer.",
                queries=[
                    (
                        f"histogram_quantile(0.99, sum by ({group}, le) "
                        f"(rate(forge_rpc_duration_seconds_bucket{{{where}}}[$__rate_interval])))",
                        legend,
                    )
                ],
                unit="s",
                thresholds=((GOOD, None), (BAD, 1)),
            ),
            Panel(
                title="Share of unary calls above a second",
                description="Of all unary calls of five minutes and of an hour; the objective is 1 % in a month. "
                "Alert: ForgeSlowCalls.",
                queries=[
                    (f"forge:rpc_slow:ratio_rate5m{{{where}}}", "{{service}} 5 min"),
                    (f"forge:rpc_slow:ratio_rate1h{{{where}}}", "{{service}} 1 h"),
                ],
                thresholds=((GOOD, None), (ODD, 0.01), (BAD, 0.144)),
                **SHARE,
            ),
            Panel(
                title="Open streams",
                description="Watches and fetches that are under way.",
                queries=[(f"sum by ({group}) (forge_rpc_open_streams{{{where}}})", legend)],
                stacked=True,
            ),
        ],
    )


def _jobs_row(where: str) -> Row:
    return Row(
        title="Jobs",
        panels=[
            Panel(
                title="Jobs by state",
                description="Jobs that have not ended.",
                queries=[(f"max by (service, state) (forge_jobs{{{where}}})", "{{service}} {{state}}")],
                stacked=True,
            ),
            Panel(
                title="Jobs without a worker",
                description="What they wait for. Alerts: ForgeWorkersDoNotStart, ForgeCapacityNotReturned.",
                queries=[(f"max by (service, what) (forge_jobs_waiting{{{where}}})", "{{service}} {{what}}")],
                stacked=True,
            ),
            Panel(
                title="Oldest wait for a first worker",
                description="Age of the job that waits the longest, 0 when none does. Alert: ForgeQueueWait.",
                queries=[(f"max by (service) (forge_queue_oldest_seconds{{{where}}})", "{{service}}")],
                unit="s",
                thresholds=((GOOD, None), (BAD, 1800)),
            ),
            Panel(
                title="Jobs that ended, within an hour",
                description="By state; failed ones by reason. Alerts: ForgeTrainingDiverged, ForgeRetryBudgetSpent, "
                "ForgeJobFailed.",
                queries=[
                    (
                        "max by (service, state, reason) "
                        f"(increase(forge_jobs_ended_total{{{where}}}[1h])) > 0 or "
                        f'max by (service, state) (increase(forge_jobs_ended_total{{state="SUCCEEDED", {where}}}[1h]))',
                        "{{service}} {{state}} {{reason}}",
                    )
                ],
            ),
            Panel(
                title="Recovery actions, within an hour",
                description="What detectors of the recovery managers led to. Alerts: those of each detector.",
                queries=[
                    (
                        "max by (service, detector) (sum by (service, instance, detector) "
                        f"(increase(forge_recovery_actions_total{{{where}}}[1h])))",
                        "{{service}} {{detector}}",
                    )
                ],
            ),
            Panel(
                title="Workers",
                description="Processes that train, of those that may at the same time; and attempts that the "
                "platform ended within an hour. Alert: ForgeAttemptsLost.",
                queries=[
                    (f"sum by (service) (forge_worker_slots_used{{{where}}})", "{{service}} train"),
                    (f"sum by (service) (forge_worker_slots{{{where}}})", "{{service}} slots"),
                    (f"max by (service) (increase(forge_attempts_lost_total{{{where}}}[1h]))", "{{service}} lost"),
                ],
            ),
        ],
    )


def _training(metrics: Sequence[tuple[str, str, str, str]], where: str) -> Row:
    """metrics: title, name, unit and description."""
    chosen = f'{where}, training_job=~"$training_job"'
    curves = [
        Panel(
            title=title,
            description=f"{description} ({name} in docs/metrics.md).",
            queries=[
                (f'max by (training_job) (forge_training_metric{{metric="{name}", {chosen}}})', "{{training_job}}")
            ],
            unit=unit,
            lowest=None,
        )
        for title, name, unit, description in metrics
    ]
    steps = f"max by (training_job) (forge_training_step{{{chosen}}})"
    total = f"max by (training_job) (forge_training_total_steps{{{chosen}}})"
    return Row(
        title="Training, of the newest jobs that run",
        panels=[
            Panel(
                title="Share of the steps that are done",
                description="Finished optimizer steps over those in all.",
                queries=[(f"{steps} / {total}", "{{training_job}}")],
                highest=1,
                **SHARE,
            ),
            Panel(
                title="Time since the last progress",
                description="Since the last progress event, or since the attempt began. Alert: ForgeJobStalled.",
                queries=[
                    (
                        f"max by (training_job) (forge_training_progress_age_seconds{{{chosen}}})",
                        "{{training_job}}",
                    )
                ],
                unit="s",
                thresholds=((GOOD, None), (BAD, 900)),
            ),
            *curves,
        ],
    )


def _store_row(where: str) -> Row:
    return Row(
        title="Store, disk and artifacts",
        panels=[
            Panel(
                title="Time of a write, 95th percentile",
                description="Of the server's write transactions, waits included. Alert: ForgeStoreSlow.",
                queries=[
                    (
                        "histogram_quantile(0.95, sum by (service, le) "
                        f"(rate(forge_store_write_seconds_bucket{{{where}}}[$__rate_interval])))",
                        "{{service}}",
                    )
                ],
                unit="s",
                thresholds=((GOOD, None), (BAD, 1)),
            ),
            Panel(
                title="Space that is left",
                description="Share of the disk where a folder is. Alerts: ForgeDiskNearlyFull, ForgeDiskFillsUp.",
                queries=[
                    (
                        f"min by (service, folder) (forge_disk_free_bytes{{{where}}} / "
                        f"forge_disk_size_bytes{{{where}}})",
                        "{{service}} {{folder}}",
                    )
                ],
                thresholds=((BAD, None), (ODD, 0.03), (GOOD, 0.10)),
                highest=1,
                **SHARE,
            ),
            Panel(
                title="Oldest look at a stored version",
                description="All stored bytes are read again every artifacts.scrub_interval_hours. "
                "Alert: ForgeArtifactsUnverified.",
                queries=[(f"max by (service) (forge_artifacts_unverified_seconds{{{where}}})", "{{service}}")],
                unit="s",
                thresholds=((GOOD, None), (BAD, 3 * 86_400)),
            ),
            Panel(
                title="Scheduler's last look",
                description="Time since it looked at jobs; a second when all is well. Alert: ForgeSchedulerStuck.",
                queries=[(f"max by (service) (forge_scheduler_tick_age_seconds{{{where}}})", "{{service}}")],
                unit="s",
                thresholds=((GOOD, None), (BAD, 60)),
            ),
            Panel(
                title="Calls missing in the audit log, within an hour",
                description="Calls that could not be written to it. Alert: ForgeAuditFails.",
                queries=[(f"sum by (service) (increase(forge_audit_failures_total{{{where}}}[1h]))", "{{service}}")],
                thresholds=RISKY,
            ),
            Panel(
                title="Bytes sent",
                description="Bytes of artifacts that were fetched, each second.",
                queries=[
                    (
                        f"sum by (service) (rate(forge_fetched_bytes_total{{{where}}}[$__rate_interval]))",
                        "{{service}}",
                    )
                ],
                unit="Bps",
            ),
        ],
    )


def _lender_panels() -> list[Panel]:
    cognate = 'service="cognate"'
    return [
        Panel(
            title="Capacity that is lent",
            description="By kind: cores, bytes of memory, graphics processors.",
            queries=[
                (f"sum by (kind) (forge_leased{{{cognate}}})", "{{kind}}"),
                (f"sum by (kind) (forge_leases{{{cognate}}})", "leases of {{kind}}"),
            ],
        ),
        Panel(
            title="Leases that ended, within an hour",
            description="Released by their borrower, run out, or revoked. Alert: ForgeLeasesExpire.",
            queries=[(f"max by (how) (increase(forge_leases_ended_total{{{cognate}}}[1h]))", "{{how}}")],
        ),
        Panel(
            title="Model events that the slowest watcher lacks",
            description="Beside the number of those that are kept. Alert: ForgeOutboxLag.",
            queries=[
                (f"max(forge_outbox_lag_events{{{cognate}}})", "lag"),
                (f"max(forge_outbox_events{{{cognate}}})", "kept"),
            ],
            thresholds=((GOOD, None), (BAD, 1000)),
        ),
    ]


def _borrower_panels() -> list[Panel]:
    agent = 'service="agent"'
    return [
        Panel(
            title="Circuit to the peer",
            description="Whether calls are held back after repeated failures. Alert: ForgeCircuitOpen.",
            queries=[(f"max by (peer) (forge_circuit_open{{{agent}}})", "{{peer}}")],
            kind="stat",
            thresholds=RISKY,
            words={"0": ("closed", GOOD), "1": ("open", BAD)},
        ),
        Panel(
            title="Calls to the peer",
            description="Sent, failed and held back, each second.",
            queries=[
                (
                    f"sum by (peer, outcome) (rate(forge_peer_calls_total{{{agent}}}[$__rate_interval]))",
                    "{{peer}} {{outcome}}",
                )
            ],
            unit="reqps",
        ),
    ]


_INSTANCES = ("instance", "Server", 'label_values(forge_build_info{{service="{}"}}, instance)')
_JOBS = ("training_job", "Job", 'label_values(forge_training_step{{service="{}"}}, training_job)')


def _variables(service: str) -> list[tuple[str, str, str]]:
    return [(name, label, query.format(service)) for name, label, query in (_INSTANCES, _JOBS)]


def overview() -> Dashboard:
    """Both services side by side."""
    where = 'service=~"cognate|agent"'
    return Dashboard(
        uid="cognateforge-overview",
        title="Forge: both services",
        description="What both training services do, and whether all is well.",
        rows=[
            _service_row(where),
            _jobs_row(where),
            Row(title="Across the boundary", panels=[*_borrower_panels(), *_lender_panels()]),
            _calls_row(where, "service"),
            _store_row(where),
        ],
    )


def cognate() -> Dashboard:
    """The Cognate service."""
    where = 'service="cognate", instance=~"$instance"'
    recorded = 'service="cognate"'
    metrics = [
        ("Loss", "loss", "short", "Cross-entropy of the training batch in nats a token"),
        ("Validation loss", "validation_loss", "short", "Cross-entropy on the validation rows in nats a token"),
        ("Learning rate", "learning_rate", "short", "AdamW's learning rate"),
        ("GrokFast's lambda", "grokfast_lambda", "short", "Its amplification in this step"),
        (
            "Slow gradient over gradient",
            "slow_gradient_norm_ratio",
            "short",
            "Norm of the gradient's EMA over that of the gradient. Alert: ForgeSlowGradient",
        ),
        ("Gradient norm", "gradient_norm", "short", "Norm of the raw gradient, before clipping"),
        (
            "Ponder steps",
            "mean_ponder_steps",
            "short",
            "Core steps taken, mean over the batch's tokens. Alert: ForgeHaltingCollapse",
        ),
        (
            "Memory slots in use",
            "memory_slot_utilization_ratio",
            "percentunit",
            "Share of slots that hold a token",
        ),
        (
            "Size of memory's contents",
            "memory_contents_rms",
            "short",
            "Root mean square of the traces that the memory holds. Alert: ForgeMemoryOverflow",
        ),
        ("Tokens a second", "tokens_per_s", "short", "Trained token positions over wall-clock time"),
    ]
    return Dashboard(
        uid="cognateforge-cognate",
        title="Forge: Cognate",
        description="The service that pretrains Cognate-25M foundation models.",
        variables=_variables("cognate"),
        rows=[
            _service_row(recorded),
            _training(metrics, where),
            _jobs_row(where),
            Row(title="Lending and events", panels=_lender_panels()),
            _calls_row(recorded, "method"),
            _store_row(where),
        ],
    )


def agent() -> Dashboard:
    """The agent service."""
    where = 'service="agent", instance=~"$instance"'
    recorded = 'service="agent"'
    metrics = [
        ("Loss", "loss", "short", "Mean loss since the progress event before"),
        ("Learning rate", "learning_rate", "short", "The optimizer's learning rate"),
        ("Gradient norm", "gradient_norm", "short", "Norm over the trained parameters, before clipping"),
        ("Loss slope", "loss_slope", "short", "Of the newest 20 steps, in loss for 100 steps"),
        (
            "Generalization gap",
            "generalization_gap",
            "short",
            "Validation loss less training loss. Alert: ForgeValidationWorse",
        ),
        ("Rows a second", "samples_per_s", "short", "Trained rows over the time of their steps"),
        ("Memory of the worker", "peak_memory_bytes", "bytes", "Largest resident set so far"),
    ]
    return Dashboard(
        uid="cognateforge-agent",
        title="Forge: agents",
        description="The service that trains agents.",
        variables=_variables("agent"),
        rows=[
            _service_row(recorded),
            _training(metrics, where),
            _jobs_row(where),
            Row(title="Calls to Cognate", panels=_borrower_panels()),
            _calls_row(recorded, "method"),
            _store_row(where),
        ],
    )


DASHBOARDS = (overview, cognate, agent)


def render(dashboard: Dashboard) -> str:
    """Return the file's text."""
    return json.dumps(dashboard.to_json(), indent=2, ensure_ascii=False) + "\n"


def path_of(dashboard: Dashboard) -> Path:
    """Return where it lies."""
    return FOLDER / f"{dashboard.uid.removeprefix('cognateforge-')}.json"


def write() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for make in DASHBOARDS:
        dashboard = make()
        path_of(dashboard).write_text(render(dashboard), encoding="utf-8")


if __name__ == "__main__":
    write()
