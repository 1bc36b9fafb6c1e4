"""The order of records: a keyed permutation of their numbers, a pure function of (seed, epoch) in constant memory.

A Feistel network permutes the smallest square domain that holds all numbers; cycle walking restricts it to the numbers
themselves (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from hashlib import blake2b

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64
NUM_ROUNDS = 8


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings; the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """The random generator of a key."""
    return np.random.Generator(np.random.Philox(key=derive_key(*parts)))


def permute(index: int, size: int, key: int) -> int:
    """Position of `index` in the permutation of [0, size) that `key` selects."""
    assert 0 <= index < size, (index, size)
    half = ((size - 1).bit_length() + 1) // 2 or 1
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(NUM_ROUNDS):
            left, right = right, left ^ (_mix(key + (number << 56) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def record_of_draw(draw: int, size: int, seed: int) -> int:
    """Record number of the `draw`-th draw from `size` records: every epoch is another permutation of all of them."""
    epoch, index = divmod(draw, size)
    return permute(index, size, derive_key(seed, epoch))


def uniforms(key: int, indices: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each index, float64 with 32 random bits; a pure function of (key, index)."""
    values = np.asarray(indices, np.uint64) * np.uint64(_GOLDEN) + np.uint64(key & _MASK)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return ((values ^ (values >> np.uint64(31))) >> np.uint64(32)) / 2.0**32


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value = (value + _GOLDEN) & _MASK
    value = (value ^ (value >> 30)) * _FIRST & _MASK
    value = (value ^ (value >> 27)) * _SECOND & _MASK
    return value ^ (value >> 31)
