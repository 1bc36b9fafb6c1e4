"""Image sizes on the page, derived from the model's default size and the server's limits."""

from math import sqrt

from serving.clients import InvalidRequest, ModelInfo

ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
SCALES = (1.0, 0.75)  # of the side; 1 is the size that the model was trained for
SIDE_FRACTION = 1 / 16  # sides are multiples of this fraction of the default side: 64 px for SDXL, as in its training


def default_size(info: ModelInfo) -> str:
    """The model's default size as "<width>x<height>"."""
    return f"{info.sampling.width}x{info.sampling.height}"


def size_choices(info: ModelInfo) -> list[tuple[str, str]]:
    """(label, "<width>x<height>") of every size, the default first. All sizes of a scale have about the same area."""
    width, height, limits = info.sampling.width, info.sampling.height, info.limits
    side = sqrt(width * height)
    multiple = max(8, round(side * SIDE_FRACTION / 8) * 8)
    choices = {default_size(info): f"{width} × {height} (default)"}
    for scale in SCALES:
        for across, down in ASPECT_RATIOS:
            w = round(scale * side * sqrt(across / down) / multiple) * multiple
            h = round(scale * side * sqrt(down / across) / multiple) * multiple
            if w * h <= limits.max_pixels and min(w, h) >= limits.min_side:
                choices.setdefault(f"{w}x{h}", f"{w} × {h} ({across}:{down})")
    return [(label, size) for size, label in choices.items()]


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "<width>x<height>"; None for the model's default."""
    if not size:
        return None, None
    width, _, height = str(size).partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InvalidRequest(f"The size is {str(size)[:40]!r}. Enter width x height in pixels, for example '512x512'.")
    return int(width), int(height)
