"""Plugins of agent architectures as installed packages: a folder on the path with files and their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GROUP = "cognateforge.agent_architectures"
ECHO = """
from agent_server.architectures.factory import ArchitectureDefaults, Setting


class Echo(ArchitectureDefaults):
    name = "echo"
    tasks = ("classification",)
    description = "Says what it heard."

    def build(self, request):
        raise NotImplementedError

    def load(self, folder):
        raise NotImplementedError
"""


def write_package(
    site: Path, name: str, files: Mapping[str, str], entry_points: Mapping[str, str], *, metadata: str = ""
) -> None:
    """Write a package's files, by paths below `site`, and the metadata that an installer would write."""
    for path, text in files.items():
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}", encoding="utf-8")
    lines = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files), encoding="utf-8")
