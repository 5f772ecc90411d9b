"""Write docs/metrics.md out of the tables that the services themselves report by: `make docs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import agent_server.metrics
import cognate_server.metrics
from training_common.metrics import Metric

TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

HEAD = """# Metrics

<!-- Written by `make docs` from cognate_server/metrics.py and agent_server/metrics.py. Edit those, then run it. -->

What the services measure, and what each name means. A quantity that was not measured is absent: there is no
placeholder, and no older value stands in for it. The unit "1" stands for a plain number.
"""

PRETRAINING = """Reported in the progress events of a pretraining job. A histogram travels as `bins` of its event;
`GetMetrics` returns single numbers only, and the newer value of a step that was trained again after a lost worker.
"""

TRAINING = """Reported in the progress events of an agent's training job, under the same rules.
"""

EVALUATIONS = """Measured around a run and kept with the published agent: in `Agent.evaluations`, its manifest and its
model card. Each names the set and the number of rows it was measured on.
"""


def table(metrics: Mapping[str, Metric]) -> str:
    """Return one Markdown table, in the order of the code."""
    rows = [f"| `{name}` | {metric.unit} | {metric.definition} |" for name, metric in metrics.items()]
    return "\n".join(["| name | unit | what it is |", "| --- | --- | --- |", *rows]) + "\n"


def render() -> str:
    """Return the whole page."""
    sections = (
        ("Pretraining", PRETRAINING, cognate_server.metrics.METRICS),
        ("Agent training", TRAINING, agent_server.metrics.METRICS),
        ("Agent evaluations", EVALUATIONS, agent_server.metrics.EVALUATIONS),
    )
    return "\n".join([HEAD, *(f"## {title}\n\n{text}\n{table(metrics)}" for title, text, metrics in sections)])


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
