"""Words look where they are: a small loss on the cross-attention of subject words, after TokenCompose (CVPR 2024).

In SDXL it comes by itself that the pixels of a dog attend to "dog", which is what guidance masks are made of. A model
that sees a thousandth of SDXL's pictures needs to be told.

Legend: B pictures, S subjects, T text tokens, h x w latent size, Q positions of a layer.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from realcustom.words import target_token_positions, words_of

from .data.sprites import CATEGORIES

NUM_SUBJECTS = 2  # at most, in a picture of the sprite world
GROUNDING_WEIGHT = 0.03  # of this loss beside the diffusion loss
EPSILON = 1e-6  # attention below this counts as this much


def subject_marks(tokenizer, captions: Sequence[str]) -> Tensor:
    """Marks the words of each subject, in the order in which the caption names them; fp32 [B, S, T]."""
    marks = torch.zeros(len(captions), NUM_SUBJECTS, tokenizer.model_max_length)
    for mark, caption in zip(marks, captions, strict=True):
        for subject, positions in enumerate(_subject_positions(tokenizer, caption)):
            mark[subject, positions] = 1
    return marks


@lru_cache(maxsize=10_000)
def _subject_positions(tokenizer, caption: str) -> tuple[list[int], ...]:
    named = (word for word in words_of(caption) if word in CATEGORIES)
    return tuple(target_token_positions(tokenizer, caption, word) for word in named)


def places_of(where: Tensor) -> Tensor:
    """`where` [B, h, w] of `RenderSamples` -> a map for each subject, fp32 [B, S, h, w]."""
    return torch.stack([(where >> subject) & 1 for subject in range(NUM_SUBJECTS)], dim=1).float()


def grounding_loss(maps: Iterable[tuple[int, Tensor]], places: Tensor) -> Tensor:
    """How far the attention to a word is from lying evenly over its subject's place, and nowhere else.

    The divergence KL(place || attention) of the two as distributions over positions, in nats, mean over words and
    layers. That attention stays inside the place is not enough: drawn to a few positions of it, a guidance mask, which
    divides by its maximum (Eq. 15), lets only those see the reference.

    Args:
        maps: per layer its level and the attention to each subject's words, [B, S, Q]; see
            `AttentionRecorder.cross_maps`. Subjects without words in the caption have zeros, and do not count.
        places: where each subject is, [B, S, h, w] in [0, 1]. Subjects without a place do not count.
    """
    losses = []
    for level, attention in maps:
        where = F.avg_pool2d(places, 2**level, ceil_mode=True).flatten(2)
        size, total = where.sum(-1, keepdim=True), attention.sum(-1, keepdim=True)
        counts = ((size > 0) & (total.detach() > 0)).squeeze(-1)
        where, seen = where / size.clamp_min(EPSILON), attention / total.clamp_min(EPSILON)
        divergence = torch.special.xlogy(where, where) - where * seen.clamp_min(EPSILON).log()
        losses.append((divergence.sum(-1) * counts).sum() / counts.sum().clamp_min(1))
    return torch.stack(losses).mean()
