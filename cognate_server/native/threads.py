"""Compiled loops on torch's own threads.

torch's operations run on a team of threads of GNU's OpenMP library, which spin for a while after each one. A second set
of threads would compete with them for the same cores, and waking a sleeping one takes 50 to 100 microseconds, as long
as many a loop. So loops are handed to the same library, as compilers do for `#pragma omp parallel`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from pathlib import Path

import torch

# Below so many numbers a loop is over before other threads have begun; torch's own operations have the same bound.
GRAIN = 32_768

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch has loaded, or None where it has another or none."""
    folder = Path(torch.__file__).parent
    for found in (folder / "lib", folder.parent / "torch.libs"):
        for file in sorted(found.glob("libgomp*.so*")):
            try:
                # Only if it is loaded already: another one would bring threads of its own.
                library = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            except OSError:
                continue
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def is_available() -> bool:
    """Say whether loops can run on torch's threads."""
    return _library() is not None


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@functools.cache
def _functions() -> tuple[int, int]:
    """Return the addresses of what tells a thread its number, and how many there are."""
    library = _library()
    if library is None:
        raise RuntimeError("torch's threads are not those of GNU's OpenMP library; ask is_available() first")
    return _address(library.omp_get_thread_num), _address(library.omp_get_num_threads)


@functools.cache
def _alone(entry: int) -> ctypes._FuncPointer:
    return _Entry(entry)


def run(entry: int, numbers: int, *arguments: int) -> None:
    """Run what `jit.entry` compiled on all of torch's threads, and wait for them.

    numbers: how many are computed; few are computed by the calling thread alone. arguments: sizes and addresses, which
    the entry finds from its third int64 on; `jit.share` takes the first two.
    """
    library = _library()
    threads = torch.get_num_threads()
    if library is None or threads == 1 or numbers < GRAIN:
        words = array("q", (0, 0, *arguments))
        _alone(entry)(words.buffer_info()[0])
        return
    words = array("q", (*_functions(), *arguments))
    # The whole team, as torch does it: the library ends the threads that a smaller one leaves over.
    library.GOMP_parallel(entry, words.buffer_info()[0], threads, 0)
