"""From what a training step gave to the metrics that are reported of it; `cognate_server.metrics` defines them."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cognate_server.grokfast import StepReport
from cognate_server.metrics import checked
from training_common.attempt import Json
from training_common.models.cognate_v1 import CognateOutput


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one batch gave: its loss in nats per token, the ponder prior's part unweighted, and the forward's output."""

    loss: float
    divergence: float
    output: CognateOutput


class CognateProgressTracker:
    """Turns what training steps gave into metrics, and keeps the time between two reports.

    step: finished steps when the tracker starts to look on; speed is absent until there is a span to measure.
    """

    def __init__(self, *, total_steps: int, batch_tokens: int, max_ponder_steps: int, step: int = 0) -> None:
        self._total_steps, self._batch_tokens, self._max_ponder_steps = total_steps, batch_tokens, max_ponder_steps
        self._step, self._at_s = step, time.perf_counter()

    def step_metrics(
        self, outcome: StepOutcome, report: StepReport | None, *, step: int, learning_rate: float
    ) -> dict[str, Json]:
        """Return the metrics of the step that was just finished as number `step`.

        report: the optimizer's.
        """
        metrics: dict[str, Json] = {
            "loss": outcome.loss,
            "ponder_divergence": outcome.divergence,
            "learning_rate": learning_rate,
            **self._halting(outcome.output),
            **_memory(outcome.output),
            **self._speed(step),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        if report is not None:
            metrics |= dataclasses.asdict(report)
        return checked(metrics)

    def _halting(self, output: CognateOutput) -> dict[str, Json]:
        most = self._max_ponder_steps
        histogram = step_histogram(torch.bincount(output.steps_BT.reshape(-1), minlength=most + 1))
        return {
            "mean_ponder_steps": mean_steps(histogram),
            "halting_histogram": list(histogram),
            "halting_entropy_nats": -sum(share * math.log(share) for share in histogram if share),
            "compute_saved_ratio": 1 - mean_steps(histogram) / most,
        }

    def _speed(self, step: int) -> dict[str, Json]:
        now_s = time.perf_counter()
        elapsed_s, steps = now_s - self._at_s, step - self._step
        self._step, self._at_s = step, now_s
        if steps == 0 or elapsed_s <= 0:
            return {}
        return {
            "tokens_per_s": steps * self._batch_tokens / elapsed_s,
            "seconds_left": (self._total_steps - step) * elapsed_s / steps,
        }


def _memory(output: CognateOutput) -> dict[str, Json]:
    used = output.memory_statistics
    if used is None:
        return {}
    entropy = used.read_entropy_nats
    return {
        "memory_write_rate": float(used.write_rate),
        "memory_slot_utilization_ratio": float(used.slot_utilization),
        "memory_read_entropy_nats": None if entropy is None else float(entropy),
    }


def step_histogram(counts_N: Tensor) -> list[float]:
    """Turn counts of 0, 1, 2, ... steps into shares of 1, 2, ...: padding takes 0 steps and does not count."""
    shares: list[float] = (counts_N[1:] / counts_N[1:].sum().clamp(min=1)).tolist()
    return shares


def mean_steps(histogram: list[float]) -> float:
    """Return the mean of a histogram of 1, 2, ... steps."""
    return sum(share * (index + 1) for index, share in enumerate(histogram))


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
