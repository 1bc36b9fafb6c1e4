"""Guidance masks drawn over an image, one color per subject."""

from collections.abc import Sequence

from PIL import Image

SUBJECT_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito: safe for color-blind viewers
OPACITY = 0.75  # where a mask is 1
DESATURATION = 0.6  # of the image under the masks, so that the colors stand out


def overlay_masks(image: Image.Image, masks: Sequence[Image.Image]) -> Image.Image:
    """The image, partly desaturated, with each mask in the color of its subject; an unchanged copy without masks.

    Args:
        image: mode "RGB".
        masks: mode "L", same size as the image, one per subject.
    """
    if not masks:
        return image.copy()
    overlay = Image.blend(image, image.convert("L").convert("RGB"), DESATURATION)
    for index, mask in enumerate(masks):
        color = Image.new("RGB", image.size, SUBJECT_COLORS[index % len(SUBJECT_COLORS)])
        overlay.paste(color, mask=mask.convert("L").point(lambda value: int(value * OPACITY)))
    return overlay
