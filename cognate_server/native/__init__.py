"""Loops over the memory of torch's tensors on a CPU, compiled by numba, which brings its own compiler."""

import importlib.util


def is_available() -> bool:
    """Say whether numba is installed."""
    return importlib.util.find_spec("numba") is not None
