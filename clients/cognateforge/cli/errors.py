"""How an error is told: lines for people, or one JSON object, both on stderr."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cognateforge.exceptions import ForgeError

_TASKS = (
    "classification",
    "extraction",
    "behavioural",
    "dialogue",
    "domain",
    "question_answering",
    "tool_calling",
    "preference",
)
_ACTING = ("reinforcement", "multi_agent")
_POLICY_FIELDS = (
    "rollout_steps",
    "environments",
    "epochs",
    "minibatches",
    "discount",
    "advantage_decay",
    "clip_range",
    "entropy_weight",
    "environment_steps",
)
_SOURCE_FIELDS = ("file", "file.path", "hub", "hub.dataset", "hub.config", "hub.revision")
# Options whose names are not their field's with dashes, by the field's path.
_OPTIONS: Mapping[str, str] = {
    "page_size": "--limit",
    "start_time": "--start",
    "end_time": "--end",
    "plan.total_steps": "--steps",
    "plan.peak_learning_rate": "--lr",
    "plan.checkpoint_interval_steps": "--checkpoint-interval",
    "plan.progress_interval_steps": "--progress-interval",
    "plan.datasets": "--dataset",
    "plan.datasets.dataset": "--dataset",
    "plan.datasets.weight": "--dataset",
    "plan.curriculum.steps": "--curriculum-steps",
    "plan.foundation.name": "--foundation",
    "plan.model_folder.path": "--model-folder",
    "plan.agent_version.name": "--continue",
    "plan.settings": "--setting",
    **{f"plan.settings.{field}": "--setting" for field in ("name", "integer", "number", "flag", "word")},
    **{f"plan.{task}": "--task" for task in _TASKS},
    **{f"plan.{task}.{field}": "--data" for task in _TASKS for field in _SOURCE_FIELDS},
    "plan.data_limits.max_refused_share": "--max-refused-share",
    "plan.rehearsal.file": "--rehearse",
    "plan.rehearsal.file.path": "--rehearse",
    "plan.rehearsal.share": "--rehearsal-share",
    "plan.classification.generated.seed": "--data-seed",
    "plan.classification.domains": "--domain",
    "plan.adaptation.lora.rank": "--lora-rank",
    "plan.adaptation.lora.alpha": "--lora-alpha",
    "plan.adaptation.lora.dropout": "--lora-dropout",
    "plan.adaptation.bottleneck.width": "--bottleneck-width",
    "plan.validation_interval_steps": "--validation-interval",
    "plan.optimization.peak_learning_rate": "--lr",
    "plan.optimization.gradient_clip_norm": "--clip-norm",
}
# Fields whose option has the field's own name.
_SAME_NAME = frozenset(
    {
        "request_id",
        "reservation",
        "slots",
        "purpose",
        "include_ended",
        "scheduling.priority",
        "scheduling.start_by",
        "scheduling.finish_by",
        "after_sequence",
        "plan.seed",
        "plan.batch_size",
        "plan.sequence_length",
        "plan.warmup_steps",
        "plan.curriculum",
        "plan.curriculum.initial_competence",
        "plan.agent",
        "plan.architecture",
        "plan.adaptation",
        "plan.adaptation.unfreeze_act_ltm",
        "plan.foundation.accept_experimental",
        "plan.classification.include_out_of_scope",
        "plan.classification.max_rows_per_label",
        "plan.behavioural.successes_only",
        "plan.behavioural.weight_by_reward",
        "plan.preference.beta",
        "plan.max_tokens",
        "plan.compute.processes",
        "plan.compute.nodes",
        "plan.adaptation.freezing.trained_blocks",
        "plan.multi_agent.agents",
        "plan.multi_agent.coordination",
        *(f"plan.{task}.{field}" for task in _ACTING for field in ("environment", "evaluation_episodes")),
        *(f"plan.{task}.policy_optimization.{field}" for task in _ACTING for field in _POLICY_FIELDS),
        "plan.optimization.accumulation_steps",
        "plan.optimization.precision",
        "plan.optimization.early_stopping",
        "plan.optimization.early_stopping.patience",
        "plan.optimization.early_stopping.min_improvement",
        "plan.optimization.warmup_steps",
        "plan.optimization.schedule",
        "plan.optimization.adamw.weight_decay",
        "plan.optimization.sgd.momentum",
    }
)


def option_for(field: str) -> str:
    """Return the option that sets a field of a request, "" where none does."""
    path = re.sub(r"\[[^]]*\]", "", field)
    if path.partition(".")[0] in (*_TASKS, *_ACTING):  # of an evaluation, which has no plan
        path = f"plan.{path}"
    if path in _SAME_NAME:
        return "--" + path.rpartition(".")[2].replace("_", "-")
    return _OPTIONS.get(path, "")


def lines(error: ForgeError) -> list[str]:
    """Return an error as people read it; what its message says already is not said again."""
    told = [f"error: {error.message}"]
    new = [violation for violation in error.violations if violation.description not in error.message]
    described = {violation.field for violation in new}
    for field in dict.fromkeys(violation.field for violation in error.violations if violation.field not in described):
        option = option_for(field)
        if option or field not in error.message:
            told.append(f"  {field} ({option})" if option else f"  field: {field}")
    for violation in new:
        option = option_for(violation.field)
        place = f"{violation.field} ({option})" if option else violation.field
        told.append(f"  {place}: {violation.description}")
    if error.unknown_reason:
        told.append(f"  reason: {error.unknown_reason}, which this release does not know")
    if error.request_id:
        told.append(f"  call id: {error.request_id}")
    return told


def to_json(error: ForgeError, **beside: Any) -> str:
    """Return an error as one line of JSON. `code` and `reason` are empty where no server gave them."""
    return json.dumps(
        {
            **beside,
            "code": error.status_name(),
            "reason": error.unknown_reason or (error.reason_name() if error.reason else ""),
            "message": error.message,
            "fields": [
                {"field": v.field, "option": option_for(v.field), "description": v.description}
                for v in error.violations
            ],
            "call_id": error.request_id,
        },
        ensure_ascii=False,
    )
