"""Stage `adapter`: RealCustom++ itself. Projector and W_Ki, W_Vi learn; text-to-image model and vision encoders are
frozen.

Visual attention is unmasked in training (Sec. 3.2): the model must find out which words a reference belongs to. Two
departures, both because the training is short: noisy steps, where appearance is decided, are drawn more often, and the
loss counts more where the reference's subjects are. Picture sizes take turns as in stage `base`.

Legend: B batch, N vision tokens, C vision channels.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from realcustom.adapter import RealCustomAdapter
from realcustom.attention import AttentionLayers, KeysValues, VisualAttention, level_sizes
from realcustom.mask import SparseMask
from realcustom.vision import VisionFeatures

from ..captions import CaptionCache
from ..checkpoint import checkpoint_state, load_average
from ..data.pool import Entry, SamplePool
from ..data.render import CAPTION_BYTES, RenderPairs, unpack_captions
from ..diffusion import diffusion_loss, sample_latents, subject_weight
from ..latents import LatentCodec
from ..loop import LoopConfig, run_loop
from ..networks import LATENT_FACTOR, PICTURE_SIZE, VISION_WIDTH, build_scheduler
from ..pictures import save_grid, to_signed
from ..precision import autocast, differentiable_attention
from .base import TextToImage, first_falling_step, load_base, size_and_turn
from .vision import load_vision

BATCH_SIZE = 64
CURRICULUM_SAMPLES = 20_000  # fresh pairs over which the curriculum of Eq. 10-13 runs
FEATURES = {"shallow": 3 * 64, "deep": 64, "local": 4 * 64}  # tokens


def build_adapter(model: TextToImage) -> RealCustomAdapter:
    return RealCustomAdapter.for_unet(model.unet, vision_dim=2 * VISION_WIDTH)


def everywhere(keys_values: KeysValues) -> VisualAttention:
    """Reference b for row b of the UNet call, without a mask."""
    return VisualAttention(keys_values=(keys_values,), inside=None)


class AdapterTask:
    """The frozen parts, and the loss of the adapter upon them."""

    def __init__(self, out: Path, device: str, compiled: bool = False) -> None:
        self.device = device
        self.model = load_base(out, device)
        self.model.unet.to(memory_format=torch.channels_last)
        self.attention = AttentionLayers(self.model.unet)
        self.unet = torch.compile(self.model.unet, dynamic=False) if compiled else self.model.unet
        self.encode_text = CaptionCache(self.model.encode_text)
        self.encoders = load_vision(out, device)
        self.vision_step = checkpoint_state(out / "vision" / "checkpoint")["step"]
        self.codec = LatentCodec(out, device)
        self.scheduler = build_scheduler()

    def autocast(self):
        return autocast(self.device)

    @torch.no_grad()
    def features(self, references: np.ndarray) -> VisionFeatures:
        """uint8 [B, 3, 128, 128] -> features."""
        parts = []
        for chunk in (to_signed(references) / 2 + 0.5).to(self.device).split(32):
            with self.autocast():
                parts.append(vars(self.encoders.encode_pixels(chunk)))
        return VisionFeatures(**{name: torch.cat([part[name].float() for part in parts]) for name in FEATURES})

    def encode(self, raw: Entry) -> Entry:
        """Pictures -> what the pool stores."""
        features = {name: values.half().cpu().numpy() for name, values in vars(self.features(raw["reference"])).items()}
        latents = self.codec.encode(to_signed(raw["pixels"])).half().cpu().numpy()
        return {**features, "latents": latents, "caption": raw["caption"], "inside": raw["inside"]}

    def tensors(self, entry: Entry) -> tuple[Tensor, VisionFeatures, Tensor]:
        """Clean latents, features, weight of each place [B, 1, h, w]."""
        load = lambda values: torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self.device)
        features = VisionFeatures(**{name: load(entry[name]) for name in FEATURES})
        return load(entry["latents"]), features, subject_weight(load(entry["inside"]))

    def loss(self, unet, vision, clean: Tensor, weight: Tensor, captions: list[str], noise: Tensor, steps: Tensor):
        """Weighted velocity loss per sample, [B]; `vision` None is the base model alone."""
        with self.autocast(), differentiable_attention(self.device):
            embeds, pooled = self.encode_text(captions)
            with self.attention.attention_context(vision=vision):
                return diffusion_loss(unet, self.scheduler, clean, noise, steps, embeds, pooled, weight)


def draw_noisy(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise, and time steps of which noisy ones are more frequent."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    even = (torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)) / len(clean)
    return noise, (even.pow(0.7) * 1000).long().clamp_max(999).to(clean.device)


def train_adapter(out: Path, device: str = "cpu", compiled: bool = False, **options) -> None:
    config = LoopConfig(
        out=out / "adapter", batch_size=BATCH_SIZE, learning_rate=6e-4, warmup_steps=100, average_decay=0.998,
        decay=0.2, preview_every_s=240, **options,
    )  # fmt: skip
    task = AdapterTask(out, device, compiled)
    adapter = build_adapter(task.model).to(device)
    details_from = first_falling_step(config)
    pools: dict[int, SamplePool] = {}

    def pool_for(size: int, turn: int) -> SamplePool:
        if size not in pools:
            side = size // LATENT_FACTOR
            fields = {
                **{name: ((tokens, 2 * VISION_WIDTH), "float16") for name, tokens in FEATURES.items()},
                "latents": ((4, side, side), "float16"),
                "caption": ((CAPTION_BYTES,), "uint8"),
                "inside": ((side, side), "uint8"),
            }
            # The curriculum runs over the half-size pairs; the fewer full-size ones are all of its last kind.
            half = size < PICTURE_SIZE
            render = RenderPairs(size=size, seed=2 if half else 7, curriculum=CURRICULUM_SAMPLES if half else 1)
            folder = config.out / f"pool_{size}_vision_{task.vision_step}"  # features of other encoders are of no use
            options = dict(start=2000, capacity=10_000, per_step=8)
            pools[size] = SamplePool(folder, fields, render, task.encode, **options)
        return pools[size]

    def loss_of_step(step: int, generator: torch.Generator):
        size, turn = size_and_turn(step, details_from)
        pool = pool_for(size, turn)
        pool.refresh(turn)
        entry = pool.batch(turn, torch.rand(config.batch_size, generator=generator).numpy())
        clean, features, weight = task.tensors(entry)
        noise, steps = draw_noisy(clean, generator)
        with task.autocast():
            vision = everywhere(adapter(features))
        return task.loss(task.unet, vision, clean, weight, unpack_captions(entry["caption"]), noise, steps).mean(), {}

    @cache
    def held_out() -> tuple[Entry, Entry, VisionFeatures]:
        """Pairs as pictures and encoded, and features of wrong references for them."""
        raw = RenderPairs(size=PICTURE_SIZE, seed=5, split="held_out", with_wrong=True)(range(1, 65))
        return raw, task.encode(raw), task.features(raw["wrong"])

    def preview(step: int) -> dict[str, float]:
        raw, encoded, wrong = held_out()
        clean, features, weight = task.tensors(encoded)
        noise, steps = draw_noisy(clean, torch.Generator().manual_seed(1))
        captions = unpack_captions(encoded["caption"])
        numbers = {}
        for name, reference in (("right", features), ("wrong", wrong), ("none", None)):
            with task.autocast():
                vision = None if reference is None else everywhere(adapter(reference))
            numbers[f"loss_{name}"] = round(
                float(task.loss(task.model.unet, vision, clean, weight, captions, noise, steps).mean()), 5
            )
        save_grid(
            _compare(task, adapter, raw, captions), config.out / "pictures" / f"{step * BATCH_SIZE:08d}.png", columns=10
        )
        return numbers

    run_loop(config, adapter, loss_of_step, preview)


def _compare(task: AdapterTask, adapter: RealCustomAdapter, raw: Entry, captions: list[str], count: int = 10) -> Tensor:
    """Rows: reference; text alone; text and reference (unmasked), all from the same noise."""
    size = raw["pixels"].shape[-1]
    shape = (count, 4, size // LATENT_FACTOR, size // LATENT_FACTOR)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(task.device)
    embeds, pooled = task.encode_text([*captions[:count], ""])
    with task.autocast():
        keys_values = adapter(task.features(raw["reference"][:count]))
    text = (embeds[:-1], pooled[:-1], embeds[-1:], pooled[-1:])
    inside = {}  # of the first half of the rows; the other one is unconditional
    for level, (height, width) in enumerate(level_sizes(*shape[-2:], max(task.attention.levels.values()) + 1)):
        ones = SparseMask.from_dense(torch.ones(1, height * width, device=task.device))
        inside[level] = SparseMask.stack([ones] * count, [row * height * width for row in range(count)])
    rows = [F.interpolate(to_signed(raw["reference"][:count]), (size, size), mode="area").to(task.device)]
    for vision in (None, VisualAttention(keys_values=(keys_values,), inside=inside)):
        with task.attention.attention_context(vision=vision):
            latents = sample_latents(task.model.unet, task.scheduler, *text, noise)
        rows.append(task.codec.decode(latents))
    return torch.cat(rows)


def load_adapter(out: Path, model: TextToImage) -> RealCustomAdapter:
    """Averaged weights of `out/adapter`; where that stage has not run yet, an adapter that changes nothing."""
    adapter = build_adapter(model)
    folder = out / "adapter" / "checkpoint"
    if folder.exists():
        return load_average(folder, adapter)
    for layer in adapter.to_v_vision.values():
        torch.nn.init.zeros_(layer.weight)
    return adapter
