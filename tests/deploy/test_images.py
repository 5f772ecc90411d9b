"""What the images are made of, read from the Containerfile. How to build them is in docs/deployment.md."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "images" / "Containerfile"
IMAGES = ("cognate-server", "cognate-worker", "agent-server", "agent-worker", "forge")
# What only workers import, and what of it a server's own processes need all the same.
ONLY_WORKERS = ("torch", "safetensors", "tokenizers", "datasets", "pandas", "numba", "transformers", "peft")


@dataclass
class Stage:
    """One stage: what it is made of, and its instructions in their order."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """Return the value of the last instruction of a kind, or nothing."""
        return next((value for name, value in reversed(self.steps) if name == instruction), "")


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    parser = DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes()))
    found: dict[str, Stage] = {}
    for step in parser.structure:
        if step["instruction"] == "FROM":
            base, _, name = step["value"].partition(" AS ")
            current = found.setdefault(name, Stage(base))
        elif found and step["instruction"] != "COMMENT":
            current.steps.append((step["instruction"], step["value"]))
    return found


def lineage(stages: dict[str, Stage], name: str) -> Iterator[Stage]:
    """Yield a stage and those below it."""
    while name in stages:
        yield stages[name]
        name = stages[name].base


def test_every_image_is_a_target_that_runs_as_nobody_of_the_host(stages: dict[str, Stage]) -> None:
    """By number, since a cluster cannot tell from a name that it is not root; and a server drains on its signal."""
    for image in IMAGES:
        layers = list(lineage(stages, image))
        assert ["10001:10001"] == [stage.last("USER") for stage in layers if stage.last("USER")]
        assert ["SIGTERM"] == [stage.last("STOPSIGNAL") for stage in layers if stage.last("STOPSIGNAL")]
        # What is copied in belongs to root: a process cannot change its own code.
        assert [f"--from={image}-packages /opt/cognateforge /opt/cognateforge"] == [
            value for name, value in stages[image].steps if name == "COPY"
        ]


def test_the_base_is_pinned_and_nothing_else_is_fetched(stages: dict[str, Stage]) -> None:
    """A tag moves; a digest does not. Packages come from pip under the constraints alone."""
    text = FILE.read_text(encoding="utf-8")
    pinned = r"^ARG BASE=docker\.io/library/python:3\.\d+\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$"
    assert re.search(pinned, text, re.MULTILINE)
    bases = {stage.base for stage in stages.values()} - set(stages)
    assert {"${BASE}", "${IMAGE}-packages", "scratch"} == bases
    installs = [
        value for stage in stages.values() for name, value in stage.steps if name == "RUN" and "-m pip" in value
    ]
    assert len(IMAGES) + 2 == len(installs)  # the wheels of this repository, each image, and what tells of them
    for name in (f"{image}-packages" for image in IMAGES):
        constraints = [stage.last("ENV") for stage in lineage(stages, name) if "PIP_CONSTRAINT" in stage.last("ENV")]
        assert ["/source/constraints.txt"] == [value.rpartition("PIP_CONSTRAINT=")[2] for value in constraints]
    for word in ("apt-get", "curl ", "wget ", "ADD ", "latest"):
        assert word not in text


def test_an_entry_is_a_program_and_its_module_is_there(stages: dict[str, Stage]) -> None:
    """No shell stands between a signal and the process that drains on it."""
    for image in IMAGES:
        entry, command = (json.loads(stages[image].last(kind)) for kind in ("ENTRYPOINT", "CMD"))
        words = [*entry, *command]
        assert words[0] in {"python", "forge"}
        if words[0] == "python":
            assert words[1] == "-m"
            assert importlib.util.find_spec(words[2]) is not None
    for service in ("cognate", "agent"):
        assert ["--settings", f"/etc/cognateforge/{service}.toml"] == json.loads(
            stages[f"{service}-server"].last("CMD")
        )


def test_health_is_asked_on_the_port_that_is_exposed(stages: dict[str, Stage]) -> None:
    """Without TLS: the listener of metrics has none."""
    for service, ports in (("cognate", ("7101", "7111")), ("agent", ("7102", "7112"))):
        stage = stages[f"{service}-server"]
        assert ports == tuple(stage.last("EXPOSE").split())
        health = stage.last("HEALTHCHECK")
        program = json.loads(health[health.index("[") :])
        assert f"http://127.0.0.1:{ports[1]}/healthz" in program[2]
        compile(program[2], "healthcheck", "exec")


def test_what_is_built_from_is_a_list_of_what_is_needed() -> None:
    """No history, no state and no secrets reach a build; and what the list names is there."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert [] == [name for name in allowed if not (ROOT / name).exists()]
    assert not set(allowed) & {".git", "deploy", "var", "tests", "."}


def test_arguments_that_pages_name_are_those_of_the_containerfile() -> None:
    """An engine takes an argument that no stage knows, and changes nothing by it."""
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("deployment.md", "kubernetes.md"))
    named = set(re.findall(r"--build-arg (\w+)=", pages))
    assert named
    assert named <= set(re.findall(r"^ARG (\w+)", FILE.read_text(encoding="utf-8"), re.MULTILINE))


def requirements(distribution: str, extras: Sequence[str]) -> set[str]:
    """Return the names that a distribution of this repository asks for, and those of its extras."""
    for file in (ROOT / "pyproject.toml", *ROOT.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        if project["name"].replace("-", "_") == distribution:
            lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
            return {re.split(r"[\[>=<~]", requirement)[0] for wanted in lists for requirement in wanted}
    raise AssertionError(f"no pyproject.toml is of {distribution}")


def test_a_server_image_brings_nothing_that_only_workers_need(stages: dict[str, Stage]) -> None:
    """PyTorch and what stands on it is in no extra that is installed there; a worker's image has all of them."""
    extras = re.search(r"^ARG SERVICE_EXTRAS=(.*)$", FILE.read_text(), re.MULTILINE)
    assert extras
    for image in IMAGES[:-1]:
        install = stages[f"{image}-packages"].last("RUN").replace("${SERVICE_EXTRAS}", extras[1])
        names = {*install.split()}
        for wheel, wanted in re.findall(r"/wheels/(\w+)-\*\.whl\)?(?:\[([\w,]+)\])?", install):
            names |= requirements(wheel, wanted.split(",") if wanted else ())
        assert bool(names & set(ONLY_WORKERS)) is image.endswith("-worker"), image


def test_servers_start_where_what_only_workers_need_is_missing(tmp_path: Path) -> None:
    """As in their images: built, with their architectures, without one of those packages."""
    script = f"""
        import importlib.abc, os, sys
        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {(*ONLY_WORKERS, "pyarrow", "gymnasium", "pettingzoo", "numpy")!r}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Missing())
        import agent_server.server, cognate_server.server, asyncio
        from agent_server.settings import load_settings as agent
        from cognate_server.settings import load_settings as cognate
        async def build():
            cognate_server.server.build(cognate(None), None)
            agent_server.server.build(agent(None), None)
        asyncio.run(build())
        print("built")
    """
    folders = {f"{name}_SERVER_DATA_DIR": str(tmp_path / name) for name in ("COGNATE", "AGENT")}
    path = ":".join(str(ROOT / part) for part in ("clients", ""))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, **folders},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "built" in done.stdout, done.stderr
