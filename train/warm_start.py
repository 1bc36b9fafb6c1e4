"""Stage `start`: a shipped model -> checkpoints to train on from, where those of its making are gone.

Weights and sample counts are the model's; optimizers begin anew and warm up. The vision encoders' training heads are
not shipped, so that stage begins with fresh heads upon trained encoders.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from realcustom.pipeline import RealCustomPipeline

from .checkpoint import Average, find_checkpoint, save_checkpoint
from .export import EXPORTED, TRAINING
from .loop import new_optimizer
from .stages import adapter, base, vae, vision


def warm_start(model: Path, out: Path) -> None:
    """Write checkpoints under `out` for every stage that `model` has been trained in.

    Raises:
        FileExistsError: a stage has a checkpoint of its own already.
    """
    for stage in EXPORTED:
        if find_checkpoint(out / stage / "checkpoint") is not None:
            raise FileExistsError(f"{out / stage} has a checkpoint already; it would be lost. Choose another folder.")
    samples = json.loads((model / TRAINING).read_text())
    pipeline = RealCustomPipeline.from_pretrained(model, dtype=torch.float32)
    shutil.copytree(model / "tokenizer", out / "tokenizer", dirs_exist_ok=True)

    text_to_image = base.TextToImage(pipeline.tokenizer)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(text_to_image, part).load_state_dict(getattr(pipeline, part).state_dict())
    teacher = vision.VisionTeacher()
    teacher.siglip.load_state_dict(pipeline.image_encoder.state_dict())
    teacher.dino.load_state_dict(pipeline.image_encoder_2.state_dict())
    modules: dict[str, tuple[nn.Module, int]] = {
        "vae": (pipeline.vae, vae.BATCH_SIZE),
        "base": (text_to_image, base.BATCH_SIZE),
        "vision": (teacher, vision.BATCH_SIZE),
        "adapter": (pipeline.adapter, adapter.BATCH_SIZE),
    }
    for stage, (module, batch_size) in modules.items():
        if samples[stage] == 0:
            continue
        module.requires_grad_(True)
        step = samples[stage] // batch_size
        state = {"step": step, "samples": step * batch_size, "begun": step}
        optimizer = new_optimizer(module.parameters())
        save_checkpoint(out / stage / "checkpoint", module, Average(module, 0.0), optimizer, state)
    (out / "vae" / "scaling_factor.json").write_text(json.dumps(pipeline.vae.config.scaling_factor))
