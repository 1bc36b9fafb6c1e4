"""Recorded attention -> guidance masks (Eq. 14, 15, 18, Algorithm 1) -> the positions inside them (Eq. 16, 19).

Legend: S subjects, h x w positions of the largest attention resolution, Q = h * w; K positions inside a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MethodConfig

EPSILON = 1e-6  # keeps an all-zero map from dividing by zero; the release's value


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of [S, h, w] maps to `size`; a map that has the size already is returned as it is."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def resize_by_height(values: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resize_map`, by one factor for both axes: that of the heights, as the release resizes its masks.

    At most sizes both agree. Where the release's arithmetic gives another width than `size` has, it fails; there the
    axes are resized each by its own factor.
    """
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    factor = size[0] / values.shape[-2]
    if int(values.shape[-2] * factor) != size[0] or int(values.shape[-1] * factor) != size[1]:
        return resize_map(values, size)
    return F.interpolate(values[:, None], scale_factor=factor, mode="bilinear", align_corners=False)[:, 0]


def aggregate_attention_maps(maps: Sequence[Tensor], size: tuple[int, int], normalization: str) -> Tensor:
    """Cross-attention of the target words, resized to the largest map and averaged over layers.

    Args:
        maps: one [S, h_l, w_l] map per layer, each at its own resolution.
        size: (h, w) of the largest map.
        normalization: "min_max_per_layer" scales every layer to [0, 1] first; all others average as they are.
    Returns:
        [S, h, w].
    """
    if normalization == "min_max_per_layer":
        return _min_max(torch.stack([resize_map(m, size) for m in maps])).mean(dim=0)
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for m in maps:
        alike.setdefault(tuple(m.shape[-2:]), []).append(m)
    # A sum may be resized as well as what it sums: once per resolution, of which SDXL's 60 layers have one.
    sums = [resize_map(torch.stack(group).sum(dim=0), size) for group in alike.values()]
    return torch.stack(sums).sum(dim=0) / len(maps)


def _min_max(values: Tensor) -> Tensor:
    low, high = values.amin(dim=(-2, -1), keepdim=True), values.amax(dim=(-2, -1), keepdim=True)
    return (values - low) / (high - low + EPSILON)


def normalize(relevance: Tensor, normalization: str) -> Tensor:
    """Relevance [S, h, w] to [0, 1]; see `MethodConfig.mask_normalization` for the ways."""
    if normalization == "max":
        return relevance / (relevance.amax(dim=(-2, -1), keepdim=True) + EPSILON)
    if normalization in ("min_max", "min_max_per_layer"):
        return _min_max(relevance)
    assert normalization == "none", normalization
    return relevance


def scope_size(scope_ratio: float, num_positions: int) -> int:
    """floor(γ_scope * h * w), the number of positions a subject keeps; at least one."""
    return max(1, int(num_positions * scope_ratio))


def top_k_mask(relevance: Tensor, scope_ratio: float) -> Tensor:
    """Marks the `scope_ratio` most relevant positions of one map (top-K, Sec. 3.3.1); bool, shaped as `relevance`."""
    flat = relevance.flatten()
    kept = flat.topk(scope_size(scope_ratio, flat.numel())).indices
    return torch.zeros_like(flat, dtype=torch.bool).index_fill(0, kept, True).view_as(relevance)


def round_robin_top_k(relevance: Tensor, scope_ratios: Sequence[float]) -> Tensor:
    """Algorithm 1: the subjects take turns picking their best free position until each has its share.

    Positions never overlap. Where the shares sum to more than there are positions, the turns end with the last one.
    Sorting once per subject and walking down the list gives the algorithm's picks without a search per pick.

    Args:
        relevance: [S, h, w].
        scope_ratios: γ_scope of each subject, in (0, 1].
    Returns:
        bool [S, h, w], marking the picks of each subject.
    """
    num_subjects, num_positions = len(relevance), relevance[0].numel()
    ranking = relevance.flatten(1).sort(dim=1, descending=True, stable=True).indices.tolist()
    wanted = [scope_size(ratio, num_positions) for ratio in scope_ratios]
    picks: list[list[int]] = [[] for _ in range(num_subjects)]
    walks = [iter(order) for order in ranking]
    free = [True] * num_positions
    num_free = num_positions
    while num_free and any(len(p) < n for p, n in zip(picks, wanted, strict=True)):
        for walk, pick, number in zip(walks, picks, wanted, strict=True):
            if num_free and len(pick) < number:
                position = next(p for p in walk if free[p])
                free[position] = False
                num_free -= 1
                pick.append(position)
    kept = torch.zeros(num_subjects, num_positions, dtype=torch.bool)
    for row, pick in zip(kept, picks, strict=True):
        row[pick] = True
    return kept.view(relevance.shape).to(relevance.device)


def guidance_masks(relevance: Tensor, scope_ratios: Sequence[float], method: MethodConfig) -> Tensor:
    """Relevance of every position to every subject -> guidance masks (Eq. 15 and 18).

    Args:
        relevance: [S, h, w], M of Eq. 14 or the averaged cross-attention.
        scope_ratios: γ_scope of each subject.
        method: how to normalize and select.
    Returns:
        [S, h, w] in [0, 1], 0 outside each subject's scope.
    """
    relevance = normalize(relevance, method.mask_normalization)
    if method.mask_selection == "threshold":
        floor = 1 - relevance.new_tensor(list(scope_ratios))[:, None, None]
        kept = relevance > floor if method.mask_binary else relevance >= floor
    elif method.disjoint_masks and len(relevance) > 1:
        kept = round_robin_top_k(relevance, scope_ratios)
    else:
        kept = torch.stack([top_k_mask(r, ratio) for r, ratio in zip(relevance, scope_ratios, strict=True)])
    masks = kept.to(relevance.dtype) if method.mask_binary else relevance * kept
    if method.disjoint_masks and len(relevance) > 1 and method.mask_normalization == "max":
        # A subject may have lost its best position to another one, so Eq. 18 divides by what it kept.
        masks = normalize(masks, "max")
    return masks


@dataclass(frozen=True)
class SparseMask:
    """Where masks are not zero: all that visual attention has to compute (Eq. 16, 19).

    Attributes:
        index: positions in ascending order, int64 [S, K], K being that of the largest mask.
        weight: the mask there, [S, K, 1]; 0 where a smaller mask has no more positions.
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def from_dense(cls, masks: Tensor) -> "SparseMask":
        """From masks [S, Q]; on a GPU this waits for them."""
        inside = masks != 0  # NaN counts, so that it is not lost
        count = max(2, int(inside.sum(dim=1).max()))  # `torch.compile` makes another program for one
        index = inside.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
        return cls(index, masks.gather(1, index)[..., None])

    @classmethod
    def stack(cls, parts: Sequence["SparseMask"], offsets: Sequence[int]) -> "SparseMask":
        """All subjects of `parts`, the positions of each part counted from its offset."""
        count = max(part.index.shape[1] for part in parts)
        index = [F.pad(p.index, (0, count - p.index.shape[1])) + start for p, start in zip(parts, offsets, strict=True)]
        weight = [F.pad(p.weight, (0, 0, 0, count - p.weight.shape[1])) for p in parts]
        stacked = cls(torch.cat(index), torch.cat(weight))
        for tensor in (stacked.index, stacked.weight):  # other masks have other counts, and no program of their own
            torch._dynamo.mark_dynamic(tensor, 1)
        return stacked
