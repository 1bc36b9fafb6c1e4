"""Rendering of views as pixels, for many views at once and on any device.

A sprite is painted in the colors of its instance, transformed into the view with bilinear interpolation, and blended
over the background. The result agrees with Pillow's `Image.transform` and `Image.paste` up to rounding.

Legend: B views, N sprites, R = 3 regions, P = 112 px, the side of a padded sprite. Levels are in [0, 255].
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .appearance import CATEGORY_INDEX, NO_PATTERN, STRIPES, Appearances, appearances_of
from .scenes import NUM_VARIANTS, SCENE_SIZE, SCENES, draw_scene
from .sprites import CATEGORIES, NUM_REGIONS, SPRITE_SIZE, Instance, load_sprite, sprite_size
from .views import NUM_SLOTS, PackedViews

# Views that are rendered together. A small chunk fits the cache of a CPU; a large one keeps a GPU busy, and its
# intermediate results take about 1 GB.
CHUNK_CPU, CHUNK_GPU = 8, 512
PATTERN_STRENGTH = 0.85
NEAR_ONE = 1 / 256  # added before rounding down: the weighted mean of equal levels may be slightly below them

# Planes of a sprite's table: color and alpha in levels; the weights of the regions; the levels that recoloring adds
# without and with the target color; the same two for the pattern; the pattern's weight; 1 where pixels are recolored.
_PLANES = (3, 1, NUM_REGIONS, NUM_REGIONS, NUM_REGIONS, 1, 1, 1, 1)
_NUM_SCENES = len(SCENES) * NUM_VARIANTS
_BLACK = 2 * _NUM_SCENES  # row of the scene table, after all variants and all mirrored variants


class Renderer:
    """Renders packed views on a device.

    Args:
        device: where the tables of sprites and scenes are, and the rendered images.
        static: prepare all tables now and draw empty slots too, so that `render` never waits for the device and its
            chunks have one shape. Otherwise, each part of the tables is prepared when a view first needs it, and empty
            slots are skipped. None: static unless the device is a CPU.
    """

    def __init__(self, device: torch.device | str = "cpu", *, static: bool | None = None) -> None:
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.static = not on_cpu if static is None else static
        self.chunk = CHUNK_CPU if on_cpu else CHUNK_GPU
        num_categories = len(CATEGORIES)
        self._sprites = torch.zeros(num_categories, sum(_PLANES), SPRITE_SIZE, SPRITE_SIZE)
        self._sizes = torch.zeros(num_categories, 2)
        self._scenes = torch.zeros(_BLACK + 1, 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8)
        self._has_sprite, self._has_scene = np.zeros(num_categories, bool), np.zeros(_NUM_SCENES, bool)
        if self.static:
            self._prepare(np.arange(num_categories), np.arange(_NUM_SCENES))
        self._sprites, self._sizes, self._scenes = (
            table.to(self.device) for table in (self._sprites, self._sizes, self._scenes)
        )
        self._axis = torch.arange(SCENE_SIZE, device=self.device) + (0.5 - SCENE_SIZE / 2)  # pixel centers
        self._side = torch.arange(SPRITE_SIZE, device=self.device, dtype=torch.float32)

    @torch.no_grad()
    def render(self, views: PackedViews) -> Tensor:
        """The images of views, uint8 [B, 3, 128, 128] on the device."""
        if not self.static:
            self._prepare(views.category[views.category >= 0], views.variant[views.variant >= 0])
        arrays = self._to_device(views)
        images = torch.empty(len(views), 3, SCENE_SIZE, SCENE_SIZE, dtype=torch.uint8, device=self.device)
        for start in range(0, len(views), self.chunk):
            part = slice(start, start + self.chunk)
            image = self._backgrounds(*(arrays[name][part] for name in ("variant", "flipped", "color")))
            for slot in range(NUM_SLOTS):
                subjects = {name: arrays[name][part, slot] for name in _SUBJECT_FIELDS}
                rows = np.flatnonzero(views.category[part, slot] >= 0)
                if self.static or len(rows) == len(image):
                    image = self._draw(image, **subjects)
                elif len(rows):
                    chosen = torch.from_numpy(rows).to(self.device)
                    drawn = self._draw(image[chosen], **{name: values[chosen] for name, values in subjects.items()})
                    image[chosen] = drawn
            images[part] = image.add_(NEAR_ONE)  # and rounded down, as in Pillow
        return images

    @torch.no_grad()
    def paint(self, instances: Sequence[Instance]) -> Tensor:
        """The upright sprites of instances, RGBA uint8 [N, 4, P, P] on the device, padded on the right and below."""
        category = np.array([CATEGORY_INDEX[instance.category] for instance in instances])
        if not self.static:
            self._prepare(category, np.zeros(0, int))
        appearances = self._to_device(appearances_of(instances))
        return self._paint(torch.from_numpy(category).to(self.device), **appearances).add_(0.5).byte()

    def _to_device(self, values: PackedViews | Appearances) -> dict[str, Tensor]:
        """The arrays of a dataclass as tensors on the device; those that are indices as int64."""
        tensors = {field.name: torch.from_numpy(getattr(values, field.name)) for field in fields(values)}
        for name in {"category", "variant"} & set(tensors):
            tensors[name] = tensors[name].long()
        if self.device.type == "cuda":  # without pinned memory, each copy waits for the device
            return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _prepare(self, categories: np.ndarray, variants: np.ndarray) -> None:
        """Fill the missing rows of the tables."""
        names = list(CATEGORIES)
        for i in np.unique(categories[~self._has_sprite[categories]]).tolist():
            self._sprites[i], self._sizes[i] = _sprite_planes(names[i]), torch.tensor(sprite_size(names[i]))
            self._has_sprite[i] = True
        for i in np.unique(variants[~self._has_scene[variants]]).tolist():
            scene = np.array(draw_scene(SCENES[i // NUM_VARIANTS], i % NUM_VARIANTS))
            self._scenes[i] = torch.from_numpy(scene).permute(2, 0, 1)
            self._scenes[i + _NUM_SCENES] = self._scenes[i].flip(-1)
            self._has_scene[i] = True

    def _backgrounds(self, variant: Tensor, flipped: Tensor, color: Tensor) -> Tensor:
        """Levels, float32 [B, 3, 128, 128]."""
        row = torch.where(variant >= 0, variant + _NUM_SCENES * flipped, _BLACK)
        return self._scenes.index_select(0, row).add_(color[:, :, None, None]).float()

    def _draw(self, image: Tensor, category: Tensor, coefficients: Tensor, **appearance: Tensor) -> Tensor:
        """Images with one subject drawn over each, levels [N, 3, 128, 128]."""
        known = category.clamp(min=0)
        sizes = self._sizes[known] * (category >= 0)[:, None]
        return _paste(image, self._paint(known, **appearance), sizes, coefficients, self._axis)

    def _paint(
        self,
        category: Tensor,
        colors: Tensor,
        strengths: Tensor,
        pattern: Tensor,
        pattern_parameters: Tensor,
        pattern_color: Tensor,
    ) -> Tensor:
        """Sprites in the colors of their instances, RGBA levels, float32 [N, 4, P, P].

        The arguments are those of `Appearances`, with the leading dimension N.
        """
        planes = self._sprites.index_select(0, category)  # a copy, whose color is painted in place
        color, _, weight, light, tint, pattern_light, pattern_tint, pattern_weight, recolored = planes.split(_PLANES, 1)
        amount = _pattern(pattern, pattern_parameters, self._side).mul_(pattern_weight)  # [N, 1, P, P]
        changed = _weighted_sum(weight, strengths).lerp_(recolored, amount)
        color.addcmul_(color, changed, value=-1)
        color += _weighted_sum(light, strengths).lerp_(pattern_light, amount)
        tint *= 1 - amount
        colors = (colors * strengths[..., None])[..., None, None]
        for region in range(NUM_REGIONS):
            color.addcmul_(tint[:, region, None], colors[:, region])
        color.addcmul_(pattern_tint * amount, pattern_color[..., None, None])
        return planes[:, :4]


_SUBJECT_FIELDS = ("category", "coefficients", *(field.name for field in fields(Appearances)))


def _paste(image: Tensor, sprites: Tensor, sizes: Tensor, coefficients: Tensor, axis: Tensor) -> Tensor:
    """Images with the transformed sprites drawn over them, levels [N, 3, 128, 128].

    Args:
        image: levels [N, 3, 128, 128].
        sprites: RGBA levels [N, 4, P, P]; overwritten.
        sizes: width and height of the sprites without padding, [N, 2]; 0 draws nothing.
        coefficients: [N, 8], see `PackedViews`.
        axis: positions of the pixels along a side of the image, relative to its center, [128].
    """
    # Homogeneous coordinates of `grid_sample`, whose range [-1, 1] is the padded sprite.
    u, v, w = F.pad(coefficients, (0, 1), value=1.0).view(-1, 3, 3).unbind(1)
    u, v, w = (
        row[:, :1, None] * axis + (row[:, 1:2, None] * axis[:, None] + row[:, 2:, None])
        for row in (u * (2 / SPRITE_SIZE) - w, v * (2 / SPRITE_SIZE) - w, w)
    )
    u, v = u.div_(w), v.div_(w)
    right, bottom = (sizes[..., None, None] * (2 / SPRITE_SIZE) - 1).unbind(1)
    inside = (u >= -1) & (u < right) & (v >= -1) & (v < bottom)
    # Beyond the centers of the outermost pixels, their levels are repeated.
    grid = torch.empty(*u.shape, 2, device=u.device)
    grid[..., 0] = torch.minimum(u, right - 1 / SPRITE_SIZE)
    grid[..., 1] = torch.minimum(v, bottom - 1 / SPRITE_SIZE)
    # Transparent pixels have no color: colors are interpolated after multiplication with alpha.
    sprites[:, :3].mul_(sprites[:, 3:] * (1 / 255)).add_(0.5).floor_()
    levels = F.grid_sample(sprites, grid, "bilinear", "border", align_corners=False).mul_(inside[:, None])
    color, alpha = levels.split((3, 1), 1)
    return color.add_(image).addcmul_(image, alpha, value=-1 / 255)


def _weighted_sum(planes: Tensor, weights: Tensor) -> Tensor:
    """Sum of planes [N, R, P, P] with weights [N, R], [N, 1, P, P]."""
    total = planes[:, :1] * weights[:, :1, None, None]
    for region in range(1, NUM_REGIONS):
        total.addcmul_(planes[:, region, None], weights[:, region, None, None, None])
    return total


def _pattern(pattern: Tensor, parameters: Tensor, side: Tensor) -> Tensor:
    """Masks of stripes or spots in [0, 1], [N, 1, P, P]; zeros for no pattern. `side` is 0, 1, ... P - 1."""
    period, angle, threshold = parameters[:, :, None, None, None].unbind(1)
    x, y, cos, sin = side, side[:, None], angle.cos() / period, angle.sin() / period
    along, across = x * cos + y * sin, y * cos - x * sin  # in periods
    stripes = (along * (2 * math.pi)).sin_().sub_(threshold).mul_(3)
    along, across = along.sub_(along.floor()).sub_(0.5), across.sub_(across.floor()).sub_(0.5)
    spots = (threshold - (along.square_().addcmul_(across, across)).sqrt_()).mul_(period)
    kind = pattern[:, None, None, None]
    return torch.where(kind == STRIPES, stripes, spots).add_(0.5).clamp_(0, 1).masked_fill_(kind == NO_PATTERN, 0)


def _sprite_planes(category: str) -> Tensor:
    """The table of a sprite, [sum of _PLANES, P, P], with zeros on the right and at the bottom."""
    sprite = load_sprite(category)
    height, width = sprite.alpha.shape[:2]
    recolored = 1 - sprite.keep
    weight = sprite.regions * recolored  # [R, H, W, 1]
    light, tint = sprite.shade * sprite.highlight, sprite.shade * (1 - sprite.highlight)
    planes = [
        255 * sprite.color,
        np.round(255 * sprite.alpha),
        *weight,
        *(255 * weight * light),
        *(255 * weight * tint),
        255 * recolored * light[0],
        255 * recolored * tint[0],
        PATTERN_STRENGTH * sprite.regions[0],
        recolored,
    ]
    values = np.concatenate(planes, -1, dtype=np.float32)
    return F.pad(torch.from_numpy(values).permute(2, 0, 1), (0, SPRITE_SIZE - width, 0, SPRITE_SIZE - height))


@cache
def cpu_renderer() -> Renderer:
    """The renderer on the CPU that this process shares."""
    return Renderer()


def draw_instances(instances: Sequence[Instance]) -> list[Image.Image]:
    """Instances, upright, as RGBA images whose longest side is `SPRITE_SIZE`; drawn on the CPU."""
    sprites = cpu_renderer().paint(instances).permute(0, 2, 3, 1).numpy()
    sizes = [sprite_size(instance.category) for instance in instances]
    return [Image.fromarray(sprite[:height, :width]) for sprite, (width, height) in zip(sprites, sizes)]
