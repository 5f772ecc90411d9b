"""What differs when a parameter is a DTensor: its own part is updated, sums are of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from training_common.parted import as_parted


def layout(tensor: Tensor) -> object:
    """Return a key: sums over tensors of one layout may be added before they are reduced."""
    parted = as_parted(tensor)
    return tensor.device if parted is None else (parted.device_mesh, parted.placements)


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return the local part as the same piece of the whole as it is in the other tensor."""
    parted = as_parted(whole)
    if parted is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, parted.device_mesh, parted.placements, run_check=False, shape=parted.shape, stride=parted.stride()
    )


def summed(numbers: list[float], one: Tensor) -> list[float]:
    """Add up, over the processes that hold other parts of such a tensor, what each has summed over its own.

    Every process of the mesh has to call it, and every one gets the same.
    """
    parted = as_parted(one)
    if parted is None:
        return numbers
    from torch.distributed.tensor import DTensor, Partial, Replicate

    kinds = [Partial() if placement.is_shard() else Replicate() for placement in parted.placements]
    mine = torch.tensor(numbers, dtype=torch.float64, device=parted.to_local().device)
    total = DTensor.from_local(mine, parted.device_mesh, kinds, run_check=False).full_tensor()
    return [float(number) for number in total]
