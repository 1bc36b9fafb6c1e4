"""Stage `adapter`: trains the adapter of RealCustom++ (projector, W_Ki, W_Vi). The text-to-image model and the vision
encoders are frozen.

Visual attention is unmasked in training (Sec. 3.2), so that the adapter learns which words a reference belongs to.
Because the training is short, it differs from the paper in two ways: noisy timesteps, which determine the appearance,
are more frequent, and the loss has a higher weight inside the reference's subjects. Image sizes alternate as in stage
`base`.

Legend: B batch, N vision tokens, C vision channels, h, w latent size.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realcustom.adapter import RealCustomAdapter
from realcustom.attention import AttentionLayers, level_sizes
from realcustom.vision import VisionFeatures
from realcustom.visual_attention import KeysValues, SparseMask, VisualAttention

from ..captions import CaptionCache
from ..checkpoint import checkpoint_state, find_checkpoint, load_ema
from ..data.pool import Entry, SamplePool
from ..data.render import CAPTION_BYTES, RenderPairs, unpack_captions
from ..diffusion import diffusion_loss, sample_latents, sample_timesteps, subject_weight
from ..images import save_grid, to_signed
from ..latents import LatentCodec
from ..loop import LoopConfig, run_loop
from ..networks import IMAGE_SIZE, LATENT_FACTOR, VISION_WIDTH, build_scheduler, module_to
from ..precision import autocast, differentiable_attention
from .base import TextToImage, first_decay_step, load_base, resolution_of_step
from .vision import load_vision

BATCH_SIZE = 64
CURRICULUM_SAMPLES = 20_000  # rendered pairs over which the curriculum of Eq. 10-13 runs
TIMESTEP_EXPONENT = 0.7  # see `sample_timesteps`
FEATURES = {"shallow": 3 * 64, "deep": 64, "local": 4 * 64}  # tokens


def build_adapter(model: TextToImage) -> RealCustomAdapter:
    """An untrained adapter for the UNet of `model`."""
    return RealCustomAdapter.for_unet(model.unet, vision_dim=2 * VISION_WIDTH)


def unmasked(keys_values: KeysValues) -> VisualAttention:
    """Unmasked visual attention: row b of the UNet call attends to reference b at all positions."""
    return VisualAttention(keys_values=(keys_values,), masks=None)


class AdapterTask:
    """The frozen models and the adapter's loss.

    Args:
        out: folder of the run. The stages `vae`, `base` and `vision` must have checkpoints in it.
        device: device of the frozen models.
        compiled: compile the UNet.
    """

    def __init__(self, out: Path, device: str, compiled: bool = False) -> None:
        self.device = device
        self.model = load_base(out, device)
        self.attention = AttentionLayers(self.model.unet)
        self.unet = torch.compile(self.model.unet, dynamic=False) if compiled else self.model.unet
        self.encode_text = CaptionCache(self.model.encode_text)
        self.encoders = load_vision(out, device)
        self.vision_step = checkpoint_state(out / "vision" / "checkpoint")["step"]
        self.codec = LatentCodec(out, device)
        self.scheduler = build_scheduler()

    def autocast(self) -> torch.autocast:
        return autocast(self.device)

    @torch.no_grad()
    def features(self, references: np.ndarray) -> VisionFeatures:
        """References, uint8 [B, 3, 128, 128] -> vision features in float32."""
        parts = []
        for chunk in (to_signed(references) / 2 + 0.5).to(self.device).split(32):
            with self.autocast():
                parts.append(vars(self.encoders.encode_pixels(chunk)))
        return VisionFeatures(**{name: torch.cat([part[name].float() for part in parts]) for name in FEATURES})

    def encode(self, raw: Entry) -> Entry:
        """Fields of `RenderPairs` -> fields of the pool: latents and features instead of images."""
        features = {name: values.half().cpu().numpy() for name, values in vars(self.features(raw["reference"])).items()}
        latents = self.codec.encode(to_signed(raw["pixels"])).half().cpu().numpy()
        return {**features, "latents": latents, "caption": raw["caption"], "inside": raw["inside"]}

    def tensors(self, entry: Entry) -> tuple[Tensor, VisionFeatures, Tensor]:
        """Clean latents [B, 4, h, w], vision features, and the weight of each position [B, 1, h, w]."""

        def load(name: str) -> Tensor:
            return torch.from_numpy(np.asarray(entry[name], dtype=np.float32)).to(self.device)

        features = VisionFeatures(**{name: load(name) for name in FEATURES})
        return load("latents"), features, subject_weight(load("inside"))

    def noise_and_timesteps(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise in the shape of `clean` [B, 4, h, w], and timesteps [B]."""
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = sample_timesteps(len(clean), generator, TIMESTEP_EXPONENT)
        return noise.to(self.device), timesteps.to(self.device)

    def loss(
        self,
        unet: Callable,
        vision: VisualAttention | None,
        clean: Tensor,
        weight: Tensor,
        captions: list[str],
        noise: Tensor,
        timesteps: Tensor,
    ) -> Tensor:
        """Weighted velocity loss per sample, [B]. `vision` None evaluates the text-to-image model alone."""
        with self.autocast(), differentiable_attention(self.device):
            embeds, pooled = self.encode_text(captions)
            with self.attention.attention_context(vision=vision):
                return diffusion_loss(unet, self.scheduler, clean, noise, timesteps, embeds, pooled, weight)


def train_adapter(out: Path, device: str = "cpu", compiled: bool = False, **options) -> None:
    """Train the adapter; checkpoints and logs go to `out/adapter`.

    Args:
        out: folder of the run, see `AdapterTask`.
        compiled: compile the UNet.
        options: fields of `LoopConfig`.
    """
    config = LoopConfig(
        out=out / "adapter", batch_size=BATCH_SIZE, learning_rate=6e-4, warmup_steps=100, ema_decay=0.998,
        decay=0.2, preview_every_s=240, **options,
    )  # fmt: skip
    task = AdapterTask(out, device, compiled)
    adapter = module_to(build_adapter(task.model), device)
    full_size_from = first_decay_step(config)
    pools: dict[int, SamplePool] = {}

    def pool_for(size: int) -> SamplePool:
        if size not in pools:
            side = size // LATENT_FACTOR
            fields = {
                **{name: ((tokens, 2 * VISION_WIDTH), "float16") for name, tokens in FEATURES.items()},
                "latents": ((4, side, side), "float16"),
                "caption": ((CAPTION_BYTES,), "uint8"),
                "inside": ((side, side), "uint8"),
            }
            # The curriculum runs over the half-size pairs. Full-size pairs are fewer and have the final difficulty.
            half = size < IMAGE_SIZE
            render = RenderPairs(size=size, seed=2 if half else 7, curriculum=CURRICULUM_SAMPLES if half else 1)
            # The vision step in the name prevents the use of features from earlier encoders.
            folder = config.out / f"pool_{size}_vision_{task.vision_step}"
            pools[size] = SamplePool(folder, fields, render, task.encode, start=2000, capacity=10_000, per_step=8)
        return pools[size]

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        size, pool_step = resolution_of_step(step, full_size_from)
        pool = pool_for(size)
        pool.refresh(pool_step)
        entry = pool.batch(pool_step, torch.rand(config.batch_size, generator=generator).numpy())
        clean, features, weight = task.tensors(entry)
        noise, timesteps = task.noise_and_timesteps(clean, generator)
        with task.autocast():
            vision = unmasked(adapter(features))
        captions = unpack_captions(entry["caption"])
        return task.loss(task.unet, vision, clean, weight, captions, noise, timesteps).mean(), {}

    @cache
    def held_out() -> tuple[Entry, Entry, VisionFeatures]:
        """Held-out pairs as rendered and as encoded, and the features of distractor references for them."""
        raw = RenderPairs(size=IMAGE_SIZE, seed=5, split="held_out", with_distractor=True)(range(1, 65))
        return raw, task.encode(raw), task.features(raw["distractor"])

    def preview(step: int) -> dict[str, float]:
        raw, encoded, distractor = held_out()
        clean, features, weight = task.tensors(encoded)
        noise, timesteps = task.noise_and_timesteps(clean, torch.Generator().manual_seed(1))
        captions = unpack_captions(encoded["caption"])
        metrics = {}
        for name, reference in (("right", features), ("distractor", distractor), ("none", None)):
            with task.autocast():
                vision = None if reference is None else unmasked(adapter(reference))
            losses = task.loss(task.model.unet, vision, clean, weight, captions, noise, timesteps)
            metrics[f"loss_{name}"] = round(float(losses.mean()), 5)
        grid = _preview_grid(task, adapter, raw, captions)
        save_grid(grid, config.out / "previews" / f"{step * BATCH_SIZE:08d}.png", columns=10)
        return metrics

    run_loop(config, adapter, loss_of_step, preview)


def _preview_grid(
    task: AdapterTask, adapter: RealCustomAdapter, raw: Entry, captions: list[str], count: int = 10
) -> Tensor:
    """Rows of `count` images: references; text only; text and reference (unmasked), from the same noise."""
    size = raw["pixels"].shape[-1]
    shape = (count, 4, size // LATENT_FACTOR, size // LATENT_FACTOR)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(task.device)
    embeds, pooled = task.encode_text([*captions[:count], ""])
    with task.autocast():
        keys_values = adapter(task.features(raw["reference"][:count]))
    text = (embeds[:-1], pooled[:-1], embeds[-1:], pooled[-1:])
    masks = {}  # masks of ones, for the rows with the text condition; the unconditional rows have no reference
    for level, (height, width) in enumerate(level_sizes(*shape[-2:], max(task.attention.levels.values()) + 1)):
        positions = torch.arange(count * height * width, device=task.device).view(count, height * width)
        masks[level] = SparseMask(positions, torch.ones(*positions.shape, 1, device=task.device))
    rows = [F.interpolate(to_signed(raw["reference"][:count]), (size, size), mode="area").to(task.device)]
    for vision in (None, VisualAttention(keys_values=(keys_values,), masks=masks)):
        with task.attention.attention_context(vision=vision):
            latents = sample_latents(task.model.unet, task.scheduler, *text, noise)
        rows.append(task.codec.decode(latents))
    return torch.cat(rows)


def load_adapter(out: Path, model: TextToImage) -> RealCustomAdapter:
    """The EMA weights of `out/adapter`; an adapter whose output is zero if that stage has not run."""
    adapter = build_adapter(model)
    folder = out / "adapter" / "checkpoint"
    if find_checkpoint(folder) is not None:
        return load_ema(folder, adapter)
    for weight in adapter.to_v_vision.parameters():
        torch.nn.init.zeros_(weight)
    return adapter
