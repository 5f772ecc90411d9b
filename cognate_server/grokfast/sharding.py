"""What differs when a parameter is a DTensor: its own part is updated, sums are of the whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def layout(tensor: Tensor) -> object:
    """Return a key: sums over tensors of one layout may be added before they are reduced."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else tensor.device


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return the local part as the same piece of the whole as it is in the other tensor."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def summed(numbers: list[float], one: Tensor) -> list[float]:
    """Add up, over the processes that hold other parts of such a tensor, what each has summed over its own.

    Every process of the mesh has to call it, and every one gets the same.
    """
    if not isinstance(one, DTensor):
        return numbers
    kinds = [Partial() if placement.is_shard() else Replicate() for placement in one.placements]
    mine = torch.tensor(numbers, dtype=torch.float64, device=one.to_local().device)
    total = DTensor.from_local(mine, one.device_mesh, kinds, run_check=False).full_tensor()
    return [float(number) for number in total]
