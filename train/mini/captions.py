"""Text conditions from frozen text encoders. Each caption of the sprite world is encoded once.

Legend: B batch, T text tokens, C channels of the hidden states, D channels of the pooled text.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CaptionCache:
    """Caches the text conditions of captions.

    Args:
        encode: captions -> hidden states [B, T, C] and pooled text [B, D]. The encoders must be frozen.
    """

    def __init__(self, encode: Callable[[list[str]], tuple[Tensor, Tensor]]) -> None:
        self._encode = encode
        self._cached: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] and pooled text [B, D] of the captions, without gradients."""
        if new := sorted(set(captions) - self._cached.keys()):
            self._cached.update(zip(new, zip(*self._encode(new), strict=True), strict=True))
        hidden, pooled = zip(*(self._cached[caption] for caption in captions), strict=True)
        return torch.stack(hidden), torch.stack(pooled)
