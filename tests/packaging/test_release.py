"""Releases: what is in a wheel, that two builds are the same bytes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tools import release
from tools.release import FOLDERS, ROOT

PACKAGES = {"client": "cognateforge", "common": "training_common", "cognate": "cognate_server", "agent": "agent_server"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wheels")
    return {part: release.build_wheel(release.read_release(part), out) for part in FOLDERS}


@pytest.mark.slow
def test_a_wheel_holds_its_package_whole_and_nothing_else(wheels: dict[str, Path]) -> None:
    """Every file of the package that git knows, the licence, and nothing of another part."""
    for part, wheel in wheels.items():
        package = PACKAGES[part]
        folder = ROOT / "clients" if part == "client" else ROOT
        names = set(zipfile.ZipFile(wheel).namelist())
        assert {package} == {name.split("/")[0] for name in names if ".dist-info/" not in name}
        listed = subprocess.run(["git", "ls-files", package], cwd=folder, capture_output=True, text=True, check=True)
        wanted = {name for name in listed.stdout.split() if (folder / name).exists()}
        left_out = {f"{package}/pyproject.toml", f"{package}/LICENSE"}
        also = {"cognateforge/constraints.txt"} if part == "client" else set()
        assert (wanted - left_out) | also == {name for name in names if ".dist-info/" not in name}, part
        [licence] = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        assert (ROOT / "LICENSE").read_bytes() == zipfile.ZipFile(wheel).read(licence)


@pytest.mark.slow
def test_the_client_asks_for_neither_torch_nor_a_database_nor_a_server(wheels: dict[str, Path]) -> None:
    """Only extras name the services; a service names the shared part, and that the client library."""
    asked: dict[str, list[str]] = {}
    for part, wheel in wheels.items():
        archive = zipfile.ZipFile(wheel)
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        found = message_from_bytes(archive.read(name))
        asked[part] = [text for text in found.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert not [text for text in asked["client"] if text.startswith(("torch", "sqlalchemy", "cognateforge"))]
    assert not [text for texts in asked.values() for text in texts if text.startswith(("torch", "numpy", "datasets"))]
    for part, below in (
        ("common", "cognateforge~="),
        ("cognate", "cognateforge-common~="),
        ("agent", "cognateforge-common~="),
    ):
        assert any(text.startswith(below) for text in asked[part]), part
    assert not [text for part in ("cognate", "agent") for text in asked[part] if "-cognate" in text or "-agent" in text]


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Also from another folder, with other times and modes of files."""
    part = "cognate"
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / FOLDERS[part], copy / FOLDERS[part], ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        path.touch()
    for command in (("init", "-q"), ("add", "-A")):
        subprocess.run(["git", *command], cwd=copy, check=True)
    stamp = subprocess.run(["git", "log", "-1", "--format=%cI"], cwd=ROOT, capture_output=True, text=True, check=True)
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(
        ["git", *name, "commit", "-qm", "a"],
        cwd=copy,
        check=True,
        env={"GIT_COMMITTER_DATE": stamp.stdout.strip(), "PATH": "/usr/bin:/bin"},
    )
    again = release.build_wheel(release.read_release(part, copy), tmp_path / "out")
    assert hashlib.sha256(wheels[part].read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with one part and a changelog, committed."""
    root = tmp_path / "checkout"
    (root / "cognate_server").mkdir(parents=True)
    (root / "cognate_server" / "pyproject.toml").write_text(
        '[project]\nname = "cognateforge-cognate"\nversion = "0.2.0"\n'
    )
    (root / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- Later.\n\n## [cognate 0.2.0] - 2027-01-01\n\n- This.\n"
    )
    git(root, "init", "-q")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *name, *arguments], cwd=root, check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a")


def test_what_is_not_ready_is_refused_with_the_remedy(checkout: Path) -> None:
    """A tree with changes, a version without a section, a tag that there is, and a tag of something else."""
    one = release.read_release("cognate", checkout)
    release.refuse_unready(one, None)
    assert "- This.\n" == release.notes(one)
    with pytest.raises(SystemExit, match=r"tag cognate-v0\.3\.0 is not cognate-v0\.2\.0"):
        release.refuse_unready(one, "cognate-v0.3.0")
    with pytest.raises(SystemExit, match="is of no commit here"):
        release.refuse_unready(one, "cognate-v0.2.0")
    git(checkout, "tag", "cognate-v0.2.0")
    release.refuse_unready(one, "cognate-v0.2.0")
    with pytest.raises(SystemExit, match=r"tag cognate-v0\.2\.0 exists: raise the version"):
        release.refuse_unready(one, None)
    (checkout / "new.py").write_text("")
    with pytest.raises(SystemExit, match=r"(?s)the tree has changes.*new\.py"):
        release.refuse_unready(one, "cognate-v0.2.0")
    commit(checkout)
    with pytest.raises(SystemExit, match="not of what is checked out"):
        release.refuse_unready(one, "cognate-v0.2.0")
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## [0.2.0]\n\n## [0.1.0]\n\n- Before.\n")
    commit(checkout)
    git(checkout, "tag", "-d", "cognate-v0.2.0")
    with pytest.raises(SystemExit, match=r"no section ## \[cognate 0\.2\.0\] or ## \[0\.2\.0\]"):
        release.refuse_unready(one, None)


@pytest.mark.slow
def test_the_list_of_materials_is_the_parts_own(tmp_path: Path) -> None:
    """A worker has torch in it and not the other service's packages; versions are those of constraints.txt."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    one = release.read_release("cognate")
    release.write_sbom(one, tmp_path / "sbom.json")
    told = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    about = told["metadata"]["component"]
    assert ("CycloneDX", one.distribution, one.version) == (told["bomFormat"], about["name"], about["version"])
    found = {component["name"]: component["version"] for component in told["components"]}
    for name, version in found.items():
        assert name.startswith("cognateforge") or pins[name] == version
    assert {"torch", "numba", "SQLAlchemy", "cognateforge", "cognateforge-common"} <= found.keys()
    assert not {"transformers", "peft", "pytest", "cognateforge-agent"} & found.keys()


def test_what_a_client_is_installed_with_has_neither_torch_nor_a_database() -> None:
    """Through all that it needs, as it is installed here."""
    needed = release.needed("client", "cognateforge")
    assert {"grpcio", "protobuf", "typer"} <= needed
    assert not {"torch", "numpy", "sqlalchemy", "datasets", "cognateforge-common", "pytest"} & needed


def test_each_part_has_its_version_in_one_place() -> None:
    """And parts that use each other's inner names ask for the same minor release."""
    for part, folder in FOLDERS.items():
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert release.read_release(part).version == project["version"]
        assert "dynamic" not in project
        minor = ".".join(project["version"].split(".")[:2])
        pins = [text for text in project["dependencies"] if text.startswith("cognateforge")]
        assert (part != "client") is bool(pins)
        assert all(text.partition("~=")[2].startswith(f"{minor}.") for text in pins)
        assert (ROOT / "LICENSE").read_bytes() == (ROOT / folder / "LICENSE").read_bytes()
