"""Configuration of the data -> the mixture of its sources."""

from typing import Literal

from .config import SourceConfig, TrainConfig
from .data.decode import Limits
from .data.mixture import Mixture
from .data.multiview import MultiviewSource
from .data.overlap import warn_if_overlapping
from .data.sample import Source
from .data.sprite_world.batches import SpriteMixture
from .data.sprite_world.source import SpriteSource
from .data.text_image import TextImageSource
from .data.transforms import aspect_buckets


def open_source(config: SourceConfig, split: Literal["train", "held_out"] = "train", name: str | None = None) -> Source:
    """Open a source; the first time, its records are indexed.

    Args:
        split: of the sprite world: instances for training, or those that training never uses.
        name: prefix of the keys of its records; default: the name of its path.
    Raises:
        ValueError: the path has no usable record.
    """
    if config.kind == "sprite_world":
        return SpriteSource(split=split, name=name or config.kind)
    assert config.path is not None
    source = TextImageSource if config.kind == "text_image" else MultiviewSource
    limits = Limits(min_side=config.min_side)
    opened: Source = source(config.path, name, limits=limits, may_flip=config.flip)
    return opened


def open_training_data(config: TrainConfig, reference_size: int) -> Mixture | SpriteMixture:
    """What a run trains on: the sprite world rendered on the run's device if it is the only source, or a mixture.

    Args:
        reference_size: side of the references in px.
    """
    alone = [source.kind for source in config.data.sources] == ["sprite_world"]
    if alone and not config.data.aspect_buckets and config.data.features is None:
        return SpriteMixture(
            SpriteSource(), batch_size=config.batch_size, seed=config.seed, curriculum=config.curriculum
        )
    return open_mixture(config, reference_size)


def open_mixture(config: TrainConfig, reference_size: int) -> Mixture:
    """The mixture of a run's sources, whose records are images.

    Args:
        reference_size: side of the references in px.
    """
    resolution = config.data.resolution
    names = [source.kind if source.path is None else source.path.stem for source in config.data.sources]
    distinct = len(set(names)) == len(names)
    sources = [
        open_source(source, name=name if distinct else f"{number}-{name}")
        for number, (source, name) in enumerate(zip(config.data.sources, names))
    ]
    if config.data.evaluation:
        folders = [source for source in sources if isinstance(source, TextImageSource | MultiviewSource)]
        warn_if_overlapping(folders, config.data.evaluation)
    return Mixture(
        sources,
        [source.weight for source in config.data.sources],
        buckets=aspect_buckets(resolution) if config.data.aspect_buckets else ((resolution, resolution),),
        batch_size=config.batch_size,
        seed=config.seed,
        curriculum=config.curriculum,
        reference_size=reference_size,
        crop=config.data.crop,
    )
