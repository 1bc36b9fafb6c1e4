"""Grounding loss on the cross-attention of subject words, after TokenCompose (CVPR 2024).

docs/mini.md explains why the embedded model needs it.

Legend: B images, S subjects, T text tokens, h x w latent size, Q positions of a layer.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from realcustom.words import target_token_positions, words_of

from ..data.sprite_world.sprites import CATEGORIES

NUM_SUBJECTS = 2  # at most, in an image of the sprite world
GROUNDING_WEIGHT = 0.03  # relative to the diffusion loss
EPSILON = 1e-6  # lower bound of attention and of areas


def subject_token_masks(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Tensor:
    """Mark the tokens of each subject's word with 1, in the order of the caption; float32 [B, S, T]."""
    masks = torch.zeros(len(captions), NUM_SUBJECTS, tokenizer.model_max_length)
    for mask, caption in zip(masks, captions, strict=True):
        for subject, positions in enumerate(_subject_positions(tokenizer, caption)):
            mask[subject, positions] = 1
    return masks


@lru_cache(maxsize=10_000)
def _subject_positions(tokenizer: PreTrainedTokenizerBase, caption: str) -> tuple[list[int], ...]:
    named = (word for word in words_of(caption) if word in CATEGORIES)
    return tuple(target_token_positions(tokenizer, caption, word) for word in named)


def subject_maps(subject_bits: Tensor) -> Tensor:
    """`subject_bits` [B, h, w] of `RenderSamples` -> one map per subject, float32 [B, S, h, w]."""
    return torch.stack([(subject_bits >> subject) & 1 for subject in range(NUM_SUBJECTS)], dim=1).float()


def grounding_loss(attention_maps: Iterable[tuple[int, Tensor]], subjects: Tensor) -> Tensor:
    """KL divergence between the area of a subject and the attention to its word, in nats; mean over words and layers.

    Both are distributions over positions. The loss is zero if attention is uniform inside the area and zero outside.
    Attention must also cover the area: if it concentrates on a few positions, the guidance mask, which is divided by
    its maximum (Eq. 15), suppresses all others.

    Args:
        attention_maps: per layer, its level and the attention to each subject's word, [B, S, Q]; see
            `AttentionRecorder.cross_maps`. A subject without a word in the caption has zeros and is ignored.
        subjects: area of each subject, [B, S, h, w] in [0, 1]. A subject without an area is ignored.
    """
    losses = []
    for level, attention in attention_maps:
        area = F.avg_pool2d(subjects, 2**level, ceil_mode=True).flatten(2)  # [B, S, Q]
        size, total = area.sum(-1, keepdim=True), attention.sum(-1, keepdim=True)
        counts = ((size > 0) & (total.detach() > 0)).squeeze(-1)
        expected, attended = area / size.clamp_min(EPSILON), attention / total.clamp_min(EPSILON)
        divergence = torch.special.xlogy(expected, expected) - expected * attended.clamp_min(EPSILON).log()
        losses.append((divergence.sum(-1) * counts).sum() / counts.sum().clamp_min(1))
    return torch.stack(losses).mean()
