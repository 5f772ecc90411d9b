"""A group of alerts as a message: Alertmanager's webhook payload, version 4, and an e-mail's subject and text.

Source: prometheus.io/docs/alerting/latest/configuration, webhook_config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cognateforge.alerts.model import Severity
from cognateforge.alerts.state import Record

_NEVER = "0001-01-01T00:00:00Z"  # Alertmanager's end of what goes on


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is told at once: all alerts of a name and a service, those too that the receiver knows.

    link: of a dashboard. runbook_base_url: stands before a runbook's path.
    """

    receiver: str
    records: Sequence[Record]
    link: str = ""
    runbook_base_url: str = ""

    @property
    def status(self) -> str:
        """Firing as long as one of them is."""
        return "firing" if any(record.status == "firing" for record in self.records) else "resolved"

    @property
    def name(self) -> str:
        """The alerts' name."""
        return self.records[0].alert.name

    @property
    def service(self) -> str:
        """The service that they are about."""
        return self.records[0].alert.service

    @property
    def critical(self) -> bool:
        """Whether somebody should look now."""
        return self.records[0].alert.severity is Severity.CRITICAL

    def payload(self) -> dict[str, Any]:
        """Return the body of a webhook."""
        alerts = [self._alert(record) for record in self.records]
        group = {"alertname": self.name, "service": self.service}
        labels = [alert["labels"] for alert in alerts]
        annotations = [alert["annotations"] for alert in alerts]
        return {
            "version": "4",
            "groupKey": "{}:{" + ", ".join(f'{key}="{value}"' for key, value in group.items()) + "}",
            "truncatedAlerts": 0,
            "status": self.status,
            "receiver": self.receiver,
            "groupLabels": group,
            "commonLabels": _common(labels),
            "commonAnnotations": _common(annotations),
            "externalURL": self.link,
            "alerts": alerts,
        }

    def subject(self) -> str:
        """Return an e-mail's subject."""
        count = sum(record.status == self.status for record in self.records)
        return f"[{self.status.upper()}:{count}] {self.name} ({self.service})"

    def text(self) -> str:
        """Return an e-mail's text."""
        parts = []
        for record in self.records:
            end = f", until {_time(record.ended)}" if record.ended else ""
            parts.append(
                f"{record.status.upper()} ({record.alert.severity}): {record.alert.summary}\n"
                f"  since {_time(record.alert.since)}{end}"
            )
        parts.append(f"What to do: {self.runbook_base_url}{self.records[0].alert.runbook}")
        if self.link:
            parts.append(f"Dashboard: {self.link}")
        return "\n\n".join(parts) + "\n"

    def _alert(self, record: Record) -> dict[str, Any]:
        alert = record.alert
        labels = {
            **alert.labels,
            "alertname": alert.name,
            "service": alert.service,
            "severity": alert.severity.value,
        }
        return {
            "status": record.status,
            "labels": labels,
            "annotations": {"summary": alert.summary, "runbook_url": f"{self.runbook_base_url}{alert.runbook}"},
            "startsAt": _time(alert.since),
            "endsAt": _time(record.ended) if record.ended else _NEVER,
            "generatorURL": self.link,
            "fingerprint": fingerprint(labels),
        }


def fingerprint(labels: dict[str, str]) -> str:
    """Return what Alertmanager names a set of labels by: FNV-1a over sorted names and values, each ended by 0xff."""
    value = 0xCBF29CE484222325
    for key in sorted(labels):
        for byte in key.encode() + b"\xff" + labels[key].encode() + b"\xff":
            value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def _common(tables: Sequence[dict[str, str]]) -> dict[str, str]:
    return {key: value for key, value in tables[0].items() if all(table.get(key) == value for table in tables)}


def _time(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
