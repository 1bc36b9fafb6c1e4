"""Views of instances for stage `vision`: two views of each instance, and a portrait of it.

Legend: B instances, S = 2 slots for subjects, N = 64 tokens (8 x 8) of a view.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sprite_world.rendered import box_maps
from ..data.sprite_world.renderer import Renderer
from ..data.sprite_world.scenes import SCENE_SIZE
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

GRID = 8  # tokens per side of a view
GROUP = 8  # instances of one category per group of a batch: the model must distinguish instances, not categories
THUMBNAIL = 32  # px
GRAY = Background(-1, color=(128, 128, 128))


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """Views of B instances that are not rendered yet.

    Attributes:
        views: 2 B views, first one of each instance and then another of each.
        slots: slot of the instance in each view, int64 [2 B].
        portraits: the instances upright on gray, B views.
    """

    views: PackedViews
    slots: np.ndarray
    portraits: PackedViews


@dataclass(frozen=True)
class ViewMixture:
    """Views of instances by step; every step has new instances. Half of the views also show another category."""

    batch_size: int
    seed: int = 3
    split: Split = "train"

    def samples(self, step: int, positions: range) -> ViewBatch:
        """The views at some positions of a step's batch."""
        world = SpriteWorld(self.seed, self.split)
        views: tuple[list[View], ...] = ([], [])
        slots: tuple[list[int], ...] = ([], [])
        portraits = []
        for position in positions:
            index = step * self.batch_size + position
            rng = world.generator(index, 2)
            category = TRAINED_CATEGORIES[index // GROUP % len(TRAINED_CATEGORIES)]
            instance = random_instance(rng, category, self.split)
            distractor = random_instance(rng, another_category(rng, category), self.split)
            for own_views, own_slots in zip(views, slots):
                shown = ((instance,), (instance,), (instance, distractor), (distractor, instance))[rng.integers(4)]
                own_views.append(compose(rng, shown, reference_background(rng, on_scene=0.35), large=True))
                own_slots.append(shown.index(instance))
            portraits.append(View(GRAY, (instance,), (0.5,) * DRAWS_PER_SUBJECT, large=True))
        return ViewBatch(pack_views([*views[0], *views[1]]), np.concatenate(slots), pack_views(portraits))


@dataclass(frozen=True, kw_only=True)
class Views:
    """Views of B instances as tensors on a device: first one of each instance and then another of each.

    Attributes:
        images: in [0, 1], float32 [2 B, 3, 128, 128].
        inside: whether the center of a token's patch is inside the instance's box, bool [2 B, N].
        categories: of all subjects, index in `CATEGORIES` (and in `TRAINED_CATEGORIES`, which come first); -1 for an
            empty slot, int64 [2 B, S].
        homographies: position in the image -> position on each subject, float32 [2 B, S, 3, 3].
        category: of the instance, int64 [B].
        portraits: the instances upright on gray, in [0, 1], float32 [B, 3, 32, 32].
    """

    images: Tensor
    inside: Tensor
    categories: Tensor
    homographies: Tensor
    category: Tensor
    portraits: Tensor


def render_view_batch(batch: ViewBatch, renderer: Renderer) -> Views:
    """Render a batch on the renderer's device."""
    device, views = renderer.device, batch.views
    boxes = torch.from_numpy(views.boxes[np.arange(len(views)), batch.slots]).to(device)  # of the instance, [2 B, 4]
    cell = SCENE_SIZE // GRID
    # A cell is inside if its center is.
    inside = box_maps((boxes[:, None] + cell // 2).div(cell, rounding_mode="floor") * cell, cell)
    portraits = renderer.render(batch.portraits).float() / 255
    return Views(
        images=renderer.render(views).float() / 255,
        inside=inside.flatten(1),
        categories=torch.from_numpy(views.category).to(device, torch.int64),
        homographies=homographies(views, device),
        category=torch.from_numpy(batch.portraits.category[:, 0]).to(device, torch.int64),
        portraits=F.avg_pool2d(portraits, SCENE_SIZE // THUMBNAIL),
    )
