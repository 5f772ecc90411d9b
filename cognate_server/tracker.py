"""From what steps and validations gave to the metrics that `cognate_server.metrics` defines."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch

from cognate_server.detectors import Measurement
from cognate_server.flops import step_flops
from cognate_server.grokfast import StepReport
from cognate_server.metrics import checked
from cognate_server.validation import ValidationReport, mean_steps, step_histogram
from training_common.attempt import Json
from training_common.models.cognate_v1 import EMPTY, CognateOutput, CognateV1Config, MemoryState


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one batch gave.

    loss: in nats per token. divergence: the ponder prior's part, unweighted. allotment: the correlation of expected
    steps and losses. targets: positions that were trained on.
    """

    loss: float
    divergence: float
    allotment: float
    targets: int
    output: CognateOutput


class CognateProgressTracker:
    """Turns what a run gave into metrics, and keeps what happened between two reports.

    step: finished steps when the tracker starts to look on; rates are absent until there is a span to measure.
    peak_flops_per_s: what the model FLOPs of the span are compared with; None: their ratio is absent.
    """

    def __init__(
        self,
        config: CognateV1Config,
        *,
        total_steps: int,
        batch_tokens: int,
        step: int = 0,
        peak_flops_per_s: float | None = None,
    ) -> None:
        self._config = config
        self._total_steps, self._batch_tokens, self._peak = total_steps, batch_tokens, peak_flops_per_s
        self._step, self._at_s, self._flops = step, time.perf_counter(), 0

    def count(self, outcome: StepOutcome) -> None:
        """Add a finished step's work to the span; for every step, before its metrics."""
        rows, length = outcome.output.steps_BT.shape
        self._flops += step_flops(
            self._config,
            rows=rows,
            tokens=rows * length,
            targets=outcome.targets,
            core_steps=int(outcome.output.steps_BT.sum()),
        )

    def step_metrics(
        self, outcome: StepOutcome, report: StepReport | None, *, step: int, learning_rate: float
    ) -> dict[str, Json]:
        """Return the metrics of the step that was just finished as number `step`.

        report: the optimizer's.
        """
        metrics: dict[str, Json] = {
            "loss": outcome.loss,
            "ponder_divergence": outcome.divergence,
            "ponder_loss_correlation": outcome.allotment,
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
        most = self._config.max_steps
        histogram = step_histogram(torch.bincount(output.steps_BT.reshape(-1), minlength=most + 1))
        return {
            "mean_ponder_steps": mean_steps(histogram),
            "halting_histogram": list(histogram),
            "halting_entropy_nats": -sum(share * math.log(share) for share in histogram if share),
            "compute_saved_ratio": 1 - mean_steps(histogram) / most,
        }

    def _speed(self, step: int) -> dict[str, Json]:
        now_s = time.perf_counter()
        elapsed_s, steps, flops = now_s - self._at_s, step - self._step, self._flops
        self._step, self._at_s, self._flops = step, now_s, 0
        if steps == 0 or elapsed_s <= 0:
            return {}
        return {
            "model_flops_per_s": flops / elapsed_s,
            "mfu_ratio": None if self._peak is None else flops / elapsed_s / self._peak,
            "tokens_per_s": steps * self._batch_tokens / elapsed_s,
            "seconds_left": (self._total_steps - step) * elapsed_s / steps,
        }


def measurement(outcome: StepOutcome, report: StepReport | None, config: CognateV1Config) -> Measurement:
    """Return what the recovery manager watches of a measured step."""
    used = outcome.output.memory_statistics
    entropy = None if used is None or used.read_entropy_nats is None else float(used.read_entropy_nats)
    counts_N = torch.bincount(outcome.output.steps_BT.reshape(-1), minlength=config.max_steps + 1)
    return Measurement(
        halting_shares=tuple(step_histogram(counts_N)),
        slow_gradient_norm_ratio=None if report is None else report.slow_gradient_norm_ratio,
        read_entropy_share=None if entropy is None else entropy / math.log(config.memory_slots),
        contents_rms=contents_rms(outcome.output.memory),
    )


def validation_metrics(report: ValidationReport) -> dict[str, Json]:
    """Return what a whole validation is reported as: the loss, and what the memory and pondering are worth in it."""
    return checked(
        {
            "validation_loss": report.loss,
            "validation_loss_memory_off": report.loss_memory_off,
            "validation_loss_one_step": report.loss_one_step,
            "memory_gain_nats": report.loss_memory_off - report.loss,
            "memory_gain_error_nats": report.memory_gain_error,
            "pondering_gain_nats": report.loss_one_step - report.loss,
            "pondering_gain_error_nats": report.pondering_gain_error,
        }
    )


def _memory(output: CognateOutput) -> dict[str, Json]:
    used = output.memory_statistics
    if used is None:
        return {}
    entropy = used.read_entropy_nats
    return {
        "memory_contents_rms": contents_rms(output.memory),
        "memory_write_rate": float(used.write_rate),
        "memory_slot_utilization_ratio": float(used.slot_utilization),
        "memory_read_entropy_nats": None if entropy is None else float(entropy),
        "memory_head_share_ratio": None if used.head_share is None else float(used.head_share),
    }


def contents_rms(memory: MemoryState) -> float:
    """Return the root mean square of what the filled slots hold; 0 while none is."""
    held_BM = memory.tokens_BM != EMPTY
    traces = memory.trace_BMD.detach()[held_BM]
    return float(traces.square().mean().sqrt()) if len(traces) else 0.0


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
