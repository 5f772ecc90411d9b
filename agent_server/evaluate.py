"""Measures a published agent on a set, in a process of its own: python -m agent_server.evaluate FOLDER.

It answers for the set's test rows, as the metrics of training do; for one that acts, for whole episodes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from agent_server.agents import Measured
from agent_server.architectures.blame import plugin_blamed
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.model import AgentModel
from agent_server.architectures.policy_model import PolicyModel
from agent_server.architectures.refusal import guard_process, require_separate
from agent_server.data.examples import Labelled, PreparedData, Tagged
from agent_server.data.processor import AgentDataProcessor
from agent_server.evaluation import measure
from agent_server.objectives.base import Measurement
from agent_server.objectives.build import objective_for
from agent_server.rl.config import PolicyConfig
from agent_server.rl.measure import Stage
from agent_server.rl.registry import require_environment
from agent_server.rl.worlds import world_maker
from agent_server.tasks import ACTING
from agent_server.train_config import from_plan
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    ArtifactCorruptError,
    DataUnavailableError,
    FieldViolation,
    IncompatibleError,
)
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.files import unpack
from training_common.artifacts.open import open_store
from training_common.settings import ArtifactSettings, DataSettings
from training_common.side_process import answer_order

# Labels that a refusal names.
_NAMED_LABELS = 10


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be measured.

    body: the agent's manifest. request: on which set. data, hub_dir: where sets are. modules: where environments are.
    blobs: where the agent's files are.
    """

    body: dict[str, Any]
    request: pb.EvaluateAgentRequest
    data: DataSettings
    hub_dir: Path
    modules: tuple[str, ...]
    blobs: BlobStore
    threads: int

    @property
    def task(self) -> str:
        """Return the agent's task; the server has checked that the request's is the same."""
        return str(self.body["task"])

    @property
    def wish(self) -> Any:
        """Return the task's message in the request."""
        return getattr(self.request, self.task)


def read_order(order: dict[str, Any]) -> Order:
    """Return the order that the server wrote."""
    return Order(
        body=json.loads(order["manifest"]),
        request=pb.EvaluateAgentRequest.FromString(base64.b64decode(order["request"])),
        data=DataSettings.model_validate(order["data"]),
        hub_dir=Path(order["hub_dir"]),
        modules=tuple(order["modules"]),
        blobs=open_store(ArtifactSettings.model_validate(order["artifacts"]), Path(order["files_dir"])),
        threads=order["threads"],
    )


def evaluate(order: Order, folder: Path, *, factory: AgentArchitectureFactory | None = None) -> list[Measured]:
    """Measure an agent; its files go into a folder below the given one.

    Errors: DataUnavailableError, InvalidFieldError, IncompatibleError, ArchitectureNotFoundError, ArtifactCorruptError.
    """
    agent_dir, place = folder / "agent", f"{order.task}."
    unpack([StoredFile(**file) for file in order.body["files"]], order.blobs, agent_dir)
    architecture = (factory or AgentArchitectureFactory()).get(order.body["architecture"])
    try:
        config = json.loads((agent_dir / "config.json").read_text(encoding="utf-8"))
        model = architecture.load(agent_dir).eval()
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"the agent's files cannot be loaded: {type(error).__name__}") from error
    if order.task in ACTING:
        return _act(order, model, seed=int(config["training"]["seed"]))
    data = AgentDataProcessor(order.data, hub_dir=order.hub_dir).prepare_set(
        order.task, order.wish, to_measure=True, place=place
    )
    return measure_on(model, data, task=order.task, wish=order.wish, max_tokens=int(config["max_tokens"]))


def measure_on(model: AgentModel, data: PreparedData[Any], *, task: str, wish: Any, max_tokens: int) -> list[Measured]:
    """Measure a model on a set's test rows.

    wish: the task's message, whose settings count as in training. What the model cannot answer rightly, as it does not
    know the label, is left out of the task's metrics, and `unknown_label_share` tells how much that is: of rows, or of
    spans.
    Errors: DataUnavailableError, without test rows; IncompatibleError, when the model knows no label of the set.
    """
    plan = pb.TrainingPlan(agent="evaluated", architecture="any", total_steps=1)
    getattr(plan, task).CopyFrom(wish)
    objective = objective_for(from_plan(plan))
    rows, found = list(data.test), list[Measurement]()
    if not rows:
        raise DataUnavailableError(
            f"{data.name} has no test rows to measure on", violations=_about(task, "no test rows")
        )
    if task == "classification":
        rows, found = _known_rows(rows, data.labels, model.labels)
    elif task == "extraction":
        rows, found = _known_spans(rows, model.labels)
    encoded = objective.encode(model, rows, max_tokens=max_tokens)
    found = [*measure(objective, model, encoded), *objective.floor(encoded), *found]
    return [Measured(metric=m.metric, dataset=f"{data.name}/test", value=m.value, rows=m.rows) for m in found]


def _known_rows(
    rows: Sequence[Labelled], labels: Sequence[str], own: Sequence[str]
) -> tuple[list[Labelled], list[Measurement]]:
    """Return the rows whose label the model knows, by its own numbers, and the share of the others if there are any."""
    numbers = {label: number for number, label in enumerate(own)}
    known = [dataclasses.replace(row, label=numbers[labels[row.label]]) for row in rows if labels[row.label] in numbers]
    foreign = {labels[row.label] for row in rows} - numbers.keys()
    return known, _unknown(len(known), len(rows), foreign, field="classification")


def _known_spans(rows: Sequence[Tagged], own: Sequence[str]) -> tuple[list[Tagged], list[Measurement]]:
    """Return the rows with the spans of slots that the model knows, and the share of the others if there are any."""
    known = [dataclasses.replace(row, spans=tuple(span for span in row.spans if span.label in own)) for row in rows]
    foreign = {span.label for row in rows for span in row.spans} - set(own)
    kept, given = (sum(len(row.spans) for row in each) for each in (known, rows))
    return known, _unknown(kept, given, foreign, field="extraction")


def _unknown(known: int, all_: int, foreign: set[str], *, field: str) -> list[Measurement]:
    if not foreign:
        return []
    if not known:
        named = sorted(foreign)
        told = ", ".join(named[:_NAMED_LABELS]) + (", ..." if len(named) > _NAMED_LABELS else "")
        description = (
            f"the agent knows none of the set's labels ({told}): give a set with labels that it was trained on"
        )
        raise IncompatibleError(f"{field}: {description}", violations=_about(field, description))
    return [Measurement(metric="unknown_label_share", value=1 - known / all_, rows=all_)]


def _act(order: Order, model: AgentModel, *, seed: int) -> list[Measured]:
    """Play whole episodes, begun by the same seeds as those of training's measurements.

    Errors: InvalidFieldError, for an environment that is not there; IncompatibleError, for one of other spaces.
    """
    wish, task = order.wish, order.task
    require_environment(task, wish.environment, modules=order.modules, field=f"{task}.environment")
    agents = int(getattr(wish, "agents", 1))
    episodes = wish.evaluation_episodes or PolicyConfig.evaluation_episodes
    make = world_maker(task, wish.environment, agents, modules=order.modules)
    stage = Stage(make, episodes=episodes, seed=seed)
    try:
        if not isinstance(model, PolicyModel) or tuple(stage.agents) != model.agents:
            description = f"{wish.environment} is seen and acted in otherwise than the agent's own environment"
            raise IncompatibleError(description, violations=_about(f"{task}.environment", description))
        played = stage.policy(model)
        values = {"return": played.mean_return, "coordination": stage.coordination(played)}
    finally:
        stage.close()
    return [
        Measured(metric=name, dataset=wish.environment, value=value, rows=episodes)
        for name, value in values.items()
        if value is not None
    ]


def _about(field: str, description: str) -> list[FieldViolation]:
    return [FieldViolation(field=field, description=description)]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code. Whatever the agent or the set lacks is told to the server."""
    guard_process()
    folder = Path(arguments[0])

    def work(order: dict[str, Any]) -> list[dict[str, Any]]:
        read = read_order(order)
        torch.set_num_threads(read.threads)
        with plugin_blamed(str(read.body["architecture"]), doing="measured", folder=folder):
            found = evaluate(read, folder)
        _require_finite(found)
        require_separate()
        return [asdict(measured) for measured in found]

    return answer_order(folder, work)


def _require_finite(found: Sequence[Measured]) -> None:
    """Refuse figures that are no numbers: the others are of answers that mean nothing. Errors: IncompatibleError."""
    broken = [measured.metric for measured in found if not math.isfinite(measured.value)]
    if broken:
        raise IncompatibleError(
            f"{', '.join(broken)} is not finite: the agent gives no numbers for these rows; take another version"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
