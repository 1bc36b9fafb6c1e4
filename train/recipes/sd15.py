"""SD1.5 at 512 px. The paper's total of 160,000 iterations is not split by resolution for this model."""

from pathlib import Path

from ..config import DataConfig, ModelConfig, TrainConfig
from ..curriculum import Curriculum
from .sdxl import SOURCES

STEPS = 160_000


def sd15_512() -> TrainConfig:
    """SD1.5 at 512 px, 160k steps of 64 samples.

    Hardware: 8 GPUs with 24 GB. Estimated time on 8 A100 at 40% of their peak: 29 hours (10.2 TFLOP per sample).
    Estimated memory: 20 GB per GPU.
    """
    return TrainConfig(
        name="sd15_512",
        out=Path("runs/sd15_512"),
        steps=STEPS,
        batch_size=64,
        micro_batch_size=8,
        model=ModelConfig(base="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        data=DataConfig(sources=SOURCES, resolution=512, aspect_buckets=True, crop="center"),
        curriculum=Curriculum(total_steps=STEPS),
    )
