"""Make what a release of one part consists of: `make release PART=cognate`.

    dist/cognateforge_cognate-0.2.0-py3-none-any.whl     the wheel; two builds of one commit are the same bytes
    dist/contract.binpb                                  the frozen descriptors of the contract that it speaks
    dist/cognate.cdx.json                                an SBOM of it and of what it was tested with, as CycloneDX
    dist/NOTES.md                                        its section of CHANGELOG.md
    dist/SHA256SUMS                                      of all of these

It refuses a tree with changes, a version that CHANGELOG.md has no section for, and one whose tag there is; with --tag,
a tag that is not of this commit and this version. --check makes wheels of any tree, which no release is made of.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"client": ".", "common": "training_common", "cognate": "cognate_server", "agent": "agent_server"}
# Extras that are a part's own code's: those that its users may add are not in its SBOM.
_EXTRAS = {"common": {"worker"}, "cognate": {"worker"}, "agent": {"worker"}}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A part at the version that its pyproject.toml has. root: the checkout."""

    part: str
    distribution: str
    version: str
    root: Path

    @property
    def folder(self) -> Path:
        """Where its pyproject.toml is."""
        return self.root / FOLDERS[self.part]

    @property
    def tag(self) -> str:
        """The tag that releases it."""
        return f"{self.part}-v{self.version}"


def read_release(part: str, root: Path = ROOT) -> Release:
    """Return a part as the checkout has it."""
    project = tomllib.loads((root / FOLDERS[part] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return Release(part=part, distribution=project["name"], version=project["version"], root=root)


def notes(release: Release) -> str:
    """Return the section of CHANGELOG.md: of this part's version, or of a version of all parts. Errors: SystemExit."""
    text = (release.root / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in (f"{release.part} {release.version}", release.version):
        found = re.search(rf"^## \[{re.escape(name)}\][^\n]*\n(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL)
        if found and found[1].strip():
            return found[1].strip() + "\n"
    raise SystemExit(
        f"CHANGELOG.md has no section ## [{release.part} {release.version}] or ## [{release.version}]: "
        "move what is released there from Unreleased"
    )


def refuse_unready(release: Release, tag: str | None) -> None:
    """End with the first thing that stands against a release. Errors: SystemExit."""
    if changed := _git(release.root, "status", "--porcelain"):
        raise SystemExit(f"the tree has changes: commit or remove them first\n{changed}")
    notes(release)
    commit = _git(release.root, "rev-list", "-n", "1", release.tag, check=False)
    if tag is None:
        if commit:
            raise SystemExit(f"tag {release.tag} exists: raise the version in {release.folder.name}/pyproject.toml")
    elif tag != release.tag:
        raise SystemExit(f"tag {tag} is not {release.tag}, the version in {release.folder.name}/pyproject.toml")
    elif commit != _git(release.root, "rev-parse", "HEAD"):
        raise SystemExit(f"tag {tag} is of {commit or 'no commit here'}, and not of what is checked out")


def build_wheel(release: Release, out: Path) -> Path:
    """Build the wheel into a folder and return its path. Its times are that of the commit."""
    out.mkdir(parents=True, exist_ok=True)
    epoch = _git(release.root, "log", "-1", "--format=%ct")
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(release.folder))
    done = subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": epoch}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{release.distribution} cannot be built:\n{done.stdout}{done.stderr}")
    [wheel] = out.glob(f"{release.distribution.replace('-', '_')}-{release.version}-*.whl")
    return wheel


def needed(part: str, name: str) -> set[str]:
    """Return all packages that a distribution is installed with, as those that are installed here tell it."""
    found: set[str] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(name, frozenset(_EXTRAS.get(part, set())))]
    seen = set(waiting)
    while waiting:
        one, extras = waiting.pop()
        for text in distribution(one).requires or []:
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (extras or {""})):
                continue
            found.add(canonicalize_name(requirement.name))
            further = (requirement.name, frozenset(requirement.extras))
            if further not in seen:
                seen.add(further)
                waiting.append(further)
    return found


def write_sbom(release: Release, target: Path) -> None:
    """Write a CycloneDX list of the part and of the versions that it was tested with."""
    wanted = needed(release.part, release.distribution)
    pins = [
        line
        for line in (release.root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if canonicalize_name(line.partition("==")[0]) in wanted
    ]
    ours = [other for part in FOLDERS if (other := read_release(part, release.root)).distribution in wanted]
    pins += [f"{other.distribution}=={other.version}" for other in ours]
    command = (sys.executable, "-m", "cyclonedx_py", "requirements", "--output-reproducible", "--of", "JSON")
    pyproject = ("--pyproject", str(release.folder / "pyproject.toml"))
    done = subprocess.run((*command, *pyproject, "-o", str(target), "-"), input="\n".join(pins), text=True)
    if done.returncode:
        raise SystemExit(f"no SBOM of {release.distribution}: cyclonedx-py ended with {done.returncode}")


def make(release: Release, out: Path) -> None:
    """Make everything that is released into a folder."""
    build_wheel(release, out)
    freeze = (str(Path(sys.executable).parent / "buf"), "build", "protos", "--exclude-source-info", "-o")
    subprocess.run((*freeze, str(out.resolve() / "contract.binpb")), cwd=release.root, check=True)
    write_sbom(release, out / f"{release.part}.cdx.json")
    (out / "NOTES.md").write_text(notes(release), encoding="utf-8")
    names = sorted(path.name for path in out.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(("git", *arguments), cwd=root, capture_output=True, text=True, check=check)
    return done.stdout.strip() if not done.returncode else ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="the part; with --check any number of them")
    parser.add_argument("--tag", help="the tag that asks for it, such as cognate-v0.2.0; it tells the part")
    parser.add_argument("--check", action="store_true", help="make nothing but wheels")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="an empty or new folder")
    wish = parser.parse_args(arguments)
    parts = [wish.tag.partition("-v")[0]] if wish.tag else wish.parts
    if not parts or not {*parts} <= FOLDERS.keys() or (len(parts) > 1 and not wish.check):
        parser.error(f"name one part of {', '.join(FOLDERS)}")
    if wish.check:
        for part in parts:
            print(build_wheel(read_release(part), wish.out))
        return
    release = read_release(parts[0])
    refuse_unready(release, wish.tag)
    if wish.out.exists() and any(wish.out.iterdir()):
        raise SystemExit(
            f"{wish.out} is not empty, and what lies there would be released too: move it away, or give --out"
        )
    make(release, wish.out)
    print(f"{release.distribution} {release.version} is in {wish.out}; tag it {release.tag}")


if __name__ == "__main__":
    main()
