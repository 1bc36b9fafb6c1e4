"""Records attention for the guidance masks, reduced at the source: no attention map is stored at full size.

The product of an attention map with a few columns is attention with these columns as values. The fused attention kernel
therefore computes both factors of Eq. 14: cross-attention summed over the target words (the columns mark the words) and
self-attention times a relevance map (the column is the map).

Legend: R rows of a UNet call, the first B of them recorded, S subjects, H heads, Q positions, T text tokens, d head
width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import aggregate_attention_maps


def attention_times(query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """Mean over heads of softmax(Q K^T) times `columns`, computed without materializing the attention map.

    Args:
        query: [R, H, Q, d]; the first B rows are used.
        key: [R, H, K, d]; the first B rows are used.
        columns: [B, K, S].
    Returns:
        [B, Q, S] in fp32.
    """
    parts = columns.split(query.shape[-1], dim=-1)  # fused kernels require values as wide as the keys
    width, dtype = query.shape[-1], query.dtype
    products = [_times_values(query, key, as_values(part, width, dtype), part.shape[-1]) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def as_values(columns: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Columns [B, K, S] -> values [B, 1, K, width], padded with zeros."""
    return F.pad(columns, (0, width - columns.shape[-1])).to(dtype)[:, None]


def _times_values(query: Tensor, key: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """Mean over heads of softmax(Q K^T) times the first columns of values [B, 1, K, d]: fp32 [B, Q, num_columns]."""
    count = len(values)
    out = F.scaled_dot_product_attention(query[:count], key[:count], values.expand(-1, query.shape[1], -1, -1))
    return out[..., :num_columns].mean(dim=1, dtype=torch.float32)


class CrossRecording:
    """Cross-attention of one layer, summed over each subject's target words: `relevance` [B, S, Q].

    Args:
        columns: marks the tokens of each subject's words, [B, T, S].
        values: `as_values` of the columns, which all layers of one width share; None computes them in each layer.
    """

    def __init__(self, columns: Tensor, values: Tensor | None) -> None:
        self._columns, self._values = columns, values
        self.relevance: Tensor | None = None

    def record(self, query: Tensor, key: Tensor) -> None:
        if self._values is None:
            relevance = attention_times(query, key, self._columns)
        else:
            relevance = _times_values(query, key, self._values, self._columns.shape[-1])
        self.relevance = relevance.transpose(1, 2)


class SelfRecording:
    """Queries and keys of one self-attention layer, to compute M_self times any columns without M_self itself.

    Args:
        rows: [B, ...], gives the number of rows that are recorded; None records all rows.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self._rows = rows
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def record(self, query: Tensor, key: Tensor) -> None:
        if self._rows is not None:  # copies, so that the memory of the other rows is released
            query, key = query[: len(self._rows)].clone(), key[: len(self._rows)].clone()
        self.query, self.key = query, key

    def times(self, columns: Tensor) -> Tensor:
        """M_self, averaged over heads, times columns [B, Q, S]: [B, Q, S]."""
        assert self.query is not None and self.key is not None, "a layer that should record did not run"
        return attention_times(self.query, self.key, columns)


class AttentionRecorder:
    """Collects what the guidance masks need from the first B rows of one UNet call.

    Args:
        levels: resolution level of every attention layer, by name.
        mask_maps: the attention maps a mask is computed from, see `MethodConfig.mask_maps`.
        target_tokens: marks the tokens of each subject's words, [B, S, T] of 0 and 1.
        all_rows: whether all rows of the call are recorded.
        head_widths: channels of an attention head of each layer. If given, the columns are converted once for all
            layers of one width instead of in each layer.
        dtype: of the queries, if `head_widths` is given.

    Attributes:
        layers: name -> recording, for `AttentionLayers.attention_context`.
    """

    def __init__(
        self,
        levels: dict[str, int],
        mask_maps: str,
        target_tokens: Tensor,
        *,
        all_rows: bool = False,
        head_widths: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        cross_levels, self_level = recorded_levels(levels, mask_maps)
        columns = target_tokens.transpose(1, 2)
        values: dict[int, Tensor] = {}  # by head width
        self.levels, self.num_subjects = levels, target_tokens.shape[1]
        self.layers: dict[str, CrossRecording | SelfRecording] = {}
        for name, level in levels.items():
            if name.endswith("attn2") and level in cross_levels:
                width = 0 if head_widths is None else head_widths[name]
                if self.num_subjects <= width and width not in values:
                    values[width] = as_values(columns, width, dtype)
                self.layers[name] = CrossRecording(columns, values.get(width))
            elif name.endswith("attn1") and level == self_level:
                self.layers[name] = SelfRecording(None if all_rows else target_tokens)

    @property
    def cross_maps(self) -> dict[str, tuple[int, Tensor]]:
        """Layer -> (level, relevance [B, S, Q])."""
        maps = {}
        for name, recording in self.layers.items():
            if isinstance(recording, CrossRecording):
                assert recording.relevance is not None, f"{name} should record but did not run"
                maps[name] = (self.levels[name], recording.relevance)
        return maps

    def relevance(self, sizes: Sequence[tuple[int, int]], normalization: str) -> Tensor:
        """Cross-attention to the target words, times M_self averaged over heads and the recorded layers (Eq. 14).

        Without recorded self-attention, the cross-attention alone.

        Args:
            sizes: (h, w) of every level.
            normalization: see `aggregate_attention_maps`.
        Returns:
            [B, S, h, w] at the highest resolution with attention.
        """
        maps = [m.flatten(0, 1).unflatten(-1, sizes[level]) for level, m in self.cross_maps.values()]
        relevance = aggregate_attention_maps(maps, sizes[min(self.levels.values())], normalization)  # [B * S, h, w]
        relevance = relevance.unflatten(0, (-1, self.num_subjects))
        recordings = [r for r in self.layers.values() if isinstance(r, SelfRecording)]
        return self_attention_times(recordings, relevance) if recordings else relevance


def self_attention_times(recordings: Sequence[SelfRecording], relevance: Tensor) -> Tensor:
    """M_self, averaged over heads and layers, times relevance [B, S, h, w], in the same shape."""
    columns = relevance.flatten(2).transpose(1, 2)
    # Relevance may be far below 1, where half precision has few digits left, so each column is scaled to 1.
    scale = columns.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
    products = torch.stack([recording.times(columns / scale) for recording in recordings])
    return (products.mean(dim=0) * scale).transpose(1, 2).view_as(relevance)


def recorded_levels(levels: dict[str, int], mask_maps: str) -> tuple[frozenset[int], int | None]:
    """Return the levels a mask is computed from: (levels of the cross-attention, level of the self-attention or None).

    The largest resolution with attention is "high", every smaller one is "low". For SDXL at 1024 px these are 64 x 64
    and 32 x 32, as in the paper; for SD1.5 at 512 px they are 64 x 64, and 32 x 32 down to 8 x 8. A UNet with attention
    at a single resolution uses it for both.

    Args:
        levels: level of every attention layer by name.
        mask_maps: see `MethodConfig.mask_maps`.
    """
    present = set(levels.values())
    high = min(present)
    if mask_maps == "all_cross":
        return frozenset(present), None
    return frozenset(present - {high} or present), high
