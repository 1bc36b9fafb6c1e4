"""The adapter of the embedded model, from the diffusers folder that `python -m train.mini` writes."""

from dataclasses import replace
from pathlib import Path

from realcustom.assets import MINI_MODEL

from ..config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    SourceConfig,
    TrainConfig,
)
from ..curriculum import Curriculum

STEPS, GPU_STEPS = 16_000, 6_000


def mini() -> TrainConfig:
    """The embedded model's adapter at 128 px, 16k steps of 64 samples of the sprite world.

    Hardware: two CPU cores or any GPU. Memory: 2 GB. docs/mini.md states the measured time.

    Because the training is short, it differs from the paper: noisy timesteps, which determine the appearance, are more
    frequent, and positions inside the reference's subjects have a higher weight. References are cropped less, because
    sprites fill them and many smaller crops would show a single color.
    """
    return TrainConfig(
        name="mini",
        out=Path("runs/mini"),
        steps=STEPS,
        batch_size=64,
        micro_batch_size=64,
        model=ModelConfig(base=str(MINI_MODEL), gradient_checkpointing=False),
        data=DataConfig(
            sources=(SourceConfig(kind="sprite_world"),),
            resolution=128,
            workers=1,
            validation=SourceConfig(kind="sprite_world"),
        ),
        objective=ObjectiveConfig(min_snr_gamma=5.0, timestep_exponent=0.7, outside_weight=0.3),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, betas=(0.9, 0.99), warmup_steps=200, decay_fraction=0.3, ema_decay=0.999
        ),
        curriculum=Curriculum(total_steps=STEPS // 4, r_max=1.6),
        checkpoint=CheckpointConfig(every_steps=250),
        preview=PreviewConfig(every_steps=500),
    )


def mini_gpu() -> TrainConfig:
    """Recipe `mini` for a large GPU: 6k steps of 1,024 samples, six times as many samples as `mini`.

    Hardware: one GPU and at least 8 CPU cores, which draw the random numbers of the samples; the GPU renders them.
    Memory: about 20 GB, an estimate. The time has not been measured.
    """
    recipe = mini()
    return replace(
        recipe,
        name="mini_gpu",
        out=Path("runs/mini_gpu"),
        steps=GPU_STEPS,
        batch_size=1024,
        micro_batch_size=1024,
        data=replace(recipe.data, workers=12),
        optimizer=replace(recipe.optimizer, learning_rate=1.5e-3),
        curriculum=replace(recipe.curriculum, total_steps=GPU_STEPS // 4),
        checkpoint=CheckpointConfig(every_steps=500),
        preview=PreviewConfig(every_steps=1000),
    )
