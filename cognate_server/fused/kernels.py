"""The loops of `operations`, compiled by numba: float32 inside, float32 or bfloat16 outside.

A kernel is compiled for the kind of numbers that it is first asked for. Sums over rows are those of blocks of `ROWS`
rows, so no result depends on how many threads there are.
"""

# D width of a row, K of a head, W of a gate. `words` are what `threads.run` passes: two of its own, then those that a
# kernel's docstring lists.

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cognate_server.native.jit import (
    BFLOAT16,
    FAST,
    FLOAT32,
    array,
    as_bits,
    as_float,
    entry,
    get,
    integers,
    jit,
    octets,
    put,
    share,
    size,
    view,
)

ROWS = 32
# Keys that a loop takes together: what is left over of one is computed one by one.
VECTOR = 16
ZERO, ONE = np.float32(0), np.float32(1)
# The exponent below which a weight counts as none.
LEAST = np.float32(-60)


def _exp_of(x: Any) -> Any:
    """Return e**x within 87 of 0, to 2 units in the last place: 2**n times a polynomial in the rest.

    The parts of ln 2 and the polynomial are those of Cephes' expf (Moshier).
    """
    n = np.rint(x * np.float32(1.44269504088896341))
    # The first part of ln 2 is exact, so the difference loses nothing.
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + ONE
    return p * as_float((np.int32(n) + np.int32(127)) << np.int32(23))


_exp = jit(_exp_of, fastmath={"contract"})


def _sigmoid_of(z: Any) -> Any:
    # Beyond 80 it is 0 or 1 in float32.
    return ONE / (ONE + _exp(min(max(-z, np.float32(-80)), np.float32(80))))


_sigmoid = jit(_sigmoid_of, fastmath={"contract"})


def _norm(a: Any, kind: Any) -> None:
    """Rows, D, epsilon's bits, and the addresses of x, scale, y and the inverse root mean squares."""
    rows, D, epsilon = a[2], a[3], as_float(a[4])
    scale, inverses = view(FLOAT32, a[6], D), view(FLOAT32, a[8], rows)
    first, end = share(a, rows)
    for row in range(first, end):
        x, y = view(kind, a[5] + size(kind) * row * D, D), view(kind, a[7] + size(kind) * row * D, D)
        squares = ZERO
        for i in range(D):
            squares += get(x, i) * get(x, i)
        inverse = ONE / np.sqrt(squares / np.float32(D) + epsilon)
        inverses[row] = inverse
        for i in range(D):
            put(y, i, get(x, i) * inverse * scale[i])


def _norm_back(a: Any, kind: Any) -> None:
    """Rows, D, and the addresses of x, scale, the inverses, y's gradient, x's, scale's or 0, and what x's is added to.

    Scale's has a row for each block.
    """
    rows, D = a[2], a[3]
    scale, inverses = view(FLOAT32, a[5], D), view(FLOAT32, a[6], rows)
    first, end = share(a, (rows + ROWS - 1) // ROWS)
    for block in range(first, end):
        if a[9]:
            of_scale = view(FLOAT32, a[9] + 4 * block * D, D)
            for i in range(D):
                of_scale[i] = ZERO
        for row in range(block * ROWS, min(rows, (block + 1) * ROWS)):
            offset = size(kind) * row * D
            x, g, of_x = view(kind, a[4] + offset, D), view(kind, a[7] + offset, D), view(kind, a[8] + offset, D)
            inverse = inverses[row]
            along = ZERO
            for i in range(D):
                along += get(g, i) * scale[i] * get(x, i)
            pull = along * inverse * inverse * inverse / np.float32(D)
            if a[10]:
                beside = view(kind, a[10] + offset, D)
                for i in range(D):
                    put(of_x, i, get(g, i) * scale[i] * inverse - pull * get(x, i) + get(beside, i))
            else:
                for i in range(D):
                    put(of_x, i, get(g, i) * scale[i] * inverse - pull * get(x, i))
            if a[9]:
                of_scale = view(FLOAT32, a[9] + 4 * block * D, D)
                for i in range(D):
                    of_scale[i] += get(g, i) * get(x, i) * inverse


def _place(a: Any, first_word: int, token: int) -> Any:
    """Return where a token sits in the batch; the words are the address of all places or 0, then T."""
    return array(integers(a[first_word]), token + 1)[token] if a[first_word] else token


_place_of = jit(_place)


def _turn(a: Any, kind: Any) -> None:
    """Tokens, heads, K, epsilon's bits; places' address, T; and the addresses of projection, cosines and sines.

    Then those of queries, keys and values, by row, head and position, and of both inverses, by token and head.
    """
    tokens, H, K, epsilon, T = a[2], a[3], a[4], as_float(a[5]), a[7]
    half = K // 2
    first, end = share(a, tokens)
    for token in range(first, end):
        place = _place_of(a, 6, token)
        row, position = place // T, place % T
        cosine, sine = view(FLOAT32, a[9] + 4 * position * half, half), view(FLOAT32, a[10] + 4 * position * half, half)
        for head in range(H):
            to = 4 * ((row * H + head) * T + position) * K
            for part in range(2):
                here = a[8] + size(kind) * ((3 * token + part) * H + head) * K
                left, right = view(kind, here, half), view(kind, here + size(kind) * half, half)
                y_left, y_right = (
                    view(FLOAT32, a[11 + part] + to, half),
                    view(FLOAT32, a[11 + part] + to + 4 * half, half),
                )
                squares = ZERO
                for i in range(half):
                    squares += get(left, i) * get(left, i) + get(right, i) * get(right, i)
                inverse = ONE / np.sqrt(squares / np.float32(K) + epsilon)
                view(FLOAT32, a[14 + part], tokens * H)[token * H + head] = inverse
                for i in range(half):
                    p, q = get(left, i) * inverse, get(right, i) * inverse
                    y_left[i] = p * cosine[i] - q * sine[i]
                    y_right[i] = q * cosine[i] + p * sine[i]
            value = view(kind, a[8] + size(kind) * ((3 * token + 2) * H + head) * K, K)
            copy = view(FLOAT32, a[13] + to, K)
            for i in range(K):
                copy[i] = get(value, i)


def _turn_back(a: Any, kind: Any) -> None:
    """Tokens, heads, K, whether keys and values were kept; places' address, T; projection's, cosines' and sines'.

    Then the addresses of the gradients of queries, keys and values, of both inverses, and of the projection's gradient.
    Of the gradients of what was kept is left what belongs to tokens that have no key and value of their own.
    """
    tokens, H, K, T = a[2], a[3], a[4], a[7]
    half = K // 2
    first, end = share(a, tokens)
    for token in range(first, end):
        place = _place_of(a, 6, token)
        row, position = place // T, place % T
        cosine, sine = view(FLOAT32, a[9] + 4 * position * half, half), view(FLOAT32, a[10] + 4 * position * half, half)
        for head in range(H):
            at = 4 * ((row * H + head) * T + position) * K
            for part in range(2):
                offset = size(kind) * ((3 * token + part) * H + head) * K
                left, right = view(kind, a[8] + offset, half), view(kind, a[8] + offset + size(kind) * half, half)
                of_left = view(kind, a[16] + offset, half)
                of_right = view(kind, a[16] + offset + size(kind) * half, half)
                g_left, g_right = (
                    view(FLOAT32, a[11 + part] + at, half),
                    view(FLOAT32, a[11 + part] + at + 4 * half, half),
                )
                inverse = view(FLOAT32, a[14 + part], tokens * H)[token * H + head]
                along = ZERO
                for i in range(half):
                    along += (g_left[i] * cosine[i] + g_right[i] * sine[i]) * get(left, i)
                    along += (g_right[i] * cosine[i] - g_left[i] * sine[i]) * get(right, i)
                pull = along * inverse * inverse * inverse / np.float32(K)
                for i in range(half):
                    p, q = g_left[i] * cosine[i] + g_right[i] * sine[i], g_right[i] * cosine[i] - g_left[i] * sine[i]
                    put(of_left, i, p * inverse - pull * get(left, i))
                    put(of_right, i, q * inverse - pull * get(right, i))
                if part == 1 and a[5]:
                    for i in range(half):
                        g_left[i] = ZERO
                        g_right[i] = ZERO
            g_value = view(FLOAT32, a[13] + at, K)
            of_value = view(kind, a[16] + size(kind) * ((3 * token + 2) * H + head) * K, K)
            for i in range(K):
                put(of_value, i, g_value[i])
            if a[5]:
                for i in range(K):
                    g_value[i] = ZERO


def _by_token(a: Any, kind: Any) -> None:
    """Tokens, heads, K, back; places' address, T; and the addresses of what heads hold and of what tokens do.

    Heads' numbers are copied to tokens, or tokens' back to the heads.
    """
    tokens, H, K, back, T = a[2], a[3], a[4], a[5], a[7]
    first, end = share(a, tokens)
    for token in range(first, end):
        place = _place_of(a, 6, token)
        for head in range(H):
            of_head = view(FLOAT32, a[8] + 4 * (((place // T) * H + head) * T + place % T) * K, K)
            of_token = view(FLOAT32, a[9] + 4 * (token * H + head) * K, K)
            if back:
                for i in range(K):
                    of_head[i] = of_token[i]
            else:
                for i in range(K):
                    of_token[i] = of_head[i]


def _softmax(a: Any, kind: Any) -> None:
    """Rows of the batch, heads, queries, keys, causal, bits of the scale and of the highest score; then addresses.

    They are those of scores, by row, head and query, which become weights, and of a mask or 0, with a byte for every
    row, query and key. No scaled score is above the highest, or below its negative, so none has to be looked for.
    """
    B, H, T, S, causal, scale, highest = a[2], a[3], a[4], a[5], a[6], as_float(a[7]), as_float(a[8])
    first, end = share(a, B * H * T)
    for line in range(first, end):
        query = line % T
        seen = np.int32(query + 1 if causal else S)
        computed = min(S, (np.int64(seen) + VECTOR - 1) // VECTOR * VECTOR)
        scores = view(FLOAT32, a[9] + 4 * line * S, S)
        total = ZERO
        if a[10]:
            visible = array(octets(a[10] + ((line // (H * T)) * T + query) * S), S)
            for i in range(computed):
                weight = _exp(scores[i] * scale - highest)
                scores[i] = weight if visible[i] else ZERO
                total += scores[i]
        else:
            for i in range(computed):
                weight = _exp(scores[i] * scale - highest)
                scores[i] = weight if np.int32(i) < seen else ZERO
                total += scores[i]
        inverse = ONE / total
        for i in range(computed):
            scores[i] *= inverse
        for i in range(computed, S):
            scores[i] = ZERO


def _softmax_back(a: Any, kind: Any) -> None:
    """Lines, queries, keys, causal, the scale's bits, and the addresses of weights and of their gradients.

    These become the scores', of those keys that `_softmax` has computed.
    """
    T, S, causal, scale = a[3], a[4], a[5], as_float(a[6])
    first, end = share(a, a[2])
    for line in range(first, end):
        computed = min(S, (line % T + VECTOR) // VECTOR * VECTOR) if causal else S
        p, g = view(FLOAT32, a[7] + 4 * line * S, computed), view(FLOAT32, a[8] + 4 * line * S, computed)
        along = ZERO
        for i in range(computed):
            along += p[i] * g[i]
        for i in range(computed):
            g[i] = p[i] * (g[i] - along) * scale
        rest = view(FLOAT32, a[8] + 4 * line * S, S)
        for i in range(computed, S):
            rest[i] = ZERO


def _ordered_of(bits: Any) -> Any:
    """Turn the bits of a float32 into a whole number of the same order, or back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


_ordered = jit(_ordered_of)


def _top_of(logits: Any, bias: Any) -> Any:
    """Return the highest sum. As whole numbers, since the compiler takes highest float32 one by one."""
    highest = np.int32(-(2**31))
    for i in range(bias.size):
        highest = np.int32(max(highest, np.int32(_ordered(np.int32(as_bits(get(logits, i) + bias[i]))))))
    return as_float(_ordered(highest))


_top = jit(_top_of)


def _weight_of(difference: Any) -> Any:
    """Return e**x for x up to 0: nothing where products would go on with denormal numbers, which slow them down."""
    return ZERO if difference < LEAST else _exp(difference)


_weight = jit(_weight_of, fastmath={"contract"})


def _head(a: Any, kind: Any) -> None:
    """Rows, V, and the addresses of logits, bias, targets, log_own, log_other, losses, owns, and the bias's gradient.

    Then the factor's bits. Logits become their gradients of so many times the sum of the losses, and the bias's
    gradient has a row of zeros for each block.
    """
    rows, V, factor = a[2], a[3], as_float(a[12])
    bias, targets = view(FLOAT32, a[5], V), array(integers(a[6]), rows)
    log_own, log_other = view(FLOAT32, a[7], rows), view(FLOAT32, a[8], rows)
    losses, owns = view(FLOAT32, a[9], rows), view(FLOAT32, a[10], rows)
    first, end = share(a, (rows + ROWS - 1) // ROWS)
    for block in range(first, end):
        of_bias = view(FLOAT32, a[11] + 4 * block * V, V)
        for row in range(block * ROWS, min(rows, (block + 1) * ROWS)):
            logits = view(kind, a[4] + size(kind) * row * V, V)
            of_logits = view(FLOAT32, a[4] + 4 * row * V, V)
            highest = _top(logits, bias)
            target = targets[row]
            of_target = get(logits, target) + bias[target]
            total = ZERO
            for i in range(V):
                weight = _weight(get(logits, i) + bias[i] - highest)
                if size(kind) == 4:  # where weights are as exact as logits, they need no second exponential
                    of_logits[i] = weight
                total += weight
            log_part = log_own[row] + (of_target - highest - np.log(total))
            # ln(e**part + e**other): the larger one goes out of the sum, so that it can't overflow.
            larger = max(log_part, log_other[row])
            log_whole = larger + np.log(np.exp(log_part - larger) + np.exp(log_other[row] - larger))
            own = np.exp(log_part - log_whole)
            losses[row] = -log_whole
            owns[row] = own
            counted = factor * own / total
            for i in range(V):
                if size(kind) == 4:
                    gradient = of_logits[i] * counted
                else:
                    gradient = _weight(get(logits, i) + bias[i] - highest) * counted
                put(logits, i, gradient)
                of_bias[i] += gradient
            # Not from what was put there, which may be rounded: near 1 bfloat16 has steps of 1/256.
            put(logits, target, _weight(of_target - highest) * counted - factor * own)
            of_bias[target] -= factor * own


def _gated(a: Any, kind: Any) -> None:
    """Rows, W, and the addresses of gates with what they let through, and of the result."""
    W = a[3]
    first, end = share(a, a[2])
    for row in range(first, end):
        gate, up = view(kind, a[4] + size(kind) * 2 * row * W, W), view(kind, a[4] + size(kind) * (2 * row + 1) * W, W)
        y = view(kind, a[5] + size(kind) * row * W, W)
        for i in range(W):
            z = get(gate, i)
            put(y, i, z * _sigmoid(z) * get(up, i))


def _gated_back(a: Any, kind: Any) -> None:
    """Rows, W, and the addresses of gates with what they let through, of the result's gradient and theirs."""
    W = a[3]
    first, end = share(a, a[2])
    for row in range(first, end):
        here, there = size(kind) * 2 * row * W, size(kind) * (2 * row + 1) * W
        gate, up, g = view(kind, a[4] + here, W), view(kind, a[4] + there, W), view(kind, a[5] + here // 2, W)
        of_gate, of_up = view(kind, a[6] + here, W), view(kind, a[6] + there, W)
        for i in range(W):
            z = get(gate, i)
            open_ = _sigmoid(z)
            pulled = get(g, i) * open_
            put(of_up, i, pulled * z)
            put(of_gate, i, pulled * get(up, i) * (ONE + z * (ONE - open_)))


_norm_loop = jit(_norm, **FAST)
_norm_back_loop = jit(_norm_back, **FAST)
_turn_loop = jit(_turn, **FAST)
_turn_back_loop = jit(_turn_back, **FAST)
_by_token_loop = jit(_by_token, **FAST)
_softmax_loop = jit(_softmax, **FAST)
_softmax_back_loop = jit(_softmax_back, **FAST)
_head_loop = jit(_head, **FAST)
_gated_loop = jit(_gated, **FAST)
_gated_back_loop = jit(_gated_back, **FAST)


# One function for each kernel and kind: what is compiled is kept under its own name.


def _norm_float32(words: Any) -> None:
    _norm_loop(array(words, 9), FLOAT32)


def _norm_bfloat16(words: Any) -> None:
    _norm_loop(array(words, 9), BFLOAT16)


def _norm_back_float32(words: Any) -> None:
    _norm_back_loop(array(words, 11), FLOAT32)


def _norm_back_bfloat16(words: Any) -> None:
    _norm_back_loop(array(words, 11), BFLOAT16)


def _turn_float32(words: Any) -> None:
    _turn_loop(array(words, 16), FLOAT32)


def _turn_bfloat16(words: Any) -> None:
    _turn_loop(array(words, 16), BFLOAT16)


def _turn_back_float32(words: Any) -> None:
    _turn_back_loop(array(words, 17), FLOAT32)


def _turn_back_bfloat16(words: Any) -> None:
    _turn_back_loop(array(words, 17), BFLOAT16)


def _by_token_float32(words: Any) -> None:
    _by_token_loop(array(words, 10), FLOAT32)


def _softmax_float32(words: Any) -> None:
    _softmax_loop(array(words, 11), FLOAT32)


def _softmax_back_float32(words: Any) -> None:
    _softmax_back_loop(array(words, 9), FLOAT32)


def _head_float32(words: Any) -> None:
    _head_loop(array(words, 13), FLOAT32)


def _head_bfloat16(words: Any) -> None:
    _head_loop(array(words, 13), BFLOAT16)


def _gated_float32(words: Any) -> None:
    _gated_loop(array(words, 6), FLOAT32)


def _gated_bfloat16(words: Any) -> None:
    _gated_loop(array(words, 6), BFLOAT16)


def _gated_back_float32(words: Any) -> None:
    _gated_back_loop(array(words, 7), FLOAT32)


def _gated_back_bfloat16(words: Any) -> None:
    _gated_back_loop(array(words, 7), BFLOAT16)


@functools.cache
def address(name: str, kind: str) -> int:
    """Return where a kernel begins, by its name and the kind of its numbers: float32 or bfloat16."""
    return entry(globals()[f"_{name}_{kind}"])
