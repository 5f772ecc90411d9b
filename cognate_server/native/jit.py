"""What the compiled loops are written with. Import it where they are needed, and not before: it loads numba."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

# numba's own annotations leave this one out.
array: Any = numba.carray  # type: ignore[attr-defined,unused-ignore]

# Sums may be taken in another order, and a product may go into a sum without being rounded.
FAST: dict[str, Any] = {"fastmath": {"reassoc", "contract"}}


# What is compiled holds code of this file, and the compiler looks at the function's own file alone to tell whether what
# it has kept is still right.
_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _kept(function: Any, compile_: Any) -> Any:
    """Keep the machine code where there is a folder to keep it in, under a name that changes with this file."""
    function.__qualname__ = f"{function.__qualname__}_{_DIGEST}"
    try:
        return compile_(cache=True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return compile_(cache=False)


def jit(function: Any, **options: Any) -> Any:
    """Compile a function that other compiled ones or Python call, without the global lock held."""
    return _kept(function, lambda cache: numba.njit(nogil=True, error_model="numpy", cache=cache, **options)(function))


def entry(function: Any) -> int:
    """Compile what a thread runs, void (*)(int64 *), and return its address."""
    signature = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]
    compiled = _kept(function, lambda cache: numba.cfunc(signature, error_model="numpy", cache=cache)(function))
    _ENTRIES.append(compiled)
    return int(compiled.address)


_ENTRIES: list[Any] = []  # what is compiled lives as long as its object


def _pointer_to(number: Any) -> Any:
    def declare(_context: Any, address: Any) -> Any:
        signature = types.CPointer(number)(address)  # type: ignore[no-untyped-call]

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return intrinsic(declare)


# How an address becomes a pointer: to float32, and to the bits of bfloat16, which numba has no type for.
floats: Any = _pointer_to(types.float32)
halves: Any = _pointer_to(types.uint16)
integers: Any = _pointer_to(types.int64)
octets: Any = _pointer_to(types.uint8)


def _bits_as(result: Any) -> Any:
    def declare(_context: Any, number: Any) -> Any:
        signature = result(number)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bits = arguments[0]
            if isinstance(bits.type, ir.IntType) and bits.type.width > 32:  # numba's integers grow as they are computed
                bits = builder.trunc(bits, ir.IntType(32))
            return builder.bitcast(bits, context.get_value_type(signature.return_type))

        return signature, generate

    return intrinsic(declare)


as_float: Any = _bits_as(types.float32)
as_bits: Any = _bits_as(types.uint32)


def _call(_context: Any, address: Any) -> Any:
    """Say how `int (*)(void)` at an address is called."""
    signature = types.int32(address)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return signature, generate


_call_int: Any = intrinsic(_call)


def _share(head: Any, count: int) -> Any:
    """Return the first and the end of this thread's part of so many things; `head` is what `threads.run` passes."""
    if head[0] == 0:
        return 0, count
    number, threads = np.int64(_call_int(head[0])), np.int64(_call_int(head[1]))
    return count * number // threads, count * (number + 1) // threads


share = jit(_share)


# Which of the two a kernel's numbers are: the type of this argument decides when it is compiled.
FLOAT32, BFLOAT16 = np.float32(0), np.uint16(0)


def view(kind: Any, address: int, count: int) -> Any:
    """Return so many numbers of a kind from an address on; for compiled functions."""
    raise NotImplementedError


@overload(view, strict=False)
def _view(kind: Any, address: Any, count: Any) -> Any:
    if kind == types.uint16:
        return lambda kind, address, count: array(halves(address), count)
    return lambda kind, address, count: array(floats(address), count)


def size(kind: Any) -> int:
    """Return the bytes of a number of a kind; for compiled functions."""
    raise NotImplementedError


@overload(size, strict=False)
def _size(kind: Any) -> Any:
    if kind == types.uint16:
        return lambda kind: 2
    return lambda kind: 4


def get(values: Any, i: int) -> Any:
    """Read a float32 or a bfloat16 as a float32; for compiled functions."""
    raise NotImplementedError


@overload(get, strict=False)
def _get(values: Any, i: Any) -> Any:
    if values.dtype == types.uint16:
        return lambda values, i: as_float(np.uint32(values[i]) << np.uint32(16))
    return lambda values, i: values[i]


def put(values: Any, i: int, value: Any) -> None:
    """Write a float32 as what the array holds, rounded to the nearest; for compiled functions."""
    raise NotImplementedError


@overload(put, strict=False)
def _put(values: Any, i: Any, value: Any) -> Any:
    if values.dtype == types.uint16:

        def rounded(values: Any, i: Any, value: Any) -> None:
            bits = as_bits(np.float32(value))
            up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # Rounding up could carry what is not a number into infinity.
            values[i] = np.uint16(0x7FC0) if value != value else np.uint16(up)

        return rounded

    def plain(values: Any, i: Any, value: Any) -> None:
        values[i] = value

    return plain
