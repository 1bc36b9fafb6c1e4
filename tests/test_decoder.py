"""Latents become images; a glance is close to what the autoencoder makes of them."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

from realcustom.decoder import LatentDecoder
from realcustom.latent_preview import LatentPreview
from tests.tiny import tiny_pipeline

MINI = "assets/mini"


@pytest.fixture(scope="module")
def shipped() -> LatentDecoder:
    return LatentDecoder(AutoencoderDC.from_pretrained(MINI, subfolder="vae", dtype=torch.float32))


def latents_of(decoder: LatentDecoder, name: str, size: tuple[int, int]) -> torch.Tensor:
    image = Image.open(f"assets/examples/{name}.png").convert("RGB").resize(size)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float()[None] / 127.5 - 1
    with torch.no_grad():
        return decoder.vae.encode(pixels).latent[0] * decoder.vae.config.scaling_factor


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, float)


@pytest.mark.parametrize("name,size", [("dog", (128, 128)), ("cat_and_car", (96, 160))])
def test_glance_is_near_what_the_autoencoder_makes(shipped, name, size):
    """It has nine tenths of the image's variance; of any size, square or not."""
    latents = latents_of(shipped, name, size)
    decoded, seen = shipped.decode(latents), LatentPreview(shipped).decode(latents)
    assert seen.size == decoded.size == size
    variance = values(decoded).var(axis=(0, 1)).mean()
    assert np.mean((values(seen) - values(decoded)) ** 2) < variance / 10


def test_glance_is_the_same_in_every_process(shipped):
    """What it is fitted to does not depend on chance: two fits give one image."""
    latents = latents_of(shipped, "dog", (128, 128))
    torch.manual_seed(5)
    again = LatentPreview(LatentDecoder(shipped.vae))
    assert again.decode(latents).tobytes() == LatentPreview(shipped).decode(latents).tobytes()


def test_a_pipeline_decodes_with_the_autoencoder_it_has_now():
    """One that is put in its place by assignment, as people do, makes images and previews from then on."""
    pipeline, other = tiny_pipeline(), tiny_pipeline(seed=9).vae
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = pipeline.decoder.decode(latents), pipeline.latent_preview.decode(latents)
    pipeline.vae = other
    after = pipeline.decoder.decode(latents), pipeline.latent_preview.decode(latents)
    assert all(one.tobytes() != two.tobytes() for one, two in zip(before, after, strict=True))
    assert after[0].tobytes() == LatentDecoder(other).decode(latents).tobytes()
