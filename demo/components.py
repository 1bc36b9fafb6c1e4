"""Small views that Gradio has no component for."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path

from PIL import Image

from .mask_overlay import SUBJECT_COLORS


def progress(text: str, fraction: float, words: Sequence[str] = (), description: str = "") -> str:
    """HTML: a line of text above a thin progress bar, filled to `fraction` in [0, 1].

    Args:
        words: target words, shown at the right with the colors of their masks.
        description: alternative text of the image; `page.js` sets it.
    """
    legend = "".join(
        f'<span><span style="color: {SUBJECT_COLORS[i % len(SUBJECT_COLORS)]}">●</span> {escape(word)}</span>'
        for i, word in enumerate(words)
    )
    alt = ""
    if description:
        masks = f"Guidance masks of {' and '.join(words)}. {description}" if words else description
        alt = f' data-description="{escape(description, quote=True)}" data-masks="{escape(masks, quote=True)}"'
    return (
        f'<div class="status-line"{alt}><span role="status">{escape(text)}</span>'
        f'<span class="status-legend">{legend}</span></div>'
        f'<div class="status-bar"><div style="width: {100 * fraction:.1f}%"></div></div>'
    )


def failure(text: str) -> str:
    """HTML: an error message in place of `progress`."""
    return f'<div class="status-line status-error" role="alert">{escape(text)}</div><div class="status-bar"></div>'


def failure_note(text: str) -> str:
    """HTML: an error message next to an input."""
    return f'<div class="status-error" role="alert">{escape(text)}</div>'


def example_card(paths: Sequence[Path], subjects: Sequence[str]) -> str:
    """HTML: the reference images of an example in one row. A click on it clicks the button in the same column."""
    row = BytesIO()
    side_by_side([Image.open(path) for path in paths]).save(row, "PNG")
    source = f"data:image/png;base64,{b64encode(row.getvalue()).decode()}"
    alt = escape(f"Reference image of {' and '.join(subjects)}", quote=True)
    return f'''<img src="{source}" alt="{alt}" onclick="this.closest('.example').querySelector('button').click()">'''


def side_by_side(images: Sequence[Image.Image], side_px: int = 220) -> Image.Image:
    """The images as square thumbnails in one row."""
    row = Image.new("RGB", (side_px * len(images), side_px), "white")
    for index, image in enumerate(images):
        thumbnail = image.convert("RGB").resize((side_px, side_px), Image.Resampling.LANCZOS)
        row.paste(thumbnail, (index * side_px, 0))
    return row


def tiled(images: Sequence[Image.Image | None]) -> Image.Image | None:
    """Images of one size in a grid that is as square as possible; the cell of a missing image is white.

    A single image is returned unchanged; None if all images are missing.
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
