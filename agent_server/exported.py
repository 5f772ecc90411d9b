"""The folder of a trained agent: merged, written, read back and run, each held against the trained model's logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agent_server.adaptation import ParameterCount, merge_checked
from agent_server.architectures.factory import AgentArchitecture
from agent_server.architectures.model import AgentModel
from agent_server.evaluation import Evaluation
from agent_server.objectives.base import Objective
from agent_server.package import as_before, write_package
from agent_server.train_config import AgentTrainConfig
from cognateforge.exceptions import IntegrityCheckFailedError
from training_common.attempt import Json
from training_common.recovery import RecoveryEvent

# Rows that the merge and the export are checked on: one batch, over in a fraction of a second.
PROBE_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a folder's config.json tells of the run. weights_of_step: the step that the weights are of."""

    steps: int
    weights_of_step: int
    count: ParameterCount
    evaluations: Sequence[Evaluation]
    recovery: Sequence[RecoveryEvent]
    constraints_enforced: bool


def write_agent(
    folder: Path,
    model: AgentModel,
    probe_rows: Sequence[Any],
    *,
    config: AgentTrainConfig,
    architecture: AgentArchitecture,
    objective: Objective[Any, Any],
    build: Callable[[], AgentModel],
    facts: RunFacts,
) -> None:
    """Write a trained agent into a folder, which is made anew, with a package around it.

    probe_rows: encoded rows to compare logits on, at most PROBE_ROWS. build: returns the model as it was untrained.
    Errors: IntegrityCheckFailedError, when what is merged, read back or run gives other logits than the trained model.
    """
    model.eval()
    probe = objective.batch(list(probe_rows))

    @torch.no_grad()
    def logits(of: AgentModel) -> Tensor:
        return objective.comparable(of, probe)

    change = merge_checked(model.base_model(), lambda: logits(model))
    if folder.exists():
        shutil.rmtree(folder)  # an earlier attempt's, cut off before it was published
    folder.mkdir(parents=True)
    model.save(folder, extra=_config(config, facts, change))
    if not torch.equal(logits(architecture.load(folder).eval()), logits(model)):
        raise IntegrityCheckFailedError("the exported agent, read back, gives other logits than the trained one")
    allowed = objective.allowed_actions if facts.constraints_enforced else frozenset[str]()
    write_package(folder, model, as_before(model, build), architecture=architecture.name, allowed_actions=allowed)


def _config(config: AgentTrainConfig, facts: RunFacts, change: float) -> dict[str, Json]:
    adaptation = config.adaptation
    frozen = "trained" if adaptation.unfreeze_act_ltm else "frozen"
    return {
        "agent": config.agent,
        "foundation": config.foundation,
        "foundation_digest": config.foundation_digest,
        "max_tokens": config.max_tokens,
        "training": json.loads(json.dumps(asdict(config))),
        "trainable_parameters": facts.count.trainable,
        "total_parameters": facts.count.total,
        "adaptation": f"{adaptation.describe()}; ACT and LTM {frozen}",
        "merge_logit_change": change,
        "steps": facts.steps,
        "weights_of_step": facts.weights_of_step,
        "recovery": [vars(event) for event in facts.recovery],
        "constraints_enforced": facts.constraints_enforced,
        "evaluations": [asdict(e) for e in facts.evaluations],
    }
