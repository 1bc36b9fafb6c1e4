"""Configuration of the data -> the mixture of its sources."""

from typing import Literal

from .config import SourceConfig, TrainConfig
from .data.mixture import Mixture
from .data.multiview import MultiviewSource
from .data.sample import Source
from .data.sprite_world.source import SpriteSource
from .data.text_image import TextImageSource
from .data.transforms import aspect_buckets


def open_source(config: SourceConfig, split: Literal["train", "held_out"] = "train") -> Source:
    """Open a source; the first time, its records are indexed.

    Args:
        split: of the sprite world: instances for training, or those that training never uses.

    Raises:
        ValueError: the path has no usable record.
    """
    if config.kind == "sprite_world":
        return SpriteSource(split=split)
    assert config.path is not None
    return TextImageSource(config.path) if config.kind == "text_image" else MultiviewSource(config.path)


def open_mixture(config: TrainConfig, reference_size: int) -> Mixture:
    """The mixture of a run's sources.

    Args:
        reference_size: side of the references in px.
    """
    resolution = config.data.resolution
    return Mixture(
        [open_source(source) for source in config.data.sources],
        [source.weight for source in config.data.sources],
        buckets=aspect_buckets(resolution) if config.data.aspect_buckets else ((resolution, resolution),),
        batch_size=config.batch_size,
        seed=config.seed,
        curriculum=config.curriculum,
        reference_size=reference_size,
    )
