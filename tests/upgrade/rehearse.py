"""A rehearsal of updates on this machine, by processes: what operators do with both services, while they are used.

Cognate is exchanged blue-green: the new release is started beside the old one, has to pass `forge smoke`, and gets the
traffic by one change of what clients find in Consul. The agent service is exchanged one replica after the other, and
no fewer than before ever serve. Then a new Cognate that cannot read its artifacts is refused by its smoke test, and the
update of Cognate is taken back while a long job runs on it. Both services share PostgreSQL and a folder each.

Workers hash instead of training; servers, stores, publication and exchange are the two releases' own.
Usage: python -m tests.upgrade.rehearse [--short]; the last line is one JSON object. Exit status 1: something was lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cognateforge.job.v1 import job_pb2
from tests.support.consul_double import ConsulDouble
from tests.support.postgres import PostgresServer
from tests.support.previous import Release, light, previous_release, this_release
from tests.support.release_servers import ReleaseServer
from tests.upgrade.calls import client_of, get, start, wait_for, watch
from tests.upgrade.load import Load, wait_until

# A server on trial starts no worker before its smoke test has had time.
_TRIAL_S = "15"
_HAND_OVER = {"WORKERS__ON_DRAIN": "hand_over", "WORKERS__START_DELAY_S": _TRIAL_S}


@dataclass(frozen=True)
class Pace:
    """calm_s: how long the load runs undisturbed between two changes. pause_s: of a caller between two rounds."""

    replicas: int
    calm_s: float
    pause_s: float
    job_every_s: float
    long_steps: int


FULL = Pace(replicas=3, calm_s=10, pause_s=0.1, job_every_s=2, long_steps=200)
SHORT = Pace(replicas=2, calm_s=0, pause_s=1, job_every_s=8, long_steps=100)


class Stage:
    """Both services' stores, folders and servers."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._number = 0
        postgres = PostgresServer()
        postgres.start()
        stack.callback(postgres.stop)
        self._stores = {service: postgres.new_database() for service in ("cognate", "agent")}
        self.consul = ConsulDouble()
        stack.callback(self.consul.close)
        stack.enter_context(mock.patch.dict(os.environ, {"CONSUL_HTTP_ADDR": f"127.0.0.1:{self.consul.port}"}))

    def server(self, service: str, release: Release, **settings: str) -> ReleaseServer:
        """Start one more server of a service, with a data folder of its own, and wait until it serves."""
        self._number += 1
        shared = self._folder / f"{service}-shared"
        shared.mkdir(exist_ok=True)
        given = {"STORE_URL": self._stores[service], "SHARED_DIR": str(shared), "WORKERS__SLOTS": "2", **settings}
        if service == "agent":
            given |= {"CONSUL__SERVICE": "agent", "COGNATE__CONSUL_SERVICE": "cognate"}
        server = ReleaseServer(service, self._folder / f"{service}-{self._number}-{release.name}", given)
        self._stack.callback(server.kill)
        server.start(release)
        return server

    def switch(self, server: ReleaseServer) -> None:
        """Let clients find this Cognate and no other one."""
        self.consul.put_instances("cognate", server.address)


def smoke(release: Release, server: ReleaseServer) -> tuple[int, list[str]]:
    """Run `forge smoke` of a release against one server, and return its exit code and what failed."""
    option = {"cognate": "--cognate", "agent": "--agent-server"}[server.service]
    command = [
        sys.executable,
        "-m",
        "cognateforge.cli",
        "smoke",
        server.service,
        "--json",
        "--timeout",
        "4",
        option,
        server.address,
    ]
    done = subprocess.run(
        [*command, "--expect-version", release.version],
        env=release.surroundings(),
        capture_output=True,
        text=True,
        check=False,
    )
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, [check["name"] for check in checks if check["level"] == "fail"]


def rehearse(folder: Path, old: Release, new: Release, pace: Pace) -> dict[str, Any]:
    """Do all of it, and return what was seen."""
    told: dict[str, Any] = {"from": old.version, "to": new.version}
    with contextlib.ExitStack() as stack:
        stage = Stage(folder, stack)
        blue = stage.server("cognate", old)
        stage.switch(blue)
        replicas = [stage.server("agent", old) for _ in range(pace.replicas)]
        _prepare(blue, replicas[0])
        load = Load(folder, pause_s=pace.pause_s, job_every_s=pace.job_every_s, models_before=1)
        began = time.monotonic()
        with load.running():
            time.sleep(pace.calm_s)
            green = _blue_green(stage, blue, new, told)
            time.sleep(pace.calm_s)
            _rolling(stage, replicas, new, told)
            time.sleep(pace.calm_s)
            _refused(stage, green, new, told)
            _taken_back(stage, green, blue, old, load, pace, told)
            time.sleep(pace.calm_s)
        told["seconds_under_load"] = round(time.monotonic() - began, 1)
        _judge(load, told)
        for server in (blue, green, *replicas):
            server.terminate()
    return told


def _prepare(cognate: ReleaseServer, agent: ReleaseServer) -> None:
    """Publish what callers fetch: a model, and an agent made of it."""
    for server in (cognate, agent):
        with client_of(server.service, server.address) as client:
            assert 1 == watch(client, start(client, steps=2, step_ms=1)).succeeded


def _blue_green(stage: Stage, blue: ReleaseServer, new: Release, told: dict[str, Any]) -> ReleaseServer:
    with _timed(told, "blue_green_s"):
        green = stage.server("cognate", new, **_HAND_OVER)
        code, failed = smoke(new, green)
        assert 0 == code, failed
        stage.switch(green)
        assert 0 == blue.stop()
    return green


def _rolling(stage: Stage, replicas: list[ReleaseServer], new: Release, told: dict[str, Any]) -> None:
    """Start a new replica before each old one is stopped."""
    with _timed(told, "rolling_s"):
        for number, before in enumerate(list(replicas)):
            replicas.append(stage.server("agent", new, **{**_HAND_OVER, "WORKERS__START_DELAY_S": "0"}))
            code, failed = smoke(new, replicas[-1])
            assert 0 == code, failed
            assert 0 == before.stop(), number
            replicas.remove(before)


def _refused(stage: Stage, green: ReleaseServer, new: Release, told: dict[str, Any]) -> None:
    """A new server whose artifacts are not where it looks: its smoke test says so, and it is stopped."""
    lost = stage._folder / "nothing-here"
    lost.mkdir()
    with _timed(told, "refused_s"):
        bad = stage.server("cognate", new, **{**_HAND_OVER, "WORKERS__START_DELAY_S": "3600", "SHARED_DIR": str(lost)})
        code, failed = smoke(new, bad)
        assert 0 == bad.stop()
    told["refused"] = {"exit_code": code, "failed": failed, "traffic_stays": green.address}


def _taken_back(
    stage: Stage, green: ReleaseServer, blue: ReleaseServer, old: Release, load: Load, pace: Pace, told: dict[str, Any]
) -> None:
    """Go back to the old release on the new schema, while a job runs that is longer than the change."""
    long = load.begin("cognate", steps=pace.long_steps, step_ms=200)
    with client_of("cognate", green.address) as client:
        wait_for(client, long, job_pb2.JOB_STATE_RUNNING, timeout_s=120)
    with _timed(told, "taken_back_s"):
        blue.start(old)
        stage.switch(blue)
        assert 0 == green.stop()
    stopped = time.monotonic()
    with client_of("cognate", blue.address) as client:
        # On a busy machine it may have ended before the change did.
        again = (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_VALIDATING, job_pb2.JOB_STATE_SUCCEEDED)
        wait_until(lambda: get(client, long).state in again, "the long job", timeout_s=120)
        told["long_job_again_after_s"] = round(time.monotonic() - stopped, 1)
        told["long_job_attempts"] = get(client, long).attempt


def _judge(load: Load, told: dict[str, Any]) -> None:
    seen, watched = load.seen, load.watched
    told |= {
        "calls": dict(sorted(seen.calls.items())),
        "failed_calls": seen.failed,
        "without_retries": {"calls": seen.unretried_calls, "failed": seen.unretried_failed},
        "broken_streams": seen.broken_streams,
        "jobs": len(load.jobs),
        "lost_jobs": [name for name in load.jobs if name not in watched or watched[name].succeeded != 1],
        "incomplete_watches": [name for name, one in watched.items() if not one.contiguous],
        "attempts": sum(one.attempts for one in watched.values()),
        "handed_over": sum(one.handed_over for one in watched.values()),
        "models": len(load.model_sequences),
        "models_complete": load.model_sequences == list(range(1, load.models_before + len(load.published) + 1)),
    }


def clean(told: dict[str, Any]) -> bool:
    """Whether nothing failed, nothing was lost, and the bad release was refused."""
    lost = told["failed_calls"] or told["lost_jobs"] or told["incomplete_watches"]
    return not lost and told["models_complete"] and told["refused"]["exit_code"] != 0


@contextlib.contextmanager
def _timed(told: dict[str, Any], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    told[name] = round(time.monotonic() - began, 1)
    sys.stderr.write(f"{name} {told[name]}\n")


def run(folder: Path, pace: Pace) -> dict[str, Any]:
    """Build both releases, and rehearse."""
    old = light(previous_release(), folder / "old-release")
    new = light(this_release(), folder / "new-release")
    return rehearse(folder, old, new, pace)


if __name__ == "__main__":
    # As an interrupt: what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="forge-rehearsal-") as scratch:
        outcome = run(Path(scratch), SHORT if "--short" in sys.argv[1:] else FULL)
    print(json.dumps(outcome))
    sys.exit(0 if clean(outcome) else 1)
