"""SDXL and SD1.5 with their published shapes and random weights, to measure speed and memory without a download.

All layers of a text or vision encoder share the weights of one layer. Encoders run once per prompt and reference, so no
measurement depends on their values, and SDXL in float32 fits into 24 GB of memory.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from realcustom import Generation, RealCustomAdapter, RealCustomConfig, RealCustomPipeline
from realcustom.assets import MINI_MODEL
from realcustom.config import ModelFamily

TOKENIZER = MINI_MODEL / "tokenizer"  # any CLIP tokenizer works, because the weights are random
TEXT_LENGTH = 77
FAMILIES = get_args(ModelFamily)

# Arguments of UNet2DConditionModel; all others have their default, which is SD1.5's.
SDXL_UNET = dict(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SD15_UNET = dict(sample_size=64, cross_attention_dim=768)


def _text_encoders(family: str) -> dict[str, nn.Module]:
    common = dict(vocab_size=49408, max_position_embeddings=TEXT_LENGTH, bos_token_id=0, eos_token_id=2)
    large = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    first = CLIPTextModel(CLIPTextConfig(projection_dim=768, **large, **common))
    if family == "sd15":
        return {"text_encoder": first}
    giant = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
    second = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, hidden_act="gelu", **giant, **common))
    return {"text_encoder": first, "text_encoder_2": second}


def _vae(family: str) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=1024 if family == "sdxl" else 512,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )


def _vision_encoders() -> dict[str, nn.Module]:
    siglip = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        hidden_act="gelu",
        vision_use_head=False,
    )
    dino = Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    return {"image_encoder": SiglipVisionModel(siglip), "image_encoder_2": Dinov2WithRegistersModel(dino)}


def default_dtype(device: str) -> torch.dtype:
    """Return bfloat16, or float32 on a CPU without bfloat16 instructions, whose emulation is about 70 times slower."""
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if torch.device(device).type != "cpu" or has_bfloat16 else torch.float32


def random_pipeline(
    family: ModelFamily, device: str = "cpu", dtype: torch.dtype | None = None, *, repeat_all: bool = False
) -> RealCustomPipeline:
    """A complete pipeline with random weights. On device "meta" it allocates no memory.

    Args:
        repeat_all: UNet, VAE and adapter share weights among their layers too, to check shapes in little memory.
    """
    dtype = dtype or default_dtype(device)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SDXL_UNET if family == "sdxl" else SD15_UNET))
        models = {
            "unet": unet,
            "adapter": RealCustomAdapter.for_unet(unet, vision_dim=1152 + 1024),
            "vae": _vae(family),
        }
        encoders = {**_text_encoders(family), **_vision_encoders()}
    for name, module in {**models, **encoders}.items():
        _materialize(module.to(dtype), device, repeated=repeat_all or name in encoders)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=TEXT_LENGTH)
    pipeline = RealCustomPipeline(
        **models,
        **encoders,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer if family == "sdxl" else None,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        realcustom_config=RealCustomConfig.preset("paper", family),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_masks_compact(pipeline: RealCustomPipeline) -> None:
    """Replace the relevance from random attention so that each mask is a compact region, as with trained weights.

    The cost of visual attention is proportional to the number of masked positions. A scattered mask of 20% of the
    positions covers 60% of the positions at half the resolution; a compact one covers little more than 20%. The
    relevance is still computed, so that its cost is measured.
    """
    set_masks = pipeline.denoiser.set_masks

    def set_compact_masks(generations: Sequence[Generation], relevance: torch.Tensor) -> None:
        num_subjects, height, width = relevance.shape[1:]
        y = torch.linspace(-1, 1, height, device=relevance.device)[:, None]
        x = torch.linspace(0, 2 * num_subjects, width, device=relevance.device)  # subjects have centers at 1, 3, ...
        distances = [y**2 + (x - center) ** 2 for center in range(1, 2 * num_subjects, 2)]
        set_masks(generations, (1 / (1 + torch.stack(distances))).expand_as(relevance))

    pipeline.denoiser.set_masks = set_compact_masks


def _materialize(module: nn.Module, device: str, repeated: bool) -> None:
    """Replace weights on the meta device by random ones; `repeated` shares one tensor per name and shape."""
    module.requires_grad_(False).eval()
    if device == "meta":
        return
    generator = torch.Generator(device).manual_seed(0)
    shared: dict[tuple, torch.Tensor] = {}
    for owner in module.modules():
        for name, value in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            key = (name, value.shape)
            if not repeated or key not in shared:
                shared[key] = _random(name, torch.empty_like(value, device=device), generator)
            is_parameter = isinstance(value, nn.Parameter)
            setattr(owner, name, nn.Parameter(shared[key], requires_grad=False) if is_parameter else shared[key])


def _random(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name == "position_ids":
        return value.copy_(torch.arange(value.shape[-1]).expand_as(value))
    if value.ndim > 1:
        # Drawing billions of numbers takes minutes on a CPU, so they repeat after a million.
        numbers = torch.randn(min(value.numel(), 2**20), generator=generator, device=value.device)
        numbers = numbers.repeat(-(-value.numel() // len(numbers)))[: value.numel()].view_as(value)
        return value.copy_(numbers * value[0].numel() ** -0.5)
    return value.fill_(1.0 if name == "weight" else 0.0)
