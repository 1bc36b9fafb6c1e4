"""Stage `start`: writes checkpoints from an exported model, to continue its training.

Weights and sample counts are those of the model. An exported model contains no optimizer state, so new optimizers start
with a warmup. It contains no training heads of the vision encoders either, so stage `vision` starts with new heads.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from realcustom.pipeline import RealCustomPipeline

from .checkpoint import EMA, find_checkpoint, save_checkpoint
from .export import STAGES_IN_MODEL, TRAINING
from .loop import new_optimizer
from .stages import adapter, base, vae, vision


def warm_start(model: Path, out: Path) -> None:
    """Write a checkpoint to `out/STAGE/checkpoint` for every stage that `model` has been trained in.

    Raises:
        FileExistsError: a stage already has a checkpoint in `out`.
    """
    for stage in STAGES_IN_MODEL:
        if find_checkpoint(out / stage / "checkpoint") is not None:
            raise FileExistsError(
                f"{out / stage} already has a checkpoint, which would be overwritten. Choose another folder with --out."
            )
    samples = json.loads((model / TRAINING).read_text())
    pipeline = RealCustomPipeline.from_pretrained(model, dtype=torch.float32)
    shutil.copytree(model / "tokenizer", out / "tokenizer", dirs_exist_ok=True)

    text_to_image = base.TextToImage(pipeline.tokenizer)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(text_to_image, part).load_state_dict(getattr(pipeline, part).state_dict())
    pretrainer = vision.VisionPretrainer()
    pretrainer.siglip.load_state_dict(pipeline.image_encoder.state_dict())
    pretrainer.dino.load_state_dict(pipeline.image_encoder_2.state_dict())
    modules: dict[str, tuple[nn.Module, int]] = {
        "vae": (pipeline.vae, vae.BATCH_SIZE),
        "base": (text_to_image, base.BATCH_SIZE),
        "vision": (pretrainer, vision.BATCH_SIZE),
        "adapter": (pipeline.adapter, adapter.BATCH_SIZE),
    }
    for stage, (module, batch_size) in modules.items():
        if samples[stage] == 0:
            continue
        module.requires_grad_(True)
        step = samples[stage] // batch_size
        state = {"step": step, "samples": step * batch_size, "warmup_start_step": step}
        optimizer = new_optimizer(list(module.parameters()))
        save_checkpoint(out / stage / "checkpoint", module, EMA(module, 0.0), optimizer, state)
    (out / "vae" / "scaling_factor.json").write_text(json.dumps(pipeline.vae.config.scaling_factor))
