"""UNetCall: the inputs of one UNet call as a plain value, its padding to a few shapes, and the key of a shape.

Legend: R rows of a call, P (row, subject) pairs, B recorded images, S subjects, T text tokens, Q = h * w positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .keys_values import KeysValues
from .text import TextCondition
from .visual_attention import SortedMask

PAIR_BUCKETS = (1, 2, 4, 8, 16)
# Fractions of a level's positions. Few, because each one that occurs is a graph; twice the positions cost 1% of a call.
POSITION_BUCKETS = (1 / 8, 1 / 4, 1 / 2, 1)
MIN_POSITIONS = 2  # `torch.compile` specializes on a size of 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A row of the call and a reference it attends to.

    Attributes:
        row: index of the row.
        keys_values: of the reference; None for padding, which attends to zeros with weight 0.
        masks: attention level -> where the row attends to the reference.
        largest: attention level -> positions of the largest mask that the image has had so far.
    """

    row: int
    keys_values: KeysValues | None
    masks: Mapping[int, SortedMask]
    largest: Mapping[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetCall:
    """The inputs of one UNet call.

    Attributes:
        sample: [R, channels, height, width], in the type of the UNet.
        timestep: of each row, fp32 [R] on the CPU.
        texts: the text of each row.
        time_ids: size condition of each row, [R, 6]; None for models without one.
        pairs: references and masks; empty for text only.
        positions: attention level -> number of positions at which each pair attends to its reference.
        columns: marks the target words of the first B rows, [B, S, T]; None if nothing is recorded.
        sizes: (h, w) of every level.
        return_output: False ends the call after the last layer that records.
    """

    sample: Tensor
    timestep: Tensor
    texts: Sequence[TextCondition]
    time_ids: Tensor | None
    pairs: Sequence[Pair]
    positions: Mapping[int, int]
    columns: Tensor | None
    sizes: Sequence[tuple[int, int]]
    return_output: bool


CallKey = tuple  # everything that determines the shapes of a call


def exact_positions(pairs: Sequence[Pair], sizes: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The number of positions that the largest mask of each level needs."""
    levels = pairs[0].masks if pairs else ()
    return {
        level: min(math.prod(sizes[level]), max(MIN_POSITIONS, *(pair.masks[level].count for pair in pairs)))
        for level in levels
    }


def padded(call: UNetCall) -> UNetCall:
    """Pad pairs and positions to buckets, so that few shapes occur. The result is the same up to rounding.

    Rows and subjects are exact: a padded row costs as much as a real one, and another number of rows or subjects
    changes the rounding of the result. The bucket of an image never becomes smaller, so that shapes do not alternate.
    """
    if not call.pairs:
        return call
    positions = {}
    for level in call.positions:
        num_positions = math.prod(call.sizes[level])
        needed = max(call.positions[level], *(pair.largest[level] for pair in call.pairs))
        positions[level] = _position_bucket(needed, num_positions)
    missing = pair_bucket(len(call.pairs)) - len(call.pairs)
    if not missing:
        return replace(call, positions=positions)
    weight = next(iter(call.pairs[0].masks.values())).weight
    masks = {level: _empty_mask(math.prod(call.sizes[level]), weight.dtype, weight.device) for level in positions}
    padding = Pair(row=0, keys_values=None, masks=masks, largest=dict.fromkeys(positions, 0))
    return replace(call, positions=positions, pairs=(*call.pairs, *[padding] * missing))


def key_of(call: UNetCall) -> CallKey:
    """The shapes of a padded call. Calls with equal keys can use the same static buffers and the same CUDA graph."""
    recorded = (0, 0) if call.columns is None else tuple(call.columns.shape[:2])
    tokens = 0 if not call.pairs else num_vision_tokens(call)
    positions = tuple(sorted(call.positions.items()))
    return tuple(call.sample.shape), len(call.pairs), tokens, positions, recorded, call.return_output


def num_vision_tokens(call: UNetCall) -> int:
    """Tokens of the references."""
    keys_values = call.pairs[0].keys_values
    assert keys_values is not None, "padding comes after the real pairs"
    return next(iter(keys_values.values()))[0].shape[1]


def stack_columns(target_tokens: Sequence[Tensor]) -> Tensor:
    """Target words of several images, each [S, T] -> [B, S, T], padded to the largest S, at least 2."""
    num_subjects = max(2, *map(len, target_tokens))  # `torch.compile` specializes on a size of 1
    return torch.stack([torch.nn.functional.pad(t, (0, 0, 0, num_subjects - len(t))) for t in target_tokens])


def pair_bucket(number: int) -> int:
    """The number of pairs that a call with `number` pairs is padded to."""
    largest = PAIR_BUCKETS[-1]
    return next((b for b in PAIR_BUCKETS if b >= number), math.ceil(number / largest) * largest)


def _position_bucket(needed: int, num_positions: int) -> int:
    buckets = (max(MIN_POSITIONS, math.ceil(fraction * num_positions)) for fraction in POSITION_BUCKETS)
    return min(num_positions, next(b for b in buckets if b >= needed))


@lru_cache(maxsize=64)
def _empty_mask(num_positions: int, dtype: torch.dtype, device: torch.device) -> SortedMask:
    """A mask without positions. Its index has no position twice, since additions to one address are serialized."""
    index = torch.arange(num_positions, device=device)
    return SortedMask(index, torch.zeros(num_positions, 1, dtype=dtype, device=device), 0)
