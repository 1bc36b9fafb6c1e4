"""A pipeline from public parts: base model, vision encoders and adapter, each from wherever it is published.

`python -m realcustom.assemble BASE --adapter RealCustom_highres.pth --out models/sdxl` writes one folder that
`from_pretrained` and the server load. Only safetensors are read, except the authors' .pth, which is read as plain
weights.
"""

import argparse
from os import PathLike
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

from .config import PresetName, RealCustomConfig
from .pipeline import RealCustomPipeline
from .scheduler import AlternatingDPMSolverScheduler

SIGLIP = "google/siglip-so400m-patch14-384"
DINOV2 = "facebook/dinov2-with-registers-large"

_FAMILIES = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
_CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}
# Weights that tell the families' single files apart.
_SINGLE_FILE_MARKS = {"conditioner.embedders.1.": "sdxl", "cond_stage_model.transformer.": "sd15"}


def from_parts(
    base: str | PathLike,
    adapter: str | PathLike | None = None,
    *,
    siglip: str | PathLike = SIGLIP,
    dinov2: str | PathLike = DINOV2,
    preset: PresetName = "paper",
    base_config: str | PathLike | None = None,
    replace_unet: bool = False,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> RealCustomPipeline:
    """Load a base model, both vision encoders and an adapter.

    Args:
        base: SDXL or SD1.5, or a fine-tune of them: hub id, folder in diffusers' layout, or one .safetensors file.
        adapter: see `weights.load_adapter`; None for plain text-to-image until `load_realcustom` is called.
        siglip, dinov2: hub id or folder of each vision encoder; None leaves it out.
        preset: "paper", or "release" for the authors' checkpoint (SDXL only).
        base_config: for a single file, hub id or folder that has the configurations and tokenizers of its family;
            None takes the family's own from the hub.
        replace_unet: see `RealCustomPipeline.load_realcustom`.
        variant: which files of the base's folder to take, such as "fp16".
        dtype: of all weights.
    Raises:
        ValueError: a base of another family, a file that is not safetensors, an adapter that does not fit.
    """
    parts, family = _load_base(base, base_config, variant, dtype)
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise ValueError(
            f"{base} takes {parts.unet.config.in_channels} channels where its images have "
            f"{parts.vae.config.latent_channels}: it is made for inpainting or editing, not for text-to-image."
        )
    config = RealCustomConfig.preset(preset, family)
    sampler = AlternatingDPMSolverScheduler if preset == "release" else DDIMScheduler
    encoders = {
        "image_encoder": None if siglip is None else _load_siglip(siglip, dtype),
        "image_encoder_2": None if dinov2 is None else _load_dinov2(dinov2, dtype),
    }
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet")
    pipeline = RealCustomPipeline(
        **{name: parts.components.get(name) for name in names},
        **encoders,
        scheduler=sampler.from_config(_known_settings(sampler, parts.scheduler.config)),
        realcustom_config=config,
        force_zeros_for_empty_prompt=preset == "paper" and parts.config.get("force_zeros_for_empty_prompt", False),
    )
    if adapter is not None:
        pipeline.load_realcustom(adapter, replace_unet)
    return pipeline


def _load_base(base, base_config, variant: str | None, dtype: torch.dtype) -> tuple[DiffusionPipeline, str]:
    if Path(base).is_file():
        family = single_file_family(base)
        options = {} if base_config is None else {"config": str(base_config)}
        load = _CLASSES[family].from_single_file
    elif Path(base).suffix in (".safetensors", ".ckpt", ".pth", ".bin"):
        raise ValueError(f"{base} is not a file; give a .safetensors file, a folder in diffusers' layout or a hub id.")
    else:
        name = DiffusionPipeline.load_config(str(base)).get("_class_name")
        if name not in _FAMILIES:
            raise ValueError(f"{base} is a {name}; RealCustom++ works on {' or '.join(_FAMILIES)}.")
        family, options = _FAMILIES[name], {"use_safetensors": True, "variant": variant}
        load = _CLASSES[family].from_pretrained
    if family == "sd15":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return load(str(base), dtype=dtype, **options), family


def single_file_family(path: str | PathLike) -> str:
    """ "sdxl" or "sd15" by the names of a checkpoint's weights; ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); pickled checkpoints are not read."
        ) from error
    for mark, family in _SINGLE_FILE_MARKS.items():
        if any(name.startswith(mark) for name in names):
            return family
    raise ValueError(
        f"{path} is neither an SDXL nor an SD1.5 checkpoint; it has none of {', '.join(_SINGLE_FILE_MARKS)}."
    )


def _load_siglip(name, dtype: torch.dtype) -> SiglipVisionModel:
    config = SiglipVisionConfig.from_pretrained(str(name))
    # The adapters were trained on timm's SigLIP, which has the exact GELU and whose pooling head is not used.
    config.hidden_act, config.vision_use_head = "gelu", False
    return SiglipVisionModel.from_pretrained(str(name), config=config, dtype=dtype, use_safetensors=True).eval()


def _load_dinov2(name, dtype: torch.dtype) -> Dinov2WithRegistersModel:
    # It resamples its positions to the size of its input as timm does: bicubic, antialiased.
    return Dinov2WithRegistersModel.from_pretrained(str(name), dtype=dtype, use_safetensors=True).eval()


def _known_settings(sampler, config: dict) -> dict:
    """The settings of another sampler that this one knows: the model's noise schedule and prediction type.

    Latents have no fixed range, so they are never clipped, whatever the other sampler's files leave unsaid.
    """
    known = sampler._get_init_keys(sampler)
    return {name: value for name, value in {**config, "clip_sample": False}.items() if name in known}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m realcustom.assemble", description=__doc__)
    parser.add_argument("base", help="hub id, diffusers folder or single .safetensors file")
    parser.add_argument("--adapter", help="RealCustom++ weights: .safetensors, or the authors' .pth")
    parser.add_argument("--siglip", default=SIGLIP)
    parser.add_argument("--dinov2", default=DINOV2)
    parser.add_argument("--preset", choices=("paper", "release"), default="paper")
    parser.add_argument("--base-config", help="for a single file: folder with the configurations of its family")
    parser.add_argument(
        "--replace-unet", action="store_true", help="take UNet weights found in the adapter's file, too"
    )
    parser.add_argument("--variant", help="which files of the base's folder to take, such as fp16")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the whole model to")
    flags = vars(parser.parse_args())
    out = flags.pop("out")
    if out.exists():
        parser.error(f"{out} exists already; choose a new folder.")
    pipeline = from_parts(flags.pop("base"), **{**flags, "dtype": getattr(torch, flags["dtype"])})
    pipeline.save_pretrained(out, safe_serialization=True)
    print(f"wrote {out}; start a server with: serve run serving:app model={out}")


if __name__ == "__main__":
    main()
