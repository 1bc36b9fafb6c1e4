"""Stage `vision`: the two small vision encoders, which a full-size model gets ready-made.

Three wishes, one loss each: two views of one individual lie closer together than two individuals of a kind (last
block), the deep features can redraw the individual upright, whatever its pose in the picture (appearance), and each
deep token can redraw its own patch (structure). The first two ask only the tokens that lie on the individual, and half
of the views show a second one: so tokens tell of what they lie on and nothing else, without which a picture of two
subjects (One2Many) would mix them. Global views and local crops are trained alike, as the projector reads both.

Legend: B pictures, N = 64 tokens (8 x 8), C channels of both encoders together.
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

from ..checkpoint import load_average
from ..data.pool import Entry, SamplePool
from ..data.render import pixels_of
from ..data.scenes import SCENE_SIZE
from ..data.sprite_world import KINDS, SpriteWorld, another_kind, compose, random_instance, reference_ground
from ..data.sprites import draw_instance
from ..loop import LoopConfig, run_loop
from ..networks import VISION_SIZE, VISION_WIDTH, build_vision_encoders
from ..pictures import save_grid, to_signed
from ..precision import autocast

BATCH_SIZE = 24
GROUP = 8  # individuals of one kind that a batch holds together, so that telling them apart is what is learned
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
    """Two views of an individual, each with a stranger of another kind beside it in half of the cases, and its upright
    portrait: `first`, `second` [n, 3, 128, 128], `first_inside`, `second_inside` [n, 8, 8] (1: the individual's
    tokens), `portrait` [n, 3, 32, 32], all uint8, and `category` int64 [n]."""

    seed: int = 3
    split: str = "train"

    def __call__(self, indices: Sequence[int]) -> Entry:
        entry: dict[str, list] = {name: [] for name in FIELDS}
        for i in indices:
            rng = SpriteWorld(self.seed, self.split)._rng(i, 2)
            category = i // GROUP % len(KINDS)
            individual = random_instance(rng, KINDS[category], self.split)
            stranger = random_instance(rng, another_kind(rng, KINDS[category]), self.split)
            for view in VIEWS:
                shown = ((individual,), (individual,), (individual, stranger), (stranger, individual))[rng.integers(4)]
                ground = reference_ground(rng, on_scene=0.35)
                boxes = compose(rng, shown, ground, large=True)
                entry[view].append(pixels_of(ground))
                entry[f"{view}_inside"].append(_tokens_in(boxes[shown.index(individual)]))
            entry["portrait"].append(pixels_of(_portrait(draw_instance(individual)), THUMBNAIL))
            entry["category"].append(category)
        return {name: np.stack(values) for name, values in entry.items()}


def _tokens_in(box: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 [8, 8], 1 where a token's patch is at least half in the box (px of the picture)."""
    left, top, right, bottom = (int(side * GRID / SCENE_SIZE + 0.5) for side in box)
    inside = np.zeros((GRID, GRID), np.uint8)
    inside[top:bottom, left:right] = 1
    assert inside.any(), f"{box} is smaller than a patch"
    return inside


def _portrait(sprite: Image.Image) -> Image.Image:
    ground = Image.new("RGB", (112, 112), (128, 128, 128))
    ground.paste(sprite, ((112 - sprite.width) // 2, (112 - sprite.height) // 2), sprite)
    return ground.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


class VisionTeacher(nn.Module):
    """Both encoders with the small heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip, self.dino = build_vision_encoders()
        # Written out, attention is faster backwards on a CPU than the fused kernel.
        self.siglip.set_attn_implementation("eager")
        self.dino.set_attn_implementation("eager")
        width = 2 * VISION_WIDTH
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(KINDS)))
        self.redraw_patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * 16))  # 4 x 4 px of a 32 px copy
        self.normalize = nn.LayerNorm(width)
        self.places = nn.Parameter(torch.randn(64, width) * 0.1)  # 8 x 8 places of the portrait
        self.ask = nn.MultiheadAttention(width, 6, batch_first=True)
        self.redraw = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 48)
        )

    def encoders(self) -> VisionEncoders:
        return VisionEncoders(self.siglip, self.dino, MINI_VISION, MethodConfig())

    def tokens(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, 64, 64] in [0, 1] -> tokens of the deep layer and of the last block, each [B, N, C]."""
        return self.encoders()._features(pixels, ((MINI_VISION.siglip_deep, MINI_VISION.dino_deep), (4, 4)))

    def portrait(self, deep: Tensor, inside: Tensor) -> Tensor:
        """Deep tokens, asked where `inside` [B, N] is true -> [B, 3, 32, 32]."""
        tokens = self.normalize(deep)
        places = self.places.to(tokens.dtype).expand(len(deep), -1, -1)
        seen = places + self.ask(places, tokens, tokens, key_padding_mask=~inside, need_weights=False)[0]
        return _fold(self.redraw(seen))

    def patches(self, deep: Tensor) -> Tensor:
        """Deep tokens -> the picture itself, [B, 3, 32, 32]."""
        return _fold(self.redraw_patch(deep))


def _fold(tokens: Tensor) -> Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (8, 8)), 4)


def views_as_tensors(entry: Entry, device: str) -> dict[str, Tensor]:
    """What `RenderViews` gives: pictures in [0, 1], `*_inside` bool."""
    pictures = {name: (to_signed(entry[name]) / 2 + 0.5).to(device) for name in (*VIEWS, "portrait")}
    inside = {f"{view}_inside": torch.from_numpy(entry[f"{view}_inside"]).bool().to(device) for view in VIEWS}
    return {**pictures, **inside, "category": torch.from_numpy(entry["category"]).to(device)}


def vision_loss(model: VisionTeacher, entry: dict[str, Tensor], generator: torch.Generator):
    """Entry: as of `views_as_tensors`."""
    views = F.avg_pool2d(torch.cat([entry["first"], entry["second"]]), 2)
    top, left = torch.randint(0, 65, (2,), generator=generator).tolist()
    crops = entry["first"][..., top : top + VISION_SIZE, left : left + VISION_SIZE]
    pictures = torch.cat([views, crops])
    deep, last = model.tokens(pictures)
    count = len(crops)
    inside = torch.cat([entry["first_inside"], entry["second_inside"]]).flatten(1)
    summary = (last[: 2 * count] * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
    patches = (model.patches(deep).float() - F.avg_pool2d(pictures, 2)).abs().mean()
    portrait = model.portrait(deep[: 2 * count], inside).float() - entry["portrait"].repeat(2, 1, 1, 1)
    portrait = portrait.abs().mean() + 2 * portrait.pow(2).mean()
    embedded = F.normalize(model.embed(summary).float(), dim=-1)
    similarity = embedded[:count] @ embedded[count:].T / TEMPERATURE
    same = torch.arange(count, device=similarity.device)
    contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    kind = F.cross_entropy(model.classify(summary).float(), entry["category"].repeat(2))
    loss = 2 * patches + 3 * portrait + 0.3 * contrast + 0.2 * kind
    right = (similarity.argmax(1) == same).float().mean()
    numbers = {"patches": patches, "portrait": portrait, "contrast": contrast, "kind": kind, "found": right}
    return loss, {name: float(value.detach()) for name, value in numbers.items()}


def train_vision(out: Path, device: str = "cpu", **options) -> None:
    config = LoopConfig(
        out=out,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        average_decay=0.995,
        preview_every_s=120,
        save_every_s=120,
        **options,
    )
    torch.manual_seed(1)
    model = VisionTeacher().to(device)
    pool = SamplePool(out / "pool", FIELDS, RenderViews(), start=3008, capacity=12_000, per_step=GROUP)

    def loss_of_step(step: int, generator: torch.Generator):
        pool.refresh(step)
        groups = torch.rand(config.batch_size // GROUP, generator=generator).double().numpy()
        entry = views_as_tensors(pool.groups(step, groups, GROUP), device)
        with autocast(device):
            return vision_loss(model, entry, generator)

    held_out = views_as_tensors(RenderViews(split="held_out")(range(64)), device)

    def preview(step: int) -> dict[str, float]:
        loss, numbers = vision_loss(model, held_out, torch.Generator().manual_seed(0))
        deep, _ = model.tokens(F.avg_pool2d(held_out["first"][:16], 2))
        rows = [
            F.avg_pool2d(held_out["first"][:16], 4),
            model.patches(deep),
            held_out["portrait"][:16],
            model.portrait(deep, held_out["first_inside"][:16].flatten(1)),
        ]
        save_grid(torch.cat(rows).float() * 2 - 1, out / "pictures.png", columns=16)
        return {f"held_out_{name}": round(value, 4) for name, value in {"loss": float(loss), **numbers}.items()}

    run_loop(config, model, loss_of_step, preview)


def load_vision(out: Path, device: str = "cpu") -> VisionEncoders:
    """The averaged, frozen encoders of `out/vision`."""
    model = load_average(out / "vision" / "checkpoint", VisionTeacher()).to(device).requires_grad_(False).eval()
    return model.encoders()
