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


def contrast(color: str, other: str) -> float:
    """Contrast ratio of two colors "#rrggbb" by WCAG 2.1, in [1, 21]."""
    darker, lighter = sorted((_luminance(color), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def text_color(background: str) -> str:
    """Black or white, whichever is easier to read on a background; its contrast is always at least 4.5."""
    return max("#000000", "#ffffff", key=lambda color: contrast(color, background))


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
