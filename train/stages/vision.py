"""Stage `vision`: the two small vision encoders, which a full-size model gets ready-made.

Three wishes, one loss each: two views of one individual lie closer together than two individuals of a kind (last
block), the deep features can redraw the individual upright, whatever its pose in the picture (appearance), and each
deep token can redraw its own patch (structure). Global views and local crops are trained alike, as the projector reads
both.

Legend: B pictures, N = 64 tokens, C channels of both encoders together.
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
from ..data.sprite_world import SpriteWorld, make_reference, random_instance
from ..data.sprites import TRAINED, draw_instance
from ..loop import LoopConfig, run_loop
from ..networks import VISION_SIZE, VISION_WIDTH, build_vision_encoders
from ..pictures import save_grid, to_signed
from ..precision import autocast

BATCH_SIZE = 24
THUMBNAIL = 32  # px
TEMPERATURE = 0.1
MINI_VISION = VisionConfig(siglip_shallow=(0, 1, 2), siglip_deep=3, dino_shallow=(0, 1, 2), dino_deep=3)


@dataclass(frozen=True)
class RenderViews:
    """Two views of an individual and its upright portrait: `first`, `second` [n, 3, 128, 128], `portrait` [n, 3, 32,
    32], all uint8, and `category` int64 [n]."""

    seed: int = 3
    split: str = "train"

    def __call__(self, indices: Sequence[int]) -> Entry:
        entry: dict[str, list] = {"first": [], "second": [], "portrait": [], "category": []}
        names = list(TRAINED)
        for i in indices:
            rng = SpriteWorld(self.seed, self.split)._rng(i, 2)
            category = int(rng.integers(len(names)))
            individual = random_instance(rng, names[category], self.split)
            for view in ("first", "second"):
                entry[view].append(pixels_of(make_reference(rng, (individual,), on_scene=0.35)))
            entry["portrait"].append(pixels_of(_portrait(draw_instance(individual)), THUMBNAIL))
            entry["category"].append(category)
        return {name: np.stack(values) for name, values in entry.items()}


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
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(TRAINED)))
        self.redraw_patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * 16))  # 4 x 4 px of a 32 px copy
        self.normalize = nn.LayerNorm(width)
        self.places = nn.Parameter(torch.randn(64, width) * 0.1)  # 8 x 8 places of the portrait
        self.ask = nn.MultiheadAttention(width, 6, batch_first=True)
        self.redraw = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 48)
        )

    def encoders(self) -> VisionEncoders:
        return VisionEncoders(self.siglip, self.dino, MINI_VISION, MethodConfig())

    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, 64, 64] in [0, 1] -> deep tokens [B, N, C] and one vector of the last block [B, C]."""
        deep, last = self.encoders()._features(pixels, ((MINI_VISION.siglip_deep, MINI_VISION.dino_deep), (4, 4)))
        return deep, last.mean(1)

    def portrait(self, deep: Tensor) -> Tensor:
        """Deep tokens -> [B, 3, 32, 32]."""
        tokens = self.normalize(deep)
        places = self.places.to(tokens.dtype).expand(len(deep), -1, -1)
        seen = places + self.ask(places, tokens, tokens, need_weights=False)[0]
        return _fold(self.redraw(seen))

    def patches(self, deep: Tensor) -> Tensor:
        """Deep tokens -> the picture itself, [B, 3, 32, 32]."""
        return _fold(self.redraw_patch(deep))


def _fold(tokens: Tensor) -> Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (8, 8)), 4)


def vision_loss(model: VisionTeacher, entry: dict[str, Tensor], generator: torch.Generator):
    """Entry: as `RenderViews`, pictures in [0, 1]."""
    views = F.avg_pool2d(torch.cat([entry["first"], entry["second"]]), 2)
    top, left = torch.randint(0, 65, (2,), generator=generator).tolist()
    crops = entry["first"][..., top : top + VISION_SIZE, left : left + VISION_SIZE]
    pictures = torch.cat([views, crops])
    deep, summary = model.tokens(pictures)
    count = len(crops)
    patches = (model.patches(deep).float() - F.avg_pool2d(pictures, 2)).abs().mean()
    portrait = model.portrait(deep[: 2 * count]).float() - entry["portrait"].repeat(2, 1, 1, 1)
    portrait = portrait.abs().mean() + 2 * portrait.pow(2).mean()
    embedded = F.normalize(model.embed(summary[: 2 * count]).float(), dim=-1)
    similarity = embedded[:count] @ embedded[count:].T / TEMPERATURE
    same = torch.arange(count, device=similarity.device)
    contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    names = entry["category"].repeat(3)
    kind = F.cross_entropy(model.classify(summary).float()[: 2 * count], names[: 2 * count])
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
    fields = {
        "first": ((3, 128, 128), "uint8"),
        "second": ((3, 128, 128), "uint8"),
        "portrait": ((3, THUMBNAIL, THUMBNAIL), "uint8"),
        "category": ((), "int64"),
    }
    pool = SamplePool(out / "pool", fields, RenderViews(), start=3000, capacity=12_000, per_step=6)
    pool.fill(0)

    def tensors(entry: Entry) -> dict[str, Tensor]:
        as_float = {name: (to_signed(entry[name]) / 2 + 0.5).to(device) for name in ("first", "second", "portrait")}
        return {**as_float, "category": torch.from_numpy(entry["category"]).to(device)}

    def loss_of_step(step: int, generator: torch.Generator):
        pool.refresh(step)
        entry = tensors(pool.batch(step, torch.rand(config.batch_size, generator=generator).numpy()))
        with autocast(device):
            return vision_loss(model, entry, generator)

    held_out = tensors(RenderViews(split="held_out")(range(64)))

    def preview(step: int) -> dict[str, float]:
        loss, numbers = vision_loss(model, held_out, torch.Generator().manual_seed(0))
        deep, _ = model.tokens(F.avg_pool2d(held_out["first"][:16], 2))
        rows = [
            F.avg_pool2d(held_out["first"][:16], 4),
            model.patches(deep),
            held_out["portrait"][:16],
            model.portrait(deep),
        ]
        save_grid(torch.cat(rows).float() * 2 - 1, out / "pictures.png", columns=16)
        return {f"held_out_{name}": round(value, 4) for name, value in {"loss": float(loss), **numbers}.items()}

    run_loop(config, model, loss_of_step, preview)


def load_vision(out: Path, device: str = "cpu") -> VisionEncoders:
    """The averaged, frozen encoders of `out/vision`."""
    model = load_average(out / "vision" / "checkpoint", VisionTeacher()).to(device).requires_grad_(False).eval()
    return model.encoders()
