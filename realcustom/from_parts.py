"""Loads the parts of a pipeline from hub ids or local files: base model, vision encoders, scheduler.

Weights are read from safetensors files only.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
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
        base: SDXL or SD1.5, or a fine-tune of either: hub id, folder in the diffusers layout, or one .safetensors file.
        siglip, dinov2: hub id or folder of each vision encoder; None omits it.
        preset: "paper", or "release" for the authors' checkpoint (SDXL only).
        base_config: for a single file, hub id or folder with the configurations and tokenizers of its family; None
            uses the family's own from the hub.
        variant: variant of the files in the base's folder, such as "fp16".
        dtype: of all weights.
    Returns:
        Keyword arguments of `RealCustomPipeline`, without an adapter.
    Raises:
        ValueError: a base of another family or with an unsupported scheduler, or a file that is not safetensors.
    """
    parts, family = _load_base(base, base_config, variant, dtype)
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise ValueError(
            f"the UNet of {base} has {parts.unet.config.in_channels} input channels and its VAE "
            f"{parts.vae.config.latent_channels} latent channels, as models for inpainting or editing do. Use a "
            "text-to-image model."
        )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet")
    return {
        **{name: parts.components.get(name) for name in names},
        "image_encoder": None if siglip is None else _load_siglip(siglip, dtype),
        "image_encoder_2": None if dinov2 is None else _load_dinov2(dinov2, dtype),
        "scheduler": _convert_scheduler(parts.scheduler, preset),
        "realcustom_config": RealCustomConfig.preset(preset, family),
        # The release encodes an empty prompt like any other.
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
    parts: Any = load(str(base), dtype=dtype, **options)
    if Path(base).is_file():
        _apply_markers(parts, base)
    return parts, family


def _apply_markers(parts, path: str | PathLike) -> None:
    """Configure the scheduler for v-prediction models, which single files mark with tensors `v_pred` and `ztsnr`."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    changes = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        parts.scheduler.register_to_config(**changes)


def single_file_family(path: str | PathLike) -> ModelFamily:
    """Identify the family of a checkpoint from the names of its weights.

    Raises:
        ValueError: not an SDXL or SD1.5 checkpoint.
    """
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


def _convert_scheduler(scheduler, preset: PresetName):
    """Return the preset's scheduler with the noise schedule and prediction type of `scheduler`, or `scheduler` itself.

    Raises:
        ValueError: neither the preset nor the method supports the base's scheduler.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(
            f"the base's scheduler is {name}; flow-matching models are not supported. Use a base that predicts epsilon "
            "or v."
        )
    uses_latent_betas = name in {member.name for member in KarrasDiffusionSchedulers} and "beta_schedule" in config
    if preset == "paper":
        # Schedulers of another parameterization, such as EDM's, cannot be converted to DDIM and are kept.
        return _from_config(DDIMScheduler, config) if uses_latent_betas else scheduler
    if not uses_latent_betas or config.get("rescale_betas_zero_snr"):
        what = "zero terminal SNR" if uses_latent_betas else name
        raise ValueError(
            f"the base's scheduler uses {what}, which the sampler of preset 'release' does not support; use preset "
            "'paper' or another base."
        )
    return _from_config(AlternatingDPMSolverScheduler, config)


def _from_config(scheduler, config):
    return scheduler.from_config(_shared_settings(scheduler, config))


def _shared_settings(scheduler, config: dict) -> dict:
    """The settings in another scheduler's `config` that this one also has: the noise schedule and the prediction type.

    Latents have no fixed range, so they are never clipped.
    """
    known = scheduler._get_init_keys(scheduler)
    return {name: value for name, value in {**config, "clip_sample": False}.items() if name in known}
