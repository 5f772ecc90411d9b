"""The workflows are valid, ask for little, and run for what concerns their part and for nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tools import affected, release

FOLDER = affected.ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
OF_PARTS = ["agent", "client", "cognate", "contract", "deploy"]
BIN = Path(sys.executable).parent


def read(name: str) -> dict[str, Any]:
    # BaseLoader: "on" is a key, and not YAML 1.1's word for true.
    found: dict[str, Any] = yaml.load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506
    return found


@pytest.mark.parametrize(
    "command",
    [
        ("check-jsonschema", "--builtin-schema", "vendor.github-workflows"),
        ("zizmor", "--offline", "--no-progress"),
    ],
    ids=["schema", "zizmor"],
)
def test_workflows_are_valid_and_safe(command: tuple[str, ...]) -> None:
    """Of the schema's form, and without a finding of the linter of their security."""
    done = subprocess.run([BIN / command[0], *command[1:], *FILES], capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_there_is_a_workflow_for_each_part_that_is_tested_alone() -> None:
    """What both services share is tested with each of them, and pages with the tests of them."""
    assert [*OF_PARTS, "release"] == sorted(path.stem for path in FILES)


@pytest.mark.parametrize("part", OF_PARTS)
def test_a_workflow_runs_for_what_concerns_its_part(part: str) -> None:
    """Over all files of the repository: its filters let through what tools/affected.py says, on both events."""
    events = read(part)["on"]
    assert events["pull_request"]["paths"] == events["push"]["paths"]
    paths = events["push"]["paths"]
    for path in affected.tracked():
        assert affected.matches(path, paths) is (part in affected.affected([path])), path


@pytest.mark.parametrize(
    ("path", "runs"),
    [
        ("cognate_server/gate.py", "cognate deploy"),
        ("agent_server/plan.py", "agent deploy"),
        ("tests/agent/test_optim.py", "agent"),
        ("protos/cognateforge/errors/v1/reasons.proto", "agent client cognate contract deploy"),
        ("docs/agents.md", ""),
    ],
)
def test_a_change_of_one_service_does_not_run_the_other(path: str, runs: str) -> None:
    """A change of the contract runs all, with the matrix of compatibility."""
    assert runs.split() == [p for p in OF_PARTS if affected.matches(path, read(p)["on"]["push"]["paths"])]


@pytest.mark.parametrize("part", OF_PARTS)
def test_a_workflow_tests_its_part(part: str) -> None:
    """With the linters, and the files that look at it; services and client build their wheels."""
    [job] = read(part)["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert "make lint" in runs
    assert any(f"affected.py --tests --part {part} " in run for run in runs)
    builds = [run for run in runs if "tools/release.py" in run]
    assert (part in release.FOLDERS) is bool(builds)
    if part == "contract":
        assert "make proto-breaking" in runs


def test_only_a_release_may_write_and_each_job_only_its_own() -> None:
    """What builds and tests reads; what has an identity or writes runs nothing of the repository's Python."""
    for part in OF_PARTS:
        workflow = read(part)
        assert {"contents": "read"} == workflow["permissions"]
        assert all("permissions" not in job for job in workflow["jobs"].values())
    workflow = read("release")
    assert {} == (workflow["permissions"] or {})
    asked = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert {
        "build": {"contents": "read"},
        "attest": {"attestations": "write", "id-token": "write"},
        "images": {"attestations": "write", "contents": "read", "id-token": "write"},
        "publish": {"contents": "write"},
    } == asked
    for name in ("attest", "publish"):
        assert not any("checkout" in step.get("uses", "") for step in workflow["jobs"][name]["steps"])


def test_every_action_is_pinned_by_its_commit_and_named_by_its_version() -> None:
    """One commit for an action over all workflows; a tag can be moved."""
    pins: dict[str, set[str]] = {}
    for path in FILES:
        for line in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8")):
            action, commit, version = re.fullmatch(r"(actions/[\w-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)", line).groups()  # type: ignore[union-attr]
            pins.setdefault(action, set()).add(f"{commit} {version}")
    assert pins
    assert all(len(found) == 1 for found in pins.values()), pins


def test_a_release_has_tags_for_each_distribution() -> None:
    """A part that can be built can be released."""
    assert {f"{part}-v[0-9]*" for part in release.FOLDERS} == {*read("release")["on"]["push"]["tags"]}


def test_images_of_a_release_are_targets_of_the_containerfile() -> None:
    """The names that the workflow's own script gives for each part are all those that there are."""
    file = affected.ROOT / "deploy" / "images" / "Containerfile"
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    [told] = [step["run"] for step in read("release")["jobs"]["build"]["steps"] if step.get("id") == "part"]
    built = set()
    for part in release.FOLDERS:
        given = {"GITHUB_REF_NAME": f"{part}-v0.2.0", "GITHUB_OUTPUT": "/dev/stdout", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["bash", "-ec", told], env=given, capture_output=True, text=True, check=True)
        outputs = dict(line.split("=", 1) for line in done.stdout.splitlines())
        assert outputs["part"] == part
        built |= set(json.loads(outputs["images"]))
    assert built == {"forge", "cognate-server", "cognate-worker", "agent-server", "agent-worker"}
    assert built <= targets


def test_images_of_a_release_keep_their_health_check() -> None:
    """Buildah leaves it out of the format that it writes by default."""
    [build] = [
        step["run"] for step in read("release")["jobs"]["images"]["steps"] if "buildah build" in step.get("run", "")
    ]
    assert "HEALTHCHECK" in (affected.ROOT / "deploy/images/Containerfile").read_text(encoding="utf-8")
    assert "--format docker" in build
