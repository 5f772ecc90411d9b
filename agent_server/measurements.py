"""What a run measures before and after its steps, on rows that it does not learn from, and what that says of the agent.

Definitions and sources of the metrics: agent_server.objectives.metrics and docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from agent_server.architectures.model import AgentModel
from agent_server.evaluation import Evaluation, measure
from agent_server.objectives.base import Measurement, Objective
from agent_server.objectives.metrics.continual import forgetting
from agent_server.tracker import Check, beats, normalized_gain, readiness
from agent_server.training_rows import Earlier, TrainingRows
from cognateforge.exceptions import TrainingDivergedError

When = Literal["before", "after"]
Between = Callable[[], None]


class Measurements:
    """The results of one run, in the order of their measurement. `results` goes into checkpoints and the artifact."""

    def __init__(self, objective: Objective[Any, Any]) -> None:
        self.results: list[Evaluation] = []
        self._objective = objective

    def load(self, results: Iterable[Evaluation]) -> None:
        """Go on from what an earlier attempt measured."""
        self.results = list(results)

    def measure(self, when: When, model: AgentModel, rows: TrainingRows, *, between: Between) -> None:
        """Measure a model on the test rows and, where it rehearses, on those of the earlier set.

        between: called between batches, to stop by an exception.
        Errors: TrainingDivergedError, for a result that is no number.
        """
        dataset = f"{rows.name}/test"
        for found in measure(self._objective, model, rows.test, between=between):
            self._record(f"{found.metric}_{when}", dataset, found)
        if when == "before":
            for found in self._objective.floor(rows.test):
                self._record(found.metric, dataset, found)
        if rows.earlier is not None:
            answering = (model, rows.earlier.test) if when == "after" else rows.earlier.before()
            for found in [] if answering is None else measure(self._objective, *answering, between=between):
                if found.metric == self._objective.score:
                    self._record(f"earlier_{found.metric}_{when}", f"{rows.earlier.name}/test", found)
            if when == "after":
                self._record_forgetting(rows.earlier)

    def measure_validation(self, model: AgentModel, rows: TrainingRows, *, between: Between) -> None:
        """Measure a model on the validation rows. Errors: as `measure`."""
        for found in measure(self._objective, model, rows.validation, between=between):
            self._record(f"validation_{found.metric}", f"{rows.name}/validation", found)

    def judge(self, rows: TrainingRows, *, trouble_left: bool) -> tuple[Check, ...]:
        """Return the checks of readiness that can be made, and record their share and what training has gained.

        trouble_left: whether the newest trouble of the run was left as it was.
        """
        values, score = self._by_metric(), self._objective.score
        after, before = values[f"{score}_after"], values[f"{score}_before"]
        sign = 1.0 if self._objective.higher_is_better else -1.0
        checks = [
            Check(name="score_is_finite", value=0.0 if math.isfinite(after.value) else 1.0, floor=0.5, below=True),
            Check(name="score_improved", value=sign * after.value, floor=sign * before.value),
            Check(name="last_trouble_was_mended", value=float(trouble_left), floor=0.5, below=True),
        ]
        floor = self._objective.floor(rows.test)
        if floor:
            checks.append(beats("score_beats_floor", after.value, floor[0].value, after.rows))
        share = readiness(checks)
        if share is not None:
            found = Measurement(metric="deployment_readiness", value=share, rows=after.rows)
            self._record("deployment_readiness", after.dataset, found)
        if self._objective.is_share:
            gain = normalized_gain(before.value, after.value)
            if gain is not None:
                found = Measurement(metric="normalized_gain", value=gain, rows=after.rows)
                self._record("normalized_gain", after.dataset, found)
        return tuple(checks)

    def _record_forgetting(self, earlier: Earlier) -> None:
        """Tell how much worse the earlier set is answered than before, in its score's own unit.

        Where nobody could answer for it before, nothing can have been forgotten.
        """
        name, values = self._objective.score, self._by_metric()
        if f"earlier_{name}_before" not in values:
            return
        before, after = values[f"earlier_{name}_before"], values[f"earlier_{name}_after"]
        worse = forgetting(before.value, after.value, higher_is_better=self._objective.higher_is_better)
        found = Measurement(metric="forgetting", value=worse, rows=after.rows)
        self._record("forgetting", f"{earlier.name}/test", found)

    def _by_metric(self) -> dict[str, Evaluation]:
        return {result.metric: result for result in self.results}

    def _record(self, metric: str, dataset: str, found: Measurement) -> None:
        if not math.isfinite(found.value):
            remedy = "lower the learning rate"
            if metric.endswith("_before"):  # no step was taken yet
                remedy = "what it begins with gives no numbers, so look at the base, or at the architecture's plugin"
            raise TrainingDivergedError(f"{metric} on {dataset} is {found.value}: {remedy}")
        self.results.append(Evaluation(metric=metric, dataset=dataset, value=found.value, rows=found.rows))
