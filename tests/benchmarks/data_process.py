"""Builds one stream, then one of more rows, and prints what the second added: a process of its own, for a peak's sake.

python tests/benchmarks/data_process.py ROWS MORE_ROWS FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.sources import SourceSettings


@dataclass(frozen=True)
class _Size:
    peak_bytes: int
    mapped_bytes: int


def measure(rows: int, folder: Path) -> _Size:
    """Build a stream of so many rows of each kind, read from it, and return the process's peak so far."""
    plan = DataPlan(seed=1, batch_size=4, sequence_length=128)
    stream, manifest = build_stream(
        plan, SourceSettings(generated_rows=rows), tokenizer_file=folder / "tokenizer.json", folder=folder
    )
    stream.unigram_counts()
    for _ in range(50):
        stream.next_batch()
    mapped = sum(2 * sum(source.tokens.values()) + 10 * sum(source.documents.values()) for source in manifest.sources)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    return _Size(peak_bytes=peak_kib * 1024, mapped_bytes=mapped)


def main(rows: int, more_rows: int, folder: Path) -> None:
    """Print one JSON object.

    resident_bytes: growth of the peak without the mapped files' pages, which the kernel may drop at any time.
    data_bytes: growth of the mapped files.
    """
    small, large = measure(rows, folder), measure(more_rows, folder)
    data = large.mapped_bytes - small.mapped_bytes
    print(json.dumps({"resident_bytes": large.peak_bytes - small.peak_bytes - data, "data_bytes": data}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
