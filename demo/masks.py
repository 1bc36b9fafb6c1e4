"""Guidance masks in the subjects' colours over a picture."""

from collections.abc import Sequence

from PIL import Image

# One colour per subject, told apart by people with any colour vision (Okabe and Ito).
SUBJECT_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
STRENGTH = 0.75  # opacity where a mask is 1


def lay_over(image: Image.Image, masks: Sequence[Image.Image]) -> Image.Image:
    """The picture, greyed, with each mask in its subject's colour.

    Args:
        image: RGB.
        masks: grey pictures of the same size, one per subject.
    """
    shown = Image.blend(image, image.convert("L").convert("RGB"), 0.6) if masks else image.copy()
    for index, mask in enumerate(masks):
        colour = Image.new("RGB", image.size, SUBJECT_COLOURS[index % len(SUBJECT_COLOURS)])
        shown.paste(colour, mask=mask.convert("L").point(lambda value: int(value * STRENGTH)))
    return shown
