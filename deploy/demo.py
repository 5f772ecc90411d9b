"""The whole product in one run: `make demo`.

Start both services, pretrain a real Cognate-25M from random weights, publish it, let the agent service fetch it across
the exchange, fine-tune an agent, and tell what came of it. Every number printed here came over the contract.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as agent_v1
from cognateforge.client import AgentClient, CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as cognate_v1
from cognateforge.exceptions import ForgeError
from cognateforge.exchange.v1 import model_pb2
from cognateforge.job.v1 import job_pb2
from deploy.services import Services

# The real intent set, where FORGE_DATA has it; generated intents otherwise.
CLINC150 = "agent/clinc150/data_full.jsonl"
# At these sizes the whole run takes about five minutes on two cores.
PRETRAINING_STEPS = 40
TRAINING_STEPS = 30


class Run:
    """One demonstration, and what it measured."""

    def __init__(self, console: Console, cognate: CognateClient, agents: AgentClient) -> None:
        self.console = console
        self.cognate = cognate
        self.agents = agents
        self.peak_memory_bytes = 0.0
        self.findings: list[tuple[str, bool]] = []

    def follow(
        self, title: str, frames: Iterator[job_pb2.WatchFrame], show: Callable[[dict[str, Any]], str]
    ) -> list[dict[str, Any]]:
        """Show a job's progress live and return the metrics of its steps. Errors: RuntimeError, when it fails."""
        history: list[dict[str, Any]] = []
        with Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        ) as progress:
            task = progress.add_task(title, total=None, status="waiting for a worker")
            for frame in frames:
                event = frame.event
                match event.WhichOneof("kind"):
                    case "note" if event.note.kind != "checkpoint_removed":
                        progress.console.print(f"  {event.note.message}", style="dim")
                    case "progress":
                        metrics = {m.name: list(m.bins) or m.value for m in event.progress.metrics}
                        history.append(metrics)
                        status = show(metrics) or progress.tasks[task].fields["status"]
                        progress.update(
                            task, completed=event.progress.step, total=event.progress.total_steps, status=status
                        )
                        if not self.console.is_terminal and event.progress.step % 5 == 0 and "loss" in metrics:
                            # A bar cannot move in a file: every fifth step takes a line.
                            self.console.print(f"  step {event.progress.step}/{event.progress.total_steps}  {status}")
                    case "state_change" if event.state_change.to == job_pb2.JOB_STATE_VALIDATING:
                        progress.update(task, status="validating and publishing")
                if frame.HasField("end") and frame.end.state != job_pb2.JOB_STATE_SUCCEEDED:
                    raise RuntimeError(f"{title} failed: {frame.end.failure.reason}: {frame.end.failure.message}")
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(m.get("peak_memory_bytes", 0.0) for m in history)])
        return history

    def pretrain(self, steps: int) -> model_pb2.FoundationModel:
        """Make a foundation model and tell how its loss and its halting went."""
        # A checkpoint is 400 MB: one in the middle, one at the end.
        plan = cognate_v1.PretrainingPlan(total_steps=steps, seed=1, checkpoint_interval_steps=(steps + 1) // 2)
        request = cognate_v1.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
        name = self.cognate.pretraining.StartPretraining(request).job.job.name
        history = self.follow("pretraining", self.cognate.watch_job(name), _pretraining_status)
        job = self.cognate.pretraining.GetJob(cognate_v1.GetJobRequest(name=name)).job.job
        losses = [metrics["loss"] for metrics in history if "loss" in metrics]
        first, last = statistics.mean(losses[:10]), statistics.mean(losses[-10:])
        self.console.print(f"  loss, mean of 10 steps: first {first:.3f}, last {last:.3f} nats/token")
        halting = [metrics["halting_histogram"] for metrics in history if "halting_histogram" in metrics][-10:]
        shares = [statistics.mean(column) for column in zip(*halting, strict=True)]
        spread = "  ".join(f"{number}: {share:.0%}" for number, share in enumerate(shares, start=1))
        self.console.print(f"  tokens by core steps taken, last 10 steps:  {spread}")
        self.findings += [
            ("the loss fell", last < first),
            ("tokens differ in the core steps they take", max(shares) < 1),
        ]
        return self.cognate.models.GetModel(model_pb2.GetModelRequest(name=job.artifact)).model

    def train(self, model: model_pb2.FoundationModel, steps: int) -> agent_v1.TrainingJob:
        """Make an agent of the model: LoRA, AdamW with a cosine schedule."""
        real = Path(os.environ.get("FORGE_DATA", "/nonexistent")) / CLINC150
        task = agent_v1.ClassificationTask()
        if real.is_file():
            task.file.path = CLINC150
        else:
            task.generated.seed = 0
        plan = agent_v1.TrainingPlan(
            agent="intent-router",
            architecture="cognate",
            foundation=agent_v1.FoundationBase(name=model.name, accept_experimental=True),
            classification=task,
            adaptation=agent_v1.Adaptation(lora=agent_v1.LoraAdaptation()),
            optimization=agent_v1.Optimization(adamw=agent_v1.AdamW(), schedule=agent_v1.SCHEDULE_COSINE),
            total_steps=steps,
            seed=1,
        )
        request = agent_v1.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
        name = self.agents.training.StartTraining(request).job.job.name
        self.follow("fine-tuning", self.agents.watch_job(name), _training_status)
        return self.agents.training.GetJob(agent_v1.GetJobRequest(name=name)).job


def _pretraining_status(metrics: dict[str, Any]) -> str:
    if "loss" not in metrics:
        return ""
    speed = f"  {metrics['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in metrics else ""
    return f"loss {metrics['loss']:.3f}  ponder {metrics['mean_ponder_steps']:.2f}{speed}"


def _training_status(metrics: dict[str, Any]) -> str:
    if "loss" not in metrics:
        return ""
    return f"loss {metrics['loss']:.3f}  accuracy {metrics['train_accuracy']:.0%}"


def _tell_model(console: Console, model: model_pb2.FoundationModel) -> None:
    state = model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_")
    sources = ", ".join(f"{source.name} ({source.kind})" for source in model.data)
    console.print(f"  published {model.name}: {state}, {model.architecture.parameter_count:,} parameters")
    console.print(f"  data: {sources}")
    for check in model.checks:
        mark = "ok " if check.passed else "not"
        console.print(f"    {mark} {check.name}: {check.value:.4g} (threshold {check.threshold:.4g})", style="dim")
    if state == "EXPERIMENTAL":
        console.print("  EXPERIMENTAL: a quality check does not hold yet, so agents take it only when told to")


def _tell_agent(console: Console, agent: agent_pb2.Agent) -> bool:
    results = {evaluation.metric: evaluation for evaluation in agent.evaluations}
    table = Table("metric", "set", "value", "rows", title=f"{agent.name}, made of {agent.foundation}")
    for evaluation in agent.evaluations:
        table.add_row(evaluation.metric, evaluation.dataset, f"{evaluation.value:.4f}", str(evaluation.rows))
    console.print(table)
    return results["accuracy_after"].value > results["majority_share"].value


def demonstrate(console: Console, folder: Path, options: argparse.Namespace) -> int:
    """Run the demonstration in a folder. Returns the exit status."""
    started = time.monotonic()
    services = Services(folder)
    data = os.environ.get("FORGE_DATA", "")
    console.rule("cognateforge: from random weights to a working agent")
    console.print(f"data: real rows below {data}" if data else "data: generated problems (FORGE_DATA names real rows)")
    try:
        first, second = services.start_both(cognate="127.0.0.1:0", agent="127.0.0.1:0")
        console.print(f"cognate service at {first.address}, agent service at {second.address}")
        with CognateClient(first.address) as cognate, AgentClient(second.address) as agents:
            run = Run(console, cognate, agents)
            model = run.pretrain(options.pretraining_steps)
            _tell_model(console, model)
            job = run.train(model, options.training_steps)
            agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=job.job.artifact)).agent
            better = _tell_agent(console, agent)
            fetched = agents.fetch_agent(agent.name, folder / "fetched" / agent.name)
        console.print(f"foundation digest, Cognate's side: {model.digest}")
        console.print(f"foundation digest, agent's side:   {agent.foundation_digest}")
        console.print(f"agent digest, published:           {agent.digest}")
        console.print(f"agent digest, fetched:             {fetched.digest}")
        console.print(f"agent files: {fetched.path}")
        console.print(f"services' state and logs: {folder}")
        seconds = time.monotonic() - started
        console.print(f"total time {seconds:.0f} s, peak memory of a worker {run.peak_memory_bytes / 2**20:.0f} MiB")
        run.findings += [
            (
                "the foundation that the agent names is the one that was published",
                model.digest == agent.foundation_digest,
            ),
            ("the agent that came back is the one that was published", agent.digest == fetched.digest),
            ("the agent is better than always choosing the most frequent label", better),
        ]
        for text, holds in run.findings:
            console.print(f"[green]ok [/green] {text}" if holds else f"[red]not[/red] {text}")
        return 0 if all(holds for _, holds in run.findings) else 1
    except (ForgeError, RuntimeError) as error:
        console.print(f"{error}\nlogs: {folder}", style="red", markup=False)
        return 1
    finally:
        services.stop()


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--training-steps", type=int, default=TRAINING_STEPS)
    parser.add_argument("--folder", type=Path, default=Path("var/demo"), help="emptied first")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    return demonstrate(Console(highlight=False, soft_wrap=True), options.folder.resolve(), options)


if __name__ == "__main__":
    sys.exit(main())
