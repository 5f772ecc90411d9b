"""In which precision a run's matrix products are computed."""

from __future__ import annotations

import enum

import torch

# Instructions that multiply bfloat16 and add in float32. With AVX512-BF16 a training step takes 0.62 of its time in
# float32 (docs/log.md). Without them bfloat16 is emulated, and slower.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


class Precision(enum.StrEnum):
    """The type of matrix products. Weights, optimizer state, losses and all that is stored are float32 in both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the same name."""
        return torch.bfloat16 if self is Precision.BFLOAT16 else torch.float32


def native_precision() -> Precision:
    """Return bfloat16 where the processor multiplies it in hardware, else float32."""
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
    return Precision.BFLOAT16 if fast else Precision.FLOAT32
