"""The adapter of the embedded model, from the diffusers folder that `python -m train.mini` writes."""

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

STEPS = 16_000


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
