"""The rows of a run: encoded, in the order of its steps, and in the pieces that its processes take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent_server.architectures.model import AgentModel
from agent_server.data.examples import Labelled, PreparedData, Tagged
from agent_server.evaluation import TrainingOrder
from agent_server.objectives.base import Batch, Objective, sample
from agent_server.train_config import AgentTrainConfig
from training_common.team import Team


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Rows of an earlier set. order: None where they are only measured on.

    before: returns who answers for the rows before training, and the rows as that model reads them; None where nobody
    can. It is the published agent where the model to train has a head of its own for other labels.
    """

    name: str
    order: TrainingOrder[Any] | None
    test: Sequence[Any]
    before: Callable[[], tuple[AgentModel, Sequence[Any]] | None]


class TrainingRows:
    """The rows of prepared data, encoded: those to train on in their order, and samples of the others.

    parent: loads the published agent that is gone on with; None where there is none.
    """

    def __init__(
        self,
        data: PreparedData[Any],
        rehearsal: PreparedData[Any] | None,
        objective: Objective[Any, Any],
        model: AgentModel,
        config: AgentTrainConfig,
        *,
        between: Callable[[], None],
        parent: Callable[[], AgentModel] | None = None,
    ) -> None:
        self.name = data.name
        self.training_rows = len(data.train)
        rehearsed = 0 if rehearsal is None else round(config.rehearsal_share * config.batch_size)

        def encode(examples: Sequence[Any], most: int = 0) -> Sequence[Any]:
            rows = sample(objective.encode(model, examples, max_tokens=config.max_tokens), most, config.seed)
            return objective.prepare(model.eval(), rows, between=between) if objective.needs_reference else rows

        def order(examples: Sequence[Any], batch_size: int) -> TrainingOrder[Any]:
            return TrainingOrder(encode(examples), length=objective.length, batch_size=batch_size, seed=config.seed)

        self.order = order(data.train, config.batch_size - rehearsed)
        self.validation = encode(data.validation, config.validation_rows)
        self.test = encode(data.test, config.evaluation_rows)
        self.earlier = None
        if rehearsal is not None:
            test = encode(rehearsal.test, config.evaluation_rows)

            def before() -> tuple[AgentModel, Sequence[Any]] | None:
                known = None if parent is None else parent()
                if known is None or (known.output, known.labels) == (model.output, model.labels):
                    return model, test
                examples = _as_known(rehearsal.test, rehearsal.labels, known.labels)
                if known.output is not model.output or examples is None:
                    return None
                rows = objective.encode(known, examples, max_tokens=config.max_tokens)
                return known.eval(), sample(rows, config.evaluation_rows, config.seed)

            self.earlier = Earlier(
                name=rehearsal.name,
                order=order(rehearsal.train, rehearsed) if rehearsed else None,
                test=test,
                before=before,
            )

    def rows_of(self, step: int, factor: int, total_steps: int) -> list[Any]:
        """Return the rows of one step: the task's, then those of the earlier set.

        factor: how many steps' rows it takes; the others are of steps that come after the run's last one.
        """
        rows = [row for part in range(factor) for row in self.order.rows_of(step + part * total_steps)]
        if self.earlier is not None and self.earlier.order is not None:
            rows += [row for part in range(factor) for row in self.earlier.order.rows_of(step + part * total_steps)]
        return rows


def _as_known(examples: Sequence[Any], labels: Sequence[str], known: Sequence[str]) -> list[Any] | None:
    """Return examples with their labels by another model's numbers, None where it does not know all of them."""
    numbers = {label: number for number, label in enumerate(known)}
    found: list[Any] = []
    for example in examples:
        match example:
            case Labelled(label=label) if labels[label] in numbers:
                found.append(replace(example, label=numbers[labels[label]]))
            case Tagged(spans=spans) if all(span.label in numbers for span in spans):
                found.append(example)
            case _:
                return None
    return found


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows that a process takes at once. counts: whether they are its own. last: of its step."""

    batch: Batch
    counts: bool
    last: bool


def pieces(batch: Batch, team: Team, most: int) -> list[Piece]:
    """Return this process's rows in at most so many pieces, as many as every other process has.

    A process takes part in every exchange, so one without a row takes the first one and counts it for nothing.
    """
    rows = len(batch["tokens_BT"])
    mine = team.rows(rows)
    own, number = mine.stop - mine.start, min(most, -(-rows // team.size))
    pieces = []
    for i in range(number):
        taken = slice(mine.start + own * i // number, mine.start + own * (i + 1) // number)
        counts = taken.stop > taken.start
        cut = {name: part[taken if counts else slice(0, 1)] for name, part in batch.items()}
        pieces.append(Piece(batch=cut, counts=counts, last=i == number - 1))
    return pieces
