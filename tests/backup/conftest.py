"""Entry points as each part's pyproject.toml has them: those of an installation may be older than this checkout."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from cognateforge.cli import plugins
from training_common.backup import service

ROOT = Path(__file__).resolve().parents[2]


def entry_points(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group, by their names."""
    found: dict[str, EntryPoint] = {}
    for file in sorted(ROOT.glob("*/pyproject.toml")):
        table = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["entry-points"].get(group, {})
        found |= {name: EntryPoint(name, value, group) for name, value in table.items()}
    return found


@pytest.fixture(autouse=True)
def _entry_points_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda: entry_points(plugins.GROUP))
    monkeypatch.setattr(service, "entry_points", lambda: entry_points(service.GROUP))


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Any:
    """Return a real S3 server, with `new_url` and the `options` that open its URLs."""
    try:
        return request.getfixturevalue("s3")
    except pytest.FixtureLookupError:
        pytest.skip("there is no S3 server among what supports the tests")


@pytest.fixture
def s3_backups(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty place in an S3, whose endpoint and keys are in the environment."""
    for name, value in s3_server.options.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", value)
    url: str = s3_server.new_url()
    return url
