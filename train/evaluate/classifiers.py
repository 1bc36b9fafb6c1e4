"""Stage `classifiers`: three small convolutional networks that only the evaluation uses.

One embeds images so that views of the same instance are close, regardless of pose and background. The other two
classify the scene and the category of the subject. They share no weights with the model they evaluate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sprite_world.scenes import SCENES
from ..data.sprite_world.views import View
from ..data.sprite_world.world import (
    TRAINED_CATEGORIES,
    Split,
    another_category,
    compose,
    make_reference,
    random_instance,
    render_views,
    scene_background,
)
from ..images import to_signed
from ..mini.loop import LoopConfig, load_stage, run_loop
from ..mini.pool import Entry, SamplePool
from ..mini.render import pixels_of
from ..precision import autocast
from .cases import crop_subject

BATCH_SIZE = 64
NUM_HELD_OUT = 256
GROUP = 8  # instances of one category per group of a batch: the networks must distinguish instances, not categories


@dataclass(frozen=True)
class RenderLabeled:
    """Images in a scene with their labels, and a reference of the same instance.

    Every third image is the crop of one of two subjects. Fields: `image`, `reference` uint8 [n, 3, 128, 128]; `scene`,
    `category` int64 [n].
    """

    seed: int = 4
    split: Split = "train"

    def __call__(self, indices: Sequence[int]) -> Entry:
        views: list[View] = []  # image and reference of each index in turn
        sides: list[int | None] = []  # which of two subjects an image is cropped to
        scenes, labels = [], []
        for i in indices:
            rng = np.random.default_rng((self.seed, self.split == "held_out", i))
            label = i // GROUP % len(TRAINED_CATEGORIES)
            category = TRAINED_CATEGORIES[label]
            instance = random_instance(rng, category, self.split)
            scene = int(rng.integers(len(SCENES)))
            background = scene_background(rng, scene)
            side, shown = None, (instance,)
            if i % 3 == 0:
                other = random_instance(rng, another_category(rng, category), self.split)
                side = int(rng.integers(2))
                shown = (instance, other) if side == 0 else (other, instance)
            views += compose(rng, shown, background), make_reference(rng, (instance,), on_scene=0.0)
            sides.append(side)
            scenes.append(scene)
            labels.append(label)
        images = render_views(views)
        cropped = [
            image if side is None else crop_subject(image, side) for image, side in zip(images[::2], sides, strict=True)
        ]
        return {
            "image": np.stack([pixels_of(image) for image in cropped]),
            "reference": np.stack([pixels_of(image) for image in images[1::2]]),
            "scene": np.array(scenes),
            "category": np.array(labels),
        }


class ConvNet(nn.Module):
    """Convolutional network with attention pooling: [B, 3, 128, 128] in [-1, 1] -> [B, num_outputs]."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        width = 3
        for wider in (32, 64, 96, 128):
            layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.SiLU()]
            width = wider
        self.trunk = nn.Sequential(*layers, nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU())
        self.attention = nn.Conv2d(width, 4, 1)
        self.head = nn.Linear(4 * width, num_outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.trunk(pixels)
        weights = self.attention(features).flatten(2).softmax(-1)  # [B, 4, h * w]
        return self.head((weights @ features.flatten(2).transpose(1, 2)).flatten(1))


class Classifiers(nn.Module):
    """The three networks: instance embedding, scene and category."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = ConvNet(64)
        self.scene = ConvNet(len(SCENES))
        self.category = ConvNet(len(TRAINED_CATEGORIES))

    def embed(self, pixels: Tensor) -> Tensor:
        """Instance embeddings of images [B, 3, 128, 128] in [-1, 1]; unit vectors, [B, 64]."""
        return F.normalize(self.instance(pixels).float(), dim=-1)


def _degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the batches and add noise, because the images of a small model are blurry and noisy."""
    if torch.rand((), generator=generator) < 0.5:
        pixels = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return pixels + 0.04 * torch.randn(pixels.shape, generator=generator).to(pixels.device)


def classifiers_loss(
    model: Classifiers, entry: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Contrastive loss of image and reference plus two classification losses; `entry` as of `RenderLabeled`."""
    images = _degrade(entry["image"], generator)
    embedded, references = model.embed(images), model.embed(entry["reference"])
    same = torch.arange(len(embedded), device=embedded.device)
    similarity = embedded @ references.T / 0.07
    loss = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    metrics = {"retrieval_accuracy": (similarity.argmax(1) == same).float().mean()}
    for name, classifier in (("scene", model.scene), ("category", model.category)):
        logits = classifier(images).float()
        loss = loss + F.cross_entropy(logits, entry[name])
        metrics[f"{name}_accuracy"] = (logits.argmax(1) == entry[name]).float().mean()
    return loss, {name: float(value) for name, value in metrics.items()}


def train_classifiers(out: Path, device: str = "cpu", **options) -> None:
    """Train the classifiers; checkpoints and logs go to `out`. `options` are fields of `LoopConfig`."""
    config = LoopConfig(
        out=out, batch_size=BATCH_SIZE, learning_rate=1e-3, ema_decay=0.99, preview_every_s=60, **options
    )
    torch.manual_seed(2)
    model = Classifiers().to(device)
    fields = {
        "image": ((3, 128, 128), "uint8"),
        "reference": ((3, 128, 128), "uint8"),
        "scene": ((), "int64"),
        "category": ((), "int64"),
    }
    pool = SamplePool(out / "pool", fields, RenderLabeled(), start=4096, capacity=8192, per_step=GROUP)

    def tensors(entry: Entry) -> dict[str, Tensor]:
        images = {name: to_signed(entry[name]).to(device) for name in ("image", "reference")}
        return {**images, **{name: torch.from_numpy(entry[name]).to(device) for name in ("scene", "category")}}

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pool.refresh(step)
        groups = torch.rand(config.batch_size // GROUP, generator=generator).double().numpy()
        entry = tensors(pool.groups(step, groups, GROUP))
        with autocast(device):
            return classifiers_loss(model, entry, generator)

    held_out = tensors(RenderLabeled(split="held_out")(range(NUM_HELD_OUT)))

    def preview(step: int) -> dict[str, float]:
        similarity = model.embed(held_out["image"]) @ model.embed(held_out["reference"]).T
        same_category = held_out["category"][:, None] == held_out["category"]
        nearest = similarity.masked_fill(~same_category, -2).argmax(1)
        right = nearest == torch.arange(len(nearest), device=device)
        metrics = {"held_out_same_category_retrieval_accuracy": float(right.float().mean())}
        for name, classifier in (("scene", model.scene), ("category", model.category)):
            right = classifier(held_out["image"]).argmax(1) == held_out[name]
            metrics[f"held_out_{name}_accuracy"] = float(right.float().mean())
        return metrics

    run_loop(config, model, loss_of_step, preview)


def load_classifiers(out: Path, device: str = "cpu") -> Classifiers:
    """The EMA weights of `out/classifiers`, frozen."""
    model = load_stage(out / "classifiers", Classifiers())
    return model.to(device).requires_grad_(False).eval()
