"""Stage `export`: writes the EMA weights of all stages as one model folder in the diffusers layout, in float16.

Recipe `mini` trains the adapter from such a folder; a later export includes it.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor

from realcustom.config import RealCustomConfig, SamplingDefaults
from realcustom.pipeline import RealCustomPipeline

from ..data.sprite_world.scenes import SCENES
from ..data.sprite_world.sprites import TRAINED
from ..results import ADAPTER, SUMMARY
from .latents import LatentCodec
from .loop import stage_state
from .networks import IMAGE_SIZE, build_scheduler
from .text_to_image import load_base
from .tokenizer import load_tokenizer
from .vision_encoders import MINI_VISION, load_vision

log = logging.getLogger(__name__)

PRETRAINED = ("vae", "base", "vision")  # stages in the model
MODEL_INDEX = "model_index.json"  # in every folder in the diffusers layout
TRAINING = "training.json"  # stage or "adapter" -> number of training samples
SAMPLING = SamplingDefaults(
    height=IMAGE_SIZE,
    width=IMAGE_SIZE,
    num_inference_steps=20,
    early_stop_step=10,
    guidance_scale=4.0,
    scope_ratio=0.35,  # sprites cover more of an image than subjects of photographs
)


def samples_seen(out: Path, run: Path | None) -> dict[str, int]:
    """Number of training samples of each stage in `out`, and of the adapter that `run` has trained."""
    counts = {stage: stage_state(out / stage)["samples"] for stage in PRETRAINED}
    return {**counts, "adapter": 0 if run is None else json.loads((run / SUMMARY).read_text())["samples"]}


def build_pipeline(out: Path) -> RealCustomPipeline:
    """A pipeline with the EMA weights of all stages and without an adapter, in float32 on the CPU."""
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
        realcustom_config=RealCustomConfig(sampling=SAMPLING, vision=MINI_VISION),
        force_zeros_for_empty_prompt=False,  # caption dropout in training uses ""
    )


def check_target(target: Path, inputs: Sequence[Path]) -> None:
    """Refuse to replace a folder that is not a model, or that contains one of the folders that are read.

    Raises:
        FileExistsError: see above.
    """
    for folder in inputs:
        if folder.resolve().is_relative_to(target.resolve()):
            raise FileExistsError(
                f"--model {target} contains {folder}, which the export reads; choose another folder for the model."
            )
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / MODEL_INDEX).is_file()):
        raise FileExistsError(
            f"--model {target} exists and is not a model, because it has no {MODEL_INDEX}; choose another folder, or "
            "empty this one."
        )


def export(out: Path, target: Path, run: Path | None = None) -> None:
    """Write the model to `target`. A new model is written next to the old one and then replaces it.

    Args:
        out: folder of the stages.
        run: folder of a run of recipe `mini`, whose adapter becomes part of the model.
    Raises:
        FileExistsError: `target` exists and is not a model, or contains `out` or `run`. Nothing is changed.
    """
    check_target(target, [out] if run is None else [out, run])
    pipeline = build_pipeline(out)
    if run is not None:
        pipeline.load_realcustom(run / ADAPTER)
    pipeline = pipeline.to(torch.float16)
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new, safe_serialization=True)
    vocabulary = {"subjects": list(TRAINED), "scenes": list(SCENES)}
    (new / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2) + "\n")
    (new / TRAINING).write_text(json.dumps(samples_seen(out, run), indent=2) + "\n")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    log.info("Wrote %s, %.1f MB.", target, sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6)
