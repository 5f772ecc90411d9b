"""Every metric that pretraining reports: its name, its unit and what it means. Defined here and nowhere else.

A metric that was not measured is absent from a progress event; none is ever estimated, carried over or filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from training_common.attempt import Json
from training_common.metrics import Metric

METRICS: Mapping[str, Metric] = {
    "loss": Metric(unit="nats/token", definition="cross-entropy of the training batch, without the ponder terms"),
    "ponder_divergence": Metric(
        unit="nats", definition="KL of the batch's mean halting distribution from the truncated geometric prior"
    ),
    "ponder_loss_correlation": Metric(
        unit="1", definition="correlation of the expected ponder steps of the batch's tokens with their losses"
    ),
    "learning_rate": Metric(unit="1", definition="AdamW's learning rate in this step"),
    "tokens_per_s": Metric(
        unit="tokens/s", definition="trained token positions over wall-clock time since the progress event before"
    ),
    "model_flops_per_s": Metric(
        unit="FLOP/s",
        definition="matrix products that the tokens needed, forward and backward, over wall-clock time since the "
        "progress event before; halted tokens, masked keys and repeated work count nothing",
    ),
    "mfu_ratio": Metric(
        unit="1",
        definition="model_flops_per_s over the rate of a large matrix product of the same type, measured by this "
        "process when it started",
    ),
    "gradient_norm": Metric(unit="1", definition="norm of the raw gradient, before clipping"),
    "grokfast_lambda": Metric(unit="1", definition="GrokFast's amplification in this step"),
    "slow_gradient_norm_ratio": Metric(
        unit="1",
        definition="norm of the gradient's EMA before the step over that of the clipped gradient; about 0.1005 for "
        "independent gradients",
    ),
    "slow_gradient_cosine": Metric(
        unit="1",
        definition="cosine of the gradient's EMA before the step and the gradient; about 0 for independent ones",
    ),
    "mean_ponder_steps": Metric(unit="steps", definition="core steps taken, mean over the batch's tokens"),
    "halting_histogram": Metric(unit="1", definition="share of the batch's tokens that took 1, 2, ... core steps"),
    "halting_entropy_nats": Metric(
        unit="nats", definition="entropy of halting_histogram; 0 when all tokens take the same number of steps"
    ),
    "compute_saved_ratio": Metric(
        unit="1", definition="core steps not taken over those of a model that always takes the most"
    ),
    "memory_slot_utilization_ratio": Metric(
        unit="1", definition="share of memory slots that hold a token after the batch"
    ),
    "memory_read_entropy_nats": Metric(
        unit="nats", definition="entropy of the slots' shares in what the head recalls, mean over tokens"
    ),
    "memory_head_share_ratio": Metric(
        unit="1", definition="share of a prediction that the memory makes, mean over the batch's tokens"
    ),
    "memory_write_rate": Metric(unit="1", definition="write gate, mean over the batch's tokens"),
    "memory_contents_rms": Metric(
        unit="1", definition="root mean square of the traces that the memory holds after the batch"
    ),
    "validation_loss": Metric(unit="nats/token", definition="cross-entropy on the validation rows"),
    "validation_loss_memory_off": Metric(unit="nats/token", definition="the same with the memory's reads switched off"),
    "validation_loss_one_step": Metric(unit="nats/token", definition="the same with one core step for every token"),
    "control_validation_loss": Metric(
        unit="nats/token",
        definition="validation_loss of plain AdamW from the same start on the same batches, the lowest among its "
        "learning rates; only where a control was asked for",
    ),
    "acceleration_factor": Metric(
        unit="1",
        definition="steps of the control over those of GrokFast until the validation loss is at or below the worse of "
        "their two final ones; absent without a control, or when one of them did not learn",
    ),
    "memory_gain_nats": Metric(
        unit="nats/token",
        definition="validation_loss_memory_off less validation_loss: what the memory is worth",
    ),
    "memory_gain_error_nats": Metric(
        unit="nats/token", definition="standard error of memory_gain_nats over the validation rows"
    ),
    "pondering_gain_nats": Metric(
        unit="nats/token", definition="validation_loss_one_step less validation_loss: what pondering is worth"
    ),
    "pondering_gain_error_nats": Metric(
        unit="nats/token", definition="standard error of pondering_gain_nats over the validation rows"
    ),
    "gsm8k_exact_match": Metric(
        unit="1", definition="share of held-out GSM8K problems with the right number after ####, by GSM8K's rule"
    ),
    "forge_arithmetic_exact_match": Metric(
        unit="1",
        definition="share of held-out forge-arithmetic ones with the right number after ####, by GSM8K's rule",
    ),
    "hotpotqa_exact_match": Metric(
        unit="1", definition="share of held-out HotpotQA questions answered exactly, after HotpotQA's normalization"
    ),
    "hotpotqa_f1": Metric(
        unit="1", definition="F1 of the answer's words on held-out HotpotQA questions, mean, by HotpotQA's own rule"
    ),
    "forge_twohop_exact_match": Metric(
        unit="1", definition="share of held-out forge-twohop questions answered exactly, after HotpotQA's normalization"
    ),
    "forge_twohop_f1": Metric(
        unit="1", definition="F1 of the answer's words on held-out forge-twohop questions, mean, by HotpotQA's own rule"
    ),
    "peak_memory_bytes": Metric(unit="bytes", definition="largest resident set of the worker process so far"),
    "seconds_left": Metric(
        unit="s", definition="optimizer steps left times the time per step since the progress event before"
    ),
}


def checked(metrics: Mapping[str, Json]) -> dict[str, Json]:
    """Return the metrics that were measured, leaving out None.

    Errors: ValueError, for a name that METRICS does not define or a value that is not finite.
    """
    measured: dict[str, Json] = {name: value for name, value in metrics.items() if value is not None}
    for name, value in measured.items():
        if name not in METRICS:
            raise ValueError(f"{name} is not a metric of cognate_server.metrics")
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {value}")
    return measured
