"""The processes that train one model together: what they add up, split, and hear from the first of them.

The first process reads the data, reports, saves and publishes; the others compute. Whatever a decision rests on is
either added up over all of them or said by the first, so all of them decide alike. A process alone is a team of one,
for which every method here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cognateforge.job.v1 import job_pb2
from training_common.attempt import TeamBrokenError
from training_common.parted import as_parted

# How long the others wait for the first one, which may prepare data, measure or save meanwhile. One that is gone is
# noticed by its closed connections at once, so this only bounds a silent network. The first one waits for no other so:
# what it says is taken from it at once.
_PATIENCE = timedelta(days=1)
T = TypeVar("T")


class Strategy(enum.StrEnum):
    """What each process holds of the model and the optimizer's state: all of it, or a part."""

    DDP = "ddp"
    FSDP2 = "fsdp2"


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process among those of its job.

    patient: the group in which the others wait for the first one.
    """

    rank: int = 0
    size: int = 1
    strategy: Strategy = Strategy.DDP
    patient: dist.ProcessGroup | None = None

    @staticmethod
    def join(*, timeout_s: float) -> Team:
        """Meet the others, as a launcher's environment says.

        timeout_s: how long an exchange may take before its partner counts as lost.
        Errors: TeamBrokenError.
        """
        with exchanging():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
            patient = dist.new_group(timeout=_PATIENCE if dist.get_rank() else timedelta(seconds=timeout_s))
        return Team(rank=dist.get_rank(), size=dist.get_world_size(), patient=patient)

    def using(self, strategy: Strategy) -> Team:
        """Return the same team, that trains in another way."""
        return dataclasses.replace(self, strategy=strategy)

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads, reports, saves and publishes."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each process holds only a part of the model."""
        return self.size > 1 and self.strategy is Strategy.FSDP2

    def rows(self, count: int) -> slice:
        """Return this process's share of so many rows. Shares differ by one row at most; one may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def mine(self, rows: Tensor) -> Tensor:
        """Return this process's share of rows."""
        return rows[self.rows(len(rows))]

    def total(self, part: Tensor) -> Tensor:
        """Add up every process's part. Its gradient is that of this process's own part: gradients are added up later.

        Errors: TeamBrokenError.
        """
        if self.size == 1:
            return part
        whole: Tensor = _Total.apply(part)  # type: ignore[no-untyped-call]
        return whole

    def gather(self, part: Tensor) -> Tensor:
        """Return all the rows of which each process holds its share, on every process. Errors: TeamBrokenError."""
        if self.size == 1:
            return part
        count = int(self.total(torch.tensor(len(part))))
        # Shares may differ by a row, and what is exchanged must not.
        most = -(-count // self.size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with exchanging():
            dist.all_gather(parts, padded)
        lengths = [len(range(count)[dataclasses.replace(self, rank=rank).rows(count)]) for rank in range(self.size)]
        return torch.cat([one[:length] for one, length in zip(parts, lengths, strict=True)])

    def agree(self, say: Callable[[], T]) -> T:
        """Let the first process say something that JSON can carry, and return it on all. Tuples may come as lists.

        Errors: what it raises; TeamBrokenError.
        """
        if self.size == 1:
            return say()
        said = json.dumps(say()).encode() if self.leads else b""
        heard: T = json.loads(self._hear(said))
        return heard

    def deal(self, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Let the first process make tensors, and return them on all. Errors: its own; TeamBrokenError."""
        if self.size == 1:
            return make()
        said = safetensors.torch.save({name: t.contiguous() for name, t in make().items()}) if self.leads else b""
        return safetensors.torch.load(self._hear(said))

    def _hear(self, said: bytes) -> bytes:
        length = torch.tensor([len(said)])
        with exchanging():
            dist.broadcast(length, 0, group=self.patient)
            data = torch.empty(int(length), dtype=torch.uint8)
            if self.leads:
                data.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
            dist.broadcast(data, 0, group=self.patient)
        return data.numpy().tobytes()

    def parallel(self, module: nn.Module, *, blocks: Iterable[nn.Module] = ()) -> nn.Module:
        """Return what to call instead of the module, so that its gradients are the sums over all processes.

        Each process's forward must give its own part of what is minimized, so that the parts add up to the whole.
        Under FSDP2 its parameters become this process's parts of them.

        blocks: parts of the module that each forward pass runs once; they are gathered one at a time under FSDP2.
        """
        if self.size == 1:
            return module
        if not self.shards:
            # With find_unused_parameters buckets stay as they are, so a resumed run reduces as the uninterrupted one,
            # bit for bit. Buffers are the same everywhere by themselves.
            wrapped = DistributedDataParallel(
                module, gradient_as_bucket_view=True, forward_sync_buffers=False, find_unused_parameters=True
            )
            wrapped.register_comm_hook(None, _add_up)
            return wrapped
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # A parameter without a dimension cannot be parted.
        scalars = {p for p in module.parameters() if p.ndim == 0}
        for part in (*blocks, module):
            if any(p.requires_grad for p in part.parameters()):
                fully_shard(part, ignored_params=scalars)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        return module

    def unexchanged(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Let passes through what `parallel` returned add to gradients without exchanging them, but for the last one's.

        Parted gradients are exchanged all the same, so that no process has to hold whole ones.
        """
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def add_up_the_rest(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients that no wrapper does: those of parameters that could not be parted, under FSDP2."""
        if not self.shards:
            return
        for parameter in parameters:
            if as_parted(parameter) is None and parameter.grad is not None:
                with exchanging():
                    dist.all_reduce(parameter.grad)

    @torch.no_grad()
    def clip(self, parameters: Sequence[Tensor], most: float) -> float:
        """Scale gradients down to a norm of `most` and return the norm that they had. Errors: TeamBrokenError."""
        if not self.shards:
            return float(nn.utils.clip_grad_norm_(parameters, most))
        squares = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            squares[as_parted(gradient) is not None] += local(gradient).double().square().sum()
        norm = float((self.total(squares[True]) + squares[False]).sqrt())
        for gradient in gradients:
            gradient.mul_(min(1.0, most / (norm + 1e-6)))
        return norm


ALONE = Team()


def team_for(compute: job_pb2.Compute, launched: Team | None) -> Team:
    """Return the team that trains as a plan asks. launched: the worker's processes, None of one alone."""
    strategy = Strategy.FSDP2 if compute.strategy == job_pb2.COMPUTE_STRATEGY_FSDP2 else Strategy.DDP
    return ALONE if launched is None else launched.using(strategy)


class exchanging:  # noqa: N801 - reads as a statement
    """Turn what torch raises when a partner is gone into TeamBrokenError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError) and is_exchange_error(error):
            raise TeamBrokenError(f"an exchange with the other processes failed: {error}"[:500]) from error


def is_exchange_error(error: BaseException) -> bool:
    """Whether torch says by this that an exchange failed. Its backends have no class of their own for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        with exchanging():
            dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


# DDP refuses annotations that are text, as all of this file's are.
def _add_up(_state, bucket):  # type: ignore[no-untyped-def]
    """Add gradients up, where DDP's own hook takes their mean."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def whole(tree: Any, *, keep: bool = True) -> Any:
    """Return nested dicts, lists and tuples with every parted tensor gathered. Every process has to call it.

    keep: a process that does not need them lets go of each at once, and has None in its place.
    """
    parted = as_parted(tree)
    if parted is not None:
        with exchanging():
            gathered = parted.full_tensor()
        return gathered if keep else None
    if isinstance(tree, dict):
        return {key: whole(item, keep=keep) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(item, keep=keep) for item in tree)
    return tree


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    parted = as_parted(tensor)
    return tensor if parted is None else parted.to_local()


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, parted as another one is."""
    parted = as_parted(like)
    if parted is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parted.device_mesh, parted.placements, src_data_rank=None)


@torch.no_grad()
def load_parts(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, as far as this process holds them."""
    for name, tensor in tensors.items():
        tensor.copy_(part_of(stored[name], tensor))


def parts_of_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimizer's whole `state_dict` with what belongs to a parted parameter parted alike.

    parameters: the optimizer's, in its order.
    """
    parted = {
        index: {
            name: part_of(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": parted}
