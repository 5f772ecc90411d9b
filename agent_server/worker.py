"""The agent worker: data, the foundation across the exchange, fine-tuning, publication.

python -m agent_server.worker --settings FILE --job jobs/... --attempt N --token N
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import torch

from agent_server import foundation
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.artifacts import AgentArtifactManager
from agent_server.data.classification import AgentDataProcessor
from agent_server.plan import classification_source
from agent_server.settings import AgentSettings, load_settings
from agent_server.train_config import from_plan
from agent_server.trainer import train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry
from training_common.attempt import Attempt, AttemptStopped, AttemptWaits
from training_common.compute import threads_of
from training_common.jobs.states import JobState
from training_common.retention import retention_of
from training_common.team import Team, team_for
from training_common.team_attempt import TeamAttempt
from training_common.worker import AssistantContext, WorkerContext, run

# Long enough that a Cognate that restarts is not pressed, short enough that its return is seen at once.
_RETRY_S = 1.0


def work(context: WorkerContext[AgentSettings]) -> None:
    """Take one job from its plan to a published agent."""
    settings, attempt = context.settings, context.attempt
    plan = pb.TrainingPlan.FromString(attempt.store.job.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(settings, team)
    attempt.keep(retention_of(plan.checkpoint_policy, highest_is_best=True))
    # A job that came back from waiting read its data before: what it lacked is asked for first.
    base = _fetch(context, plan) if attempt.store.job.waits else None
    processor = AgentDataProcessor(folder=settings.data.folder)
    data = processor.process(classification_source(plan.classification), each_row=lambda: _heed(attempt))
    attempt.event(
        "data_ready",
        {
            "message": f"{data.name} ({data.manifest.kind}): {len(data.train)} rows to train on, {len(data.test)} to "
            f"test on, {len(data.labels)} labels",
            "dataset": data.name,
            "kind": data.manifest.kind,
            "rows_read": data.report.rows_read,
            "rows_refused": data.report.rows_refused,
            "digest": data.manifest.digest,
        },
    )
    base = base or _fetch(context, plan)
    attempt.store.set_facts({"foundation": base.name, "foundation_digest": base.digest})
    attempt.event(
        "foundation_ready",
        {"message": f"{base.name} fetched and verified", "foundation": base.name, "digest": base.digest},
    )
    attempt.move(JobState.RUNNING)
    name, digest, path = team.agree(lambda: (base.name, base.digest, str(base.path)))
    result = train_agent(
        from_plan(plan, foundation=name, foundation_digest=digest),
        Path(path),
        data,
        TeamAttempt(team, attempt, job=attempt.job, workdir=attempt.workdir),
        team=team,
    )
    manifest = json.dumps(data.manifest.to_json(), indent=1) + "\n"
    (result.folder / "data.json").write_text(manifest, encoding="utf-8")
    registry = ArtifactRegistry(context.database, BlobStore(settings.files_dir / "artifacts"))
    AgentArtifactManager(registry).publish(result, plan=plan, foundation=base, data=data.manifest, attempt=attempt)


def assist(context: AssistantContext[AgentSettings]) -> None:
    """Take part in training, in a process that is not the first."""
    plan = pb.TrainingPlan.FromString(context.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(context.settings, team)
    name, digest, path = team.agree(lambda: ("", "", ""))  # what the first one has fetched
    config = from_plan(plan, foundation=name, foundation_digest=digest)
    attempt = TeamAttempt(team, None, job=context.job, workdir=context.job_dir)
    train_agent(config, Path(path), None, attempt, team=team)


def _set_threads(settings: AgentSettings, team: Team) -> None:
    torch.set_num_threads(threads_of(settings.workers.threads, os.cpu_count() or 1, team.size))


def _heed(attempt: Attempt) -> None:
    stop = attempt.stop_requested()
    if stop is not None:
        raise AttemptStopped(stop)


def _fetch(context: WorkerContext[AgentSettings], plan: pb.TrainingPlan) -> foundation.Foundation:
    """Fetch the plan's foundation. While Cognate cannot be reached, wait for a moment, then give the slot back.

    A later attempt takes the version that the first one resolved, so that a job has one foundation.
    Errors: AttemptWaits; AttemptStopped.
    """
    attempt, endpoint = context.attempt, context.settings.cognate
    architecture = AgentArchitectureFactory().get(plan.architecture)
    name = attempt.store.job.facts.get("foundation") or plan.foundation.name
    # Who waited before holds no slot for it again: one look is enough.
    hold_s = 0.0 if attempt.store.job.waits else endpoint.hold_slot_s
    hold_until, progressed = time.monotonic() + hold_s, False

    def on_progress(_arrived: int, _total: int) -> None:
        nonlocal hold_until, progressed
        _heed(attempt)
        hold_until, progressed = time.monotonic() + endpoint.hold_slot_s, True

    with contextlib.ExitStack() as stack:
        client = None
        while True:
            try:
                client = client or stack.enter_context(foundation.connect(endpoint))
                return foundation.fetch(
                    client,
                    name,
                    accept_experimental=plan.foundation.accept_experimental,
                    required=architecture.required_architecture,
                    cache_dir=context.settings.files_dir / "foundations",
                    on_progress=on_progress,
                    patience_s=endpoint.hold_slot_s,
                )
            except foundation.AWAY as error:
                away = error.message
            _heed(attempt)
            left_s = hold_until - time.monotonic()
            if left_s <= 0:
                raise AttemptWaits(
                    "Cognate", message=away, give_up_after_s=endpoint.give_up_after_s, progressed=progressed
                )
            time.sleep(min(_RETRY_S, left_s))


if __name__ == "__main__":
    run(load_settings, work, assist)
