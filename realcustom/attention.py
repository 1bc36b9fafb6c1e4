"""The attention processors, and the only knowledge of the UNet's insides: which layer works at which resolution.

The processors own no weights and keep nothing between calls. Two keyword doors lead in and out through
`cross_attention_kwargs`: `vision` (subjects, their keys and values, their masks) and `recorder` (what the guidance
branch attends to). Without them every layer computes exactly what the stock processor computes.

Legend: R rows of the UNet call, P (row, subject) pairs, H heads, Q = h * w positions, T text tokens, N vision tokens,
C channels of a layer, d = C / H.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import VisionKeysValues


@dataclass(frozen=True, kw_only=True)
class VisualAttention:
    """Who sees which reference where: the second summand of Eq. 16 and 19.

    Attributes:
        rows: row of the UNet call that pair p belongs to, int64 [P]; None where pair p is row p for every row.
        keys_values: per pair the keys and values of its reference, each [1, N, C] in every layer.
        masks: guidance mask at each attention level, level -> [P, Q, 1] in [0, 1]; None attends everywhere.
    """

    rows: Tensor | None
    keys_values: Sequence[VisionKeysValues]
    masks: dict[int, Tensor] | None

    def attend(self, layer: str, level: int, query: Tensor) -> Tensor:
        """Masked visual attention of every pair summed into its row; query [R, H, Q, d] -> [R, Q, C]."""
        key = _stack(kv[layer][0] for kv in self.keys_values)
        value = _stack(kv[layer][1] for kv in self.keys_values)
        asked = query if self.rows is None else query[self.rows]
        seen = _merge_heads(F.scaled_dot_product_attention(asked, *(_split_heads(x, query) for x in (key, value))))
        if self.masks is not None:
            seen = seen * self.masks[level].to(seen.dtype)
        if self.rows is None:
            return seen
        return seen.new_zeros(len(query), *seen.shape[1:]).index_add(0, self.rows, seen)


def _stack(parts) -> Tensor:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, tokens, C] -> [B, H, tokens, d] with the heads of `like`."""
    return tokens.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class RealCustomAttnProcessor:
    """Eq. 4, 16 and 19 in one layer of a stock diffusers UNet; self-attention and cross-attention alike.

    Args:
        layer: name of the attention module in the UNet.
        level: resolution level of the layer, 0 for the latent's own resolution.
    """

    def __init__(self, layer: str, level: int) -> None:
        self.layer = layer
        self.level = level

    # diffusers hands on only the keywords it finds in this signature, so both doors are spelled out.
    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        vision: VisualAttention | None = None,
        recorder=None,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = _split_heads(attn.to_k(text), query)
        value = _split_heads(attn.to_v(text), query)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
            attention_mask = attention_mask.view(len(text), attn.heads, -1, attention_mask.shape[-1])
        out = _merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        if recorder is not None:
            recorder.record(self.layer, self.level, query, key, is_cross=encoder_hidden_states is not None)
        if vision is not None and encoder_hidden_states is not None:
            out = out + vision.attend(self.layer, self.level, query)
        out = attn.to_out[1](attn.to_out[0](out))
        return out / attn.rescale_output_factor


def attention_level(layer: str, num_levels: int) -> int:
    """Resolution level of an attention module by its name: how often the latent was halved before it."""
    block, index = layer.split(".")[:2]
    if block == "down_blocks":
        return int(index)
    if block == "up_blocks":
        return num_levels - 1 - int(index)
    assert block == "mid_block", layer
    return num_levels - 1


def level_sizes(height: int, width: int, num_levels: int) -> list[tuple[int, int]]:
    """(h, w) of every level for a latent of height x width; each downsampling rounds up, as the UNet's stride does."""
    sizes = [(height, width)]
    for _ in range(num_levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def install_processors(unet) -> Callable[[], None]:
    """Give every attention layer of a stock UNet our processor; returns a function that puts the old ones back."""
    num_levels = len(unet.config.down_block_types)
    before = dict(unet.attn_processors)
    unet.set_attn_processor(
        {
            name: RealCustomAttnProcessor(layer := name.removesuffix(".processor"), attention_level(layer, num_levels))
            for name in before
        }
    )
    return lambda: unet.set_attn_processor(dict(before))
