"""The objective of each task."""

from __future__ import annotations

from typing import Any

from agent_server.objectives.base import Objective
from agent_server.objectives.classification import ClassificationObjective
from agent_server.objectives.language import LanguageObjective
from agent_server.objectives.preference import PreferenceObjective
from agent_server.objectives.tagging import TaggingObjective
from agent_server.tasks import OUTPUTS, Output
from agent_server.train_config import AgentTrainConfig
from cognateforge.exceptions import NotImplementedByServerError


def objective_for(config: AgentTrainConfig) -> Objective[Any, Any]:
    """Return what a configuration's task asks of a model. Errors: NotImplementedByServerError."""
    if config.task == "classification":
        return ClassificationObjective()
    if config.task == "extraction":
        return TaggingObjective()
    if config.task == "preference":
        return PreferenceObjective(beta=config.beta)
    if OUTPUTS.get(config.task) is Output.LANGUAGE:
        return LanguageObjective(config.task, constraints=config.constraints)
    raise NotImplementedByServerError(f"this release has no objective for the task {config.task!r}")
