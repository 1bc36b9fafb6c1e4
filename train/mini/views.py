"""Views of instances for stage `vision`: two views of each instance, and a portrait of it.

Legend: B instances, S = 2 slots for subjects, N = 64 tokens (8 x 8) of a view.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sprite_world.appearance import CATEGORY_INDEX
from ..data.sprite_world.rendered import box_maps
from ..data.sprite_world.renderer import Renderer
from ..data.sprite_world.scenes import SCENE_SIZE
from ..data.sprite_world.sprites import CATEGORIES
from ..data.sprite_world.surfaces import homographies
from ..data.sprite_world.views import DRAWS_PER_SUBJECT, Background, PackedViews, View, pack_views
from ..data.sprite_world.world import (
    TRAINED_CATEGORIES,
    Split,
    SpriteWorld,
    another_category,
    compose,
    random_instance,
    reference_background,
)

NUM_VIEWS = 2
GRID = 8  # tokens per side of a view
GROUP = 8  # instances of one category per group of a batch: the model must distinguish instances, not categories
THUMBNAIL = 32  # px
GRAY = Background(-1, color=(128, 128, 128))


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """Views of B instances that are not rendered yet.

    Attributes:
        views: first view, second view and portrait of each instance in turn, 3 B views.
        slots: slot of the instance in both views, int64 [B, 2].
    """

    views: PackedViews
    slots: np.ndarray


@dataclass(frozen=True)
class ViewMixture:
    """Views of instances by step; every step has new instances. Half of the views also show another category."""

    batch_size: int
    seed: int = 3
    split: Split = "train"

    def samples(self, step: int, positions: range) -> ViewBatch:
        """The views at some positions of a step's batch."""
        world = SpriteWorld(self.seed, self.split)
        views: list[View] = []
        slots = []
        for position in positions:
            index = step * self.batch_size + position
            rng = world.generator(index, 2)
            category = TRAINED_CATEGORIES[index // GROUP % len(TRAINED_CATEGORIES)]
            instance = random_instance(rng, category, self.split)
            distractor = random_instance(rng, another_category(rng, category), self.split)
            for _ in range(NUM_VIEWS):
                shown = ((instance,), (instance,), (instance, distractor), (distractor, instance))[rng.integers(4)]
                views.append(compose(rng, shown, reference_background(rng, on_scene=0.35), large=True))
                slots.append(shown.index(instance))
            views.append(View(GRAY, (instance,), (0.5,) * DRAWS_PER_SUBJECT, large=True))
        return ViewBatch(pack_views(views), np.array(slots).reshape(-1, NUM_VIEWS))


@dataclass(frozen=True, kw_only=True)
class Views:
    """Views of B instances as tensors on a device.

    Attributes:
        images: in [0, 1], float32 [B, 2, 3, 128, 128].
        portraits: the instances upright on gray, in [0, 1], float32 [B, 3, 32, 32].
        inside: whether a token's patch is at least half inside the instance's box, bool [B, 2, N].
        category: of the instance, index in `TRAINED_CATEGORIES`, int64 [B].
        categories: of all subjects; -1 for an empty slot, int64 [B, 2, S].
        homographies: position in the image -> position on each subject, float32 [B, 2, S, 3, 3].
    """

    images: Tensor
    portraits: Tensor
    inside: Tensor
    category: Tensor
    categories: Tensor
    homographies: Tensor


def render_views(batch: ViewBatch, renderer: Renderer) -> Views:
    """Render a batch on the renderer's device."""
    device, views = renderer.device, batch.views
    pixels = (renderer.render(views).float() / 255).unflatten(0, (-1, NUM_VIEWS + 1))
    slots = torch.from_numpy(batch.slots).to(device)
    boxes = torch.from_numpy(views.boxes).to(device).unflatten(0, (-1, NUM_VIEWS + 1))[:, :NUM_VIEWS]
    boxes = boxes.gather(2, slots[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)  # [B, 2, 4]
    cell = SCENE_SIZE // GRID
    # A cell is inside if its center is.
    inside = box_maps((boxes + cell // 2).div(cell, rounding_mode="floor") * cell, cell)
    labels = torch.from_numpy(_LABELS[views.category].reshape(-1, NUM_VIEWS + 1, views.category.shape[1])).to(device)
    return Views(
        images=pixels[:, :NUM_VIEWS],
        portraits=F.avg_pool2d(pixels[:, NUM_VIEWS], SCENE_SIZE // THUMBNAIL),
        inside=inside.flatten(2),
        category=labels[:, NUM_VIEWS, 0],
        categories=labels[:, :NUM_VIEWS],
        homographies=homographies(views, device).unflatten(0, (-1, NUM_VIEWS + 1))[:, :NUM_VIEWS],
    )


def _labels() -> np.ndarray:
    """Index in `CATEGORIES` -> index in `TRAINED_CATEGORIES`, int64; -1, an empty slot, remains."""
    labels = np.full(len(CATEGORIES) + 1, -1)
    for label, category in enumerate(TRAINED_CATEGORIES):
        labels[CATEGORY_INDEX[category]] = label
    return labels


_LABELS = _labels()
