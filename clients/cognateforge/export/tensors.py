"""Files of safetensors, read and written without a tensor library.

Form: 8 bytes with the header's length, the header as JSON, then each tensor's bytes, little-endian.
"""

from __future__ import annotations

import array
import json
import math
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.exceptions import ArtifactCorruptError

_LENGTH = struct.Struct("<Q")
# The library's own bound on a header.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Matrix:
    """A tensor of 32-bit floats: its shape, and its values in row-major order."""

    shape: tuple[int, ...]
    values: array.array[float]


class TensorFile:
    """A file whose header was read. Errors: ArtifactCorruptError, when it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = _LENGTH.unpack(file.read(8))
                if length > _MAX_HEADER_BYTES:
                    raise ValueError(f"its header claims {length} bytes")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries: dict[str, dict[str, Any]] = header
            self._start = 8 + length
            self._offsets = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ArtifactCorruptError(f"{path.name} is no file of safetensors: {error}") from error

    def read(self, name: str) -> Matrix:
        """Return a tensor of 32-bit floats. Errors: ArtifactCorruptError."""
        entry = self.entries.get(name)
        if entry is None or entry.get("dtype") != "F32":
            raise ArtifactCorruptError(f"{self.path.name} has no tensor {name} of 32-bit floats")
        first, last = self._offsets[name]
        shape = tuple(entry["shape"])
        with self.path.open("rb") as file:
            file.seek(self._start + first)
            values = array.array("f", file.read(last - first))
        if sys.byteorder == "big":
            values.byteswap()
        if len(values) != math.prod(shape):
            raise ArtifactCorruptError(f"{self.path.name}: {name} has {len(values)} values, its shape {shape}")
        return Matrix(shape, values)

    def copy(self, out: Path, *, rename: Callable[[str], str], more: Mapping[str, Matrix]) -> None:
        """Write its tensors under other names, and further ones behind them."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self.metadata}}
        header |= {rename(name): entry for name, entry in self.entries.items()}
        end = max((last for _, last in self._offsets.values()), default=0)
        for name, matrix in more.items():
            size_bytes = 4 * len(matrix.values)
            header[name] = {"dtype": "F32", "shape": list(matrix.shape), "data_offsets": [end, end + size_bytes]}
            end += size_bytes
        text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
        text += b" " * (-len(text) % 8)  # as the library does: what follows is aligned
        with out.open("wb") as target, self.path.open("rb") as source:
            target.write(_LENGTH.pack(len(text)) + text)
            source.seek(self._start)
            shutil.copyfileobj(source, target, 1 << 20)
            for matrix in more.values():
                values = array.array("f", matrix.values)
                if sys.byteorder == "big":
                    values.byteswap()
                target.write(values.tobytes())
