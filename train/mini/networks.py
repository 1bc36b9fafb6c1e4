"""Networks of the embedded model: the architecture of SDXL at a small size.

All networks are classes of diffusers and transformers.
"""

from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_SIZE = 128  # px
LATENT_FACTOR = 4  # px per latent position
TEXT_LENGTH = 32  # tokens
TEXT_WIDTH = 64  # channels of each of the two text encoders
VISION_SIZE = 64  # px of a vision encoder's input
VISION_WIDTH = 96  # channels of each of the two vision encoders

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_to(module: ModuleT, device: str) -> ModuleT:
    """Move a module to a device, in place; unlike diffusers' `to`, it declares the type of the module."""
    nn.Module.to(module, device)  # in place
    return module


def build_vae() -> AutoencoderDC:
    """The autoencoder: images [3, 128, 128] -> latents [4, 32, 32].

    On a CPU, its cost is dominated by memory traffic. Therefore, the full-resolution level has no layers, and the
    half-resolution level has 24 channels.
    """
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(32, 24, 96),
        decoder_block_out_channels=(32, 24, 96),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 3),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_out_shortcut=True,
        decoder_in_shortcut=True,
    )
    return convert_conv2d_weight_memory_format(vae, torch.channels_last)


def build_unet() -> UNet2DConditionModel:
    """The UNet, with cross-attention at the second and third level as in SDXL."""
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 160),
        attention_head_dim=cast(Any, (2, 2, 5)),  # one number per level; diffusers declares tuple[int]
        transformer_layers_per_block=cast(Any, (1, 1, 1)),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 16,
    )
    return convert_conv2d_weight_memory_format(unet, torch.channels_last)


def build_text_encoders(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two CLIP text encoders of the same size; the second also returns the pooled text."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(bos, int) and isinstance(eos, int) and isinstance(pad, int)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_scheduler() -> DDIMScheduler:
    """DDIM, velocity prediction, zero terminal SNR: the last timestep is pure noise, as at the start of sampling."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_vision_encoders() -> tuple[SiglipVisionModel, Dinov2WithRegistersModel]:
    """Both vision encoders: images of 64 x 64 px -> 8 x 8 tokens of 96 channels each."""
    siglip = SiglipVisionConfig(
        image_size=VISION_SIZE,
        patch_size=8,
        hidden_size=VISION_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=4 * VISION_WIDTH,
        hidden_act="gelu",
        vision_use_head=False,
    )
    dino = Dinov2WithRegistersConfig(
        image_size=VISION_SIZE,
        patch_size=8,
        hidden_size=VISION_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=3,
        mlp_ratio=4,
        num_register_tokens=4,
    )
    return SiglipVisionModel(siglip), Dinov2WithRegistersModel(dino)
