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

KeysValues = dict[str, tuple[Tensor, Tensor]]  # layer name -> keys and values, each [B, tokens, C]


@dataclass(frozen=True)
class SparseMask:
    """The nonzero positions of masks.

    Attributes:
        index: positions in ascending order, int64 [S, K], where K is the size of the largest mask.
        weight: mask values at these positions, [S, K, 1]; 0 where a smaller mask is padded.
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def from_dense(cls, masks: Tensor) -> "SparseMask":
        """Convert masks [S, Q]. On a GPU this waits for the device, because K depends on the values."""
        inside = masks != 0  # NaN counts as inside, so that it propagates to the result
        count = max(2, int(inside.sum(dim=1).max()))  # `torch.compile` specializes on a size of 1
        index = inside.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
        return cls(index, masks.gather(1, index)[..., None])

    @classmethod
    def stack(cls, parts: Sequence["SparseMask"], offsets: Sequence[int]) -> "SparseMask":
        """Concatenate masks along S; the positions of each part are shifted by its offset."""
        count = max(part.index.shape[1] for part in parts)
        index = [F.pad(p.index, (0, count - p.index.shape[1])) + start for p, start in zip(parts, offsets, strict=True)]
        weight = [F.pad(p.weight, (0, 0, 0, count - p.weight.shape[1])) for p in parts]
        stacked = cls(torch.cat(index), torch.cat(weight))
        for tensor in (stacked.index, stacked.weight):  # K changes with every mask and must not trigger recompilation
            torch._dynamo.mark_dynamic(tensor, 1)
        return stacked


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
        keys_values: keys and values of the reference of each pair, each [1, N, C] in every layer.
        masks: the sparse masks at each attention level, with positions counted over all rows. None means that pair p
            is row p, for every row, and that the attention is unmasked.
    """

    keys_values: Sequence[KeysValues]
    masks: Mapping[int, SparseMask] | None

    def at(self, layer: str, level: int) -> LayerVision:
        """The visual attention of a layer at a resolution level."""
        key, value = stack_keys_values(self.keys_values, layer)
        return LayerVision(key, value, None if self.masks is None else self.masks[level])


def stack_keys_values(keys_values: Sequence[KeysValues], layer: str) -> tuple[Tensor, Tensor]:
    """Concatenate keys and values of one layer along the batch; a single entry is not copied."""
    keys, values = zip(*(kv[layer] for kv in keys_values), strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


def split_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, tokens, C] -> [B, H, tokens, d] with the number of heads of `like`."""
    return tokens.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, tokens, d] -> [B, tokens, C]."""
    return x.transpose(1, 2).flatten(2)
