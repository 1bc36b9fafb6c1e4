"""Stage `export`: everything trained so far -> one folder in diffusers' layout, weights in fp16."""

import json
import logging
import shutil
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor

from realcustom.config import RealCustomConfig, SamplingDefaults
from realcustom.pipeline import RealCustomPipeline

from .checkpoint import checkpoint_state
from .data.scenes import SCENES
from .data.sprites import TRAINED
from .latents import LatentCodec
from .networks import PICTURE_SIZE, build_scheduler
from .stages.adapter import load_adapter
from .stages.base import load_base
from .stages.vision import MINI_VISION, load_vision
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)

EXPORTED = ("vae", "base", "vision", "adapter")
TRAINING = "training.json"
SAMPLING = SamplingDefaults(
    height=PICTURE_SIZE,
    width=PICTURE_SIZE,
    num_inference_steps=20,
    early_stop_step=10,
    guidance_scale=4.0,
    scope_ratio=0.35,  # sprites fill more of their picture than the subjects of photographs
)


def samples_seen(out: Path) -> dict[str, int]:
    """Stage -> training samples behind its weights."""
    return {stage: checkpoint_state(out / stage / "checkpoint")["samples"] for stage in EXPORTED}


def build_pipeline(out: Path) -> RealCustomPipeline:
    """The pipeline of the stages' averaged weights, fp32 on the CPU."""
    model, encoders = load_base(out), load_vision(out)
    model.unet.set_attn_processor(AttnProcessor())
    for encoder in (model.text_encoder, model.text_encoder_2, encoders.siglip, encoders.dino):
        encoder.set_attn_implementation("sdpa")
    return RealCustomPipeline(
        vae=LatentCodec(out).vae,
        text_encoder=model.text_encoder,
        tokenizer=load_tokenizer(out),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=load_tokenizer(out),
        unet=model.unet,
        scheduler=build_scheduler(),
        image_encoder=encoders.siglip,
        image_encoder_2=encoders.dino,
        adapter=load_adapter(out, model),
        realcustom_config=RealCustomConfig(sampling=SAMPLING, vision=MINI_VISION),
        force_zeros_for_empty_prompt=False,  # captions were dropped to "" in training
    )


def export(out: Path, target: Path) -> None:
    """Write the model beside `target` and swap it in, so that a reader never finds half a model."""
    pipeline = build_pipeline(out).to(torch.float16)
    fresh = target.with_name(target.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    vocabulary = {"subjects": list(TRAINED), "scenes": list(SCENES)}
    (fresh / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2) + "\n")
    (fresh / TRAINING).write_text(json.dumps(samples_seen(out), indent=2) + "\n")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    log.info("wrote %s, %.1f MB", target, sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6)
