"""Samples as tensors on the device, from sources that render there.

Legend: B samples, H, W size of the images, S side of the references; all in px.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PixelBatch:
    """Images of one size with everything that the frozen models encode.

    Attributes:
        images: target images in [0, 1], float32 [B, 3, H, W].
        references: reference images after the curriculum's crop in [0, 1], float32 [B, 3, S, S].
        captions: the text of each sample.
        original_size: height and width of all images before resizing. None is cropped.
        inside: 1 inside the reference's subjects and 0 elsewhere, float32 [B, ...]; of any size.
    """

    images: Tensor
    references: Tensor
    captions: list[str]
    original_size: tuple[int, int]
    inside: Tensor
