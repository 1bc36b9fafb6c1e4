"""Views: what an image of the sprite world shows, as numbers. `renderer` turns them into pixels.

A `View` holds the random numbers of one image. `pack_views` computes the geometry and the colors of many views at once
and stores them as arrays, which are small enough to be sent from worker processes to the process that renders. Nothing
here needs torch.

Legend: B views, S = 2 slots for subjects, N subjects of all views. Positions are in px.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from .appearance import CATEGORY_INDEX, appearances_of
from .scenes import SCENE_SIZE
from .sprites import Instance, sprite_size

NUM_SLOTS = 2
DRAWS_PER_SUBJECT = 14  # see `_corners`


class Background(NamedTuple):
    """A variant of a scene, or a single color.

    Attributes:
        variant: number of the variant among those of all scenes, or -1 for a single color.
        flipped: whether the variant is mirrored.
        color: RGB in [0, 255] if there is no variant.
    """

    variant: int
    flipped: bool = False
    color: tuple[int, int, int] = (0, 0, 0)


class View(NamedTuple):
    """One image: subjects, from left to right, on a background.

    Attributes:
        draws: uniform numbers in [0, 1) that determine the poses, DRAWS_PER_SUBJECT for each subject.
        large: a single subject fills most of the image, as in references.
    """

    background: Background
    subjects: tuple[Instance, ...]
    draws: tuple[float, ...]
    large: bool = False


@dataclass(frozen=True, eq=False)
class PackedViews:
    """Many views as arrays. `len()` is their number; an index (slice, integers or a mask) selects some of them.

    Attributes:
        variant, flipped, color: the backgrounds, see `Background`; int16, bool [B], uint8 [B, 3].
        category: index of each subject's category in `CATEGORIES`, or -1 for an empty slot, int8 [B, S].
        number: number of each instance, int32 [B, S].
        boxes: bounding boxes in px: left, top, right, bottom; zeros for an empty slot; int32 [B, S, 4].
        coefficients: perspective from the image to the sprite, float32 [B, S, 8], see `_perspective`.
        colors, strengths, pattern, pattern_parameters, pattern_color: see `Appearances`; [B, S, ...].
    """

    variant: np.ndarray
    flipped: np.ndarray
    color: np.ndarray
    category: np.ndarray
    number: np.ndarray
    boxes: np.ndarray
    coefficients: np.ndarray
    colors: np.ndarray
    strengths: np.ndarray
    pattern: np.ndarray
    pattern_parameters: np.ndarray
    pattern_color: np.ndarray

    def __len__(self) -> int:
        return len(self.variant)

    def __getitem__(self, key: slice | np.ndarray) -> "PackedViews":
        return PackedViews(**{field.name: getattr(self, field.name)[key] for field in fields(self)})


def choose_views(first: np.ndarray, ones: PackedViews, others: PackedViews) -> PackedViews:
    """Row i of `ones` where `first[i]`, otherwise of `others`."""
    columns = {}
    for field in fields(PackedViews):
        one, other = getattr(ones, field.name), getattr(others, field.name)
        columns[field.name] = np.where(first.reshape(-1, *[1] * (one.ndim - 1)), one, other)
    return PackedViews(**columns)


def pack_views(views: Sequence[View]) -> PackedViews:
    """The arrays of views. Equal views give equal rows, whatever else is packed with them."""
    slots = [(row, slot) for row, view in enumerate(views) for slot in range(len(view.subjects))]
    rows, columns = np.array(slots, int).reshape(-1, 2).T
    subjects = [subject for view in views for subject in view.subjects]
    unique = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
    which = np.array([unique[subject] for subject in subjects], int)
    appearances = appearances_of(list(unique))
    category = np.array([CATEGORY_INDEX[subject.category] for subject in subjects], int)
    sizes = np.array([sprite_size(subject.category) for subject in subjects], float).reshape(-1, 2)
    draws = np.array([draw for view in views for draw in view.draws], float).reshape(-1, DRAWS_PER_SUBJECT)
    alone = np.array([len(view.subjects) == 1 for view in views], bool)[rows]
    large = np.array([view.large for view in views], bool)[rows]
    corners = _corners(draws, sizes, columns, alone, large)

    def in_slots(values: np.ndarray, dtype: type, empty: int = 0) -> np.ndarray:
        packed = np.full((len(views), NUM_SLOTS, *values.shape[1:]), empty, dtype)
        packed[rows, columns] = values
        return packed

    return PackedViews(
        variant=np.array([view.background.variant for view in views], np.int16),
        flipped=np.array([view.background.flipped for view in views], bool),
        color=np.array([view.background.color for view in views], np.uint8).reshape(-1, 3),
        category=in_slots(category, np.int8, -1),
        number=in_slots(np.array([subject.number for subject in subjects], int), np.int32),
        boxes=in_slots(_boxes(corners), np.int32),
        coefficients=in_slots(_perspective(corners, sizes), np.float32),
        colors=in_slots(appearances.colors[which], np.float32),
        strengths=in_slots(appearances.strengths[which], np.float32),
        pattern=in_slots(appearances.pattern[which], np.int8),
        pattern_parameters=in_slots(appearances.pattern_parameters[which], np.float32),
        pattern_color=in_slots(appearances.pattern_color[which], np.float32),
    )


def _corners(
    draws: np.ndarray, sizes: np.ndarray, columns: np.ndarray, alone: np.ndarray, large: np.ndarray
) -> np.ndarray:
    """Corners of the sprites in the image, clockwise from the top left of the drawing; float64 [N, 4, 2].

    Each subject has a random size, position, aspect, perspective, rotation and mirroring.

    Args:
        draws: [N, DRAWS_PER_SUBJECT] in [0, 1).
        sizes: width and height of the sprites, [N, 2].
        columns: slot of each subject, [N].
        alone, large: whether it is the only subject of its view, and whether the view is large; [N].
    """
    shortest = np.where(alone, np.where(large, 0.72, 0.5), 0.42)
    tallest = np.where(alone, np.where(large, 0.92, 0.8), 0.56)
    height = _between(shortest, tallest, draws[:, 0])  # relative to the image, like x and y
    margin = 0.5 - height / 2
    x = np.where(
        alone,
        0.5 + _between(-margin, margin, draws[:, 1]) * 0.9,
        np.array([0.27, 0.73])[columns] + _between(-0.03, 0.03, draws[:, 1]),
    )
    y = np.where(alone, 0.5 + margin * _between(-0.2, 0.8, draws[:, 2]), _between(0.5, 0.68, draws[:, 2]))
    max_width = np.where(alone, 0.95, 0.46) * SCENE_SIZE
    scale = (height * SCENE_SIZE / sizes[:, 1])[:, None] * np.ones(2)
    scale[:, 0] *= _between(0.88, 1.14, draws[:, 3])
    scale *= np.minimum(1.0, max_width / (sizes[:, 0] * scale[:, 0]))[:, None]
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (sizes / 2 * scale)[:, None]
    corners *= 1 + _between(-0.07, 0.07, draws[:, 4:12]).reshape(-1, 4, 2)
    angle = _between(-0.35, 0.35, draws[:, 12])
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    rotated = np.stack(
        [corners[..., 0] * cos - corners[..., 1] * sin, corners[..., 0] * sin + corners[..., 1] * cos], -1
    )
    rotated[..., 0] *= np.where(draws[:, 13] < 0.5, -1, 1)[:, None]
    return rotated + (np.stack([x, y], 1) * SCENE_SIZE)[:, None]


def _between(low: float | np.ndarray, high: float | np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Numbers between two limits, from draws in [0, 1); the same as those of `Generator.uniform`."""
    return low + (high - low) * draws


def _boxes(corners: np.ndarray) -> np.ndarray:
    """Bounding boxes of corners, clipped to the image, [N, 4]."""
    first = np.maximum(0, np.floor(corners.min(1)))
    last = np.minimum(SCENE_SIZE, np.ceil(corners.max(1)))
    return np.concatenate([first, last], 1)


def _perspective(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Coefficients a...h of the map from the image to the sprite, float64 [N, 8].

    With (x, y) relative to the center of the image, the position in the sprite is
    ((a x + b y + c) / (g x + h y + 1), (d x + e y + f) / (g x + h y + 1)). These are the coefficients of PIL's
    `Transform.PERSPECTIVE`, except that its origin is the corner; with the center as origin, float32 is accurate.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (corners - SCENE_SIZE / 2).transpose(1, 2, 0)
    # The map from the unit square to the corners, [[a, b, x0], [d, e, y0], [g, h, 1]] in homogeneous coordinates.
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    determinant = (x1 - x2) * (y3 - y2) - (x3 - x2) * (y1 - y2)
    g = (sum_x * (y3 - y2) - (x3 - x2) * sum_y) / determinant
    h = ((x1 - x2) * sum_y - sum_x * (y1 - y2)) / determinant
    a, b = x1 - x0 + g * x1, x3 - x0 + h * x3
    d, e = y1 - y0 + g * y1, y3 - y0 + h * y3
    # Its inverse up to a factor, which the division by the last entry removes.
    width, height = sizes.T
    u = np.stack([e - y0 * h, x0 * h - b, b * y0 - x0 * e]) * width
    v = np.stack([y0 * g - d, a - x0 * g, x0 * d - a * y0]) * height
    w = np.stack([d * h - e * g, b * g - a * h, a * e - b * d])
    return np.concatenate([u, v, w[:2]]).T / w[2][:, None]
