"""The folder with rows of the real sets, which are never in this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_DEFAULT = Path(__file__).resolve().parent.parent / ".." / "shared" / "data"


def real_data() -> Path:
    """Return the folder, or skip the test with the reason."""
    folder = Path(os.environ.get("FORGE_DATA", _DEFAULT))
    if not (folder / "expected_figures.json").is_file():
        pytest.skip(f"no real rows in {folder}; set FORGE_DATA to a folder that has them")
    return folder.resolve()


def figures(folder: Path) -> Any:
    """Return what was measured on the real rows."""
    return json.loads((folder / "expected_figures.json").read_text(encoding="utf-8"))
