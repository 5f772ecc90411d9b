"""What was seen and told, in a file that outlives the process."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cognateforge.alerts.model import Alert, Severity
from cognateforge.exceptions import ClientSetupError, LocalStorageError

_VERSION = 1


@dataclass(kw_only=True)
class Told:
    """What a receiver knows of an alert, and since when."""

    status: str
    time: datetime


@dataclass(kw_only=True)
class Record:
    """An alert over time.

    seen: when a look first found it. firing: whether it has held for long enough to be told. missed: looks in a row
    that did not find it. ended: when it was found to be over. told: by receiver.
    """

    alert: Alert
    seen: datetime
    firing: bool = False
    missed: int = 0
    ended: datetime | None = None
    told: dict[str, Told] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Alertmanager's word."""
        return "resolved" if self.ended else "firing"


@dataclass(kw_only=True)
class State:
    """All that is remembered. looked: when both services were last asked. records: by their alerts' keys."""

    looked: datetime | None = None
    records: dict[str, Record] = field(default_factory=dict)


class StateFile:
    """The state, in a JSON file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file for this process alone. Errors: ClientSetupError, where another notifier has it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_name(self._path.name + ".lock").open("w")
        except OSError as error:
            raise LocalStorageError(f"the folder of {self._path} cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ClientSetupError(f"another notifier uses {self._path}: give this one its own state") from error
            yield

    def load(self) -> State:
        """Return the state, an empty one where there is no file.

        Errors: LocalStorageError, where it is no state: one that is thrown away would tell everything again.
        """
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["version"] != _VERSION:
                raise ValueError(f"version {stored['version']}")
            looked = datetime.fromisoformat(stored["looked"]) if stored["looked"] else None
            records = [_record(one) for one in stored["records"]]
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"{self._path} is not what a notifier has written ({error}): mend it, or remove it to begin anew"
            raise LocalStorageError(text) from error
        return State(looked=looked, records={record.alert.key: record for record in records})

    def save(self, state: State) -> None:
        """Replace the file, durably. Errors: LocalStorageError."""
        looked = state.looked.isoformat() if state.looked else None
        records = [_plain(one) for one in state.records.values()]
        text = json.dumps({"version": _VERSION, "looked": looked, "records": records}, indent=1)
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise LocalStorageError(f"{self._path} cannot be written: {error.strerror}") from error


def _plain(record: Record) -> dict[str, Any]:
    alert = record.alert
    return {
        "name": alert.name,
        "severity": alert.severity.value,
        "service": alert.service,
        "labels": dict(alert.labels),
        "summary": alert.summary,
        "runbook": alert.runbook,
        "since": alert.since.isoformat(),
        "seen": record.seen.isoformat(),
        "firing": record.firing,
        "missed": record.missed,
        "ended": record.ended.isoformat() if record.ended else None,
        "told": {name: [one.status, one.time.isoformat()] for name, one in record.told.items()},
    }


def _record(stored: dict[str, Any]) -> Record:
    alert = Alert(
        name=stored["name"],
        severity=Severity(stored["severity"]),
        service=stored["service"],
        labels=stored["labels"],
        summary=stored["summary"],
        runbook=stored["runbook"],
        since=datetime.fromisoformat(stored["since"]),
    )
    told = {
        name: Told(status=status, time=datetime.fromisoformat(time)) for name, (status, time) in stored["told"].items()
    }
    ended = datetime.fromisoformat(stored["ended"]) if stored["ended"] else None
    return Record(
        alert=alert,
        seen=datetime.fromisoformat(stored["seen"]),
        firing=stored["firing"],
        missed=stored["missed"],
        ended=ended,
        told=told,
    )
