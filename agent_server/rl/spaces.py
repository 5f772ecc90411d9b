"""The spaces of observations and actions as data that a config.json can hold, and their values as vectors."""

# F numbers of a flattened observation, K parts of an action, P parameters of a distribution over actions.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognateforge.exceptions import IncompatibleError
from training_common.attempt import Json

Floats = NDArray[np.float32]
# Of a value that is refused, so much is quoted.
_TOLD_CHARS = 60
_KINDS = ("box", "discrete", "multi_discrete", "multi_binary")


@dataclass(frozen=True, kw_only=True)
class Space:
    """A space of Gymnasium's fundamental kinds: box, discrete, multi_discrete or multi_binary.

    shape: of a value. counts: values of each part of a discrete kind; starts: the least of them.
    low, high: bounds of each number of a box, None where there is none.
    dtype: of a box's numbers, by NumPy's name.
    """

    kind: str
    shape: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    dtype: str = "float32"

    @property
    def width(self) -> int:
        """F: how many numbers a flattened value has; discrete parts are one-hot."""
        return math.prod(self.shape) if self.kind in ("box", "multi_binary") else sum(self.counts)

    @property
    def parts(self) -> int:
        """K: of how many parts an action is made."""
        return math.prod(self.shape) if self.kind == "box" else len(self.counts)

    @property
    def outputs(self) -> int:
        """P: how many numbers a policy gives for an action: logits, or the means of a box."""
        return math.prod(self.shape) if self.kind == "box" else sum(self.counts)

    def flatten(self, value: Any) -> Floats:
        """Return a value as [F] numbers. Errors: ValueError, for a value of another form; TypeError, for no numbers."""
        if self.kind in ("box", "multi_binary"):
            with np.errstate(over="ignore"):  # what is beyond 32 bits becomes infinite, which its reader looks for
                numbers = np.asarray(value, dtype=np.float32)
            if numbers.size != self.width:
                raise ValueError(f"it has the shape {numbers.shape}, and its space says {self.shape}")
            return numbers.reshape(-1)
        flat = np.zeros(self.width, dtype=np.float32)
        values = np.asarray(value, dtype=np.int64).reshape(-1)
        indices = values - np.asarray(self.starts) if values.size == len(self.counts) else None
        # A value too large would be taken for one of the next part.
        if indices is None or not ((indices >= 0) & (indices < self.counts)).all():
            raise ValueError(f"it is {str(value)[:_TOLD_CHARS]}, which is not in its space")
        flat[np.cumsum((0, *self.counts[:-1])) + indices] = 1.0
        return flat

    def action(self, parts: Floats) -> Any:
        """Return [K] parts as the environment's action. Numbers beyond a box's bounds are clipped to them."""
        if self.kind == "box":
            low = np.array([-np.inf if bound is None else bound for bound in self.low])
            high = np.array([np.inf if bound is None else bound for bound in self.high])
            return np.clip(parts, low, high).reshape(self.shape).astype(self.dtype)
        values = np.asarray(parts).astype(np.int64) + np.asarray(self.starts)
        return int(values[0]) if self.kind == "discrete" else values.reshape(self.shape)

    def random(self, generator: np.random.Generator) -> Floats:
        """Return the [K] parts of an action that knows nothing: uniform, or standard normal where there is no bound."""
        if self.kind == "box":
            drawn = [
                generator.standard_normal() if low is None or high is None else generator.uniform(low, high)
                for low, high in zip(self.low, self.high, strict=True)
            ]
            return np.array(drawn, dtype=np.float32)
        return generator.integers(0, self.counts).astype(np.float32)

    def to_json(self) -> dict[str, Json]:
        """Return the space as config.json holds it."""
        told: dict[str, Json] = {"kind": self.kind, "shape": list(self.shape)}
        if self.kind == "box":
            return {**told, "low": list(self.low), "high": list(self.high), "dtype": self.dtype}
        return {**told, "counts": list(self.counts), "starts": list(self.starts)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Space:
        """Return the space that `to_json` told of. Errors: ValueError, KeyError, TypeError."""
        if told["kind"] not in _KINDS:
            raise ValueError(f"a space is one of {', '.join(_KINDS)}, not {told['kind']!r}")
        values: dict[str, Any] = {key: v if isinstance(v, str) else tuple(v) for key, v in told.items()}
        return cls(**values)

    @classmethod
    def of(cls, space: Any, *, where: str) -> Space:
        """Return a Gymnasium space as data. where: whose it is. Errors: IncompatibleError, for other kinds."""
        from gymnasium import spaces

        match space:
            case spaces.Box():
                return cls(
                    kind="box",
                    shape=space.shape,
                    low=_bounds(space.low),
                    high=_bounds(space.high),
                    dtype=str(space.dtype),
                )
            case spaces.Discrete():
                return cls(kind="discrete", counts=(int(space.n),), starts=(int(space.start),))
            case spaces.MultiDiscrete():
                counts, starts = (tuple(int(n) for n in part.reshape(-1)) for part in (space.nvec, space.start))
                return cls(kind="multi_discrete", shape=space.shape, counts=counts, starts=starts)
            case spaces.MultiBinary():
                parts = math.prod(space.shape)
                return cls(kind="multi_binary", shape=space.shape, counts=(2,) * parts, starts=(0,) * parts)
        raise IncompatibleError(
            f"{where} is a {type(space).__name__}; a policy knows Box, Discrete, MultiDiscrete and MultiBinary: "
            "flatten it with a wrapper of Gymnasium, registered under a name of its own"
        )


@dataclass(frozen=True, kw_only=True)
class AgentSpaces:
    """An agent's name and what it sees and does."""

    name: str
    observation: Space
    action: Space


def _bounds(values: Any) -> tuple[float | None, ...]:
    return tuple(float(bound) if np.isfinite(bound) else None for bound in values.reshape(-1))
