"""Kinds of precomputed features, and the names of their tensors.

Legend: C latent channels, h, w latent size, T text tokens, D channels of the text, P of the pooled text, L shallow
layers, N vision tokens, V their channels.
"""

from typing import Literal, get_args

Kind = Literal["latents", "text", "vision"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: dict[Kind, tuple[str, ...]] = {
    "latents": ("latents",),  # [C, h, w]
    "text": ("embeds", "pooled"),  # [T, D], [P]
    "vision": ("shallow", "deep", "local"),  # [L * N, V], [N, V], [4 * N, V]
}
