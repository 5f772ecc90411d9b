"""A shuffled order that is computed, not stored: `Permutation`."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
# Four rounds of a random function make a permutation that looks random (Luby and Rackoff 1988). Two more are for the
# narrow halves of small sizes.
_ROUNDS = 6


class Permutation:
    """A bijection of 0 to `size` - 1 that a seed picks, in constant memory.

    A Feistel network permutes the next power of two; numbers at or above `size` are sent through again until they fall
    below it, which takes fewer than two passes on average.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking.
    """

    def __init__(self, size: int, seed: str) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)
        digest = hashlib.sha512(seed.encode("utf-8")).digest()
        self._keys = [int.from_bytes(digest[8 * n : 8 * n + 8], "big") for n in range(_ROUNDS)]

    def __getitem__(self, place: int) -> int:
        """Return the number at a place. Errors: IndexError."""
        if not 0 <= place < self._size:
            raise IndexError(f"{place} is not within 0 and {self._size - 1}")
        number = self._pass(place)
        while number >= self._size:
            number = self._pass(number)
        return number

    def _pass(self, number: int) -> int:
        left_bits, right_bits = self._widths
        left, right = number >> right_bits, number & ((1 << right_bits) - 1)
        for key in self._keys:  # an even number of rounds, so the halves end with the widths they began with
            left, right = right, left ^ (_mix(right ^ key) >> (64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right


def _mix(number: int) -> int:
    """Return 64 bits that all depend on all of the number's (finalizer of SplitMix64, Steele et al. 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
    return number ^ number >> 31
