"""SDXL and SD1.5 at full size with random weights: `python -m pytest -m slow -s tests/test_full_size.py`.

Takes several minutes. Weights are bfloat16 if the CPU has instructions for it, otherwise float32 (17 GB for SDXL).
"""

import resource
import time
from itertools import pairwise

import pytest
from tiny import subject_image

from benchmarks.full_size import random_pipeline
from realcustom import Request, Subject

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family,size", [("sdxl", 512), ("sd15", 512)])
def test_two_subjects_two_steps(family, size):
    """All parts have their published shapes and work together; the masks of two subjects do not overlap."""
    start = time.perf_counter()
    pipeline = random_pipeline(family)
    loaded = time.perf_counter()
    subjects = (
        Subject(image=subject_image("red"), target_phrase="dog"),
        Subject(image=subject_image("blue"), target_phrase="beach"),
    )
    request = Request(
        prompt="a dog on the beach", subjects=subjects, height=size, width=size, num_inference_steps=2, seed=0
    )
    generation = pipeline.prepare(request)
    prepared = time.perf_counter()
    pipeline.run([generation])
    stepped = time.perf_counter()
    (image,) = pipeline.decode([generation])
    decoded = time.perf_counter()

    sizes = {"sdxl": (2048, (32, 32)), "sd15": (768, (64, 64))}
    width, mask_size = sizes[family]
    assert generation.text.embeds.shape == (77, width)
    tokens = {tuple(keys.shape[:2]) for keys, _ in generation.references[0].values()}
    assert tokens == {(1, 2 * 729)}  # shallow tokens and deep tokens, each 27 x 27
    assert generation.guidance_masks.shape == (2, *mask_size)
    assert not (generation.guidance_masks[0].bool() & generation.guidance_masks[1].bool()).any()
    assert generation.latents.isfinite().all() and image.size == (size, size)
    times = (start, loaded, prepared, stepped, decoded)
    seconds = zip(("load", "prepare", "2 steps", "decode"), (b - a for a, b in pairwise(times)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{family}, {pipeline.unet.dtype}: "
        + ", ".join(f"{name} {t:.1f} s" for name, t in seconds)
        + f"; peak memory {peak:.1f} GiB"
    )
