"""The Cognate worker: data, random weights, training, gate, publication.

python -m cognate_server.worker --settings FILE --job jobs/... --attempt N --token N
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cognate_server.artifacts import CognateArtifactManager, TrainedModel
from cognate_server.data.build import DataManifest, build_stream
from cognate_server.data_plan import data_plan
from cognate_server.evaluation import ReasoningScore, evaluate_on, metrics_of, right_share
from cognate_server.gate import GateReport, Verdict, judge
from cognate_server.grokfast import ALPHA, LAMBDA
from cognate_server.metrics import checked
from cognate_server.plan import source_settings
from cognate_server.precision import Precision, native_precision
from cognate_server.settings import CognateSettings, load_settings
from cognate_server.trainer import PretrainConfig, PretrainResult, pretrain
from cognate_server.trainer import TrainingDivergedError as TrainerDivergedError
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import IntegrityCheckFailedError, TrainingDivergedError
from training_common.artifacts.open import open_registry
from training_common.compute import processes_here, threads_of
from training_common.jobs.states import JobState
from training_common.models import cognate_v1
from training_common.models.cognate_v1 import CognateV1
from training_common.retention import retention_of
from training_common.team import team_for
from training_common.team_attempt import TeamAttempt
from training_common.worker import AssistantContext, WorkerContext, run

ARCHITECTURE = "cognate_v1"
# A score of 16 problems of each set takes 30 s of one core while no answer ends early: 4 % of 500 steps of the
# smallest default batch.
SCORE_INTERVAL_STEPS = 500
# 32 rows forward cost as much as three training steps of the smallest default batch.
VALIDATION_INTERVAL_STEPS = 100


def work(context: WorkerContext[CognateSettings]) -> None:
    """Take one job from its plan to a published model."""
    settings, attempt = context.settings, context.attempt
    plan = pb.PretrainingPlan.FromString(attempt.store.job.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(settings)
    attempt.keep(retention_of(plan.checkpoint_policy, highest_is_best=False))
    tokenizer_file = context.job_dir / "tokenizer.json"
    stream, data = build_stream(
        data_plan(plan), source_settings(settings.data), tokenizer_file=tokenizer_file, folder=context.job_dir
    )
    for source in data.sources:
        attempt.event(
            "data_ready",
            {
                "message": f"{source.source.dataset.value} ({source.source.kind.value}): "
                f"{source.documents['train']} documents, {source.tokens['train']} tokens to train on",
                "dataset": source.source.dataset.value,
                "kind": source.source.kind.value,
                "rows_read": source.report.rows_read,
                "rows_refused": source.report.rows_refused,
                "digest": source.source.digest,
            },
        )
    attempt.move(JobState.RUNNING)
    try:
        # The first process decides for all of them.
        precision = team.agree(lambda: _precision(settings.pretraining.precision, context.job_dir / "precision"))
        reason = functools.partial(evaluate_on, stream, plan.sequence_length, settings.pretraining)
        result = pretrain(
            _config(plan, Precision(precision)),
            stream,
            TeamAttempt(team, attempt, job=attempt.job, workdir=attempt.workdir),
            score=lambda model: right_share(reason(model)),
            team=team,
        )
    except TrainerDivergedError as error:
        raise TrainingDivergedError(str(error)) from error
    reasoning = reason(_published(result))
    attempt.progress(step=result.step, total_steps=result.step, metrics=checked(metrics_of(reasoning)))
    weights = result.model_dir / "model.safetensors"
    report = judge(weights, result.validation, reasoning, max_steps=result.config.max_steps)
    if report.verdict is Verdict.REFUSED:
        failed = "; ".join(f"{c.name} is {c.value:g}, must be {c.rule} {c.threshold:g}" for c in report.failed)
        raise IntegrityCheckFailedError(f"nothing was published: {failed}")
    shutil.copyfile(tokenizer_file, result.model_dir / "tokenizer.json")
    # The frozen forward pass that the weights are for: it imports torch alone, and opens them anywhere.
    shutil.copyfile(cognate_v1.__file__, result.model_dir / Path(cognate_v1.__file__).name)
    (result.model_dir / "data.json").write_text(json.dumps(data.to_json(), indent=1) + "\n", encoding="utf-8")
    manager = CognateArtifactManager(open_registry(settings, context.database))
    manager.publish(_model(plan, data, result, report, reasoning), attempt)


def assist(context: AssistantContext[CognateSettings]) -> None:
    """Take part in training, in a process that is not the first."""
    plan = pb.PretrainingPlan.FromString(context.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(context.settings)
    precision = team.agree(lambda: Precision.FLOAT32)  # what the first one says
    attempt = TeamAttempt(team, None, job=context.job, workdir=context.job_dir)
    try:
        pretrain(_config(plan, Precision(precision)), None, attempt, team=team)
    except TrainerDivergedError as error:
        raise TrainingDivergedError(str(error)) from error


def _set_threads(settings: CognateSettings) -> None:
    torch.set_num_threads(threads_of(settings.workers.threads, os.cpu_count() or 1, processes_here()))


def _published(result: PretrainResult) -> CognateV1:
    """Return the model as its files say, since they are what is judged and published."""
    model = CognateV1(result.config)
    cognate_v1.load_state(model, result.model_dir / "model.safetensors")
    return model.eval()


def _precision(setting: str, kept: Path) -> Precision:
    """Decide once for a job: an attempt on another machine goes on in the precision of the first."""
    if not kept.exists():
        chosen = native_precision() if setting == "auto" else Precision(setting)
        scratch = kept.with_suffix(".new")
        scratch.write_text(chosen)
        scratch.replace(kept)
    return Precision(kept.read_text())


def _config(plan: pb.PretrainingPlan, precision: Precision) -> PretrainConfig:
    return PretrainConfig(
        precision=precision,
        seed=plan.seed,
        total_steps=plan.total_steps,
        batch_tokens=plan.batch_size * plan.sequence_length,
        sequence_length=plan.sequence_length,
        peak_lr=plan.peak_learning_rate,
        warmup_steps=plan.warmup_steps,
        checkpoint_interval_steps=plan.checkpoint_interval_steps,
        progress_interval_steps=plan.progress_interval_steps,
        validation_interval_steps=_validation_interval_steps(plan),
        score_interval_steps=SCORE_INTERVAL_STEPS,
        control_rates=tuple(plan.acceleration_control.learning_rate_factors),
    )


def _validation_interval_steps(plan: pb.PretrainingPlan) -> int:
    """Return the usual interval; with a control at most a twentieth of the run, as it is the factor's resolution."""
    if not plan.HasField("acceleration_control"):
        return VALIDATION_INTERVAL_STEPS
    return min(VALIDATION_INTERVAL_STEPS, max(1, plan.total_steps // 20))


def _model(
    plan: pb.PretrainingPlan,
    data: DataManifest,
    result: PretrainResult,
    report: GateReport,
    reasoning: Sequence[ReasoningScore],
) -> TrainedModel:
    tokens = result.step * plan.batch_size * plan.sequence_length
    sources: list[dict[str, Any]] = [
        {
            "name": source.source.dataset.value,
            "kind": source.source.kind.value,
            "rows": source.documents["train"],
            "digest": source.source.digest,
        }
        for source in data.sources
    ]
    return TrainedModel(
        folder=result.model_dir,
        state="READY" if report.verdict is Verdict.READY else "EXPERIMENTAL",
        architecture={
            "name": ARCHITECTURE,
            "fingerprint": f"sha256:{cognate_v1.architecture_fingerprint(result.config)}",
            "parameter_count": result.parameters,
            "act_version": cognate_v1.SEMANTICS_VERSION,
            "ltm_version": cognate_v1.SEMANTICS_VERSION,
        },
        tokenizer_digest=data.tokenizer_digest,
        sources=sources,
        checks=[check.told() for check in report.checks],
        results=_results(data, result, reasoning),
        training={
            "steps": result.step,
            "tokens": tokens,
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "sequence_length": plan.sequence_length,
            "peak_learning_rate": plan.peak_learning_rate,
            "warmup_steps": plan.warmup_steps,
            "precision": result.precision,
            "curriculum": data.to_json()["curriculum"],
            "loss_first_10_steps": result.first_loss,
            "loss_last_10_steps": result.last_loss,
            "validation": dataclasses.asdict(result.validation),
            "reasoning": [dataclasses.asdict(score) for score in reasoning],
            "acceleration": None if result.acceleration is None else dataclasses.asdict(result.acceleration),
        },
        grokfast={
            "alpha": ALPHA,
            "lambda": LAMBDA,
            "departures": [dataclasses.asdict(departure) for departure in result.lambda_departures],
            "implementations": list(result.optimizer_implementations),
        },
        recovery=[dataclasses.asdict(event) for event in result.recovery],
    )


def _results(data: DataManifest, result: PretrainResult, reasoning: Sequence[ReasoningScore]) -> list[dict[str, Any]]:
    """Return what was measured on named sets, under the names of `cognate_server.metrics`."""
    held_out = [source.source.dataset.value for source in data.sources if source.documents["validation"]]
    rows = {"dataset": f"{'+'.join(held_out)}/validation", "rows": result.validation.rows}
    found = [
        {"metric": "validation_loss", "value": result.validation.loss, **rows},
        {"metric": "validation_loss_memory_off", "value": result.validation.loss_memory_off, **rows},
        {"metric": "validation_loss_one_step", "value": result.validation.loss_one_step, **rows},
    ]
    if result.acceleration is not None:
        found.append({"metric": "acceleration_factor", "value": result.acceleration.factor, **rows})
    for score in reasoning:
        problems = {"dataset": f"{score.source}/validation", "rows": score.problems}
        found += [{"metric": metric, "value": value, **problems} for metric, value in score.metrics().items()]
    return found


if __name__ == "__main__":
    run(load_settings, work, assist, plan_type=pb.PretrainingPlan)
