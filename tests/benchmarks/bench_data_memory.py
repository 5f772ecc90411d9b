"""How memory grows when the set grows eightfold: resident bytes beyond the mapped files, over the files' own growth.

Ours is the growth of the peak from 2,000 rows of each generated kind to 16,000, in a fresh process. The yardstick is
what the tokenized documents grew by, which keeping them in memory would cost at least.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.common import report

ROWS, MORE_ROWS = 2_000, 16_000
PROCESS = Path(__file__).parent / "data_process.py"


def grow() -> tuple[float, float]:
    """Return the growth of resident memory and of the data, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROCESS), str(ROWS), str(MORE_ROWS), folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["resident_bytes"], found["data_bytes"]


def main(runs: int) -> None:
    """Measure and print."""
    report("data_memory", [grow() for _ in range(runs)], unit="bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
