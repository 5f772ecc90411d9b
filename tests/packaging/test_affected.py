"""What a change concerns: the rule is that of the imports, and no file and no test is left out."""

from __future__ import annotations

import tomllib

import grimp
import pytest

from tools import affected
from tools.affected import PARTS, ROOT

PACKAGES = {part.package: name for name, part in PARTS.items() if part.package}


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("cognate_server/gate.py", "cognate deploy docs"),
        ("agent_server/rl/ppo.py", "agent deploy docs"),
        ("training_common/worker.py", "common cognate agent deploy docs"),
        ("clients/cognateforge/layout.py", "client common cognate agent deploy docs"),
        ("protos/cognateforge/job/v1/job.proto", "contract client common cognate agent deploy docs"),
        ("deploy/up.py", "deploy"),
        ("docs/adr/README.md", "docs"),
        ("README.md", "docs"),
        ("tests/cognate/test_gate.py", "cognate"),
        ("tests/contract/access_table.md", "contract"),
        ("constraints.txt", " ".join(PARTS)),
        ("tests/support/servers.py", " ".join(PARTS)),
    ],
)
def test_a_change_concerns_what_is_made_with_it(path: str, parts: str) -> None:
    """One service's code is no matter of the other's, and the contract is everybody's."""
    assert parts.split() == affected.affected([path])


def test_parts_are_made_with_what_they_import() -> None:
    """Neither an import goes past the rule, nor does the rule name what nobody imports."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imported: dict[str, set[str]] = {name: set() for name in PACKAGES.values()}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            imported[PACKAGES[module.partition(".")[0]]].add(PACKAGES[other.partition(".")[0]])
    for name, found in imported.items():
        below = {part for part in affected.made_with(name) if PARTS[part].package} - {name}
        assert found - {name} <= below, name
        if name != "deploy":  # starts the services as processes
            assert {need for need in PARTS[name].needs if PARTS[need].package} <= found, name


def test_the_layers_of_the_linter_are_those_of_the_parts() -> None:
    """What stands on one layer may not be made with each other, and each is made with all that is below."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    floors = [{PACKAGES[name.strip()] for name in layer.split("|")} for layer in layers]
    for place, floor in enumerate(floors):
        for name in floor:
            below = {part for part in affected.made_with(name) if PARTS[part].package} - {name}
            assert below == set().union(*floors[place + 1 :]), name


def test_every_file_is_of_a_part() -> None:
    """A new folder has to be given to one."""
    assert [] == [path for path in affected.tracked() if not affected.affected([path])]


def test_every_test_belongs_to_a_part_and_services_have_their_own() -> None:
    """All parts' tests are all tests; a service's are not those that only the other one has."""
    every = {path for path in affected.tracked() if affected.matches(path, ("tests/**",)) and "/test_" in path}
    every = {path for path in every if path.endswith(".py") and (ROOT / path).exists()}
    assert every == set(affected.tests_of(PARTS))
    cognate, agent = set(affected.tests_of(["cognate"])), set(affected.tests_of(["agent"]))
    for own, other, folder in ((cognate, agent, "tests/cognate/"), (agent, cognate, "tests/agent/")):
        assert {path for path in every if path.startswith(folder)} <= own
        assert not {path for path in other if path.startswith(folder)}
    assert "tests/contract/test_compatibility.py" in cognate & agent
    assert "tests/rpc/test_agents.py" in agent


def test_patterns_are_read_as_the_host_of_the_repository_reads_them() -> None:
    """A star ends at a slash, two do not, and a later pattern goes before an earlier one."""
    assert affected.matches("a/b/c.py", ["a/**"])
    assert not affected.matches("a/b/c.py", ["a/*"])
    assert affected.matches("README.md", ["*.md"])
    assert not affected.matches("docs/README.md", ["*.md"])
    assert not affected.matches("a/b", ["a/**", "!a/b"])
    assert affected.matches("a/b", ["!a/b", "a/**"])


def test_changed_files_are_read_and_parts_or_tests_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """As a command: one name a line."""
    affected.main(["agent_server/plan.py", "docs/agents.md"])
    assert ["agent", "deploy", "docs"] == capsys.readouterr().out.split()
    affected.main(["--tests", "--part", "docs"])
    assert "tests/test_docs.py" in capsys.readouterr().out.split()
