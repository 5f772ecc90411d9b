"""A real Prometheus and Alertmanager on this machine, with the rules of deploy/monitoring at a faster pace."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

MONITORING = Path(__file__).resolve().parents[2] / "deploy/monitoring"
# So many times faster: a quarter of an hour takes 5 s. Scrapes come every half second instead of every 15.
PACE = 180
SCRAPE_INTERVAL = "500ms"
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def program(name: str) -> str:
    """Return a program of the machine, or skip."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: on Debian it comes with prometheus or prometheus-alertmanager")
    return found


def free_port() -> int:
    """Return a port that nobody uses at this moment: these programs do not tell which one they took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def faster(duration: str) -> str:
    """Return a duration at the pace of the tests."""
    return f"{max(1, round(int(duration[:-1]) * _UNIT_MS[duration[-1]] / PACE))}ms"


def faster_rules(text: str) -> str:
    """Return a rule file with every window, hold and interval at the pace of the tests."""
    text = re.sub(r"\[(\d+[smhd])\]", lambda found: f"[{faster(found[1])}]", text)
    text = re.sub(r"(offset |for: )(\d+[smhd])", lambda found: found[1] + faster(found[2]), text)
    text = text.replace("4 * 3600", f"4 * 3600 / {PACE}")  # how far ahead a disk is looked at
    return re.sub(r"interval: \w+", f"interval: {SCRAPE_INTERVAL}", text)


def faster_alertmanager(text: str, url: str) -> str:
    """Return Alertmanager's configuration at that pace, with every webhook at one address."""
    text = re.sub(r"(group_wait|group_interval): (\w+)", lambda found: f"{found[1]}: {faster(found[2])}", text)
    return re.sub(r"url: http://\S+", f"url: {url}", text)


def get(url: str, **query: str) -> Any:
    """Return an answer in JSON."""
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as answer:  # noqa: S310 - ours
        return json.load(answer)


@dataclass(frozen=True, kw_only=True)
class Alertmanager:
    """Where it listens."""

    url: str

    def post(self, *alerts: Mapping[str, str]) -> None:
        """Let alerts fire, by their labels."""
        body = json.dumps([{"labels": labels} for labels in alerts]).encode()
        request = urllib.request.Request(  # noqa: S310 - ours
            f"{self.url}/api/v2/alerts", data=body, headers={"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310 - ours

    def alerts(self) -> list[dict[str, Any]]:
        """Return all that it knows, silenced and inhibited ones too."""
        found: list[dict[str, Any]] = get(f"{self.url}/api/v2/alerts")
        return found


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """Where it listens."""

    url: str

    def query(self, expr: str, *, start: float, end: float) -> list[dict[str, Any]]:
        """Return the series of a query over a time, one value a second."""
        told = get(f"{self.url}/api/v1/query_range", query=expr, start=str(start), end=str(end), step="1")
        found: list[dict[str, Any]] = told["data"]["result"]
        return found


@contextmanager
def _running(url: str, *command: str | Path, folder: Path) -> Iterator[None]:
    """Yield while a program runs that says at /-/ready when it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process:
        try:
            end = time.monotonic() + 30
            while True:
                try:
                    urllib.request.urlopen(f"{url}/-/ready", timeout=1).close()  # noqa: S310 - ours
                    break
                except (OSError, urllib.error.URLError):
                    told = (folder / "log").read_text()[-2000:]
                    assert process.poll() is None, told
                    assert time.monotonic() < end, told
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()


@contextmanager
def alertmanager(folder: Path, hook: str) -> Iterator[Alertmanager]:
    """Yield one with the configuration of deploy/monitoring."""
    url = f"http://127.0.0.1:{free_port()}"
    folder.mkdir(parents=True)
    text = (MONITORING / "alertmanager/alertmanager.yml").read_text()
    (folder / "alertmanager.yml").write_text(faster_alertmanager(text, hook))
    command = [
        program("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--cluster.listen-address=",
    ]
    with _running(url, *command, folder=folder):
        yield Alertmanager(url=url)


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str], told: Alertmanager) -> Iterator[Prometheus]:
    """Yield one with the rules of deploy/monitoring. targets: addresses by the names of their scrape jobs."""
    url = f"http://127.0.0.1:{free_port()}"
    config = yaml.safe_load((MONITORING / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [told.url.removeprefix("http://")]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    (folder / "rules").mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for rules in (MONITORING / "prometheus/rules").glob("*.yml"):
        (folder / "rules" / rules.name).write_text(faster_rules(rules.read_text()))
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--rules.alert.resend-delay=1s",
    ]
    with ExitStack() as stack:
        stack.enter_context(_running(url, *command, folder=folder))
        yield Prometheus(url=url)
