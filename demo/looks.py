"""Small views that Gradio has no component for."""

from collections.abc import Sequence
from html import escape
from math import ceil, sqrt

from PIL import Image


def progress(says: str, fraction: float) -> str:
    """A line of text over a thin bar; `fraction` in [0, 1] of the bar is filled."""
    return (
        f'<div class="stage-line" role="status">{escape(says)}</div>'
        f'<div class="stage-bar"><div style="width: {100 * fraction:.1f}%"></div></div>'
    )


def side_by_side(pictures: Sequence[Image.Image], side: int = 220) -> Image.Image:
    """The pictures as square thumbnails of `side` px in one row."""
    row = Image.new("RGB", (side * len(pictures), side), "white")
    for index, picture in enumerate(pictures):
        row.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (index * side, 0))
    return row


def tiled(pictures: Sequence[Image.Image | None]) -> Image.Image | None:
    """Pictures of one size in a grid as square as can be; one that is not there yet leaves its place empty.

    A single picture is returned as it is; None as long as there is none.
    """
    first = next((picture for picture in pictures if picture is not None), None)
    if first is None or len(pictures) == 1:
        return first
    columns = ceil(sqrt(len(pictures)))
    grid = Image.new("RGB", (first.width * columns, first.height * ceil(len(pictures) / columns)), "white")
    for index, picture in enumerate(pictures):
        if picture is not None:
            grid.paste(picture, (index % columns * first.width, index // columns * first.height))
    return grid
