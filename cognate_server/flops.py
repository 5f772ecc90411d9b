"""How much arithmetic a pretraining step executes, and how much this device can do in the same time.

Letters as in `cognate_v1`. Only matrix products count, two FLOPs for each multiplication and addition.
"""

from __future__ import annotations

import functools
import time

import torch

from training_common.models.cognate_v1 import CognateV1Config

# A forward pass and twice as much for the gradients of inputs and weights.
PASSES = 3
# Large enough for a matrix library's full rate, small enough for 20 ms on one core.
PEAK_SIZE = 1_024
PEAK_SIZE_ACCELERATOR = 8_192
PEAK_REPEATS = 3


def step_flops(config: CognateV1Config, *, rows: int, tokens: int, targets: int, core_steps: int) -> int:
    """Return the FLOPs of one step, forward and backward, that its tokens needed.

    A token that has halted counts nothing from then on; attention counts the keys up to the token itself. Work that an
    implementation does beyond this (masked keys, recomputation) earns nothing.

    rows, tokens: of the batch, padding included. targets: positions that the head is applied to.
    core_steps: ponder steps taken, summed over the tokens.
    """
    D, M, H, V = config.width, config.memory_slots, config.heads, config.vocabulary_size
    length = tokens // rows
    attention = 2 * D * (length + 1)  # scores and mixing over (T + 1) / 2 keys on average
    block = 2 * (4 * D * D + 3 * D * config.feed_forward_width) + attention
    chunks = -(-length // config.memory_chunk) * rows
    write = 4 * D * D + 2 * D  # key and value, gate
    keys_and_values = chunks * M * 4 * D * D
    read = 4 * D * D + 2 * D * H + 4 * D * M
    recall = 2 * D * D + 2 * D * M + 2 * D  # query, scores, gate
    outer = (config.prelude_blocks + config.coda_blocks) * block + write + recall
    core = config.core_blocks * block + read + 2 * D
    head = 2 * D * D + 2 * D * V
    return PASSES * (tokens * outer + keys_and_values + core_steps * core + targets * head)


@functools.cache
def peak_flops_per_s(device: str, dtype: torch.dtype) -> float:
    """Return the rate of one large matrix product here and now: the best of three, with the process's threads.

    Measured, never looked up: a core that others use, or a limit on its clock, lowers it as it lowers training.
    """
    size = PEAK_SIZE if device == "cpu" else PEAK_SIZE_ACCELERATOR
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state is left alone
    left, right = (torch.rand(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    torch.mm(left, right)
    best_s = min(_product_s(left, right) for _ in range(PEAK_REPEATS))
    return 2 * size**3 / best_s


def _product_s(left: torch.Tensor, right: torch.Tensor) -> float:
    start_s = time.perf_counter()
    # Reading one number back waits for the device.
    float(torch.mm(left, right)[0, 0])
    return time.perf_counter() - start_s
