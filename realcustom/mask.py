"""Recorded attention -> guidance masks (Eq. 14, 15, 18, Algorithm 1).

Legend: S subjects, h x w positions of the largest attention resolution, L layers.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MethodConfig

EPSILON = 1e-6  # keeps an all-zero map from dividing by zero; the release's value


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps [S, h, w] to `size`: area averages if both axes shrink, bilinear otherwise.

    Bilinear interpolation skips positions when it shrinks by more than 2, so that a small mask may vanish. At a factor
    of exactly 2, as between SDXL's levels, both give the same values.
    """
    height, width = values.shape[-2:]
    if (height, width) == tuple(size):
        return values
    if size[0] <= height and size[1] <= width:
        return F.interpolate(values[:, None], size=size, mode="area")[:, 0]
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def resize_by_height(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps with the scale factor of the heights on both axes, as in the authors' release; see `resize_map`.

    Both agree at most sizes. Where the release's factor yields a different width than `size`, the release fails; this
    function then resizes each axis by its own factor.
    """
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    factor = size[0] / values.shape[-2]
    if int(values.shape[-2] * factor) != size[0] or int(values.shape[-1] * factor) != size[1]:
        return resize_map(values, size)
    return F.interpolate(values[:, None], scale_factor=factor, mode="bilinear", align_corners=False)[:, 0]


def aggregate_attention_maps(maps: Sequence[Tensor], size: tuple[int, int], normalization: str) -> Tensor:
    """Resize the cross-attention of the target words to one resolution and average it over layers.

    Args:
        maps: one [S, h_l, w_l] map per layer, each at its own resolution.
        size: (h, w) of the highest resolution with attention.
        normalization: "min_max_per_layer" scales every layer to [0, 1] first; all other values average unscaled maps.
    Returns:
        [S, h, w].
    """
    if normalization == "min_max_per_layer":
        return _min_max(torch.stack([resize_map(m, size) for m in maps])).mean(dim=0)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for m in maps:
        by_size.setdefault((m.shape[-2], m.shape[-1]), []).append(m)
    # Resizing is linear, so the maps of each resolution are summed before they are resized: SDXL's 60 recorded layers
    # need one resize.
    sums = [resize_map(torch.stack(group).sum(dim=0), size) for group in by_size.values()]
    return torch.stack(sums).sum(dim=0) / len(maps)


def _min_max(values: Tensor) -> Tensor:
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return (values - low) / (high - low + EPSILON)


def normalize(relevance: Tensor, normalization: str) -> Tensor:
    """Normalize relevance [S, h, w]; see `MethodConfig.mask_normalization`."""
    if normalization == "max":
        return relevance / (relevance.amax(dim=(-2, -1), keepdim=True) + EPSILON)
    if normalization in ("min_max", "min_max_per_layer"):
        return _min_max(relevance)
    assert normalization == "none", normalization
    return relevance


def scope_size(scope_ratio: float, num_positions: int) -> int:
    """The number of positions a subject keeps: floor(γ_scope * h * w), at least 1."""
    # Exact arithmetic: in floating point 2700 * 0.7 is slightly less than 1890.
    return max(1, math.floor(num_positions * Fraction(str(float(scope_ratio)))))


def top_k_mask(relevance: Tensor, scope_ratio: float) -> Tensor:
    """Mark the fraction `scope_ratio` of most relevant positions of one map [h, w] (top-K, Sec. 3.3.1); bool [h, w]."""
    flat = relevance.flatten()
    # A stable sort resolves ties in favor of the first position, as Algorithm 1 does.
    kept = flat.argsort(descending=True, stable=True)[: scope_size(scope_ratio, flat.numel())]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, kept, True).view_as(relevance)


def round_robin_top_k(relevance: Tensor, scope_ratios: Sequence[float]) -> Tensor:
    """Algorithm 1: in each round, each subject selects its best free position, until it has its number of positions.

    Selections do not overlap. If the scopes sum to more than 1, the rounds end when no position is free. Each subject's
    positions are sorted once and visited in order, which selects the same positions as a search per round.

    Args:
        relevance: [S, h, w].
        scope_ratios: γ_scope of each subject, in (0, 1].
    Returns:
        bool [S, h, w], True at the selected positions of each subject.
    """
    num_subjects, num_positions = len(relevance), relevance[0].numel()
    ranking = relevance.flatten(1).sort(dim=1, descending=True, stable=True).indices.tolist()
    targets = [scope_size(ratio, num_positions) for ratio in scope_ratios]
    selected: list[list[int]] = [[] for _ in range(num_subjects)]
    next_rank = [0] * num_subjects
    free = [True] * num_positions
    num_free = num_positions
    choosing = list(range(num_subjects))
    while num_free and choosing:
        for subject in choosing[:num_free]:
            order, rank = ranking[subject], next_rank[subject]
            while not free[order[rank]]:
                rank += 1
            free[order[rank]] = False
            selected[subject].append(order[rank])
            next_rank[subject] = rank + 1
        num_free -= len(choosing[:num_free])
        choosing = [subject for subject in choosing if len(selected[subject]) < targets[subject]]
    kept = torch.zeros(num_subjects, num_positions, dtype=torch.bool)
    for row, positions in zip(kept, selected, strict=True):
        row[positions] = True
    return kept.view(relevance.shape).to(relevance.device)


def guidance_masks(relevance: Tensor, scope_ratios: Sequence[float], method: MethodConfig) -> Tensor:
    """Turn the relevance of every position to every subject into guidance masks (Eq. 15 and 18).

    Args:
        relevance: [S, h, w], M of Eq. 14 or the averaged cross-attention.
        scope_ratios: γ_scope of each subject, in (0, 1].
        method: how to normalize and select.
    Returns:
        [S, h, w] in [0, 1], 0 outside each subject's scope.
    """
    relevance = normalize(relevance, method.mask_normalization)
    if method.mask_selection == "threshold":
        threshold = 1 - relevance.new_tensor(list(scope_ratios))[:, None, None]
        # Both comparisons are the release's.
        kept = relevance > threshold if method.mask_binary else relevance >= threshold
    elif method.disjoint_masks and len(relevance) > 1:
        kept = round_robin_top_k(relevance, scope_ratios)
    else:
        kept = torch.stack([top_k_mask(r, ratio) for r, ratio in zip(relevance, scope_ratios, strict=True)])
    masks = kept.to(relevance.dtype) if method.mask_binary else relevance * kept
    if method.disjoint_masks and len(relevance) > 1 and method.mask_normalization == "max":
        # Another subject may have taken the best position of this one, so Eq. 18 divides by the maximum of the kept
        # values.
        masks = normalize(masks, "max")
    return masks
