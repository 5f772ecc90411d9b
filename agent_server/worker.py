"""The agent worker: data, the foundation across the exchange, fine-tuning, publication.

python -m agent_server.worker --settings FILE --job jobs/... --attempt N --token N
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from agent_server import descents, foundation
from agent_server.architectures.blame import plugin_blamed
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.refusal import guard_process, require_separate
from agent_server.architectures.settings import settings_of
from agent_server.artifacts import AgentArtifactManager
from agent_server.bases import Base, resolve
from agent_server.data.processor import AgentDataProcessor, ready_event
from agent_server.objectives.build import objective_for
from agent_server.rl.work import train_acting
from agent_server.settings import AgentSettings, load_settings
from agent_server.tasks import ACTING
from agent_server.tracker import Cost
from agent_server.train_config import AgentTrainConfig, from_plan
from agent_server.trainer import train_agent
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import NotImplementedByServerError
from training_common.artifacts.open import open_registry
from training_common.artifacts.registry import ArtifactRegistry
from training_common.attempt import Attempt, AttemptStopped, AttemptWaits
from training_common.compute import processes_here, threads_of
from training_common.jobs.states import JobState
from training_common.retention import retention_of
from training_common.team import ALONE, Team, team_for
from training_common.team_attempt import TeamAttempt
from training_common.worker import AssistantContext, WorkerContext, run

# Long enough that a Cognate that restarts is not pressed, short enough that its return is seen at once.
_RETRY_S = 1.0
T = TypeVar("T")
# Is told of the bytes that there are, and of those that there will be.
_Progress = Callable[[int, int], None]


def work(context: WorkerContext[AgentSettings]) -> None:
    """Take one job from its plan to a published agent."""
    guard_process()
    settings, attempt = context.settings, context.attempt
    plan = pb.TrainingPlan.FromString(attempt.store.job.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(settings)
    registry = open_registry(settings, context.database)
    if plan.WhichOneof("task") in ACTING:
        attempt.keep(retention_of(plan.checkpoint_policy, highest_is_best=True))
        _act(context, plan, registry)
        return
    attempt.keep(retention_of(plan.checkpoint_policy, highest_is_best=objective_for(from_plan(plan)).higher_is_better))
    # A job that came back from waiting read its data before: what it lacked is asked for first.
    base = _base(context, plan, registry) if attempt.store.job.waits else None
    processor = AgentDataProcessor(settings.data, hub_dir=settings.files_dir / "hub")
    data = processor.prepare(plan, each_row=lambda: _heed(attempt))
    rehearsal = processor.prepare_rehearsal(plan, data.labels, each_row=lambda: _heed(attempt))
    attempt.event("data_ready", ready_event(data))
    base = base or _base(context, plan, registry)
    facts = {"foundation": base.foundation, "foundation_digest": base.foundation_digest}
    if base.agent_dir:
        facts["agent_version"] = base.name
    if plan.WhichOneof("base") == "model_folder":
        facts["model_digest"] = base.digest
    attempt.store.set_facts(facts)
    if base.base_dir:
        attempt.event(
            "foundation_ready",
            {"message": f"{base.name} fetched and verified", "foundation": base.name, "digest": base.digest},
        )
    attempt.move(JobState.RUNNING)
    config, base_dir, agent_dir = _agreed(team, plan, base)
    # Several processes end for each other's faults, which torch tells of in errors of its own.
    blamed = plan.architecture if team.size == 1 else ""
    with plugin_blamed(blamed, doing="trained", folder=attempt.workdir) if blamed else contextlib.nullcontext():
        result = train_agent(
            config,
            base_dir,
            data,
            TeamAttempt(team, attempt, job=attempt.job, workdir=attempt.workdir),
            rehearsal=rehearsal,
            agent_dir=agent_dir,
            team=team,
            cost=_cost(context, team),
        )
    require_separate()
    manifest = json.dumps(data.manifest.to_json(), indent=1) + "\n"
    (result.folder / "data.json").write_text(manifest, encoding="utf-8")
    manager = AgentArtifactManager(registry, data_folder=settings.data.folder)
    manager.publish(result, plan=plan, base=base, data=data.manifest, attempt=attempt)


def _act(context: WorkerContext[AgentSettings], plan: pb.TrainingPlan, registry: ArtifactRegistry) -> None:
    """Take a job whose agents act in an environment to a published agent."""
    attempt = context.attempt
    base = _base(context, plan, registry)
    if base.agent_dir:
        attempt.store.set_facts({"agent_version": base.name})
    attempt.move(JobState.RUNNING)
    modules, cost = context.settings.environments.modules, _cost(context, ALONE)
    result, manifest = train_acting(plan, base, attempt, modules=modules, cost=cost)
    require_separate()
    AgentArtifactManager(registry).publish(result, plan=plan, base=base, data=manifest, attempt=attempt)


def assist(context: AssistantContext[AgentSettings]) -> None:
    """Take part in training, in a process that is not the first."""
    guard_process()
    plan = pb.TrainingPlan.FromString(context.plan)
    team = team_for(plan.compute, context.team)
    _set_threads(context.settings)
    config, base_dir, agent_dir = _agreed(team, plan, None)
    attempt = TeamAttempt(team, None, job=context.job, workdir=context.job_dir)
    train_agent(config, base_dir, None, attempt, agent_dir=agent_dir, team=team)


def _agreed(team: Team, plan: pb.TrainingPlan, base: Base | None) -> tuple[AgentTrainConfig, Path | None, Path | None]:
    """Return what the first process knows of the base, on all of them: configuration, foundation and agent folder."""

    def said() -> tuple[str, str, str, str]:
        found = base or Base()
        return found.name, found.digest, str(found.base_dir or ""), str(found.agent_dir or "")

    name, digest, base_dir, agent_dir = team.agree(said)
    architecture = AgentArchitectureFactory().get(plan.architecture)
    settings = settings_of(architecture.name, architecture.settings, plan.settings)
    config = from_plan(plan, foundation=name, foundation_digest=digest, settings=settings)
    return config, Path(base_dir) if base_dir else None, Path(agent_dir) if agent_dir else None


def _base(context: WorkerContext[AgentSettings], plan: pb.TrainingPlan, registry: ArtifactRegistry) -> Base:
    return resolve(
        plan,
        fetch=lambda: _fetch(context, plan),
        registry=registry,
        cache_dir=context.settings.files_dir / "agents",
        models=context.settings.models,
        agent_name=context.attempt.store.job.facts.get("agent_version", ""),
        model_digest=context.attempt.store.job.facts.get("model_digest", ""),
        hold=lambda row: context.attempt.store.write_too(
            lambda connection: descents.hold_agent(connection, registry, row, context.attempt.job)
        ),
        trust=lambda agent, below: _trust(context, agent, below),
    )


def _hold_model(
    context: WorkerContext[AgentSettings], register: Callable[[Sequence[foundation.Descent]], None], model: str
) -> None:
    """Keep a foundation from being collected, from before it is fetched until the job has ended.

    register: tells Cognate.

    Errors: ModelNotFoundError; UnavailableError and its kin when Cognate cannot be reached.
    """
    job = context.attempt.job
    context.attempt.store.write_too(lambda connection: descents.hold_model(connection, model, job))
    with contextlib.suppress(NotImplementedByServerError):  # the server tells so in its log
        register([foundation.Descent(model=model, name=job)])


def _cost(context: WorkerContext[AgentSettings], team: Team) -> Cost:
    hour = context.settings.price.worker_hour
    return Cost(
        worker_hour=None if hour is None else hour * team.size,
        earlier_seconds=context.attempt.store.earlier_seconds(),
    )


def _set_threads(settings: AgentSettings) -> None:
    torch.set_num_threads(threads_of(settings.workers.threads, os.cpu_count() or 1, processes_here()))


def _heed(attempt: Attempt) -> None:
    stop = attempt.stop_requested()
    if stop is not None:
        raise AttemptStopped(stop)


def _fetch(context: WorkerContext[AgentSettings], plan: pb.TrainingPlan) -> foundation.Foundation:
    """Fetch the plan's foundation.

    A later attempt takes the version that the first one resolved, so that a job has one foundation.
    Errors: those of `_asking`.
    """
    endpoint = context.settings.cognate
    architecture = AgentArchitectureFactory().get(plan.architecture)
    name = context.attempt.store.job.facts.get("foundation") or plan.foundation.name

    def fetch(client: foundation.Client, on_progress: _Progress) -> foundation.Foundation:
        return foundation.fetch(
            client,
            name,
            accept_experimental=plan.foundation.accept_experimental,
            required=architecture.required_architecture,
            cache_dir=context.settings.files_dir / "foundations",
            trusted=foundation.trusted_keys(endpoint),
            on_resolved=functools.partial(_hold_model, context, functools.partial(foundation.register, client)),
            on_progress=on_progress,
            patience_s=endpoint.hold_slot_s,
        )

    return _asking(context, fetch)


def _trust(context: WorkerContext[AgentSettings], agent: str, below: foundation.Below) -> None:
    """Refuse an agent for the foundation below it, where the policy does. Errors: those of `_asking`."""
    trusted = foundation.trusted_keys(context.settings.cognate)
    if trusted and below.name:
        _asking(context, lambda client, _progress: foundation.check_below(client, agent, below, trusted))


def _asking(
    context: WorkerContext[AgentSettings], ask: Callable[[foundation.Client, Callable[[int, int], None]], T]
) -> T:
    """Return what Cognate answers. While it cannot be reached, wait for a moment, then give the slot back.

    ask: gets a client, and what it calls when something has arrived.
    Errors: those of `ask`; AttemptWaits; AttemptStopped.
    """
    attempt, endpoint = context.attempt, context.settings.cognate
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
                return ask(client, on_progress)
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
    run(load_settings, work, assist, plan_type=pb.TrainingPlan)
