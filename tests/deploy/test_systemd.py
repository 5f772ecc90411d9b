"""Units for a machine without containers: what they run, what outlives them, and what they may."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_server.settings import AgentSettings
from cognate_server.settings import CognateSettings
from training_common.settings import ServiceSettings, load

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SERVICES: dict[str, type[ServiceSettings]] = {"cognate": CognateSettings, "agent": AgentSettings}
# Of 10, as `systemd-analyze security` counts; 1.9 is what it says today.
MOST_EXPOSED = 2.0
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: Debian has it in systemd"
)

Unit = Mapping[str, list[str]]


def unit(service: str) -> Unit:
    """Return every value of every key, in its order."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (FOLDER / f"{service}-server.service").read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def settings(service: str) -> ServiceSettings:
    return load(SERVICES[service], file=FOLDER / f"{service}.toml", environment={}, prefix="UNUSED_")


@pytest.mark.parametrize("service", SERVICES)
def test_a_restart_leaves_workers_alone(service: str) -> None:
    """They are in the unit's control group: only the server is signalled, and a worker out of memory is no failure."""
    keys = unit(service)
    assert keys["KillMode"] == ["process"]
    assert keys["OOMPolicy"] == ["continue"]
    # What would be taken away from workers that go on.
    assert not set(keys) & {"PrivateTmp", "DynamicUser", "RemoveIPC", "RuntimeDirectory", "PrivateMounts"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_server_has_the_time_to_drain_and_is_not_started_again_in_vain(service: str) -> None:
    """Status 2 tells of settings that cannot be used."""
    keys, read = unit(service), settings(service)
    assert float(keys["TimeoutStopSec"][0]) >= read.drain_grace_s + 10
    assert keys["KillSignal"] == ["SIGTERM"]
    assert keys["Restart"] == ["on-failure"]
    assert keys["RestartPreventExitStatus"] == ["2"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_sample_settings_fit_the_unit(service: str) -> None:
    """Folders that may be written are those of the settings; the locks of devices are shared by both services."""
    keys, read = unit(service), settings(service)
    assert f"/var/lib/{keys['StateDirectory'][0]}" == str(read.data_dir)
    assert keys["ReadWritePaths"] == [f"-{read.workers.device_folder}"]
    assert f"d {read.workers.device_folder} 1777 root root -" in (FOLDER / "tmpfiles.conf").read_text().splitlines()
    assert keys["ExecStart"] == [
        f"/opt/cognateforge/{service}/bin/python -m {service}_server --settings /etc/cognateforge/{service}.toml"
    ]
    assert re.search(rf"^u {keys['User'][0]} ", (FOLDER / "sysusers.conf").read_text(), re.MULTILINE)
    scratch = dict(part.split("=", 1) for part in keys["Environment"][0].split())
    assert scratch["TMPDIR"] == scratch["HOME"] == f"%C/{keys['CacheDirectory'][0]}"


def test_the_services_share_nothing_but_the_locks() -> None:
    """Each has a user, folders and an environment of its own, and both have the same protection."""
    cognate, agent = unit("cognate"), unit("agent")
    own = {"Description", "After", "User", "Group", "ExecStart", "EnvironmentFile"}
    own |= {"StateDirectory", "CacheDirectory", "Environment", "WorkingDirectory"}
    assert own == {key for key in {*cognate, *agent} if cognate[key] != agent[key]}
    first, second = (tomllib.loads((FOLDER / f"{name}.toml").read_text()) for name in SERVICES)
    assert second["cognate"]["address"] == first["address"]


@needs_systemd
@pytest.mark.parametrize("service", SERVICES)
def test_systemd_knows_every_line(service: str, tmp_path: Path) -> None:
    """By its own reader, which also looks for the program: one of this machine stands in for it."""
    text = (FOLDER / f"{service}-server.service").read_text()
    file = tmp_path / f"{service}-server.service"
    file.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if file.name in line]
    assert (done.returncode, told) == (0, [])


@needs_systemd
@pytest.mark.parametrize("service", SERVICES)
def test_a_unit_is_no_more_exposed_than_it_was(service: str) -> None:
    """What was given up is a decision: the threshold is the figure of today."""
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}"]
    done = subprocess.run([*command, str(FOLDER / f"{service}-server.service")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
