"""Appearance of instances: what the number of an instance determines.

The number is the seed of everything that distinguishes an instance: the colors of its regions, their strengths, and a
pattern with a second color on its largest region. Number 0 is the original drawing.

Legend: N instances, R regions of a sprite; colors are RGB in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .sprites import CATEGORIES, NUM_REGIONS, Instance

NO_PATTERN, STRIPES, SPOTS = range(3)
CATEGORY_INDEX = {category: i for i, category in enumerate(CATEGORIES)}

_PATTERN_BOUNDS = np.array([0.4, 0.75])  # cumulative probabilities of no pattern and of stripes; the rest are spots
_NUM_DRAWS = 21  # uniform numbers of an instance with a pattern; one without leaves the last three unused


@dataclass(frozen=True, eq=False)
class Appearances:
    """Colors and patterns of N instances.

    Attributes:
        colors: target color of each region, float32 [N, R, 3].
        strengths: how much of the target color each region has; 0 keeps its original colors; float32 [N, R].
        pattern: `NO_PATTERN`, `STRIPES` or `SPOTS`, int8 [N].
        pattern_parameters: period in px of the sprite, angle in radians, and threshold, float32 [N, 3]. The threshold
            is the offset of the wave for stripes, and the radius relative to the period for spots.
        pattern_color: float32 [N, 3].
    """

    colors: np.ndarray
    strengths: np.ndarray
    pattern: np.ndarray
    pattern_parameters: np.ndarray
    pattern_color: np.ndarray


def appearances_of(instances: Sequence[Instance]) -> Appearances:
    """The appearances of instances, computed for all of them together."""
    draws = np.zeros((len(instances), _NUM_DRAWS))
    for row, instance in zip(draws, instances):
        if instance.number:
            np.random.default_rng((CATEGORY_INDEX[instance.category], instance.number)).random(out=row)
    recolored = np.array([instance.number != 0 for instance in instances], bool)
    # Each region draws hue, saturation, value and strength; all but the first also whether they keep their colors.
    starts = np.array([0, 4, 9])
    colors = _color(*(draws[:, starts + i] for i in range(3)))
    strengths = 0.75 + (0.95 - 0.75) * draws[:, starts + 3]
    strengths[:, 1:] *= draws[:, [8, 13]] >= 0.5  # original colors keep the category recognizable
    strengths *= recolored[:, None]
    pattern = np.where(recolored, np.searchsorted(_PATTERN_BOUNDS, draws[:, 14], side="right"), NO_PATTERN)
    period = 14 + (26 - 14) * draws[:, 15]
    angle = math.pi * draws[:, 16]
    offset = -0.2 + (0.4 - -0.2) * draws[:, 17]
    radius = 0.24 + (0.36 - 0.24) * draws[:, 17]
    parameters = np.stack([period, angle, np.where(pattern == STRIPES, offset, radius)], 1)
    color_draws = np.where((pattern == NO_PATTERN)[:, None], draws[:, 15:18], draws[:, 18:21])
    return Appearances(
        colors=colors.astype(np.float32),
        strengths=strengths.astype(np.float32),
        pattern=pattern.astype(np.int8),
        pattern_parameters=parameters.astype(np.float32),
        pattern_color=_color(*color_draws.T).astype(np.float32),
    )


def _color(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colors of uniform numbers in [0, 1), neither gray nor dark; [..., 3]. The conversion is `colorsys.hsv_to_rgb`."""
    saturation, value = 0.25 + (0.95 - 0.25) * saturation, 0.45 + (1.0 - 0.45) * value
    sector = np.floor(hue * 6).astype(int)
    part = hue * 6 - sector
    low, falling = value * (1 - saturation), value * (1 - saturation * part)
    rising = value * (1 - saturation * (1 - part))
    red = np.stack([value, falling, low, low, rising, value], -1)  # in each sector; green and blue lag behind
    return np.take_along_axis(red, (sector[..., None] + np.array([0, 4, 2])) % 6, -1)


assert NUM_REGIONS == 3, "the positions of the draws are those of three regions"
