"""Guidance masks in the subjects' colors over an image."""

from collections.abc import Sequence

from PIL import Image

# One color per subject, told apart by people with any color vision (Okabe and Ito).
SUBJECT_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
STRENGTH = 0.75  # opacity where a mask is 1


def overlay_masks(image: Image.Image, masks: Sequence[Image.Image]) -> Image.Image:
    """The image, grayed, with each mask in its subject's color.

    Args:
        image: RGB.
        masks: gray images of the same size, one per subject.
    """
    shown = Image.blend(image, image.convert("L").convert("RGB"), 0.6) if masks else image.copy()
    for index, mask in enumerate(masks):
        color = Image.new("RGB", image.size, SUBJECT_COLORS[index % len(SUBJECT_COLORS)])
        shown.paste(color, mask=mask.convert("L").point(lambda value: int(value * STRENGTH)))
    return shown
