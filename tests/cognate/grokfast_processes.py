"""What each of two processes does in test_grokfast_distributed, and the same training in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cognate_server.grokfast import GrokFastAdamW, StepReport

PROCESSES = 2
STEPS = 8
RESUMED_AT = 4


@dataclass(frozen=True)
class Ended:
    """Where a training ended."""

    parameters: list[Tensor]
    slow: list[Tensor]
    reports: list[StepReport]
    kept_gradients: bool = True


def make_model() -> nn.Sequential:
    """A model whose 5 rows do not divide by 2, and whose last bias leaves one process nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def make_optimizer(model: nn.Module) -> GrokFastAdamW:
    """Without a ramp to speak of, so that the filter counts."""
    return GrokFastAdamW(model.parameters(), lr=1e-2, ramp_steps=2)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Each rank has data of its own, and a gradient that is longer than the clip."""
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + rank))
    loss: Tensor = (model(inputs) - 3 * rank - 1).square().mean()
    return loss


def train_alone() -> Ended:
    """Take the mean of all ranks' losses in one process."""
    model = make_model()
    optimizer = make_optimizer(model)
    reports = []
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(model, step, rank) for rank in range(PROCESSES)]).mean().backward()  # type: ignore[no-untyped-call]
        reports.append(_measured_step(optimizer))
    return _ended(model, optimizer, reports)


def run(rank: int, folder: str) -> None:
    """Train under DDP and under fully_shard, and leave both ends in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    torch.save(_under_ddp(rank), Path(folder) / f"ddp-{rank}.pt")
    torch.save(_sharded(rank), Path(folder) / f"sharded-{rank}.pt")
    dist.destroy_process_group()


def _under_ddp(rank: int) -> Ended:
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model)
    reports, places = [], set()
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss_of(wrapped, step, rank).backward()  # type: ignore[no-untyped-call]
        reports.append(_measured_step(optimizer))
        if step > 0:  # buckets are built anew after the first step
            places.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.grad is not None))
    return _ended(model, optimizer, reports, kept_gradients=len(places) == 1)


def _sharded(rank: int) -> Ended:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    optimizer = make_optimizer(model)
    reports = []
    for step in range(STEPS):
        if step == RESUMED_AT:
            resumed = make_optimizer(model)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        reports.append(_measured_step(optimizer))
    return _ended(model, optimizer, reports)


def _measured_step(optimizer: GrokFastAdamW) -> StepReport:
    optimizer.measure_next_step()
    optimizer.step()
    assert optimizer.report is not None
    return optimizer.report


def _ended(
    model: nn.Module, optimizer: GrokFastAdamW, reports: list[StepReport], *, kept_gradients: bool = True
) -> Ended:
    return Ended(
        parameters=[_whole(p) for p in model.parameters()],
        slow=[_whole(optimizer.state[p]["slow_gradient"]) for p in model.parameters()],
        reports=reports,
        kept_gradients=kept_gradients,
    )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
