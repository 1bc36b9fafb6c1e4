"""Stage `base`: text to image. The UNet and both text encoders, from nothing, on latents of the sprite world.

Most steps work on half-size pictures, three times as many a second: words, shapes and layout are learned there, as SDXL
itself was trained. While the learning rate falls every step is of full size, for the details.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realcustom.attention import AttentionLayers
from realcustom.recorder import AttentionRecorder

from ..captions import CaptionCache
from ..data.pool import Entry, SamplePool
from ..data.render import CAPTION_BYTES, RenderSamples, unpack_captions
from ..diffusion import diffusion_loss, sample_latents, subject_weight
from ..grounding import GROUNDING_WEIGHT, grounding_loss, places_of, subject_marks
from ..latents import LatentCodec
from ..loop import LoopConfig, run_loop
from ..networks import LATENT_FACTOR, PICTURE_SIZE, build_scheduler, build_text_encoders, build_unet
from ..pictures import save_grid, to_signed
from ..precision import autocast, differentiable_attention
from ..tokenizer import load_tokenizer

CAPTION_DROPOUT = 0.1
BATCH_SIZE = 64
FULL_SIZE_EVERY = 20
TEXT_STEPS = 200_000 // BATCH_SIZE  # then the text encoders know the world's few words, stay, and cost nothing more
GROUNDED_EVERY = 5  # a step that records attention takes a third longer; divides the above: both sizes are grounded
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


def size_and_turn(step: int, details_from: int | None = None) -> tuple[int, int]:
    """Picture size of a step in px, and how many earlier steps had that size.

    From step `details_from` on, every step is of full size.
    """
    mixed = step if details_from is None else min(step, details_from)
    full = mixed // FULL_SIZE_EVERY
    if mixed < step:
        return PICTURE_SIZE, full + step - mixed
    if step == details_from or step % FULL_SIZE_EVERY == FULL_SIZE_EVERY - 1:
        return PICTURE_SIZE, full
    return PICTURE_SIZE // 2, step - full


def first_falling_step(config: LoopConfig) -> int | None:
    """The step from which the learning rate falls; None if the run has no end."""
    if config.max_samples is None:
        return None
    return math.ceil((1 - config.decay) * config.max_samples / config.batch_size)


class TextToImage(nn.Module):
    """UNet and text encoders as one trainable module."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.text_encoder, self.text_encoder_2 = build_text_encoders(tokenizer)
        for encoder in (self.text_encoder, self.text_encoder_2):  # see `differentiable_attention`
            encoder.set_attn_implementation("eager")

    def tokens(self, captions: list[str]) -> Tensor:
        """int64 [B, T]."""
        return self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Penultimate states of both encoders [B, T, 128], pooled text of the second [B, 64]."""
        tokens = self.tokens(captions).to(self.unet.device)
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def draw_noise(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and time steps, the latter spread evenly over the batch so that the loss is less noisy."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    offsets = (torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)) / len(clean)
    return noise, (offsets * 1000).long().clamp_max(999).to(clean.device)


def train_base(out: Path, device: str = "cpu", compiled: bool = False, **options) -> None:
    config = LoopConfig(
        out=out / "base", batch_size=BATCH_SIZE, learning_rate=1e-3, warmup_steps=100, decay=0.2, **options
    )
    torch.manual_seed(0)
    model = TextToImage(load_tokenizer(out)).to(device)
    attention = AttentionLayers(model.unet)
    scheduler = build_scheduler()
    frozen_text = CaptionCache(model.encode_text)
    codec = LatentCodec(out, device)
    details_from = first_falling_step(config)
    unet = torch.compile(model.unet, dynamic=False) if compiled else model.unet
    pools: dict[int, SamplePool] = {}

    def encode(raw: Entry) -> Entry:
        latents = codec.encode(to_signed(raw["pixels"])).cpu().half().numpy()
        return {"latents": latents, "caption": raw["caption"], "where": raw["where"]}

    def pool_for(size: int, turn: int) -> SamplePool:
        if size not in pools:
            side = size // LATENT_FACTOR
            fields = {
                "latents": ((4, side, side), "float16"),
                "caption": ((CAPTION_BYTES,), "uint8"),
                "where": ((side, side), "uint8"),
            }
            folder = config.out / f"pool_{size}"
            render = RenderSamples(size=size)
            pools[size] = SamplePool(folder, fields, render, encode, start=8000, capacity=60_000, per_step=6)
        return pools[size]

    def loss_of_step(step: int, generator: torch.Generator):
        size, turn = size_and_turn(step, details_from)
        pool = pool_for(size, turn)
        pool.refresh(turn)
        entry = pool.batch(turn, torch.rand(config.batch_size, generator=generator).numpy())
        clean = torch.from_numpy(entry["latents"].astype(np.float32)).to(device)
        places = places_of(torch.from_numpy(entry["where"]).to(device))
        weight = subject_weight(places.amax(1))
        dropped = torch.rand(len(clean), generator=generator) < CAPTION_DROPOUT
        captions = ["" if drop else text for text, drop in zip(unpack_captions(entry["caption"]), dropped)]
        noise, steps = draw_noise(clean, generator)
        recorder = None
        if step % GROUNDED_EVERY == GROUNDED_EVERY - 1:
            marks = subject_marks(model.tokenizer, captions).to(device)
            recorder = AttentionRecorder(attention.levels, "all_cross", marks)
        recordings = recorder and recorder.layers
        with autocast(device), differentiable_attention(device), attention.attention_context(recordings=recordings):
            encode_text = model.encode_text if step < TEXT_STEPS else frozen_text
            embeds, pooled = encode_text(captions)
            loss = diffusion_loss(unet, scheduler, clean, noise, steps, embeds, pooled, weight).mean()
        if recorder is None:
            return loss, {}
        grounding = grounding_loss(recorder.cross_maps.values(), places)
        # The log averages over all steps.
        return loss + GROUNDING_WEIGHT * grounding, {"grounding": GROUNDED_EVERY * float(grounding.detach())}

    def preview(step: int) -> None:
        side = PICTURE_SIZE // LATENT_FACTOR
        noise = torch.randn(len(PREVIEW_PROMPTS), 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        embeds, pooled = model.encode_text([*PREVIEW_PROMPTS, ""])
        latents = sample_latents(model.unet, scheduler, embeds[:-1], pooled[:-1], embeds[-1:], pooled[-1:], noise)
        save_grid(codec.decode(latents), config.out / "pictures" / f"{step * config.batch_size:08d}.png", columns=5)

    run_loop(config, model, loss_of_step, preview)


def load_base(out: Path, device: str = "cpu") -> TextToImage:
    """The averaged weights of `out/base`, frozen."""
    from ..checkpoint import load_average

    model = load_average(out / "base" / "checkpoint", TextToImage(load_tokenizer(out)))
    return model.to(device).requires_grad_(False).eval()
