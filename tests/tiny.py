"""Toy-size pipelines for tests: the real classes with small dimensions and random weights.

A tiny pipeline is built in less than a second and generates 64 x 64 px images.
"""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
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

from realcustom import (
    Generation,
    MethodConfig,
    RealCustomAdapter,
    RealCustomConfig,
    RealCustomPipeline,
    Request,
    SamplingDefaults,
    Subject,
)
from realcustom.config import PresetName, VisionConfig

TEXT_LENGTH = 24
PROMPT = "a dog and a cat"

# Arguments of UNet2DConditionModel for the published SDXL UNet; all others have their default.
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


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer without merges: each letter is a token, so that words have several tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer(
            vocab=str(Path(folder) / "vocab.json"),
            merges=str(Path(folder) / "merges.txt"),
            model_max_length=TEXT_LENGTH,
        )


def tiny_unet() -> UNet2DConditionModel:
    """Return a UNet with the structure of SDXL: no attention at the first level, cross-attention at the next two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


def tiny_sd15_unet() -> UNet2DConditionModel:
    """Return a UNet with the structure of SD1.5: cross-attention at the first three levels and in the middle block."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )


def tiny_text_config(hidden_size: int = 16) -> CLIPTextConfig:
    """Return a text encoder configuration that fits `tiny_tokenizer`."""
    return CLIPTextConfig(
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        vocab_size=514,
        projection_dim=16,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def tiny_vae() -> AutoencoderKL:
    """Return a VAE with 4 latent channels that scales images down by 4."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


def tiny_vision_encoders(num_layers: int = 3) -> tuple[SiglipVisionModel, Dinov2WithRegistersModel]:
    """Return SigLIP and DINOv2 for 16 x 16 px images, 16 tokens each."""
    vision = dict(
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        hidden_act="gelu",
    )
    siglip = SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, vision_use_head=False, **vision))
    return siglip, Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=1, **vision))


def tiny_pipeline(
    seed: int = 0, preset: PresetName = "paper", scheduler: SchedulerMixin | None = None
) -> RealCustomPipeline:
    """Return a complete pipeline for 64 x 64 px images. The global random state is left unchanged.

    Args:
        seed: of the weights. They are scaled up so that each input has a visible effect on the image.
        preset: of the method, see `MethodConfig.preset`.
        scheduler: default: DDIM with v-prediction.
    """
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)
    unet = tiny_unet()
    siglip, dino = tiny_vision_encoders()
    pipeline = RealCustomPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config()),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=scheduler
        or DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False),
        image_encoder=siglip,
        image_encoder_2=dino,
        adapter=RealCustomAdapter.for_unet(unet, vision_dim=64, head_dim=32),
        realcustom_config=RealCustomConfig(
            method=MethodConfig.preset(preset),
            sampling=SamplingDefaults(
                height=64, width=64, num_inference_steps=4, early_stop_step=2, guidance_scale=3.0, scope_ratio=0.25
            ),
            vision=VisionConfig(siglip_shallow=(0,), siglip_deep=1, dino_shallow=(0,), dino_deep=1),
        ),
        force_zeros_for_empty_prompt=False,
    )
    with torch.no_grad():
        for module in (pipeline.unet, pipeline.adapter, pipeline.text_encoder, pipeline.text_encoder_2):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    torch.set_rng_state(rng_state)
    return pipeline


def stock_pipeline(family: str) -> StableDiffusionXLPipeline | StableDiffusionPipeline:
    """Return a complete stock pipeline of a family with random weights."""
    torch.manual_seed(0)
    common = dict(
        vae=tiny_vae(),
        # Widths differ between families, because diffusers identifies the family of a single file by them.
        text_encoder=CLIPTextModel(tiny_text_config(8 if family == "sdxl" else 16)),
        tokenizer=tiny_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )
    if family == "sdxl":
        second = dict(text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(24)), tokenizer_2=tiny_tokenizer())
        return StableDiffusionXLPipeline(**common, **second, unet=tiny_unet())
    options = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**common, **options, unet=tiny_sd15_unet())


def subject_image(color: str = "red", size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a colored ellipse on white; `size` is (width, height) in pixels."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse([8, 6, size[0] - 8, size[1] - 6], fill=color, outline="black")
    return image


def dog(color: str = "red", scope_ratio: float | None = None) -> Subject:
    """A subject that becomes the dog of `PROMPT`."""
    return Subject(image=subject_image(color), target_phrase="dog", scope_ratio=scope_ratio)


def cat(color: str = "blue", scope_ratio: float | None = None) -> Subject:
    """A subject that becomes the cat of `PROMPT`."""
    return Subject(image=subject_image(color), target_phrase="cat", scope_ratio=scope_ratio)


def run(pipeline: RealCustomPipeline, generations: list[Generation]) -> list[torch.Tensor]:
    """Run generations together until all are done; return the latents of each."""
    pipeline.run(generations)
    return [generation.latents for generation in generations]


def latents_of(pipeline: RealCustomPipeline, request: Request, **options) -> torch.Tensor:
    """Final latents of one request that runs alone; `options` are those of `prepare`."""
    return run(pipeline, [pipeline.prepare(request, **options)])[0]


def sharpen(pipeline: RealCustomPipeline, factor: float = 3.0) -> RealCustomPipeline:
    """Scale up the query and key weights in place and return the pipeline, for tests that compare masks.

    With random weights all positions are almost equally relevant, and rounding errors, which depend on the batch
    size, decide which positions a mask selects. Sharper attention avoids these ties, as trained weights do.
    """
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "to_q" in name or "to_k" in name:
                parameter.mul_(factor)
    return pipeline
