"""Write docs/metrics.md out of the tables that the services themselves report by: `make docs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import agent_server.metrics
import cognate_server.metrics
from training_common.metrics import Metric
from training_common.telemetry.catalog import CATALOG, ServerMetric

TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

HEAD = """# Metrics

<!-- Written by `make docs` from cognate_server/metrics.py, agent_server/metrics.py and
training_common/telemetry/catalog.py. Edit those, then run it. -->

What the services measure, and what each name means. A quantity that was not measured is absent: there is no
placeholder, and no older value stands in for it. The unit "1" stands for a plain number.
"""

PRETRAINING = """Reported in the progress events of a pretraining job. A histogram travels as `bins` of its event;
`GetMetrics` returns single numbers only, and the newer value of a step that was trained again after a lost worker.
"""

TRAINING = """Reported in the progress events of an agent's training job, under the same rules.
"""

MEASURED = """Measured on rows that are not trained on; each task has its own of them. In progress events a name begins
with `validation_`. Around a run they are measured on test rows, `_before` its first step and `_after` its last one, on
validation rows once more, and with rehearsal on the earlier set's test rows, where names begin with `earlier_`. Of an
agent that goes on with other labels, and so with a new head, what is measured there before is the published agent, by
its own labels; it is absent where that one does not know them all, and then `forgetting` is too. These are kept with
the published agent: in `Agent.evaluations`, its manifest and its model card. Each names the set, and the number of
rows, turns or pairs that it was measured on: answers are written for 64 of them at most.
"""

FLOORS = """Kept beside them: what an agent has to beat, and what it forgot.
"""

ON_REQUEST = """`EvaluateAgent` measures what is measured in training, under the names above without a moment, for
instance "accuracy". Beside them, and with `coordination` where several agents act:
"""


SERVERS = """What each service exposes at `/metrics` and sends over OTLP ([telemetry.md](telemetry.md)), under the same
names. Every one has the label `service`, "cognate" or "agent", beside those of the table. What could not be looked at
is absent. A metric of training above is `forge_training_metric` here, with its name as the label `metric`.
"""


def table(metrics: Mapping[str, Metric]) -> str:
    """Return one Markdown table, in the order of the code."""
    rows = [f"| `{name}` | {metric.unit} | {metric.definition} |" for name, metric in metrics.items()]
    return "\n".join(["| name | unit | what it is |", "| --- | --- | --- |", *rows]) + "\n"


def server_table(metrics: Sequence[ServerMetric]) -> str:
    """Return the table of what servers expose, in the order of the catalogue."""
    rows = [
        f"| `{one.name}` | {one.kind.value} | {', '.join(f'`{label}`' for label in one.labels) or '-'} "
        f"| {' '.join(one.services)} | {one.description} |"
        for one in metrics
    ]
    head = ["| name | kind | labels | services | what it is |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *rows]) + "\n"


def render() -> str:
    """Return the whole page."""
    sections = (
        ("Pretraining", PRETRAINING, cognate_server.metrics.METRICS),
        ("Agent training", TRAINING, agent_server.metrics.STEPS),
        ("Agent evaluations", MEASURED, agent_server.metrics.MEASURED),
        ("Agent floors", FLOORS, agent_server.metrics.FLOORS),
        ("Agents measured again", ON_REQUEST, agent_server.metrics.ON_REQUEST),
    )
    pages = [f"## {title}\n\n{text}\n{table(metrics)}" for title, text, metrics in sections]
    return "\n".join([HEAD, *pages, f"## Servers\n\n{SERVERS}\n{server_table(CATALOG)}"])


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
