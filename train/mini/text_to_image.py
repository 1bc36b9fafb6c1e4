"""Stage `base`: the text-to-image model. UNet and both text encoders are trained from scratch on latents of the sprite
world.

Most steps use half-size images, of which three times as many can be processed per second. They train words, shapes and
layout, as in the first phase of SDXL's own training. While the learning rate decays, all steps use full-size images,
which train details.
"""

import math
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from realcustom.attention import AttentionLayers
from realcustom.recorder import AttentionRecorder

from ..images import save_grid
from ..noise import normals
from ..objective import position_weight
from ..precision import autocast, differentiable_attention
from .captions import CaptionCache
from .diffusion import OUTSIDE_WEIGHT, diffusion_loss, sample_latents, sample_timesteps
from .grounding import GROUNDING_WEIGHT, grounding_loss, subject_token_masks
from .latent_samples import LatentPool, LatentSource, LatentStream
from .latents import LatentCodec
from .loop import LoopConfig, load_stage, run_loop
from .networks import IMAGE_SIZE, LATENT_FACTOR, build_scheduler, build_text_encoders, build_unet
from .tokenizer import load_tokenizer

CAPTION_DROPOUT = 0.1
BATCH_SIZE, GPU_BATCH_SIZE = 64, 1024
FULL_SIZE_EVERY = 20
# The text encoders are trained on this many samples. Afterwards they are frozen, and each caption is encoded once.
TEXT_SAMPLES = 200_000
# A step that records attention takes a third longer. The number divides FULL_SIZE_EVERY, so that steps of both sizes
# have the grounding loss.
GROUNDED_EVERY = 5
PREVIEW_PROMPTS = (
    "a dog on the beach",
    "a cat in the snow",
    "a fox on green grass",
    "a bear in the jungle",
    "a rabbit on a wooden floor",
    "a frog on a cobblestone street",
    "a pig at night under stars",
    "a penguin in the city",
    "an owl on the beach",
    "a duck in the snow",
    "a car on green grass",
    "a robot in the jungle",
    "a backpack on a wooden floor",
    "a teapot on a cobblestone street",
    "a guitar at night under stars",
    "a boot in the city",
    "a dog and a cat on the beach",
    "a car and a robot in the snow",
    "a fox and an owl on green grass",
    "a teapot and a boot on a wooden floor",
)


def resolution_of_step(step: int, full_size_from: int | None = None) -> tuple[int, int]:
    """Image size of a step in px, and the number of earlier steps of that size.

    Args:
        full_size_from: from this step on, all steps use full-size images; None never.
    """
    mixed = step if full_size_from is None else min(step, full_size_from)
    full = mixed // FULL_SIZE_EVERY
    if mixed < step:
        return IMAGE_SIZE, full + step - mixed
    if step == full_size_from or step % FULL_SIZE_EVERY == FULL_SIZE_EVERY - 1:
        return IMAGE_SIZE, full
    return IMAGE_SIZE // 2, step - full


def first_decay_step(config: LoopConfig) -> int | None:
    """The step at which the learning rate starts to decay; None if the run has no end."""
    if config.max_samples is None:
        return None
    return math.ceil((1 - config.decay_fraction) * config.max_samples / config.batch_size)


class TextToImage(nn.Module):
    """UNet and text encoders as one trainable module."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.unet = build_unet()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(tokenizer)
        for encoder in (self.text_encoder, self.text_encoder_2):  # see `differentiable_attention`
            encoder.set_attn_implementation("eager")

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids, int64 [B, T]."""
        return self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Penultimate hidden states of both encoders [B, T, 128], and the pooled text of the second [B, 64]."""
        tokens = self.tokens(captions).to(self.unet.device)
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def default_batch_size(device: str) -> int:
    """Default number of samples per step on a device."""
    return BATCH_SIZE if device == "cpu" else GPU_BATCH_SIZE


def train_base(
    out: Path, device: str = "cpu", compiled: bool = False, batch_size: int | None = None, **options
) -> None:
    """Train the text-to-image model; checkpoints and logs go to `out/base`.

    Args:
        out: folder of the run. The stage `vae` must have a checkpoint in it.
        compiled: compile the UNet.
        batch_size: samples per step; None for `default_batch_size`.
        options: fields of `LoopConfig`.

    Raises:
        FileNotFoundError: stage `vae` has no checkpoint in `out`.
    """
    batch_size = batch_size or default_batch_size(device)
    config = LoopConfig(
        out=out / "base",
        batch_size=batch_size,
        learning_rate=1e-3 * (batch_size / 64) ** 0.25,
        warmup_steps=100,
        decay_fraction=0.2,
        **options,
    )
    torch.manual_seed(0)
    model = TextToImage(load_tokenizer(out)).to(device)
    attention = AttentionLayers(model.unet)
    scheduler = build_scheduler()
    frozen_text = CaptionCache(model.encode_text)
    codec = LatentCodec(out, device)
    full_size_from = first_decay_step(config)
    unet = torch.compile(model.unet, dynamic=False) if compiled else model.unet
    samples: LatentSource = (
        LatentPool(config.out, codec, batch_size) if device == "cpu" else LatentStream(codec, batch_size)
    )

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        size, size_step = resolution_of_step(step, full_size_from)
        batch = samples.batch(step, size, size_step, generator)
        clean, subjects = batch.latents, batch.subjects
        weight = position_weight(subjects.amax(1, keepdim=True), OUTSIDE_WEIGHT)
        dropped = torch.rand(len(clean), generator=generator) < CAPTION_DROPOUT
        captions = ["" if drop else text for text, drop in zip(batch.captions, dropped.tolist())]
        key = int(torch.randint(1 << 62, (), generator=generator))
        noise = normals(key, range(len(clean)), clean.shape[1:], device)
        timesteps = sample_timesteps(len(clean), generator).to(device)
        recorder = None
        if step % GROUNDED_EVERY == GROUNDED_EVERY - 1:
            target_tokens = subject_token_masks(model.tokenizer, captions).to(device)
            recorder = AttentionRecorder(attention.levels, "all_cross", target_tokens)
        recordings = recorder and recorder.layers
        with autocast(device), differentiable_attention(device), attention.attention_context(recordings=recordings):
            encode_text = model.encode_text if step * batch_size < TEXT_SAMPLES else frozen_text
            embeds, pooled = encode_text(captions)
            loss = diffusion_loss(unet, scheduler, clean, noise, timesteps, embeds, pooled, weight).mean()
        if recorder is None:
            return loss, {}
        grounding = grounding_loss(recorder.cross_maps.values(), subjects)
        return loss + GROUNDING_WEIGHT * grounding, {"grounding": float(grounding.detach())}

    def preview(step: int) -> None:
        side = IMAGE_SIZE // LATENT_FACTOR
        noise = torch.randn(len(PREVIEW_PROMPTS), 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        embeds, pooled = model.encode_text([*PREVIEW_PROMPTS, ""])
        latents = sample_latents(model.unet, scheduler, embeds[:-1], pooled[:-1], embeds[-1:], pooled[-1:], noise)
        save_grid(codec.decode(latents), config.out / "previews" / f"{step * config.batch_size:08d}.png", columns=5)

    with closing(samples):
        run_loop(config, model, loss_of_step, preview)


def load_base(out: Path, device: str = "cpu") -> TextToImage:
    """The EMA weights of `out/base`, frozen."""
    model = load_stage(out / "base", TextToImage(load_tokenizer(out)))
    return model.to(device).requires_grad_(False).eval()
