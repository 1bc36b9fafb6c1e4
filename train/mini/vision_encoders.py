"""Stage `vision`: the two small vision encoders. A full-size model uses pretrained ones instead.

Three losses train them:

- contrastive: two views of an instance are closer to each other than to other instances of the category (last block);
- appearance: the deep features reconstruct the instance upright, independent of its pose in the view;
- structure: each deep token reconstructs its own patch.

The first two use only the tokens that lie on the instance, and half of the views contain a second subject. Each token
therefore describes only the subject it lies on. Otherwise, the features of a reference with two subjects (One2Many)
would mix them. Training uses global views and local crops, because the projector reads both.

Legend: B images, N = 64 tokens (8 x 8), C channels of both encoders together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from realcustom.config import MethodConfig, VisionConfig
from realcustom.vision import VisionEncoders

from ..data.sprite_world.renderer import cpu_renderer, draw_instances
from ..data.sprite_world.scenes import SCENE_SIZE
from ..data.sprite_world.sprites import SPRITE_SIZE
from ..data.sprite_world.views import View, pack_views
from ..data.sprite_world.world import (
    TRAINED_CATEGORIES,
    Split,
    SpriteWorld,
    another_category,
    compose,
    random_instance,
    reference_background,
)
from ..images import save_grid, to_signed
from ..precision import autocast
from .loop import LoopConfig, load_stage, run_loop
from .networks import VISION_SIZE, VISION_WIDTH, build_vision_encoders
from .pool import Entry, SamplePool
from .render import pixels_of

BATCH_SIZE = 24
NUM_HELD_OUT = 64
GROUP = 8  # instances of one category per group of a batch: the model must distinguish instances, not categories
THUMBNAIL = 32  # px
TEMPERATURE = 0.1
VIEWS = ("first", "second")
GRID = 8  # tokens per side of a view
FIELDS = {
    "first": ((3, SCENE_SIZE, SCENE_SIZE), "uint8"),
    "second": ((3, SCENE_SIZE, SCENE_SIZE), "uint8"),
    "first_inside": ((GRID, GRID), "uint8"),
    "second_inside": ((GRID, GRID), "uint8"),
    "portrait": ((3, THUMBNAIL, THUMBNAIL), "uint8"),
    "category": ((), "int64"),
}
MINI_VISION = VisionConfig(siglip_shallow=(0, 1, 2), siglip_deep=3, dino_shallow=(0, 1, 2), dino_deep=3)


@dataclass(frozen=True)
class RenderViews:
    """Two views of an instance and its upright portrait. Half of the views also contain another category.

    Fields, all uint8 except the last: `first`, `second` [n, 3, 128, 128]; `first_inside`, `second_inside` [n, 8, 8], 1
    for the instance's tokens; `portrait` [n, 3, 32, 32]; `category` int64 [n].
    """

    seed: int = 3
    split: Split = "train"

    def __call__(self, indices: Sequence[int]) -> Entry:
        world = SpriteWorld(self.seed, self.split)
        views: list[View] = []  # first and second of each index in turn
        slots: list[int] = []  # of the instance in each view
        instances, labels = [], []
        for i in indices:
            rng = world.generator(i, 2)
            label = i // GROUP % len(TRAINED_CATEGORIES)
            category = TRAINED_CATEGORIES[label]
            instance = random_instance(rng, category, self.split)
            distractor = random_instance(rng, another_category(rng, category), self.split)
            for _ in VIEWS:
                shown = ((instance,), (instance,), (instance, distractor), (distractor, instance))[rng.integers(4)]
                views.append(compose(rng, shown, reference_background(rng, on_scene=0.35), large=True))
                slots.append(shown.index(instance))
            instances.append(instance)
            labels.append(label)
        packed = pack_views(views)
        pixels = cpu_renderer().render(packed).numpy()
        inside = np.stack([_tokens_in(box) for box in packed.boxes[np.arange(len(views)), slots].tolist()])
        return {
            **{view: pixels[offset :: len(VIEWS)] for offset, view in enumerate(VIEWS)},
            **{f"{view}_inside": inside[offset :: len(VIEWS)] for offset, view in enumerate(VIEWS)},
            "portrait": np.stack([pixels_of(_portrait(sprite), THUMBNAIL) for sprite in draw_instances(instances)]),
            "category": np.array(labels),
        }


def _tokens_in(box: Sequence[int]) -> np.ndarray:
    """Mark the tokens whose patch is at least half inside the box (px of the image) with 1, uint8 [8, 8]."""
    left, top, right, bottom = (int(side * GRID / SCENE_SIZE + 0.5) for side in box)
    inside = np.zeros((GRID, GRID), np.uint8)
    inside[top:bottom, left:right] = 1
    assert inside.any(), f"{box} is smaller than a patch"
    return inside


def _portrait(sprite: Image.Image) -> Image.Image:
    """The sprite centered on gray, 32 x 32 px."""
    portrait = Image.new("RGB", (SPRITE_SIZE, SPRITE_SIZE), (128, 128, 128))
    portrait.paste(sprite, ((SPRITE_SIZE - sprite.width) // 2, (SPRITE_SIZE - sprite.height) // 2), sprite)
    return portrait.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


class VisionPretrainer(nn.Module):
    """Both encoders with the small heads that only their training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip, self.dino = build_vision_encoders()
        # On a CPU, the backward pass of eager attention is faster than that of the fused kernel.
        self.siglip.set_attn_implementation("eager")
        self.dino.set_attn_implementation("eager")
        width = 2 * VISION_WIDTH
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(TRAINED_CATEGORIES)))
        self.decode_patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * 16))  # 4 x 4 px of a 32 px copy
        self.portrait_norm = nn.LayerNorm(width)
        self.portrait_queries = nn.Parameter(torch.randn(64, width) * 0.1)  # one for each 4 x 4 px of the portrait
        self.portrait_attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.decode_portrait = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 48)
        )

    def encoders(self) -> VisionEncoders:
        """The encoders without the heads."""
        return VisionEncoders(self.siglip, self.dino, MINI_VISION, MethodConfig())

    def tokens(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, 64, 64] in [0, 1] -> tokens of the deep layer and of the last block, each [B, N, C]."""
        return self.encoders().tokens(pixels, ((MINI_VISION.siglip_deep, MINI_VISION.dino_deep), (4, 4)))

    def portrait(self, deep: Tensor, inside: Tensor) -> Tensor:
        """Reconstruct the portrait from the deep tokens [B, N, C] where `inside` [B, N] is true; [B, 3, 32, 32]."""
        tokens = self.portrait_norm(deep)
        queries = self.portrait_queries.to(tokens.dtype).expand(len(deep), -1, -1)
        attended, _ = self.portrait_attention(queries, tokens, tokens, key_padding_mask=~inside, need_weights=False)
        return _fold(self.decode_portrait(queries + attended))

    def patches(self, deep: Tensor) -> Tensor:
        """Reconstruct the view from the deep tokens [B, N, C], each token its own patch; [B, 3, 32, 32]."""
        return _fold(self.decode_patch(deep))


def _fold(tokens: Tensor) -> Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (8, 8)), 4)


def views_as_tensors(entry: Entry, device: str) -> dict[str, Tensor]:
    """The fields of `RenderViews` as tensors: images in [0, 1], `*_inside` as bool."""
    images = {name: (to_signed(entry[name]) / 2 + 0.5).to(device) for name in (*VIEWS, "portrait")}
    inside = {f"{view}_inside": torch.from_numpy(entry[f"{view}_inside"]).bool().to(device) for view in VIEWS}
    return {**images, **inside, "category": torch.from_numpy(entry["category"]).to(device)}


def vision_loss(
    model: VisionPretrainer, entry: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the three losses and of a classification loss; `entry` as returned by `views_as_tensors`."""
    views = F.avg_pool2d(torch.cat([entry["first"], entry["second"]]), 2)
    top, left = torch.randint(0, 65, (2,), generator=generator).tolist()
    crops = entry["first"][..., top : top + VISION_SIZE, left : left + VISION_SIZE]
    images = torch.cat([views, crops])
    deep, last = model.tokens(images)
    count = len(crops)
    inside = torch.cat([entry["first_inside"], entry["second_inside"]]).flatten(1)
    summary = (last[: 2 * count] * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
    patches = (model.patches(deep).float() - F.avg_pool2d(images, 2)).abs().mean()
    portrait = model.portrait(deep[: 2 * count], inside).float() - entry["portrait"].repeat(2, 1, 1, 1)
    portrait = portrait.abs().mean() + 2 * portrait.pow(2).mean()
    embedded = F.normalize(model.embed(summary).float(), dim=-1)
    similarity = embedded[:count] @ embedded[count:].T / TEMPERATURE
    same = torch.arange(count, device=similarity.device)
    contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    category = F.cross_entropy(model.classify(summary).float(), entry["category"].repeat(2))
    loss = 2 * patches + 3 * portrait + 0.3 * contrast + 0.2 * category
    metrics = {
        "patches": patches,
        "portrait": portrait,
        "contrast": contrast,
        "category": category,
        "retrieval_accuracy": (similarity.argmax(1) == same).float().mean(),
    }
    return loss, {name: float(value.detach()) for name, value in metrics.items()}


def train_vision(out: Path, device: str = "cpu", **options) -> None:
    """Train the vision encoders; checkpoints and logs go to `out`. `options` are fields of `LoopConfig`."""
    config = LoopConfig(
        out=out,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        ema_decay=0.995,
        preview_every_s=120,
        save_every_s=120,
        **options,
    )
    torch.manual_seed(1)
    model = VisionPretrainer().to(device)
    pool = SamplePool(out / "pool", FIELDS, RenderViews(), start=3008, capacity=12_000, per_step=GROUP)

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pool.refresh(step)
        groups = torch.rand(config.batch_size // GROUP, generator=generator).double().numpy()
        entry = views_as_tensors(pool.groups(step, groups, GROUP), device)
        with autocast(device):
            return vision_loss(model, entry, generator)

    held_out = views_as_tensors(RenderViews(split="held_out")(range(NUM_HELD_OUT)), device)

    def preview(step: int) -> dict[str, float]:
        loss, metrics = vision_loss(model, held_out, torch.Generator().manual_seed(0))
        deep, _ = model.tokens(F.avg_pool2d(held_out["first"][:16], 2))
        rows = [
            F.avg_pool2d(held_out["first"][:16], 4),
            model.patches(deep),
            held_out["portrait"][:16],
            model.portrait(deep, held_out["first_inside"][:16].flatten(1)),
        ]
        save_grid(torch.cat(rows).float() * 2 - 1, out / "preview.png", columns=16)
        return {f"held_out_{name}": round(value, 4) for name, value in {"loss": float(loss), **metrics}.items()}

    run_loop(config, model, loss_of_step, preview)


def load_vision(out: Path, device: str = "cpu") -> VisionEncoders:
    """The encoders of `out/vision` with their EMA weights, frozen."""
    model = load_stage(out / "vision", VisionPretrainer())
    return model.to(device).requires_grad_(False).eval().encoders()
