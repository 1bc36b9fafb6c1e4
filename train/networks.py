"""The embedded model's networks: SDXL's shape with every number shrunk, all of them stock diffusers and transformers
classes."""

from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

PICTURE_SIZE = 128  # px
LATENT_FACTOR = 4  # px per latent
TEXT_LENGTH = 32  # tokens
TEXT_WIDTH = 64  # channels of each of the two text encoders
VISION_SIZE = 64  # px of a vision encoder's input
VISION_WIDTH = 96


def build_vae() -> AutoencoderDC:
    """128 px -> 4 x 32 x 32. Without layers at full resolution its convolutions there cost next to nothing.

    Its cost on a CPU is memory traffic, so the half-resolution level is thin (24 channels).
    """
    return AutoencoderDC(
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


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 160),
        attention_head_dim=(2, 2, 5),
        transformer_layers_per_block=(1, 1, 1),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 16,
    )


def build_text_encoders(tokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def build_scheduler() -> DDIMScheduler:
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
    shape = dict(
        image_size=VISION_SIZE, patch_size=8, hidden_size=VISION_WIDTH, num_hidden_layers=5, num_attention_heads=3
    )
    siglip = SiglipVisionModel(
        SiglipVisionConfig(**shape, intermediate_size=4 * VISION_WIDTH, hidden_act="gelu", vision_use_head=False)
    )
    dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, mlp_ratio=4, num_register_tokens=4))
    return siglip, dino
