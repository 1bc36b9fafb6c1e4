"""Stage `start`: writes checkpoints from an exported model, to continue its pretraining.

Weights and sample counts are those of the model. An exported model contains no optimizer state, so new optimizers start
with a warmup. It contains no training heads of the vision encoders either, so stage `vision` starts with new heads. The
adapter is not a stage: recipe `mini` continues it from the model.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from realcustom.pipeline import RealCustomPipeline

from ..checkpoint import has_checkpoint
from ..ema import EMA
from . import text_to_image, vae, vision_encoders
from .export import PRETRAINED, TRAINING
from .loop import CHECKPOINTS, new_optimizer, save_stage, stage_counts


def warm_start(folder: Path, out: Path, device: str = "cpu", base_batch_size: int | None = None) -> None:
    """Write a checkpoint to `out/STAGE` for every stage that the model in `folder` has been trained in.

    Args:
        device: where the stages will run; it determines their batch sizes.
        base_batch_size: samples per step of stage `base`; None for the default of the device.
    Raises:
        FileExistsError: a stage already has a checkpoint in `out`.
    """
    for stage in PRETRAINED:
        if has_checkpoint(out / stage / CHECKPOINTS):
            raise FileExistsError(
                f"{out / stage} already has a checkpoint, which would be overwritten. Choose another folder with --out."
            )
    samples = json.loads((folder / TRAINING).read_text())
    pipeline = RealCustomPipeline.from_pretrained(folder, dtype=torch.float32)
    shutil.copytree(folder / "tokenizer", out / "tokenizer", dirs_exist_ok=True)

    model = text_to_image.TextToImage(pipeline.tokenizer)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(model, part).load_state_dict(getattr(pipeline, part).state_dict())
    pretrainer = vision_encoders.VisionPretrainer()
    pretrainer.siglip.load_state_dict(pipeline.image_encoder.state_dict())
    pretrainer.dino.load_state_dict(pipeline.image_encoder_2.state_dict())
    modules: dict[str, tuple[nn.Module, int]] = {
        "vae": (pipeline.vae, vae.BATCH_SIZE),
        "base": (model, base_batch_size or text_to_image.default_batch_size(device)),
        "vision": (pretrainer, vision_encoders.default_batch_size(device)),
    }
    for stage, (module, batch_size) in modules.items():
        if samples[stage] == 0:
            continue
        module.requires_grad_(True)
        step = samples[stage] // batch_size
        optimizer = new_optimizer(list(module.parameters()))
        counts = stage_counts(step, batch_size, warmup_start_step=step)
        save_stage(out / stage, module, EMA(module, 0.0), optimizer, counts)
    (out / "vae" / "scaling_factor.json").write_text(json.dumps(pipeline.vae.config.scaling_factor))
