"""Commands that submit jobs."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cognateforge.cli import acting as options
from cognateforge.cli import bases, rows
from cognateforge.cli.acting import Acting, refuse_acting, set_acting
from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import JobService, Progress, RequestId, Service
from cognateforge.cli.names import check_artifact_name, full_reservation_name
from cognateforge.cli.session import Session, command, new_request_id, print_line, say

if TYPE_CHECKING:
    from cognateforge.agent.v1 import training_pb2
    from cognateforge.job.v1.job_pb2 import CheckpointPolicy, Compute, Cost, Estimate, Scheduling

Watch = Annotated[bool, typer.Option("--watch", "--wait", help="Follow the job; the exit code tells how it ended.")]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
CheckpointInterval = Annotated[int, typer.Option(help="Steps between checkpoints. 0: 100.")]
KeepLast = Annotated[int, typer.Option(help="Newest checkpoints that are kept. 0: 2.")]
KeepBest = Annotated[int, typer.Option(help="Best checkpoints that are kept beside them.")]
KeepEvery = Annotated[int, typer.Option(help="Keep checkpoints whose step is a multiple. 0: none.")]
Processes = Annotated[int, typer.Option(help="How many train, each in a slot and on rows of its own. 0: 1.")]
Nodes = Annotated[int, typer.Option(help="Machines that they are spread over, of which one is the server's. 0: 1.")]
Sharded = Annotated[
    bool, typer.Option("--sharded", help="Each process holds a part of the model and the optimizer's state.")
]
Priority = Annotated[int, typer.Option(help="-100 to 100: higher goes first; a point is worth an hour of waiting.")]
StartBy = Annotated[str, typer.Option(help="Fail unless started by then: a time, or 30m, 8h, 2d from now.")]
FinishBy = Annotated[str, typer.Option(help="Save, stop and fail unless ended by then: as --start-by.")]
ValidateOnly = Annotated[bool, typer.Option("--validate-only", help="Check and estimate; make no job.")]


class Dataset(enum.StrEnum):
    """A set that pretraining can use."""

    GSM8K = "gsm8k"
    HOTPOTQA = "hotpotqa"
    FORGE_ARITHMETIC = "forge-arithmetic"
    FORGE_TWOHOP = "forge-twohop"


class Task(enum.StrEnum):
    """What an agent is to learn."""

    CLASSIFICATION = "classification"
    BEHAVIOURAL = "behavioural"
    DIALOGUE = "dialogue"
    DOMAIN = "domain"
    EXTRACTION = "extraction"
    QUESTION_ANSWERING = "question-answering"
    TOOL_CALLING = "tool-calling"
    PREFERENCE = "preference"
    REINFORCEMENT = "reinforcement"
    MULTI_AGENT = "multi-agent"

    @property
    def acts(self) -> bool:
        """Whether it is learnt in an environment, without rows."""
        return self in (Task.REINFORCEMENT, Task.MULTI_AGENT)

    @property
    def field(self) -> str:
        """The task's field in TrainingPlan."""
        return self.value.replace("-", "_")


class AdaptationKind(enum.StrEnum):
    """How much of the base is trained."""

    LORA = "lora"
    FULL = "full"
    HEAD = "head"
    FREEZING = "freezing"
    BOTTLENECK = "bottleneck"


class Optimizer(enum.StrEnum):
    """The standard optimizers."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"


class ScheduleKind(enum.StrEnum):
    """The learning rate over time."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    ONE_CYCLE = "one-cycle"
    PLATEAU = "plateau"


class PrecisionKind(enum.StrEnum):
    """What a forward pass computes with."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    _pretrain(app)
    _train(app)


def _scheduling(priority: int, start_by: str, finish_by: str) -> Scheduling | None:
    from cognateforge.cli.moments import moment
    from cognateforge.job.v1 import job_pb2

    if not (priority or start_by or finish_by):
        return None
    return job_pb2.Scheduling(
        priority=priority,
        start_by=moment(start_by, option="--start-by") if start_by else None,
        finish_by=moment(finish_by, option="--finish-by") if finish_by else None,
    )


def _submitted(session: Session, service: Service, answer: Any, watch: bool, progress: bool | None) -> Exit:
    item = answer.job
    if not item.HasField("job"):  # nothing was made
        _show_dry_run(session, service, answer)
        return Exit.OK
    if not session.as_json and answer.HasField("estimate"):
        say(needs(answer.estimate))
    if session.as_json:
        session.show(item, service=service.value)
    elif not watch:
        print_line(item.job.name)
    else:
        say(f"submitted {item.job.name}")
    if not watch:
        return Exit.OK
    from cognateforge.cli.follow import follow

    jobs = JobService(service, session)
    return follow(session, jobs.watch(item.job.name, 0), item.job, progress=progress, verdict=jobs.verdict)


def _show_dry_run(session: Session, service: Service, answer: Any) -> None:
    report = getattr(answer, "data_report", None)
    if session.as_json or report is None or not answer.HasField("data_report"):
        session.show(answer, service=service.value)
        return
    shown = type(answer)()
    shown.CopyFrom(answer)
    shown.ClearField("data_report")
    session.show(shown, service=service.value)
    for line in rows.report_lines(report):
        print_line(line)


def _cost(cost: Cost) -> str:
    return f"{cost.amount:.2f} {cost.currency}" + (f" on {cost.offer}" if cost.offer else "")


def needs(estimate: Estimate) -> str:
    """Return an estimate in a line, for people."""
    told = [f"{estimate.memory_bytes / 1e9:.1f} GB of memory"] if estimate.memory_bytes else []
    if estimate.HasField("run_time"):
        told.append(f"{estimate.run_time.ToSeconds()} s of training, by {estimate.measured_attempts} measured attempts")
    if estimate.HasField("cost"):
        told.append(_cost(estimate.cost))
    if estimate.HasField("spot_cost"):
        told.append(f"{_cost(estimate.spot_cost)} at spot prices")
    return f"expected: {', '.join(told) or 'nothing is known'}"


def _pretrain(app: typer.Typer) -> None:
    @command(app)
    def pretrain(
        session: Session,
        steps: Steps,
        seed: Seed = 0,
        batch_size: Annotated[int, typer.Option(help="Sequences in a step. 0: the server's choice.")] = 0,
        sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence. 0: the server's choice.")] = 0,
        lr: Annotated[float, typer.Option("--lr", help="Highest learning rate. 0: the server's choice.")] = 0.0,
        warmup_steps: Annotated[int, typer.Option(help="Steps of warm-up. 0: a tenth of all.")] = 0,
        checkpoint_interval: CheckpointInterval = 0,
        keep_last: KeepLast = 0,
        keep_best: KeepBest = 0,
        keep_every: KeepEvery = 0,
        processes: Processes = 0,
        nodes: Nodes = 0,
        sharded: Sharded = False,
        progress_interval: Annotated[int, typer.Option(help="Steps between progress events. 0: 1.")] = 0,
        dataset: Annotated[
            list[str] | None, typer.Option(help="SET or SET:WEIGHT. May be repeated. Default: both sets.")
        ] = None,
        curriculum: Annotated[
            bool, typer.Option("--curriculum", help="Begin with the easiest documents and admit the others gradually.")
        ] = False,
        curriculum_steps: Annotated[
            int, typer.Option(help="With --curriculum: steps until all are admitted. 0: half of all.")
        ] = 0,
        initial_competence: Annotated[
            float, typer.Option(help="With --curriculum: share of documents to begin with. 0: 0.1.")
        ] = 0.0,
        reservation: Annotated[
            str, typer.Option(help="Run in this reservation of slots: its name, or its UUID alone.")
        ] = "",
        priority: Priority = 0,
        start_by: StartBy = "",
        finish_by: FinishBy = "",
        validate_only: ValidateOnly = False,
        watch: Watch = False,
        progress: Progress = None,
        request_id: RequestId = None,
    ) -> Exit:
        """Pretrain a Cognate-25M foundation model. GrokFast is always on and has no settings.

        Sets: gsm8k, hotpotqa, forge-arithmetic, forge-twohop.
        """
        from cognateforge.cognate.v1 import pretraining_pb2

        plan = pretraining_pb2.PretrainingPlan(
            total_steps=steps,
            seed=seed,
            batch_size=batch_size,
            sequence_length=sequence_length,
            peak_learning_rate=lr,
            warmup_steps=warmup_steps,
            checkpoint_interval_steps=checkpoint_interval,
            checkpoint_policy=_policy(keep_last, keep_best, keep_every),
            compute=_compute(processes, nodes, sharded),
            progress_interval_steps=progress_interval,
        )
        for share in dataset or []:
            number, weight = _share(share)
            plan.datasets.add(dataset=number, weight=weight)
        if curriculum:
            plan.curriculum.CopyFrom(
                pretraining_pb2.Curriculum(steps=curriculum_steps, initial_competence=initial_competence)
            )
        elif curriculum_steps or initial_competence:
            raise typer.BadParameter("needs --curriculum", param_hint="--curriculum-steps, --initial-competence")
        request = pretraining_pb2.StartPretrainingRequest(
            request_id=new_request_id(request_id),
            plan=plan,
            scheduling=_scheduling(priority, start_by, finish_by),
            validate_only=validate_only,
            reservation=full_reservation_name(reservation, "--reservation") if reservation else "",
        )
        answer = session.cognate_client.pretraining.StartPretraining(request)
        return _submitted(session, Service.COGNATE, answer, watch, progress)


def _share(text: str) -> tuple[Any, float]:
    from cognateforge.cognate.v1 import pretraining_pb2

    name, _, weight = text.partition(":")
    try:
        number = pretraining_pb2.Dataset.Value(f"DATASET_{Dataset(name).name}")
        return number, float(weight or 1.0)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not SET or SET:WEIGHT with a set of {', '.join(Dataset)}", param_hint="--dataset"
        ) from None


def _train(app: typer.Typer) -> None:
    @command(app)
    def train(
        session: Session,
        agent: Annotated[str, typer.Option(help="Family of the agent that is made.", callback=check_artifact_name)],
        foundation: bases.Foundation = "",
        model_folder: bases.ModelFolder = "",
        scratch: bases.Scratch = False,
        continues: bases.Continue = "",
        steps: Annotated[int, typer.Option(help="Optimizer steps. Of agents that act, rollouts say how many.")] = 0,
        data: rows.Data = "",
        architecture: Annotated[str, typer.Option(help="See forge architectures. Default: by base and task.")] = "",
        setting: bases.Settings = None,
        task: Annotated[Task, typer.Option(help="What it is to learn.")] = Task.CLASSIFICATION,
        adaptation: Annotated[
            AdaptationKind | None,
            typer.Option(help="How much is trained. Default: lora, or full from random values and of recurrent."),
        ] = None,
        lora_rank: Annotated[int, typer.Option(help="0: 8.")] = 0,
        lora_alpha: Annotated[float, typer.Option(help="0: twice the rank.")] = 0.0,
        lora_dropout: Annotated[float, typer.Option(help="0 to 0.9.")] = 0.0,
        weight_decomposed: Annotated[
            bool, typer.Option("--weight-decomposed", help="For lora: learn magnitudes beside directions (DoRA).")
        ] = False,
        trained_blocks: Annotated[int, typer.Option(help="For freezing: blocks, from the last. 0: 1.")] = 0,
        bottleneck_width: Annotated[int, typer.Option(help="For bottleneck. 0: 32.")] = 0,
        unfreeze_act_ltm: Annotated[
            bool, typer.Option("--unfreeze-act-ltm", help="Train halting unit and memory too.")
        ] = False,
        optimizer: Annotated[Optimizer, typer.Option(help="Which one.")] = Optimizer.ADAMW,
        weight_decay: Annotated[float, typer.Option(help="For adamw. 0: 0.01.")] = 0.0,
        momentum: Annotated[float, typer.Option(help="For sgd.")] = 0.0,
        lr: Annotated[float, typer.Option("--lr", help="Highest learning rate. 0: 0.001.")] = 0.0,
        schedule: Annotated[ScheduleKind, typer.Option(help="Of the learning rate.")] = ScheduleKind.COSINE,
        warmup_steps: Annotated[int, typer.Option(help="0: a tenth of all.")] = 0,
        clip_norm: Annotated[float, typer.Option(help="Gradients are scaled down to it. 0: 1.")] = 0.0,
        accumulation_steps: Annotated[int, typer.Option(help="Parts that a step's rows are taken in. 0: 1.")] = 0,
        precision: Annotated[PrecisionKind, typer.Option(help="Of forward passes.")] = PrecisionKind.FLOAT32,
        early_stopping: Annotated[
            bool, typer.Option("--early-stopping", help="End when it gets no better, and keep what was best.")
        ] = False,
        patience: Annotated[
            int, typer.Option(help="With --early-stopping: so many validations without a better one. 0: 3.")
        ] = 0,
        min_improvement: Annotated[
            float, typer.Option(help="With --early-stopping: by what it is better. 0: any.")
        ] = 0.0,
        validation_interval: Annotated[int, typer.Option(help="Steps between validations. 0: a quarter of all.")] = 0,
        max_tokens: Annotated[int, typer.Option(help="Longer texts are cut off. 0: 128.")] = 0,
        batch_size: Annotated[int, typer.Option(help="Rows in a step. 0: 32.")] = 0,
        seed: Seed = 0,
        data_seed: Annotated[int, typer.Option(help="Seed of generated data.")] = 0,
        checkpoint_interval: CheckpointInterval = 0,
        keep_last: KeepLast = 0,
        keep_best: KeepBest = 0,
        keep_every: KeepEvery = 0,
        processes: Processes = 0,
        nodes: Nodes = 0,
        sharded: Sharded = False,
        include_out_of_scope: Annotated[
            bool, typer.Option("--include-out-of-scope", help="Keep rows of no label, as a label.")
        ] = False,
        max_rows_per_label: Annotated[int, typer.Option(help="0: all.")] = 0,
        domain: Annotated[list[str] | None, typer.Option(help="Only rows of this domain. May be repeated.")] = None,
        successes_only: Annotated[
            bool, typer.Option("--successes-only", help="Leave out trajectories without success.")
        ] = False,
        weight_by_reward: rows.WeightByReward = False,
        beta: rows.Beta = 0.0,
        max_refused_share: rows.MaxRefusedShare = None,
        rehearse: rows.Rehearse = "",
        rehearsal_share: rows.RehearsalShare = 0.0,
        accept_experimental: Annotated[
            bool, typer.Option("--accept-experimental", help="Take an EXPERIMENTAL model too.")
        ] = False,
        environment: options.Environment = "",
        agents: options.Agents = 0,
        coordination: options.Coordination = None,
        rollout_steps: options.RolloutSteps = 0,
        environments: options.Environments = 0,
        epochs: options.Epochs = 0,
        minibatches: options.Minibatches = 0,
        discount: options.Discount = 0.0,
        advantage_decay: options.AdvantageDecay = 0.0,
        clip_range: options.ClipRange = 0.0,
        entropy_weight: options.EntropyWeight = 0.0,
        environment_steps: options.EnvironmentSteps = 0,
        evaluation_episodes: options.EvaluationEpisodes = 0,
        priority: Priority = 0,
        start_by: StartBy = "",
        finish_by: FinishBy = "",
        validate_only: ValidateOnly = False,
        watch: Watch = False,
        progress: Progress = None,
        request_id: RequestId = None,
    ) -> Exit:
        """Train an agent on a base, or a policy in an environment, with a standard optimizer."""
        from cognateforge.agent.v1 import training_pb2 as pb

        _require_options(task, data=data, steps=steps)
        _refuse_unheeded(
            ("--weight-decay", weight_decay, optimizer is Optimizer.ADAMW, "--optimizer adamw"),
            ("--momentum", momentum, optimizer is Optimizer.SGD, "--optimizer sgd"),
            ("--warmup-steps", warmup_steps, schedule is not ScheduleKind.ONE_CYCLE, "other schedules than one-cycle"),
            ("--data-seed", data_seed, data == "generated", "--data generated"),
            ("--accept-experimental", accept_experimental, bool(foundation), "--foundation"),
            ("--include-out-of-scope", include_out_of_scope, task is Task.CLASSIFICATION, "--task classification"),
            ("--max-rows-per-label", max_rows_per_label, task is Task.CLASSIFICATION, "--task classification"),
            ("--domain", domain, task is Task.CLASSIFICATION, "--task classification"),
            ("--successes-only", successes_only, task is Task.BEHAVIOURAL, "--task behavioural"),
            ("--weight-by-reward", weight_by_reward, task is Task.BEHAVIOURAL, "--task behavioural"),
            ("--beta", beta, task is Task.PREFERENCE, "--task preference"),
            ("--rehearse", rehearse, not task.acts, "tasks with rows"),
            ("--rehearsal-share", rehearsal_share, not task.acts, "tasks with rows"),
            ("--max-refused-share", max_refused_share is not None, not task.acts, "tasks with rows"),
        )
        plan = pb.TrainingPlan(
            agent=agent,
            architecture=architecture,
            adaptation=pb.Adaptation(unfreeze_act_ltm=unfreeze_act_ltm),
            optimization=pb.Optimization(
                peak_learning_rate=lr,
                schedule=pb.Schedule.Value(f"SCHEDULE_{schedule.name}"),
                warmup_steps=warmup_steps,
                gradient_clip_norm=clip_norm,
                accumulation_steps=accumulation_steps,
                precision=pb.Precision.Value(f"PRECISION_{precision.name}"),
            ),
            total_steps=steps or max(1, warmup_steps),  # of agents that act, the server counts
            batch_size=batch_size,
            seed=seed,
            checkpoint_interval_steps=checkpoint_interval,
            validation_interval_steps=validation_interval,
            max_tokens=max_tokens,
            checkpoint_policy=_policy(keep_last, keep_best, keep_every),
            compute=_compute(processes, nodes, sharded),
        )
        base = bases.Base(foundation=foundation, model_folder=model_folder, scratch=scratch, agent=continues)
        bases.set_base(plan, base, task=task.value, acts=task.acts, accept_experimental=accept_experimental)
        bases.set_settings(plan, setting)
        lora = pb.LoraAdaptation(
            rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, weight_decomposed=weight_decomposed
        )
        from_scratch = plan.WhichOneof("base") == "scratch"
        # Recurrent layers have no maps for low-rank updates.
        trains_all = from_scratch or plan.architecture == "recurrent"
        adaptation = adaptation or (AdaptationKind.FULL if trains_all else AdaptationKind.LORA)
        _set_adaptation(plan.adaptation, adaptation, lora, trained_blocks, bottleneck_width)
        if early_stopping:
            plan.optimization.early_stopping.patience = patience
            plan.optimization.early_stopping.min_improvement = min_improvement
            plan.optimization.early_stopping.SetInParent()
        elif patience or min_improvement:
            raise typer.BadParameter("needs --early-stopping", param_hint="--patience, --min-improvement")
        match optimizer:
            case Optimizer.ADAMW:
                plan.optimization.adamw.CopyFrom(pb.AdamW(weight_decay=weight_decay))
            case Optimizer.ADAM:
                plan.optimization.adam.SetInParent()
            case Optimizer.SGD:
                plan.optimization.sgd.CopyFrom(pb.Sgd(momentum=momentum))
        acting = Acting(
            environment=environment,
            agents=agents,
            coordination=coordination,
            rollout_steps=rollout_steps,
            environments=environments,
            epochs=epochs,
            minibatches=minibatches,
            discount=discount,
            advantage_decay=advantage_decay,
            clip_range=clip_range,
            entropy_weight=entropy_weight,
            environment_steps=environment_steps,
            evaluation_episodes=evaluation_episodes,
        )
        if task.acts:
            set_acting(plan, acting, together=task is Task.MULTI_AGENT)
        else:
            refuse_acting(acting, task)
            rows.set_rows(
                plan,
                task.field,
                data,
                data_seed=data_seed,
                max_refused_share=max_refused_share,
                rehearse=rehearse,
                rehearsal_share=rehearsal_share,
            )
        if task is Task.CLASSIFICATION:
            plan.classification.include_out_of_scope = include_out_of_scope
            plan.classification.max_rows_per_label = max_rows_per_label
            plan.classification.domains.extend(domain or [])
        elif task is Task.BEHAVIOURAL:
            plan.behavioural.successes_only = successes_only
            plan.behavioural.weight_by_reward = weight_by_reward
        elif task is Task.PREFERENCE:
            plan.preference.beta = beta
        request = pb.StartTrainingRequest(
            request_id=new_request_id(request_id),
            plan=plan,
            scheduling=_scheduling(priority, start_by, finish_by),
            validate_only=validate_only,
        )
        answer = session.agent_client.training.StartTraining(request)
        return _submitted(session, Service.AGENT, answer, watch, progress)


def _require_options(task: Task, *, data: str, steps: int) -> None:
    """Refuse a command that lacks what its task needs, or has what it would not heed."""
    for option, given in (("--data", data), ("--steps", steps)):
        if task.acts and given:
            raise typer.BadParameter(f"is not for {task}, which is learnt in an environment", param_hint=option)
    for option, given in (("--data", data), ("--steps", steps)):
        if not task.acts and not given:
            raise typer.BadParameter(f"is needed for {task}", param_hint=option)


def _refuse_unheeded(*options: tuple[str, object, bool, str]) -> None:
    """Refuse what would not be heeded: the option, what was given, whether it is heeded, and what it is for."""
    for option, given, heeded, owner in options:
        if given and not heeded:
            raise typer.BadParameter(f"is for {owner}", param_hint=option)


def _set_adaptation(
    adaptation: training_pb2.Adaptation,
    kind: AdaptationKind,
    lora: training_pb2.LoraAdaptation,
    trained_blocks: int,
    bottleneck_width: int,
) -> None:
    """Set the method; an option of another one is refused, so that nobody takes it for heeded."""
    for option, given, owner in (
        ("--lora-rank", lora.rank, AdaptationKind.LORA),
        ("--lora-alpha", lora.alpha, AdaptationKind.LORA),
        ("--lora-dropout", lora.dropout, AdaptationKind.LORA),
        ("--weight-decomposed", lora.weight_decomposed, AdaptationKind.LORA),
        ("--trained-blocks", trained_blocks, AdaptationKind.FREEZING),
        ("--bottleneck-width", bottleneck_width, AdaptationKind.BOTTLENECK),
    ):
        if given and kind is not owner:
            raise typer.BadParameter(f"is for --adaptation {owner}, not {kind}", param_hint=option)
    getattr(adaptation, kind.value).SetInParent()
    match kind:
        case AdaptationKind.LORA:
            adaptation.lora.CopyFrom(lora)
        case AdaptationKind.FREEZING:
            adaptation.freezing.trained_blocks = trained_blocks
        case AdaptationKind.BOTTLENECK:
            adaptation.bottleneck.width = bottleneck_width


def _policy(last: int, best: int, every: int) -> CheckpointPolicy | None:
    from cognateforge.job.v1 import job_pb2

    if not (last or best or every):
        return None
    return job_pb2.CheckpointPolicy(keep_last=last, keep_best=best, keep_every_steps=every)


def _compute(processes: int, nodes: int, sharded: bool) -> Compute | None:
    from cognateforge.job.v1 import job_pb2

    if not (processes or nodes or sharded):
        return None
    strategy = job_pb2.COMPUTE_STRATEGY_FSDP2 if sharded else job_pb2.COMPUTE_STRATEGY_DDP
    return job_pb2.Compute(processes=processes, nodes=nodes, strategy=strategy)
