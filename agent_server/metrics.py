"""Every metric that agent training reports: its name, its unit and what it means. Defined here and nowhere else.

A metric that was not measured is absent from a progress event; none is ever estimated, carried over or filled in.
"""

from __future__ import annotations

from collections.abc import Mapping

from training_common.metrics import Metric

METRICS: Mapping[str, Metric] = {
    "loss": Metric(
        unit="nats/row",
        definition="cross-entropy of the right label, mean over the rows since the progress event before",
    ),
    "train_accuracy": Metric(
        unit="1",
        definition="share of the rows trained on since the progress event before whose likeliest label was right",
    ),
    "validation_accuracy": Metric(
        unit="1", definition="share of validation rows whose likeliest label is right, on the same rows each time"
    ),
    "learning_rate": Metric(unit="1", definition="the optimizer's learning rate in this step"),
    "gradient_norm": Metric(unit="1", definition="norm of the gradient over the trained parameters, before clipping"),
    "samples_per_s": Metric(
        unit="rows/s", definition="trained rows over the time of their steps since the progress event before"
    ),
    "peak_memory_bytes": Metric(unit="bytes", definition="largest resident set of the worker process so far"),
    "seconds_left": Metric(unit="s", definition="optimizer steps left times the running mean of a step's time"),
}

# What is measured around a run and published with the agent, by the names that the trainer records.
EVALUATIONS: Mapping[str, Metric] = {
    "accuracy_before": Metric(
        unit="1",
        definition="share of test rows whose likeliest label is right, before the first step: the head is untrained",
    ),
    "accuracy_after": Metric(
        unit="1", definition="the same after the last step, on the same rows, before low-rank updates are merged"
    ),
    "macro_f1_before": Metric(
        unit="1", definition="F1 of each label that occurs among the test rows, their plain mean, before the first step"
    ),
    "macro_f1_after": Metric(unit="1", definition="the same after the last step, on the same rows"),
    "majority_share": Metric(
        unit="1", definition="share of the test rows' most frequent label: what the best constant answer scores"
    ),
    "validation_accuracy": Metric(
        unit="1",
        definition="share of validation rows whose likeliest label is right, after the last step; absent without such "
        "rows",
    ),
}
