"""From what steps and validations gave to the metrics that `cognate_server.metrics` defines."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cognate_server.detectors import Measurement
from cognate_server.flops import step_flops
from cognate_server.grokfast import StepReport
from cognate_server.metrics import checked
from cognate_server.validation import ValidationReport, mean_steps, step_histogram
from training_common.attempt import Json
from training_common.models.cognate_v1 import EMPTY, CognateOutput, CognateV1Config, MemoryState
from training_common.team import ALONE, Team


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """How the long-term memory was used in a step; see `MemoryStatistics`. contents_rms: as in `contents_rms`."""

    contents_rms: float
    write_rate: float
    slot_utilization: float
    read_entropy_nats: float | None
    head_share: float | None


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one batch gave, over all processes.

    loss: in nats per token. divergence: the ponder prior's part, unweighted. allotment: the correlation of expected
    steps and losses. targets: positions that were trained on. rows: of the batch. taken_N: tokens that took 0, 1, ...
    steps, padding being 0. use: only of steps that were measured. memory: what this process's rows left.
    """

    loss: float
    divergence: float
    allotment: float
    targets: int
    rows: int
    taken_N: Tensor
    use: MemoryUse | None
    memory: MemoryState


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
        taken_N = outcome.taken_N
        self._flops += step_flops(
            self._config,
            rows=outcome.rows,
            tokens=int(taken_N.sum()),
            targets=outcome.targets,
            core_steps=int(taken_N @ torch.arange(len(taken_N))),
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
            **self._halting(outcome.taken_N),
            **_memory(outcome.use),
            **self._speed(step),
            "peak_memory_bytes": _peak_memory_bytes(),
        }
        if report is not None:
            metrics |= dataclasses.asdict(report)
        return checked(metrics)

    def _halting(self, taken_N: Tensor) -> dict[str, Json]:
        most = self._config.max_steps
        histogram = step_histogram(taken_N)
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


def measurement(outcome: StepOutcome, report: StepReport | None, config: CognateV1Config) -> Measurement | None:
    """Return what the recovery manager watches; None of a step that was not measured."""
    use = outcome.use
    if use is None:
        return None
    entropy = use.read_entropy_nats
    return Measurement(
        halting_shares=tuple(step_histogram(outcome.taken_N)),
        slow_gradient_norm_ratio=None if report is None else report.slow_gradient_norm_ratio,
        read_entropy_share=None if entropy is None else entropy / math.log(config.memory_slots),
        contents_rms=use.contents_rms,
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


def _memory(use: MemoryUse | None) -> dict[str, Json]:
    if use is None:
        return {}
    return {
        "memory_contents_rms": use.contents_rms,
        "memory_write_rate": use.write_rate,
        "memory_slot_utilization_ratio": use.slot_utilization,
        "memory_read_entropy_nats": use.read_entropy_nats,
        "memory_head_share_ratio": use.head_share,
    }


def memory_use(output: CognateOutput, team: Team = ALONE) -> MemoryUse | None:
    """Return how the rows of all processes used the memory; None where it was not measured."""
    used = output.memory_statistics
    if used is None:
        return None
    rows, tokens = len(output.steps_BT), int((output.steps_BT > 0).sum())
    reads = 0 if used.reads is None else int(used.reads)
    means = ((used.write_rate, tokens), (used.slot_utilization, rows), (used.read_entropy_nats, reads))
    parts = [*means, (used.head_share, tokens)]
    sums = torch.tensor([0.0 if mean is None else float(mean) * count for mean, count in parts], dtype=torch.float64)
    counts = torch.tensor([float(count) for _, count in parts], dtype=torch.float64)
    rate, utilization, entropy, share = (team.total(sums) / team.total(counts).clamp(min=1)).tolist()
    return MemoryUse(
        contents_rms=contents_rms(output.memory, team),
        write_rate=rate,
        slot_utilization=utilization,
        read_entropy_nats=None if used.read_entropy_nats is None else entropy,
        head_share=None if used.head_share is None else share,
    )


def contents_rms(memory: MemoryState, team: Team = ALONE) -> float:
    """Return the root mean square of what the filled slots of all processes hold; 0 while none is."""
    traces = memory.trace_BMD.detach()[memory.tokens_BM != EMPTY].double()
    squares, count = team.total(torch.stack([traces.square().sum(), torch.tensor(float(traces.numel())).double()]))
    return math.sqrt(float(squares) / max(1.0, float(count)))


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
