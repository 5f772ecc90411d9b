"""Which engine the settings give a server, and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy_worker import ToySettings
from training_common.engines.build import build_engine, worker_settings_file
from training_common.settings import SettingsError, load


def settings(folder: Path, text: str) -> ToySettings:
    file = folder / "settings.toml"
    file.write_text(text)
    return load(ToySettings, file=file, environment={}, prefix="TOY_SERVER_")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('engine = "slurm"', "workers.engine"),
        ('ray.address = "127.0.0.1:6379"', "workers.ray.address"),
        ("ray.resources = {CPU = -1}", "resources.CPU: -1.0 is no amount"),
        ("ray.resources = {CPU = 0}", "a process that asks for nothing"),
        ("ray.queue = 1", "workers.ray.queue: unknown key"),
    ],
)
def test_wrong_settings_of_an_engine_are_named(text: str, said: str, tmp_path: Path) -> None:
    """Before anything starts, with the key and what to do."""
    with pytest.raises(SettingsError, match=said):
        settings(tmp_path, f"[workers]\n{text}\n")


def test_workers_read_the_settings_of_where_they_run(tmp_path: Path) -> None:
    """On a cluster those of the cluster, or their environment alone; here the server's own."""
    own = tmp_path / "own.toml"
    for engine, there in (("local", own), ("ray", Path("/there.toml")), ("kubernetes", None)):
        found = settings(tmp_path, f'[workers]\nengine = "{engine}"\nray.settings_file = "/there.toml"\n')
        assert worker_settings_file(found, own) == there


def test_an_engine_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library may be missing, and the message tells how to get it."""
    monkeypatch.setitem(sys.modules, "training_common.engines.ray", None)
    with pytest.raises(SettingsError, match=r"pip install 'cognateforge\[ray\]'"):
        build_engine(settings(tmp_path, '[workers]\nengine = "ray"\n'), module="worker")


def test_rays_environment_may_not_lead_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client obeys RAY_ADDRESS before the address that it is given."""
    pytest.importorskip("ray.job_submission", reason="the extra [ray] is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(SettingsError, match="RAY_ADDRESS names another cluster"):
        build_engine(settings(tmp_path, '[workers]\nengine = "ray"\n'), module="worker")


def test_a_server_loads_the_library_of_its_own_engine_only() -> None:
    """Ray and Kubernetes take seconds to load, and are extras."""
    code = "import sys, cognate_server.server, agent_server.server; print({'ray', 'kubernetes'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert ended.stdout.strip() == "set()"
