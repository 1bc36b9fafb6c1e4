"""Stage `judges`: three small convolutional networks that only evaluation uses.

One puts pictures of the same individual close together, however it stands and wherever it is; the others name the scene
and the kind of subject. They share nothing with the model they judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_average
from ..data.pool import Entry, SamplePool
from ..data.render import pixels_of
from ..data.scenes import SCENES
from ..data.sprite_world import KINDS, Split, another_kind, compose, make_reference, random_instance, scene_ground
from ..loop import LoopConfig, run_loop
from ..pictures import to_signed
from ..precision import autocast
from .cases import half

GROUP = 8  # individuals of one category that a batch holds together, so that telling them apart is what is learned


@dataclass(frozen=True)
class RenderJudged:
    """A picture in a scene, a reference of the same individual, and the scene: `picture`, `reference` uint8
    [n, 3, 128, 128], `scene`, `category` int64 [n].

    Every third picture is the individual's half of one with two subjects.
    """

    seed: int = 4
    split: Split = "train"

    def __call__(self, indices: Sequence[int]) -> Entry:
        entry: dict[str, list] = {"picture": [], "reference": [], "scene": [], "category": []}
        for i in indices:
            rng = np.random.default_rng((self.seed, self.split == "held_out", i))
            category = i // GROUP % len(KINDS)
            individual = random_instance(rng, KINDS[category], self.split)
            scene = int(rng.integers(len(SCENES)))
            ground = scene_ground(rng, SCENES[scene])
            if i % 3:
                compose(rng, (individual,), ground)
            else:
                other = random_instance(rng, another_kind(rng, KINDS[category]), self.split)
                side = int(rng.integers(2))
                compose(rng, (individual, other) if side == 0 else (other, individual), ground)
                ground = half(ground, side)
            entry["picture"].append(pixels_of(ground))
            entry["reference"].append(pixels_of(make_reference(rng, (individual,), on_scene=0.0)))
            entry["scene"].append(scene)
            entry["category"].append(category)
        return {name: np.stack(values) for name, values in entry.items()}


class ConvNet(nn.Module):
    """[B, 3, 128, 128] in [-1, 1] -> [B, out]; which places count is learned (attention pooling)."""

    def __init__(self, out: int) -> None:
        super().__init__()
        layers, width = [nn.AvgPool2d(2)], 3
        for wider in (32, 64, 96, 128):
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.trunk = nn.Sequential(*layers, nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU())
        self.where = nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(4 * width, out)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.trunk(pixels)
        weights = self.where(seen).flatten(2).softmax(-1)  # [B, 4, h * w]
        return self.head((weights @ seen.flatten(2).transpose(1, 2)).flatten(1))


class Judges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.individual = ConvNet(64)
        self.scene = ConvNet(len(SCENES))
        self.category = ConvNet(len(KINDS))

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit vectors, [B, 64]."""
        return F.normalize(self.individual(pixels).float(), dim=-1)


def _noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Soften and jitter: a judge must bear what a small model's pictures look like."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return pixels + 0.04 * torch.randn(pixels.shape, generator=generator).to(pixels.device)


def judges_loss(model: Judges, entry: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    picture = _noisy(entry["picture"], generator)
    seen, asked = model.embed(picture), model.embed(entry["reference"])
    same = torch.arange(len(seen), device=seen.device)
    similarity = seen @ asked.T / 0.07
    contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    numbers, loss = {"found": (similarity.argmax(1) == same).float().mean()}, contrast
    for name, judge in (("scene", model.scene), ("category", model.category)):
        named = judge(picture).float()
        loss = loss + F.cross_entropy(named, entry[name])
        numbers[f"{name}_right"] = (named.argmax(1) == entry[name]).float().mean()
    return loss, {name: float(value) for name, value in numbers.items()}


def train_judges(out: Path, device: str = "cpu", **options) -> None:
    config = LoopConfig(out=out, batch_size=64, learning_rate=1e-3, average_decay=0.99, preview_every_s=60, **options)
    torch.manual_seed(2)
    model = Judges().to(device)
    fields = {
        "picture": ((3, 128, 128), "uint8"),
        "reference": ((3, 128, 128), "uint8"),
        "scene": ((), "int64"),
        "category": ((), "int64"),
    }
    pool = SamplePool(out / "pool", fields, RenderJudged(), start=4096, capacity=8192, per_step=GROUP)

    def tensors(entry: Entry) -> dict[str, Tensor]:
        pictures = {name: to_signed(entry[name]).to(device) for name in ("picture", "reference")}
        return {**pictures, **{name: torch.from_numpy(entry[name]).to(device) for name in ("scene", "category")}}

    def loss_of_step(step: int, generator: torch.Generator):
        pool.refresh(step)
        groups = torch.rand(config.batch_size // GROUP, generator=generator).double().numpy()
        entry = tensors(pool.groups(step, groups, GROUP))
        with autocast(device):
            return judges_loss(model, entry, generator)

    held_out = tensors(RenderJudged(split="held_out")(range(256)))

    def preview(step: int) -> dict[str, float]:
        seen, asked = model.embed(held_out["picture"]), model.embed(held_out["reference"])
        kin = held_out["category"][:, None] == held_out["category"]
        found = (seen @ asked.T).masked_fill(~kin, -2).argmax(1) == torch.arange(len(seen), device=device)
        numbers = {"held_out_found_in_kin": float(found.float().mean())}
        for name, judge in (("scene", model.scene), ("category", model.category)):
            numbers[f"held_out_{name}"] = float((judge(held_out["picture"]).argmax(1) == held_out[name]).float().mean())
        return numbers

    run_loop(config, model, loss_of_step, preview)


def load_judges(out: Path, device: str = "cpu") -> Judges:
    return load_average(out / "judges" / "checkpoint", Judges()).to(device).requires_grad_(False).eval()
