"""Latent decoding, and how closely previews approximate it."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from tiny import tiny_pipeline

from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL
from realcustom.decoder import LatentDecoder
from realcustom.latent_preview import LatentPreview


@pytest.fixture(scope="module")
def mini_decoder() -> LatentDecoder:
    return LatentDecoder(AutoencoderDC.from_pretrained(MINI_MODEL, subfolder="vae", dtype=torch.float32))


def encode_example(decoder: LatentDecoder, name: str, size: tuple[int, int]) -> torch.Tensor:
    """Latents [C, h, w] of an example image, resized to `size` = (width, height)."""
    image = Image.open(EXAMPLE_IMAGES / f"{name}.png").convert("RGB").resize(size)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float()[None] / 127.5 - 1
    with torch.no_grad():
        return decoder.vae.encode(pixels).latent[0] * decoder.vae.config.scaling_factor


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, float)


@pytest.mark.parametrize("name,size", [("dog", (128, 128)), ("cat_and_car", (96, 160))])
def test_preview_approximates_the_decoded_image(mini_decoder, name, size):
    """A preview of any size, square or not, explains more than 90% of the variance of the decoded image."""
    latents = encode_example(mini_decoder, name, size)
    decoded, preview = mini_decoder.decode(latents), LatentPreview(mini_decoder).decode(latents)
    assert preview.size == decoded.size == size
    variance = values(decoded).var(axis=(0, 1)).mean()
    assert np.mean((values(preview) - values(decoded)) ** 2) < variance / 10


def test_preview_fit_is_deterministic(mini_decoder):
    """Two fits yield the same preview, regardless of the global random state."""
    latents = encode_example(mini_decoder, "dog", (128, 128))
    torch.manual_seed(5)
    refitted = LatentPreview(LatentDecoder(mini_decoder.vae))
    assert refitted.decode(latents).tobytes() == LatentPreview(mini_decoder).decode(latents).tobytes()


def test_assigned_vae_is_used_for_images_and_previews():
    """After `pipeline.vae = other`, images and previews are decoded with the new autoencoder."""
    pipeline, other = tiny_pipeline(), tiny_pipeline(seed=9).vae
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = pipeline.decoder.decode(latents), pipeline.latent_preview.decode(latents)
    pipeline.vae = other
    after = pipeline.decoder.decode(latents), pipeline.latent_preview.decode(latents)
    assert all(one.tobytes() != two.tobytes() for one, two in zip(before, after, strict=True))
    assert after[0].tobytes() == LatentDecoder(other).decode(latents).tobytes()
