"""Loads the parts of a pipeline from wherever they are published: base model, vision encoders, scheduler.

Only safetensors are read.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

from .config import DINOV2, SIGLIP, ModelFamily, PresetName, RealCustomConfig
from .scheduler import AlternatingDPMSolverScheduler

_FAMILIES: dict[str, ModelFamily] = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
_CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
# Prefixes of weights that identify the family of a single file.
_SINGLE_FILE_PREFIXES: dict[str, ModelFamily] = {
    "conditioner.embedders.1.": "sdxl",
    "cond_stage_model.transformer.": "sd15",
}


def load_parts(
    base: str | PathLike,
    *,
    siglip: str | PathLike | None = SIGLIP,
    dinov2: str | PathLike | None = DINOV2,
    preset: PresetName = "paper",
    base_config: str | PathLike | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Load a base model and both vision encoders.

    Args:
        base: SDXL or SD1.5, or a fine-tune of them: hub id, folder in the diffusers layout, or one .safetensors file.
        siglip, dinov2: hub id or folder of each vision encoder; None omits it.
        preset: "paper", or "release" for the authors' checkpoint (SDXL only).
        base_config: for a single file, hub id or folder with the configurations and tokenizers of its family; None
            uses the family's own from the hub.
        variant: variant of the files in the base's folder, such as "fp16".
        dtype: of all weights.
    Returns:
        Keyword arguments of `RealCustomPipeline`, without an adapter.
    Raises:
        ValueError: a base of another family, or a file that is not safetensors.
    """
    parts, family = _load_base(base, base_config, variant, dtype)
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise ValueError(
            f"the UNet of {base} has {parts.unet.config.in_channels} input channels and its VAE "
            f"{parts.vae.config.latent_channels} latent channels; it is made for inpainting or editing. Use a "
            "text-to-image model."
        )
    scheduler = AlternatingDPMSolverScheduler if preset == "release" else DDIMScheduler
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet")
    return {
        **{name: parts.components.get(name) for name in names},
        "image_encoder": None if siglip is None else _load_siglip(siglip, dtype),
        "image_encoder_2": None if dinov2 is None else _load_dinov2(dinov2, dtype),
        "scheduler": scheduler.from_config(_shared_settings(scheduler, parts.scheduler.config)),
        "realcustom_config": RealCustomConfig.preset(preset, family),
        "force_zeros_for_empty_prompt": preset == "paper" and parts.config.get("force_zeros_for_empty_prompt", False),
    }


def _load_base(base, base_config, variant: str | None, dtype: torch.dtype) -> tuple[Any, ModelFamily]:
    if Path(base).is_file():
        family = single_file_family(base)
        options = {} if base_config is None else {"config": str(base_config)}
        load = _CLASSES[family].from_single_file
    elif Path(base).suffix in (".safetensors", ".ckpt", ".pth", ".bin"):
        raise ValueError(f"{base} is not a file; use a .safetensors file, a diffusers folder or a hub id.")
    else:
        index: Any = DiffusionPipeline.load_config(str(base))
        name = index.get("_class_name")
        if name not in _FAMILIES:
            raise ValueError(f"{base} is a {name}; RealCustom++ supports {' or '.join(_FAMILIES)}.")
        family, options = _FAMILIES[name], {"use_safetensors": True, "variant": variant}
        load = _CLASSES[family].from_pretrained
    if family == "sd15":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return load(str(base), dtype=dtype, **options), family


def single_file_family(path: str | PathLike) -> ModelFamily:
    """Identify the family of a checkpoint from the names of its weights; ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); pickled checkpoints are not supported."
        ) from error
    for prefix, family in _SINGLE_FILE_PREFIXES.items():
        if any(name.startswith(prefix) for name in names):
            return family
    raise ValueError(
        f"{path} is not an SDXL or SD1.5 checkpoint; it has no weights named {', '.join(_SINGLE_FILE_PREFIXES)}."
    )


def _load_siglip(name, dtype: torch.dtype) -> SiglipVisionModel:
    config = SiglipVisionConfig.from_pretrained(str(name))
    # The adapters were trained with timm's SigLIP, which uses the exact GELU; its pooling head is not used.
    config.hidden_act, config.vision_use_head = "gelu", False
    return SiglipVisionModel.from_pretrained(str(name), config=config, dtype=dtype, use_safetensors=True).eval()


def _load_dinov2(name, dtype: torch.dtype) -> Dinov2WithRegistersModel:
    # transformers resamples the position embeddings to the input size as timm does: bicubic, antialiased.
    return Dinov2WithRegistersModel.from_pretrained(str(name), dtype=dtype, use_safetensors=True).eval()


def _shared_settings(scheduler, config: dict) -> dict:
    """The settings of another scheduler that this one has too: the noise schedule and the prediction type.

    Latents have no fixed range, so they are never clipped, whatever the other scheduler's configuration omits.
    """
    known = scheduler._get_init_keys(scheduler)
    return {name: value for name, value in {**config, "clip_sample": False}.items() if name in known}
