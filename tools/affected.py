"""Which parts of the repository a change concerns: what must be built, tested and released again.

    python tools/affected.py [--tests] PATH...            parts, or the test files that belong to them
    git diff --name-only main... | python tools/affected.py -
    python tools/affected.py --tests --part cognate       the tests of one part

A part is concerned by a change of its own files, of a part that it is made with, and of what all are made with. The
rule follows the floors of imports; tests/packaging/test_affected.py holds it to the imports themselves.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the repository.

    paths: its own files, as patterns of GitHub's `paths` filters. tests: folders of tests that look at it alone.
    needs: the parts that it is made with. package: the Python package that it is.
    """

    paths: tuple[str, ...]
    tests: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    package: str = ""


PARTS = {
    "contract": Part(
        paths=("protos/**", "third_party/proto/**", "buf.yaml"), tests=("tests/contract/**", "tests/fuzz/**")
    ),
    "client": Part(
        paths=("clients/**",),
        tests=("tests/alerts/**", "tests/bridge/**", "tests/client/**", "tests/dashboard/**"),
        needs=("contract",),
        package="cognateforge",
    ),
    "common": Part(paths=("training_common/**",), needs=("client",), package="training_common"),
    "cognate": Part(
        paths=("cognate_server/**",), tests=("tests/cognate/**",), needs=("common",), package="cognate_server"
    ),
    "agent": Part(paths=("agent_server/**",), tests=("tests/agent/**",), needs=("common",), package="agent_server"),
    "deploy": Part(
        paths=("deploy/**", "third_party/schemas/**"),
        tests=("tests/deploy/**", "tests/upgrade/**"),
        needs=("cognate", "agent"),
        package="deploy",
    ),
    # Two of its pages are written from the contract and from the services' tables.
    "docs": Part(
        paths=("docs/**", "*.md", "LICENSE", "third_party/*.md", "third_party/axe-core/**"),
        tests=("tests/test_docs.py",),
        needs=("cognate", "agent"),
    ),
}
# What all parts are made and tested with.
EVERYTHING = ("pyproject.toml", "constraints.txt", "Makefile", "tools/**", ".ci/**", ".github/**", ".*")
_OWN_TESTS = tuple(pattern for part in PARTS.values() for pattern in part.tests)


def made_with(name: str) -> list[str]:
    """Return a part and all that it is made with, in the order of PARTS."""
    below = {one for need in PARTS[name].needs for one in made_with(need)}
    return [one for one in PARTS if one == name or one in below]


def filters(name: str) -> list[str]:
    """Return the patterns of the paths that concern a part, for a `paths` filter: later ones go before earlier ones."""
    own = [path for one in made_with(name) for path in PARTS[one].paths]
    others = [pattern for pattern in _OWN_TESTS if pattern not in PARTS[name].tests]
    return [*own, *EVERYTHING, "tests/**", *(f"!{pattern}" for pattern in others)]


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a `paths` filter lets a path through. `*` ends at a slash and `**` does not."""
    found = False
    for pattern in patterns:
        if re.fullmatch(_expression(pattern.removeprefix("!")), path):
            found = not pattern.startswith("!")
    return found


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")


def affected(paths: Iterable[str]) -> list[str]:
    """Return the parts that a change of some files concerns, in the order of PARTS."""
    changed = list(paths)
    return [name for name in PARTS if any(matches(path, filters(name)) for path in changed)]


def tracked() -> list[str]:
    """Return the repository's files as git lists them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name]


def tests_of(names: Iterable[str]) -> list[str]:
    """Return the test files of some parts: their own folders, and others that name their packages.

    A file names a package also where a module of tests/support, or another that it imports, does. Of folders that look
    at one part alone only those of the contract are others: today's services are held to it.
    """
    wanted = list(names)
    alone = [pattern for name, part in PARTS.items() for pattern in part.tests if name != "contract"]
    own = [pattern for name in wanted for pattern in PARTS[name].tests]
    packages = {PARTS[name].package for name in wanted} - {""}
    found = []
    for path in tracked():
        if not re.fullmatch(r"tests/(.*/)?test_\w+\.py", path) or not (ROOT / path).exists():
            continue
        named = packages_named(path)
        if matches(path, own) or (not matches(path, alone) and (packages & named or not named)):
            found.append(path)
    return found


def packages_named(path: str) -> set[str]:
    """Return the packages of parts that a file of tests names, itself or by what it imports of tests."""
    ours = "|".join(sorted(part.package for part in PARTS.values() if part.package))
    named: set[str] = set()
    seen, waiting = {path}, [path]
    while waiting:
        text = (ROOT / waiting.pop()).read_text(encoding="utf-8")
        named |= set(re.findall(rf"\b({ours})\b", text))
        for module in re.findall(r"\btests(?:\.\w+)+", text):
            file = module.replace(".", "/") + ".py"
            if file not in seen and (ROOT / file).is_file():
                seen.add(file)
                waiting.append(file)
    return named


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="changed files, or - to read them")
    parser.add_argument("--part", choices=PARTS, action="append", help="this part, whatever has changed")
    parser.add_argument("--tests", action="store_true", help="print test files in place of parts")
    wish = parser.parse_args(arguments)
    paths = [line.strip() for line in sys.stdin] if wish.paths == ["-"] else wish.paths
    names = wish.part or affected(paths)
    print("\n".join(tests_of(names) if wish.tests else names))


if __name__ == "__main__":
    main()
