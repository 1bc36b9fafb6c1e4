"""Noise by key and position: the bits of splitmix64, and standard normal numbers."""

import numpy as np
import pytest
import torch

from train.data.order import uniforms
from train.noise import normals, random_bits

KEYS = (0, 1, (1 << 63) + 5, (1 << 64) - 1)


@pytest.mark.parametrize("key", KEYS)
def test_bits_are_those_of_the_numpy_implementation(key):
    """The upper 32 bits equal those of `uniforms`, also for keys and counters whose products overflow."""
    counters = np.concatenate([np.arange(1000), np.arange(1000) + (1 << 40)])
    upper = (random_bits(key, torch.from_numpy(counters)) >> 32) & 0xFFFFFFFF
    assert (upper.numpy() == uniforms(key, counters) * 2**32).all()


@pytest.mark.parametrize("key", KEYS)
def test_numbers_are_standard_normal(key):
    """The distribution function of 10^6 numbers differs from the normal one by less than 2 / 1000; neighbors and the
    two numbers of a pair are uncorrelated."""
    values = normals(key, range(250), (4, 32, 32), "cpu").double().flatten()
    expected = torch.special.ndtr(values.sort().values)
    observed = (torch.arange(len(values)) + 0.5) / len(values)
    assert (expected - observed).abs().max() < 2e-3
    for distance in (1, 2, 1024, 4096):
        assert abs(float((values[distance:] * values[:-distance]).mean())) < 5e-3


def test_a_row_depends_on_its_position_only():
    """Rows of any selection equal those of all positions; an odd number of values per position is possible."""
    rows = normals(7, range(6), (5,), "cpu")
    assert rows.shape == (6, 5) and torch.equal(normals(7, [4, 1], (5,), "cpu"), rows[[4, 1]])
    assert len(set(rows.flatten().tolist())) == 30
