"""Parted tensors, which torch calls DTensor: told apart without importing what they need.

Their module takes most of a second to import, and a process that trains alone never has one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_parted(value: object) -> DTensor | None:
    """Return the value if it is a parted tensor. Without their module there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    kind: type[DTensor] | None = getattr(module, "DTensor", None)
    return value if kind is not None and isinstance(value, kind) else None
