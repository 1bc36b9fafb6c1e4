"""Visual attention inside the guidance masks: the second term of Eq. 16 and Eq. 19.

Only positions inside a mask attend to a reference. They are gathered, attended and scattered back. The cost is
proportional to the area of the masks, and the result equals dense attention multiplied by the masks.

Legend: R rows of the UNet call, P (row, subject) pairs, S subjects, H heads, Q = h * w positions, K of them inside a
mask, N vision tokens, C channels of a layer, d = C / H.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .keys_values import KeysValues, stack_keys_values


@dataclass(frozen=True)
class SparseMask:
    """The nonzero positions of masks.

    Attributes:
        index: positions, counted over all rows of the call, int64 [P, K]: first those inside the mask in ascending
            order, then padding with positions outside of it. K is at least the size of the largest mask.
        weight: mask values at these positions, [P, K, 1]; 0 at padding.
    """

    index: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class SortedMask:
    """One mask with its positions sorted so that the nonzero ones come first. Compared by identity,
    which needs no read from the device.

    Attributes:
        index: all positions, int64 [Q]: those inside the mask in ascending order, then the others.
        weight: mask values at these positions, [Q, 1].
        count: number of positions inside the mask.
    """

    index: Tensor
    weight: Tensor
    count: int


def sort_masks(groups: Sequence[Tensor], dtype: torch.dtype) -> list[list[SortedMask]]:
    """Sort the positions of masks. All masks together need one read from the device.

    Args:
        groups: masks [S, Q]; each group may have another S and Q.
        dtype: of the weights.
    """
    inside = [masks != 0 for masks in groups]  # NaN counts as inside, so that it propagates to the result
    counts = iter(torch.cat([i.sum(dim=1) for i in inside]).tolist())
    result = []
    for masks, mask_inside in zip(groups, inside, strict=True):
        index = mask_inside.byte().sort(dim=1, descending=True, stable=True).indices
        weight = masks.gather(1, index)[..., None].to(dtype)
        result.append([SortedMask(i, w, next(counts)) for i, w in zip(index, weight, strict=True)])
    return result


@dataclass(frozen=True)
class LayerVision:
    """The visual attention of one layer: keys and values [P, N, C] and the masks; see `VisualAttention`."""

    key: Tensor
    value: Tensor
    mask: SparseMask | None

    def add_to(self, out: Tensor, query: Tensor) -> Tensor:
        """Add the masked visual attention of every pair to its row of `out` [R, Q, C]; query [R, H, Q, d]."""
        key, value = split_heads(self.key, query), split_heads(self.value, query)
        if self.mask is None:
            return out + merge_heads(F.scaled_dot_product_attention(query, key, value))
        index = self.mask.index.flatten()
        inside = merge_heads(query).flatten(0, 1).index_select(0, index).unflatten(0, self.mask.index.shape)
        visual = merge_heads(F.scaled_dot_product_attention(split_heads(inside, query), key, value))  # [P, K, C]
        visual = visual * self.mask.weight.to(visual.dtype)
        return out.flatten(0, 1).index_add(0, index, visual.flatten(0, 1)).view_as(out)


@dataclass(frozen=True, kw_only=True)
class VisualAttention:
    """The references and masks of one UNet call.

    Attributes:
        keys_values: keys and values of the references, each [1, N, C] in every layer, or those of all pairs in one
            entry, each [P, N, C].
        masks: the sparse masks at each attention level, with positions counted over all rows. None means that pair p
            is row p, for every row, and that the attention is unmasked.
    """

    keys_values: Sequence[KeysValues]
    masks: Mapping[int, SparseMask] | None

    def at(self, layer: str, level: int) -> LayerVision:
        """The visual attention of a layer at a resolution level."""
        key, value = stack_keys_values(self.keys_values, layer)
        return LayerVision(key, value, None if self.masks is None else self.masks[level])


def split_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, tokens, C] -> [B, H, tokens, d] with the number of heads of `like`."""
    return tokens.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, tokens, d] -> [B, tokens, C]."""
    return x.transpose(1, 2).flatten(2)
