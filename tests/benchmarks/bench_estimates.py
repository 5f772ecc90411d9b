"""Memory that workers were estimated to need, against what they came to need.

Cognate: a real service and its workers, in float32, up to a step behind the second checkpoint; the estimate is the one
in the answer to StartPretraining. Agents: the trainer over a Cognate-25M with random values, in a process with the
modules and the environment of a worker. The value is the measured peak over the estimate that is furthest from 1 of all
cases, and what must hold is that every one lies between 1/2 and 2. The yardstick is 1.
Usage: python tests/benchmarks/bench_estimates.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from agent_server import estimates
from agent_server.architectures.cognate import CognateArchitecture
from agent_server.plan import with_defaults
from agent_server.settings import AgentSettings
from cognateforge.agent.v1 import training_pb2 as pb_agent
from cognateforge.client import CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.job.v1 import job_pb2
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result
from training_common.engines.processes import WORKER_ENVIRONMENT

# Rows of a step, their tokens, rates of a control, processes, whether they part the model.
COGNATE = (
    (4, 128, 0, 1, False),
    (8, 256, 0, 1, False),
    (4, 128, 1, 1, False),
    (4, 128, 0, 2, False),
    (4, 128, 0, 2, True),
)
# Rows of a step, and what is trained how.
AGENTS = (
    (32, "lora"),
    (32, "full"),
    (128, "lora"),
    (128, "dora"),
    (128, "bottleneck"),
    (128, "freezing"),
    (128, "head"),
    (128, "lora in 4 parts"),
    (128, "lora in bfloat16"),
    (32, "full, early stopping"),
)
PARTS = pb_agent.Optimization(accumulation_steps=4)
NARROW = pb_agent.Optimization(precision=pb_agent.PRECISION_BFLOAT16)
ENDING = pb_agent.Optimization(early_stopping=pb_agent.EarlyStopping())
LORA = pb_agent.Adaptation(lora=pb_agent.LoraAdaptation())
FULL = pb_agent.Adaptation(full=pb_agent.FullAdaptation())
DORA = pb_agent.Adaptation(lora=pb_agent.LoraAdaptation(weight_decomposed=True))
WAYS = {
    "lora": pb_agent.TrainingPlan(adaptation=LORA),
    "full": pb_agent.TrainingPlan(adaptation=FULL),
    "dora": pb_agent.TrainingPlan(adaptation=DORA),
    "bottleneck": pb_agent.TrainingPlan(adaptation=pb_agent.Adaptation(bottleneck=pb_agent.BottleneckAdaptation())),
    "freezing": pb_agent.TrainingPlan(adaptation=pb_agent.Adaptation(freezing=pb_agent.FreezingAdaptation())),
    "head": pb_agent.TrainingPlan(adaptation=pb_agent.Adaptation(head=pb_agent.HeadAdaptation())),
    "lora in 4 parts": pb_agent.TrainingPlan(adaptation=LORA, optimization=PARTS),
    "lora in bfloat16": pb_agent.TrainingPlan(adaptation=LORA, optimization=NARROW),
    "full, early stopping": pb_agent.TrainingPlan(adaptation=FULL, optimization=ENDING),
}
STEPS, CHECKPOINT_STEPS = 9, 4
FACTOR = 2.0
TIMEOUT_S = 600.0
POLL_S = 0.2
_KIB = 1024


def workers_of(job: str) -> list[psutil.Process]:
    """Return the processes that work for a job."""
    return [process for process in psutil.process_iter(["cmdline"]) if job in (process.info["cmdline"] or [])]


def peak_bytes(process: psutil.Process) -> int:
    """Return the most memory that a process has occupied; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM:")), 0)


def cognate_case(
    client: CognateClient, rows: int, tokens: int, controls: int, processes: int, sharded: bool
) -> tuple[int, int]:
    """Return the measured bytes of the process that needs most, and the estimated ones, of one plan."""
    plan = pb.PretrainingPlan(
        total_steps=1000, batch_size=rows, sequence_length=tokens, checkpoint_interval_steps=CHECKPOINT_STEPS
    )
    plan.datasets.add(dataset=pb.DATASET_FORGE_ARITHMETIC, weight=1)
    plan.compute.processes = processes
    if sharded:
        plan.compute.strategy = job_pb2.COMPUTE_STRATEGY_FSDP2
    if controls:
        plan.acceleration_control.learning_rate_factors.extend(range(1, controls + 1))
    answer = client.pretraining.StartPretraining(
        pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan), timeout=TIMEOUT_S
    )
    name, measured, end_s = answer.job.job.name, 0, time.monotonic() + TIMEOUT_S
    while client.pretraining.GetJob(pb.GetJobRequest(name=name), timeout=TIMEOUT_S).job.job.step < STEPS:
        if time.monotonic() > end_s:
            raise RuntimeError(f"{name} did not come to step {STEPS} in {TIMEOUT_S:.0f} s")
        measured = max(measured, *(peak_bytes(worker) for worker in workers_of(name)), 0)
        time.sleep(POLL_S)
    client.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=name), timeout=TIMEOUT_S)
    for _ in client.watch_job(name):
        pass  # its worker lets go
    return measured, answer.estimate.memory_bytes


def agent_plan(rows: int, way: str) -> pb_agent.TrainingPlan:
    """Return a plan of an agent."""
    plan = pb_agent.TrainingPlan(
        agent="bench",
        architecture="cognate",
        classification=pb_agent.ClassificationTask(generated=pb_agent.GeneratedSource(seed=1)),
        optimization=pb_agent.Optimization(adamw=pb_agent.AdamW()),
        total_steps=STEPS,
        batch_size=rows,
        checkpoint_interval_steps=CHECKPOINT_STEPS,
    )
    plan.MergeFrom(WAYS[way])
    return with_defaults(plan)


def train_agent_here(folder: Path, rows: int, way: str) -> None:
    """Train in this process, and print its peak. For a process of its own."""
    import resource

    import torch

    from agent_server import worker  # noqa: F401 - its modules are part of what a worker needs
    from agent_server.data.examples import texts_of
    from agent_server.data.processor import AgentDataProcessor
    from agent_server.train_config import from_plan
    from agent_server.trainer import train_agent
    from tests.agent._support import MemoryAttempt, factory, write_foundation
    from training_common.models.cognate_v1 import CognateV1Config
    from training_common.settings import DataSettings

    torch.set_num_threads(1)
    plan = agent_plan(rows, way)
    data = AgentDataProcessor(DataSettings()).prepare(plan)
    foundation = write_foundation(folder / "foundation", list(texts_of(data.train)), config=CognateV1Config())
    train_agent(from_plan(plan), foundation, data, MemoryAttempt(folder), factory=factory())
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB))


def agent_case(folder: Path, rows: int, way: str) -> tuple[int, int]:
    """Return the measured and the estimated bytes of one plan."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, __file__, "agent", str(folder), str(rows), way],
        env={**os.environ, **WORKER_ENVIRONMENT},
        stdout=subprocess.PIPE,
        check=True,
        timeout=TIMEOUT_S,
    )
    settings = AgentSettings.model_validate({"workers": {"checkpoints": "sync"}})  # as the attempt of the test
    estimate = estimates.memory(agent_plan(rows, way), CognateArchitecture(), settings)
    return int(done.stdout.splitlines()[-1]), sum(estimate.values())


def main() -> None:
    """Measure and print. Errors: AssertionError, for an estimate that is wrong by more than the factor."""
    clean_up_on_sigterm()
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-estimates-") as name:
        settings = {"WORKERS__SLOTS": "2", "WORKERS__THREADS": "1", "PRETRAINING__PRECISION": "float32"}
        environment = {f"COGNATE_SERVER_{key}": value for key, value in settings.items()}
        with cognate_process(Path(name) / "cognate", None, **environment) as address, CognateClient(address) as client:
            for rows, tokens, controls, processes, sharded in COGNATE:
                case = f"cognate {rows}x{tokens}{' with a control' if controls else ''}"
                case += f", {'a part' if sharded else 'all'} in each of {processes}" if processes > 1 else ""
                found[case] = cognate_case(client, rows, tokens, controls, processes, sharded)
        for number, (rows, way) in enumerate(AGENTS):
            found[f"agent {rows} rows, {way}"] = agent_case(Path(name) / str(number), rows, way)
    ratios = {case: measured / estimate for case, (measured, estimate) in found.items()}
    worst = max(ratios.values(), key=lambda ratio: max(ratio, 1 / ratio))
    cases = {
        case: {"mib": n >> 20, "estimate_mib": m >> 20, "ratio": round(n / m, 3)} for case, (n, m) in found.items()
    }
    print_result("estimates", worst, 1.0, unit="measured/estimated", factor=FACTOR, cases=cases)
    if not 1 / FACTOR <= worst <= FACTOR:
        raise AssertionError(f"an estimate is wrong by more than a factor of {FACTOR:g}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["agent"]:
        train_agent_here(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
