"""The program of docs/agents.md, against a real server with real workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.services import Services

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "agents.md"


def rows(count: int, **also: str) -> str:
    """Return rows that a word decides."""
    said = [("what is my balance", "balance"), ("move it to anna", "transfer")]
    return "".join(
        json.dumps({"text": f"{said[i % 2][0]} {i}", "label": said[i % 2][1], **also}) + "\n" for i in range(count)
    )


@pytest.mark.slow
def test_the_program_of_the_page_trains_measures_and_fetches(tmp_path: Path) -> None:
    """It is run as it stands, but for the address, and what it fetches answers."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "intents.jsonl").write_text(rows(200), encoding="utf-8")
    (tmp_path / "data" / "held.jsonl").write_text(rows(20, split="test"), encoding="utf-8")
    services = Services(tmp_path / "var")
    try:
        settings = {"DATA__FOLDER": str(tmp_path / "data")}
        address = services.start("agent_server", address="127.0.0.1:0", settings=settings).address
        done = subprocess.run(
            [sys.executable, "-c", program.replace("127.0.0.1:7102", address)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
    finally:
        services.stop()
    assert done.returncode == 0, done.stderr
    assert "accuracy 1.0 held/test" in done.stdout
    assert (tmp_path / "intent-router" / "run.py").is_file()
