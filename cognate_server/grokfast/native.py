"""The update as one pass over memory on a CPU, compiled by numba, which brings its own compiler.

An update has little to compute and much to fetch, so its time is that of the memory. Read and written once each are
p, h, m and v; the gradient is read twice, since the clip needs its norm first. All tensors are cut into pieces, and a
fixed number of runs of pieces is handed to as many threads as torch has; each element's result and the order of every
sum are those of the pieces, so neither depends on the number of threads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cognate_server.grokfast.update import Share

# Elements of a piece: its gradient and h stay in a second-level cache between the telemetry's loop and the update's.
PIECE = 16_384
# A thread takes so many pieces at a time: some tens of microseconds, so that a thread which is held up costs little.
RUN = 32
# Elements of a cache line and of a page.
LINE, PAGE = 16, 1_024
# Elements between the rows of h, m and v, over whole pages: state that starts at the same place in a page competes for
# the same lines of the caches. The pass took 1.33 x AdamW without, 1.16 with (one thread).
STAGGER = 272

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Kernels:
    squares: Callable[[Integers, Integers, int, int, Doubles], None]
    update: Callable[[Integers, Floats, Integers, int, int, bool, Doubles], None]


@functools.cache
def _kernels() -> _Kernels:
    """Compile, or load what an earlier process has compiled."""
    from cognate_server.grokfast import kernels

    return _Kernels(squares=kernels.squares, update=kernels.update)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads beside the calling one; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"grokfast-{process}")


def _in_runs(count: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` over all pieces, on as many threads as torch uses."""
    runs = iter(range(0, count, RUN))

    def take() -> None:
        for first in runs:
            work(first, min(count, first + RUN))

    helpers = min(torch.get_num_threads() - 1, count // RUN)
    others = [_pool(os.getpid(), helpers).submit(take) for _ in range(helpers)]
    take()
    for other in others:
        other.result()


@functools.lru_cache(maxsize=8)
def _pieces(sizes: tuple[int, ...]) -> Integers:
    """Cut tensors of these sizes: rows of tensor, first element, elements."""
    rows = [(t, first, min(PIECE, size - first)) for t, size in enumerate(sizes) for first in range(0, size, PIECE)]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor as the kernels read it, which is itself in the ordinary case."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


_STATE = (attrgetter("slow"), attrgetter("mean"), attrgetter("mean_square"))


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


class NativeUpdate:
    """Numba's kernels on the memory of torch's tensors."""

    name = "native"

    def squares(self, gradients: Sequence[Tensor]) -> float:
        """See Update."""
        plain = [_plain(gradient) for gradient in gradients]
        addresses = np.array([[0, gradient.data_ptr(), 0, 0, 0] for gradient in plain], dtype=np.int64).reshape(-1, 5)
        pieces = _pieces(tuple(gradient.numel() for gradient in plain))
        sums = np.zeros(len(pieces))
        kernel = _kernels().squares
        _in_runs(len(pieces), lambda first, last: kernel(addresses, pieces, first, last, sums))
        return float(sums.sum())

    def apply(self, shares: Sequence[Share], *, measure: bool) -> list[tuple[float, float]]:
        """See Update."""
        owners = [number for number, share in enumerate(shares) for _ in share.parameters]
        parameters = [parameter for share in shares for parameter in share.parameters]
        computed = [_plain(parameter) for parameter in parameters]
        gradients = [_plain(gradient) for share in shares for gradient in share.gradients]
        columns = [computed, gradients, *([t for share in shares for t in rows(share)] for rows in _STATE)]
        addresses = np.array([[tensor.data_ptr() for tensor in column] for column in columns], dtype=np.int64).T.copy()
        numbers = np.array([share.factors.numbers() for share in shares], dtype=np.float32)[owners]
        pieces = _pieces(tuple(parameter.numel() for parameter in parameters))
        sums = np.zeros((len(pieces), 2))
        kernel = _kernels().update
        _in_runs(len(pieces), lambda first, last: kernel(addresses, numbers, pieces, first, last, measure, sums))
        for parameter, result in zip(parameters, computed, strict=True):
            if result is not parameter:
                parameter.copy_(result)
        if not measure:
            return []
        share_of_piece = np.array(owners)[pieces[:, 0]]
        return [tuple(sums[share_of_piece == number].sum(axis=0).tolist()) for number in range(len(shares))]

    def states_like(self, parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """See Update."""
        # numpy advises huge pages for large arrays, torch does not.
        whole = [_rounded(parameter.numel(), LINE) for parameter in parameters]
        row = _rounded(sum(whole), PAGE) + STAGGER
        memory = torch.from_numpy(np.zeros(3 * row + LINE, dtype=np.float32))
        memory = memory[-memory.data_ptr() % (4 * LINE) // 4 :]
        starts = (np.cumsum(whole) - whole).tolist()
        h, m, v = (
            [memory[i * row + start :][: p.numel()].view(p.shape) for start, p in zip(starts, parameters, strict=True)]
            for i in range(3)
        )
        return list(zip(h, m, v, strict=True))
