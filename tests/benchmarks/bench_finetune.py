"""Samples/s of our trainer over those of `transformers.Trainer`, by LoRA (theirs by peft) and by full fine-tuning.

Both train the same random BERT with a classification head: the same rows of equal length, batch, precision (float32),
threads, optimizer (fused AdamW) and clipping, each in a process of its own. Ours is the architecture
`sequence_classifier`; theirs has BERT's pooler too, a 256 x 256 map of 16 vectors. They take turns of `STEPS` steps, so
that a busy machine hurts both alike; all that a loop does in a turn is in its time. The ratio is the lesser one of the
two methods' medians. Beside it stand each method's figures and the peak memory of both processes.
Usage: python tests/benchmarks/bench_finetune.py [turns]
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.common import print_result
from training_common.engines.processes import WORKER_ENVIRONMENT

THREADS = 1
STEPS = 5
BATCH_SIZE, TOKENS, VOCABULARY, LABELS, ROWS = 16, 64, 8_192, 20, 640
RANK, ALPHA, LR = 8, 16, 1e-3
HIDDEN, LAYERS = 256, 4
METHODS = ("lora", "full")
_KIB = 1024


def write_model(folder: Path) -> None:
    """Write a random BERT of 5.3M parameters with its configuration, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(  # noqa: C408 - as the keywords they are
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        num_labels=LABELS,
    )
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))  # noqa: S106 - a word
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def rows() -> list[tuple[list[int], int]]:
    """Return rows of tokens and labels, the same ones in every process."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator).tolist()
    labels = torch.randint(0, LABELS, (ROWS,), generator=generator).tolist()
    return list(zip(tokens, labels, strict=True))


class Turns:
    """What the bench's own process says and hears: a line for each turn."""

    def __init__(self) -> None:
        self._started_s = 0.0

    def wait(self) -> None:
        """Wait until it is this process's turn."""
        sys.stdin.readline()
        self._started_s = time.perf_counter()

    def done(self) -> None:
        """Tell how long the turn took, and the most memory so far."""
        seconds = time.perf_counter() - self._started_s
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def train_ours(folder: Path, method: str, turns: int) -> None:
    """Train by this project's trainer."""
    from agent_server.adaptation import Adaptation, Lora
    from agent_server.architectures.factory import AgentArchitectureFactory
    from agent_server.architectures.sequence_classifier import SequenceClassifierArchitecture
    from agent_server.data.examples import Labelled
    from agent_server.optim import Optimization, Schedule
    from agent_server.train_config import AgentTrainConfig
    from agent_server.trainer import train_agent
    from tests.agent._support import MemoryAttempt, prepared

    line = Turns()

    class Attempt(MemoryAttempt):
        """Waits for its turn where a row of progress is due."""

        def progress(self, *, step: int, total_steps: int, metrics: Mapping[str, Any]) -> None:
            if step % STEPS:
                return
            line.done()
            if step == total_steps:
                raise SystemExit(0)
            line.wait()

        def event(self, kind: str, payload: Mapping[str, Any]) -> None:
            """Hear it."""

        def stop_requested(self) -> None:
            return None

    examples = [Labelled(" ".join(map(str, tokens)), label) for tokens, label in rows()]
    config = AgentTrainConfig(
        agent="bench",
        architecture="sequence_classifier",
        settings={"pooling": "first", "dropout": 0.1},
        total_steps=STEPS * turns,
        batch_size=BATCH_SIZE,
        max_tokens=TOKENS,
        adaptation=Adaptation(lora=Lora(rank=RANK, alpha=ALPHA)) if method == "lora" else Adaptation(),
        optimization=Optimization(lr=LR, head_lr_scale=1, schedule=Schedule.LINEAR, warmup_steps=1),
        checkpoint_interval_steps=10**6,
        progress_interval_steps=STEPS,
    )
    data = prepared(examples, examples[:1], labels=[str(i) for i in range(LABELS)])
    factory = AgentArchitectureFactory(given=[SequenceClassifierArchitecture()])
    line.wait()
    train_agent(config, folder, data, Attempt(folder), factory=factory)


def train_theirs(folder: Path, method: str, turns: int) -> None:
    """Train by the Trainer of transformers, with peft for LoRA."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    line = Turns()

    class WaitForTurns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % STEPS == 0:
                line.done()
                if state.global_step == STEPS * turns:
                    raise SystemExit(0)
                line.wait()

    model: Any = BertForSequenceClassification.from_pretrained(folder)
    if method == "lora":
        layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".encoder." in n]
        lora = LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=layers)
        model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=STEPS * turns,
        learning_rate=LR,
        warmup_steps=1,
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.optim != "adamw_torch_fused":
        raise RuntimeError(f"the yardstick's optimizer is {arguments.optim}, and ours is fused AdamW")
    examples = [{"input_ids": tokens, "attention_mask": [1] * TOKENS, "labels": label} for tokens, label in rows()]

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=collate,
        callbacks=[WaitForTurns()],
    )
    line.wait()
    trainer.train()


@contextmanager
def side(who: str, folder: Path, method: str, turns: int) -> Iterator[subprocess.Popen[str]]:
    """Start one side's process."""
    process = subprocess.Popen(
        [sys.executable, __file__, who, str(folder), method, str(turns)],
        env={**os.environ, **WORKER_ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()


def turn(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let a side take its steps; return seconds and peak memory."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the side has no pipes")
    process.stdin.write("go\n")
    process.stdin.flush()
    for text in process.stdout:
        if text.startswith("{"):
            said: dict[str, float] = json.loads(text)
            return said
    raise RuntimeError(f"{process.args!r} ended before its turn was over")


def measure(folder: Path, method: str, turns: int) -> dict[str, float]:
    """Return the figures of a method. The first turn warms up."""
    with side("ours", folder, method, turns + 1) as ours, side("theirs", folder, method, turns + 1) as theirs:
        pairs = [(turn(ours), turn(theirs)) for _ in range(turns + 1)]
    samples = STEPS * BATCH_SIZE
    seconds = [(mine["seconds"], other["seconds"]) for mine, other in pairs[1:]]
    return {
        "samples_per_s": samples / statistics.median(mine for mine, _ in seconds),
        "yardstick_samples_per_s": samples / statistics.median(other for _, other in seconds),
        "ratio": statistics.median(other / mine for mine, other in seconds),
        "peak_mib": pairs[-1][0]["peak_bytes"] / 2**20,
        "yardstick_peak_mib": pairs[-1][1]["peak_bytes"] / 2**20,
    }


def main(turns: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="bench-finetune-") as name:
        folder = Path(name)
        write_model(folder)
        cases = {method: measure(folder, method, turns) for method in METHODS}
    worst = min(cases.values(), key=lambda case: case["ratio"])
    print_result(
        "finetune",
        worst["samples_per_s"],
        worst["yardstick_samples_per_s"],
        unit="samples/s",
        ratio=worst["ratio"],
        runs=turns,
        cases={method: {key: round(value, 3) for key, value in case.items()} for method, case in cases.items()},
    )


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["theirs"]):
        import torch

        torch.set_num_threads(THREADS)
        train = train_ours if sys.argv[1] == "ours" else train_theirs
        train(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
