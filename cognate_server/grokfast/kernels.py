"""The loops that numba compiles.

None has fastmath where it would matter: each operation of the update rounds as IEEE 754 says and none is contracted,
so the result is that of torch's single operations. Only the sums may be taken in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cognate_server.native.jit import FAST, array, floats, jit

# Below the smallest normal float32, h, m and v become 0: a row of the embedding that has had no gradient for a while
# would decay into denormal numbers, which cost some processors a hundred cycles each. sqrt(v) is then below 1e-18,
# where epsilon is 1e-8.
TINY = np.float32(np.finfo(np.float32).tiny)
ZERO = np.float32(0)


def _dot_loop(a: Any, b: Any) -> Any:
    total = 0.0
    for i in range(a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


_dot = jit(_dot_loop, **FAST)


def _compare_loop(h: Any, g: Any) -> Any:
    """Sum a piece in float32: these are for telemetry, and float64 takes twice as long."""
    along, squares = ZERO, ZERO
    for i in range(h.size):
        along += h[i] * g[i]
        squares += h[i] * h[i]
    return along, squares


_compare = jit(_compare_loop, **FAST)


def _update_loop(p: Any, g: Any, h: Any, m: Any, v: Any, numbers: Any) -> None:
    """Run the arithmetic of `update`; numbers are in the order of NUMBERS."""
    scale, alpha, rest, lamb = numbers[0], numbers[1], numbers[2], numbers[3]
    beta1, rest1, beta2, rest2 = numbers[4], numbers[5], numbers[6], numbers[7]
    shrink, size, root, eps = numbers[8], numbers[9], numbers[10], numbers[11]
    for i in range(p.size):
        x = g[i] * scale
        slow = alpha * h[i] + rest * x
        h[i] = ZERO if abs(slow) < TINY else slow
        x = x + lamb * slow
        mean = beta1 * m[i] + rest1 * x
        square = beta2 * v[i] + rest2 * (x * x)
        m[i] = ZERO if abs(mean) < TINY else mean
        v[i] = ZERO if square < TINY else square
        p[i] = shrink * p[i] - size * (mean / (np.sqrt(square) * root + eps))


_update_piece = jit(_update_loop)


def _squares(addresses: Any, pieces: Any, first: int, last: int, sums: Any) -> None:
    """Sum the squares of the gradients' pieces: addresses (tensors, 5), pieces (pieces, 3), sums (pieces,)."""
    for k in range(first, last):
        gradient = array(floats(addresses[pieces[k, 0], 1] + 4 * pieces[k, 1]), pieces[k, 2])
        sums[k] = _dot(gradient, gradient)


squares = jit(_squares)


def _update(addresses: Any, numbers: Any, pieces: Any, first: int, last: int, measure: bool, sums: Any) -> None:
    """Update pieces: addresses of p, g, h, m, v (tensors, 5), numbers (tensors, NUMBERS), sums (pieces, 2)."""
    for k in range(first, last):
        t, offset, n = pieces[k, 0], 4 * pieces[k, 1], pieces[k, 2]
        p = array(floats(addresses[t, 0] + offset), n)
        g = array(floats(addresses[t, 1] + offset), n)
        h = array(floats(addresses[t, 2] + offset), n)
        m = array(floats(addresses[t, 3] + offset), n)
        v = array(floats(addresses[t, 4] + offset), n)
        if measure:
            along, squares = _compare(h, g)
            sums[k, 0], sums[k, 1] = np.float64(along) * np.float64(numbers[t, 0]), squares
        _update_piece(p, g, h, m, v, numbers[t])


update = jit(_update)
