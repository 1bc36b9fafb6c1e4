"""Small views that Gradio has no component for."""

from collections.abc import Sequence
from html import escape
from math import ceil, sqrt

from PIL import Image


def progress(text: str, fraction: float) -> str:
    """A line of text over a thin bar; `fraction` in [0, 1] of the bar is filled."""
    return (
        f'<div class="stage-line" role="status">{escape(text)}</div>'
        f'<div class="stage-bar"><div style="width: {100 * fraction:.1f}%"></div></div>'
    )


def side_by_side(images: Sequence[Image.Image], side: int = 220) -> Image.Image:
    """The images as square thumbnails of `side` px in one row."""
    row = Image.new("RGB", (side * len(images), side), "white")
    for index, image in enumerate(images):
        row.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (index * side, 0))
    return row


def tiled(images: Sequence[Image.Image | None]) -> Image.Image | None:
    """Images of one size in a grid as square as can be; one that is not there yet leaves its place empty.

    A single image is returned as it is; None as long as there is none.
    """
    first = next((image for image in images if image is not None), None)
    if first is None or len(images) == 1:
        return first
    columns = ceil(sqrt(len(images)))
    grid = Image.new("RGB", (first.width * columns, first.height * ceil(len(images) / columns)), "white")
    for index, image in enumerate(images):
        if image is not None:
            grid.paste(image, (index % columns * first.width, index // columns * first.height))
    return grid
