"""The release before this one, from its own wheel: processes of it run beside those of this release.

The wheel is built from the repository's history and unpacked into a folder, which goes before everything that is
installed. What the release depends on is what this one has.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

_PINNED = Path(__file__).with_name("previous_release.toml")
_LIGHT_WORKER = Path(__file__).with_name("light_worker.py")
_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("cognateforge", "training_common", "cognate_server", "agent_server")


class PreviousReleaseMissing(RuntimeError):  # noqa: N818 - a reason to skip
    """The release before this one cannot be had here: the message says why."""


@dataclass(frozen=True)
class Release:
    """A release that processes can be started of. environment: goes over the caller's."""

    name: str
    version: str
    environment: Mapping[str, str] = field(hash=False)

    def surroundings(self, **more: str) -> dict[str, str]:
        """Return the whole environment of a process of it."""
        return {**os.environ, **self.environment, **more}


def this_release() -> Release:
    """Return the release that the tests belong to, from the checkout."""
    return Release("N", _version({}), {})


def previous_release() -> Release:
    """Return the release before this one. Errors: PreviousReleaseMissing, where the clone is too shallow for it."""
    return _previous(**tomllib.loads(_PINNED.read_text()))


def light(release: Release, folder: Path) -> Release:
    """Return a copy of a release in a folder, whose workers hash instead of training.

    Servers, store, publication and exchange are its own. The copy of this release bears the version of the checkout,
    whatever was installed before it.
    """
    unpacked = release.environment.get("PYTHONPATH", "")
    for package in _PACKAGES:
        source = Path(unpacked) / package if unpacked else _checkout(package)
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for service in ("cognate_server", "agent_server"):
        shutil.copyfile(_LIGHT_WORKER, folder / service / "worker.py")
    version = release.version
    if unpacked:
        for told in Path(unpacked).glob("*.dist-info"):
            shutil.copytree(told, folder / told.name)
    else:
        version = _tell_versions(folder)
    return Release(release.name, version, {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"})


def _checkout(package: str) -> Path:
    return _REPOSITORY / ("clients" if package == "cognateforge" else "") / package


def _tell_versions(folder: Path) -> str:
    """Write metadata that go before the installed ones, with the same entry points. Return the client's version."""
    versions: dict[str, str] = {}
    for place in (".", "training_common", "cognate_server", "agent_server"):
        project = tomllib.loads((_REPOSITORY / place / "pyproject.toml").read_text())["project"]
        name, versions[place] = project["name"], project["version"]
        told = folder / f"{name.replace('-', '_')}-{versions[place]}.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[place]}\n")
        (told / "entry_points.txt").write_text(distribution(name).read_text("entry_points.txt") or "")
    return versions["."]


@functools.cache
def _previous(*, commit: str, version: str) -> Release:
    """Build it once for all processes of a machine that test at the same time, and for later ones."""
    folder = Path(tempfile.gettempdir()) / f"cognateforge-previous-{os.getuid()}" / f"{commit}-{sys.version_info.minor}"
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    if folder.parent.is_symlink() or folder.parent.stat().st_uid != os.getuid():
        raise PreviousReleaseMissing(f"{folder.parent} belongs to somebody else: remove it")
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            _build(commit, folder)
    environment = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    if (found := _version(environment)) != version:
        raise AssertionError(f"{_PINNED} says {version}, and its commit is version {found}")
    return Release("N-1", version, environment)


def _build(commit: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source, wheels, unpacked = (Path(scratch) / name for name in ("source", "wheels", "unpacked"))
        source.mkdir()
        git = ["git", "-C", str(_REPOSITORY)]
        if _fails([*git, "cat-file", "-e", f"{commit}^{{commit}}"]):
            raise PreviousReleaseMissing(f"commit {commit} is not in this clone: fetch the whole history")
        _run([*git, "archive", "--output", f"{scratch}/source.tar", commit])
        _run(["tar", "-x", "-f", f"{scratch}/source.tar", "-C", str(source)])
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
        _run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)])
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
        unpacked.rename(folder)


def _version(environment: Mapping[str, str]) -> str:
    told = "from importlib.metadata import version; print(version('cognateforge'))"
    command = [sys.executable, "-c", told]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _fails(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode != 0
    except FileNotFoundError as error:
        raise PreviousReleaseMissing(f"{command[0]} is not installed") from error


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
