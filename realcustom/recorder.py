"""What the guidance branch attends to, reduced as it arrives: no attention map is ever stored at full size.

A product of an attention map with a few columns is attention with those columns as values, so the fused kernel
computes both what Eq. 14 needs: cross-attention summed over the target words (columns mark the words), and
self-attention times a relevance map (the column is the map).

Legend: B rows, S subjects, H heads, Q positions, T text tokens, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RecordingComplete(Exception):
    """Leaves the UNet once everything the mask needs is recorded; the rest of the pass would be thrown away."""


def attention_times(query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """Mean over heads of softmax(Q K^T) times `columns`, without the map.

    Args:
        query: [B, H, Q, d].
        key: [B, H, K, d].
        columns: [B, K, S], S columns to multiply with.
    Returns:
        [B, Q, S] in fp32.
    """
    num_columns, width = columns.shape[-1], query.shape[-1]
    outs = []
    for part in columns.split(width, dim=-1):  # fused kernels want values as wide as the keys
        value = F.pad(part, (0, width - part.shape[-1])).to(query.dtype)
        value = value[:, None].expand(-1, query.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(query, key, value)
        outs.append(out[..., : part.shape[-1]].float().mean(dim=1))
    out = torch.cat(outs, dim=-1)
    assert out.shape[-1] == num_columns
    return out


class AttentionRecorder:
    """Collects what a mask needs from one guidance pass.

    Args:
        target_tokens: marks the tokens of each subject's words, [B, S, T] of 0 and 1.
        cross_levels: levels whose cross-attention is recorded.
        self_level: level whose self-attention is kept (queries and keys only), or None.
        num_layers: how many layers will be recorded; the pass is left after the last one.

    Attributes:
        cross_maps: layer -> (level, relevance [B, S, Q]), in forward order.
        self_queries_keys: queries and keys of each self-attention layer at `self_level`.
    """

    def __init__(
        self, target_tokens: Tensor, *, cross_levels: frozenset[int], self_level: int | None, num_layers: int
    ) -> None:
        self.columns = target_tokens.transpose(1, 2)  # [B, T, S]
        self.cross_levels = cross_levels
        self.self_level = self_level
        self.num_missing = num_layers
        self.cross_maps: dict[str, tuple[int, Tensor]] = {}
        self.self_queries_keys: list[tuple[Tensor, Tensor]] = []

    def record(self, layer: str, level: int, query: Tensor, key: Tensor, *, is_cross: bool) -> None:
        if is_cross and level in self.cross_levels:
            self.cross_maps[layer] = (level, attention_times(query, key, self.columns).transpose(1, 2))
        elif not is_cross and level == self.self_level:
            self.self_queries_keys.append((query, key))
        else:
            return
        self.num_missing -= 1
        assert self.num_missing >= 0, f"{layer} was recorded beyond the planned layers"
        if self.num_missing == 0:
            raise RecordingComplete

    def self_attention_times(self, relevance: Tensor) -> Tensor:
        """M_self times `relevance` (Eq. 14), averaged over heads and the recorded layers; [B, S, Q] -> [B, S, Q]."""
        columns = relevance.transpose(1, 2)
        products = [attention_times(query, key, columns) for query, key in self.self_queries_keys]
        return torch.stack(products).mean(dim=0).transpose(1, 2)


def plan_recording(layers: dict[str, int], mask_maps: str) -> tuple[frozenset[int], int | None, int]:
    """Which levels a mask is built from: (cross levels, self level, number of recorded layers).

    Resolutions are told apart by size: the largest one with attention is "high", every smaller one is "low".
    A UNet with attention at a single resolution uses it for both.

    Args:
        layers: level of every attention layer, self-attention (attn1) and cross-attention (attn2), by name.
        mask_maps: see `MethodConfig.mask_maps`.
    """
    levels = set(layers.values())
    high = min(levels)
    if mask_maps == "all_cross":
        cross_levels, self_level = frozenset(levels), None
    else:
        cross_levels, self_level = frozenset(levels - {high} or levels), high
    count = sum(
        level in cross_levels if name.endswith("attn2") else level == self_level for name, level in layers.items()
    )
    return cross_levels, self_level, count
