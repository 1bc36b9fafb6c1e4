"""Small views that Gradio has no component for."""

from collections.abc import Sequence
from html import escape

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
