"""Random numbers as a pure function of a key and a position, on any device.

PyTorch's generators give different numbers on a GPU and on a CPU and cannot skip to a position of their sequence. These
numbers are the output of splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014) at a
counter. Any process on any device can therefore compute the noise of its own samples.

Legend: B positions, n numbers per position.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_bits(key: int, counters: Tensor) -> Tensor:
    """64 random bits for each counter, int64 of the same shape."""
    values = counters * _GOLDEN + _signed(key)
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left; torch's own shift of int64 repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def normals(key: int, positions: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal numbers for each position, float32 [B, *shape] (Box-Muller transform).

    Args:
        key: 64 bits; other keys give independent numbers.
        positions: row i of the result depends on the key and on `positions[i]` only.
        shape: of the numbers of one position.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    rows = torch.tensor(positions, dtype=torch.int64, device=device)[:, None] * pairs
    bits = random_bits(key, rows + torch.arange(pairs, device=device))
    first, second = (part.float() + 0.5 for part in (_shifted(bits, 32), bits & 0xFFFFFFFF))
    radius, angle = (first * 2.0**-32).log().mul_(-2).sqrt_(), second.mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count].unflatten(1, shape)
