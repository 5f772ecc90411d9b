"""A Cognate-25M that was trained on real rows, for benches that look at what training made.

The weights are kept in var/benchmarks under a digest of all that decides them: config, data and the code that trains.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.sources import SourceSettings, parse_share
from cognate_server.data.stream import CognateTokenStream
from cognate_server.data.tokenizer import CognateTokenizer
from cognate_server.precision import native_precision
from cognate_server.run import PretrainConfig, PretrainingRun
from cognate_server.stream import Batch
from cognate_server.validation import first_rows
from training_common.models.cognate_v1 import CognateV1, load_state, save_state

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "var" / "benchmarks"
REAL_ROWS = Path(os.environ.get("FORGE_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Trained:
    """A model, what it was trained on and how."""

    model: CognateV1
    stream: CognateTokenStream
    config: PretrainConfig


def real_stream(
    *sets: str, rows: int, sequence_length: int, tokenizer: CognateTokenizer | None = None
) -> CognateTokenStream:
    """Return a stream of real rows, under a given tokenizer or one of its own. Ends the process without rows."""
    if not REAL_ROWS.is_dir():
        sys.exit(f"this bench needs real rows and there is no {REAL_ROWS}: set FORGE_DATA to a folder that has them")
    shares = tuple(parse_share(name) for name in sets)
    plan = DataPlan(seed=1, batch_size=rows, sequence_length=sequence_length, datasets=shares)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json" if tokenizer else None
        if tokenizer and file:
            tokenizer.save(file)
        return build_stream(plan, SourceSettings(folder=REAL_ROWS), tokenizer_file=file)[0]


def train(steps: int, *, rows: int = 8, sequence_length: int = 128) -> Trained:
    """Return Cognate-25M after so many steps on GSM8K and HotpotQA in equal parts, newly trained or kept."""
    stream = real_stream("gsm8k", "hotpotqa", rows=rows, sequence_length=sequence_length)
    config = PretrainConfig(
        seed=1,
        total_steps=steps,
        batch_tokens=rows * sequence_length,
        sequence_length=sequence_length,
        warmup_steps=max(1, steps // 10),
        precision=native_precision(),
    )
    file = FOLDER / f"cognate-{_digest(config, stream)}.safetensors"
    run = PretrainingRun(config, stream)
    if file.exists():
        load_state(run.model, file)
        return Trained(run.model.eval(), stream, config)
    while run.step < steps:
        outcome = run.train_step(measure=False)
        if run.step % max(1, steps // 10) == 0:
            print(f"training: step {run.step}/{steps}, loss {outcome.loss:.3f}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_state(run.model, file)
    return Trained(run.model.eval(), stream, config)


def validation_rows(trained: Trained, rows: int) -> list[Batch]:
    """Return validation batches of so many rows, in the order in which their memory is carried over."""
    return first_rows(trained.stream.validation_batches(), rows)


def _digest(config: PretrainConfig, stream: CognateTokenStream) -> str:
    sources = sorted([*(ROOT / "cognate_server").rglob("*.py"), ROOT / "training_common/models/cognate_v1.py"])
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    text = json.dumps([config.digest(), stream.digest, code, torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
