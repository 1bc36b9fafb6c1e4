"""Captioned latents of the sprite world for stage `base`: from a pool on disk, or rendered at every step.

A CPU trains on more samples than it can render: it keeps a pool and draws each sample about ten times. A GPU renders
faster than it trains, so every step has new samples.

Legend: B batch, C latent channels, h, w latent size, S subjects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sprite_world.batches import SampleMixture
from ..data.sprite_world.rendered import box_maps
from ..data.sprite_world.renderer import Renderer
from ..data.sprite_world.scenes import SCENE_SIZE
from ..images import to_signed
from .grounding import subject_maps
from .latents import LatentCodec
from .networks import LATENT_FACTOR
from .pool import Entry, SamplePool
from .render import CAPTION_BYTES, RenderSamples, unpack_captions
from .stream import SampleStream


@dataclass(frozen=True)
class LatentBatch:
    """Samples as stage `base` trains on them, on its device.

    Attributes:
        latents: scaled latents, float32 [B, C, h, w].
        captions: the text of each sample.
        subjects: boxes of the caption's subjects in the order of the caption, float32 [B, S, h, w].
    """

    latents: Tensor
    captions: list[str]
    subjects: Tensor


class LatentSource(Protocol):
    """Makes the samples of a step."""

    def batch(self, step: int, size: int, size_step: int, generator: torch.Generator) -> LatentBatch:
        """The samples of a step.

        Args:
            size: of the images, in px.
            size_step: number of earlier steps of this size.
            generator: the random numbers of the step.
        """
        ...

    def close(self) -> None:
        """End the processes that make samples."""
        ...


class LatentPool:
    """Samples from a pool of latents per image size; see `SamplePool`."""

    def __init__(self, folder: Path, codec: LatentCodec, batch_size: int) -> None:
        self._folder, self._codec, self._batch_size = folder, codec, batch_size
        self._pools: dict[int, SamplePool] = {}

    def batch(self, step: int, size: int, size_step: int, generator: torch.Generator) -> LatentBatch:
        pool = self._pool(size)
        pool.refresh(size_step)
        entry = pool.batch(size_step, torch.rand(self._batch_size, generator=generator).numpy())
        device = self._codec.device
        return LatentBatch(
            latents=torch.from_numpy(entry["latents"].astype(np.float32)).to(device),
            captions=unpack_captions(entry["caption"]),
            subjects=subject_maps(torch.from_numpy(entry["subject_bits"]).to(device)),
        )

    def close(self) -> None:
        pass

    def _pool(self, size: int) -> SamplePool:
        if size not in self._pools:
            side = size // LATENT_FACTOR
            fields = {
                "latents": ((4, side, side), "float16"),
                "caption": ((CAPTION_BYTES,), "uint8"),
                "subject_bits": ((side, side), "uint8"),
            }
            self._pools[size] = SamplePool(
                self._folder / f"pool_{size}", fields, RenderSamples(size=size), self._encode,
                start=8000, capacity=60_000, per_step=6,
            )  # fmt: skip
        return self._pools[size]

    def _encode(self, raw: Entry) -> Entry:
        latents = self._codec.encode(to_signed(raw["pixels"])).cpu().half().numpy()
        return {"latents": latents, "caption": raw["caption"], "subject_bits": raw["subject_bits"]}


class LatentStream:
    """New samples at every step: worker processes draw their random numbers, and the device renders and encodes them.

    Args:
        codec: encodes the images on its device.
        workers: processes that draw; each core draws several thousand samples per second.
    """

    def __init__(self, codec: LatentCodec, batch_size: int, workers: int | None = None) -> None:
        self._codec = codec
        self._renderer = Renderer(codec.device)
        self._stream = SampleStream(SampleMixture(batch_size), workers)

    def batch(self, step: int, size: int, size_step: int, generator: torch.Generator) -> LatentBatch:
        samples = self._stream.samples(step)
        pixels = self._renderer.render(samples.images).float() / 127.5 - 1
        if size < SCENE_SIZE:
            pixels = F.avg_pool2d(pixels, SCENE_SIZE // size)
        boxes = torch.from_numpy(samples.images.boxes).to(pixels.device)
        # As in `RenderSamples`, the maps of smaller images have every second position of those of full size.
        return LatentBatch(
            latents=self._codec.encode(pixels),
            captions=samples.captions,
            subjects=box_maps(boxes, LATENT_FACTOR, SCENE_SIZE // size).float(),
        )

    def close(self) -> None:
        self._stream.close()
