"""Copies of training state in memory, so that it can be written while training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training_common.team import whole


class MemoryCopy:
    """Copies nested dicts, lists and tuples of tensors into memory that it keeps for the next copy.

    Only one copy is valid: the next one overwrites it. Kept memory took a sixth of the time of new one to fill, whose
    pages the kernel has yet to give (docs/log.md).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def take(self, tree: Any) -> Any:
        """Return `tree` with its tensors copied to this machine's memory. What is neither is taken as it is.

        Parted tensors are gathered, one at a time and in the order of `whole`, which the other processes have to call.
        """
        kept, self._kept = self._kept, {}
        with torch.no_grad():
            return self._copy(tree, (), kept)

    def _copy(self, value: Any, path: tuple[object, ...], kept: dict[tuple[object, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            value = whole(value)
            memory = kept.get(path)
            if memory is None or (memory.shape, memory.dtype) != (value.shape, value.dtype):
                memory = torch.empty(value.shape, dtype=value.dtype)
            self._kept[path] = memory.copy_(value)
            return memory
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key), kept) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*path, place), kept) for place, item in enumerate(value))
        return value
