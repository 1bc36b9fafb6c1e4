"""Text conditions of frozen text encoders, each caption encoded once: the sprite world has nine thousand of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CaptionCache:
    """Args:
    encode: captions -> hidden states [B, T, C] and pooled text [B, D], by encoders that no longer change.
    """

    def __init__(self, encode: Callable[[list[str]], tuple[Tensor, Tensor]]) -> None:
        self._encode = encode
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] and pooled text [B, D] of the captions, without gradients."""
        if new := sorted(set(captions) - self._known.keys()):
            self._known.update(zip(new, zip(*self._encode(new), strict=True), strict=True))
        hidden, pooled = zip(*(self._known[caption] for caption in captions), strict=True)
        return torch.stack(hidden), torch.stack(pooled)
