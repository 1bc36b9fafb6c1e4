"""SDXL as in the paper (Sec. 4.1): 60,000 iterations at 512 px, then 100,000 at 1024 px, on 8 GPUs, learning rate 1e-4.

The paper states neither batch size nor dropout of conditions. The curriculum covers both runs.
"""

from dataclasses import replace
from pathlib import Path

from ..config import DataConfig, ModelConfig, SourceConfig, TrainConfig
from ..curriculum import Curriculum

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
STEPS_512, STEPS_1024 = 60_000, 100_000
SOURCES = (
    SourceConfig(kind="text_image", path=Path("data/text_image")),
    SourceConfig(kind="multiview", path=Path("data/multiview")),
)


def sdxl_512() -> TrainConfig:
    """SDXL at 512 px, 60k steps of 64 samples.

    Hardware: 8 GPUs with 40 GB. Estimated time on 8 A100 at 40% of their peak: 17 hours (15.6 TFLOP per sample).
    Estimated memory: 30 GB per GPU (frozen models 9 GB, adapter with optimizer and EMA 9 GB, the rest for activations).
    """
    return TrainConfig(
        name="sdxl_512",
        out=Path("runs/sdxl_512"),
        steps=STEPS_512,
        batch_size=64,
        micro_batch_size=8,
        model=ModelConfig(base=BASE),
        data=DataConfig(sources=SOURCES, resolution=512, aspect_buckets=True),
        curriculum=Curriculum(total_steps=STEPS_512 + STEPS_1024),
    )


def sdxl_1024() -> TrainConfig:
    """SDXL at 1024 px, 100k steps of 32 samples, from the adapter that `sdxl_512` has trained.

    Hardware: 8 GPUs with 40 GB. Estimated time on 8 A100 at 40% of their peak: 32 hours (36 TFLOP per sample).
    Estimated memory: 35 GB per GPU.
    """
    config = sdxl_512()
    return replace(
        config,
        name="sdxl_1024",
        out=Path("runs/sdxl_1024"),
        steps=STEPS_1024,
        batch_size=32,
        micro_batch_size=4,
        model=replace(config.model, adapter=str(config.out / "adapter.safetensors")),
        data=replace(config.data, resolution=1024),
        curriculum=replace(config.curriculum, first_step=STEPS_512),
    )
