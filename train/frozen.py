"""The frozen half of the model: VAE, text encoders, vision encoders and UNet, from any diffusers folder.

Legend: B batch, C latent channels, h, w latent size, T text tokens, D channels of the text,
P channels of the pooled text.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from realcustom import RealCustomAdapter, RealCustomPipeline
from realcustom.adapter import cross_attention_layers
from realcustom.decoder import LatentDecoder
from realcustom.vision import VisionFeatures
from realcustom.weights import load_adapter

from .config import ModelConfig
from .data.pixels import PixelBatch
from .data.sample import Sample
from .objective import Encoded, inside_of_latents

# Features of one sample that were computed before, or None if there are none.
Lookup = Callable[[Sample], Mapping[str, Tensor] | None]

TEXT_CACHE_BYTES = 1 << 28


def load_pipeline(model: ModelConfig, dtype: torch.dtype) -> RealCustomPipeline:
    """The frozen models as a pipeline. Its adapter, if it has one, is that of a complete RealCustom++ folder.

    Raises:
        ValueError: a base that cannot be found, one of another family, or one without vision encoders.
    """
    if not is_complete(model.base):
        return RealCustomPipeline.from_parts(
            model.base, siglip=model.siglip, dinov2=model.dinov2, variant=model.variant, dtype=dtype
        )
    pipeline = RealCustomPipeline.from_pretrained(model.base, dtype=dtype)
    if pipeline.vision_encoders is None:
        raise ValueError(f"{model.base} has no vision encoders; use a folder that has both.")
    return pipeline


def is_complete(base: str) -> bool:
    """Whether a base is a complete RealCustom++ pipeline, with its own vision encoders.

    Raises:
        ValueError: the base cannot be found.
    """
    if Path(base).is_file():
        return False
    try:
        index: Any = DiffusionPipeline.load_config(base)
    except OSError as error:  # no folder, no such hub id, or no connection
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model.base is {base}, which cannot be loaded; give a hub id, a folder in the diffusers layout or a "
            f".safetensors file. {reason}"
        ) from error
    return index["_class_name"] == RealCustomPipeline.__name__


def start_adapter(model: ModelConfig, pipeline: RealCustomPipeline, seed: int) -> RealCustomAdapter:
    """The trainable adapter in float32 with the weights that the run starts from; see `ModelConfig.adapter`.

    Raises:
        ValueError: the base has no adapter, or the file does not fit the model.
    """
    encoders = pipeline.vision_encoders
    assert encoders is not None
    if model.adapter == "new":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = RealCustomAdapter.for_unet(pipeline.unet, vision_dim=encoders.num_channels)
    elif model.adapter == "base":
        if pipeline.adapter is None:
            raise ValueError(f"{model.base} has no adapter to continue; use model.adapter=new, or the path of one.")
        adapter = pipeline.adapter
    else:
        adapter, plain = load_adapter(model.adapter, pipeline.unet, vision_dim=encoders.num_channels)
        assert not plain
    return _trainable(adapter)


def adapter_of_structure(config: Mapping[str, Any], pipeline: RealCustomPipeline) -> RealCustomAdapter:
    """The trainable adapter in float32 with the structure of a checkpoint, whose weights will be loaded into it.

    Args:
        config: of the adapter that the checkpoint contains.
    Raises:
        ValueError: the adapter was trained for another base.
    """
    adapter = cast(RealCustomAdapter, RealCustomAdapter.from_config(dict(config)))
    encoders = pipeline.vision_encoders
    assert encoders is not None
    if adapter.config["layers"] != cross_attention_layers(pipeline.unet) or (
        adapter.config["vision_dim"] != encoders.num_channels
    ):
        raise ValueError(
            "the checkpoint was trained for a base with other layers or vision encoders than those of model.base; "
            "resume the run with the base that it started with."
        )
    return _trainable(adapter)


def _trainable(adapter: RealCustomAdapter) -> RealCustomAdapter:
    nn.Module.float(adapter)  # without the warning of diffusers
    nn.Module.requires_grad_(adapter, True).train()
    return adapter


class FrozenModels:
    """Encodes samples with the frozen models.

    Args:
        pipeline: see `load_pipeline`; it is moved to the device.
        device: of the computation.
        lookup: features that were computed before; samples without them are encoded here.

    Attributes:
        reference_size: side of the references in px, twice the input size of the vision encoders (Sec. 3.2.1).
        factor: px per latent position and axis.
    """

    def __init__(
        self, pipeline: RealCustomPipeline, device: torch.device, lookup: Lookup = lambda sample: None
    ) -> None:
        assert pipeline.vision_encoders is not None
        pipeline.adapter = None  # the trained adapter is kept separately
        pipeline.to(device)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        nn.Module.float(pipeline.vae)  # latents in bfloat16 would have visible rounding errors
        self.pipeline, self.device = pipeline, device
        self._lookup = lookup
        self._decoder = LatentDecoder(pipeline.vae)
        self._texts: OrderedDict[str, tuple[Tensor, Tensor | None]] = OrderedDict()
        self.reference_size = 2 * pipeline.vision_encoders.input_size
        self.factor = self._decoder.factor

    @torch.no_grad()
    def empty_text(self) -> tuple[Tensor, Tensor | None]:
        """Text condition of a dropped caption, as the pipeline encodes an empty negative prompt: embeds [T, D] and
        pooled text [P], or None if the model takes none."""
        ((embeds, *rest),) = self.encode_texts([""])
        pooled = rest[0] if rest else None
        if self.pipeline.config["force_zeros_for_empty_prompt"]:
            return torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
        return embeds, pooled

    @torch.no_grad()
    def encode(self, samples: Sequence[Sample] | PixelBatch) -> Encoded:
        """Latents, text conditions and vision features of samples of one bucket."""
        if isinstance(samples, PixelBatch):
            return self._encode_pixels(samples)
        features = [self._lookup(sample) or {} for sample in samples]

        def complete(names: tuple[str, ...], encode: Callable[[list[Sample]], Sequence[tuple[Tensor, ...]]]):
            """Per name, the stacked values of all samples; those not found are computed together."""
            missing = [i for i, values in enumerate(features) if not all(name in values for name in names)]
            computed = dict(zip(missing, encode([samples[i] for i in missing]))) if missing else {}
            rows = [
                computed[i] if i in computed else tuple(values[name].to(self.device) for name in names)
                for i, values in enumerate(features)
            ]
            return [torch.stack(values) for values in zip(*rows, strict=True)]

        (latents,) = complete(("latents",), self.encode_images)
        text_names = ("embeds", "pooled") if self._has_pooled_text else ("embeds",)
        embeds, *pooled = complete(text_names, lambda missing: self.encode_texts([s.caption for s in missing]))
        shallow, deep, local = complete(("shallow", "deep", "local"), self.encode_references)
        inside = None
        if any("inside" in sample.extras for sample in samples):
            # Samples without a map have the weight 1 everywhere, in any micro-batch.
            ones = np.ones(samples[0].image.shape[:2], np.uint8)
            maps = torch.from_numpy(np.stack([sample.extras.get("inside", ones) for sample in samples]))
            height, width = latents.shape[-2:]
            inside = inside_of_latents(maps.to(self.device), (height, width))
        return Encoded(
            latents=latents.float(),
            embeds=embeds,
            pooled=pooled[0] if pooled else None,
            features=VisionFeatures(shallow=shallow.float(), deep=deep.float(), local=local.float()),
            time_ids=torch.tensor(
                [self._time_ids(s.original_size, s.crop, s.image.shape[:2]) for s in samples], device=self.device
            ).float(),
            inside=inside,
        )

    def _encode_pixels(self, batch: PixelBatch) -> Encoded:
        encoders = self.pipeline.vision_encoders
        assert encoders is not None
        height, width = batch.images.shape[-2:]
        latents = self._decoder.scaled(self._decoder.encode(batch.images * 2 - 1)).float()
        embeds, *pooled = (torch.stack(values) for values in zip(*self.encode_texts(batch.captions), strict=True))
        features = encoders.encode_pixels(batch.references)
        time_ids = torch.tensor(self._time_ids(batch.original_size, (0, 0), (height, width)), device=self.device)
        return Encoded(
            latents=latents,
            embeds=embeds,
            pooled=pooled[0] if pooled else None,
            features=VisionFeatures(
                shallow=features.shallow.float(), deep=features.deep.float(), local=features.local.float()
            ),
            time_ids=time_ids.float().expand(len(latents), -1),
            inside=inside_of_latents(batch.inside, (latents.shape[-2], latents.shape[-1])),
        )

    def autocast(self) -> torch.autocast:
        """Context of forward passes in which the float32 adapter and the UNet work together, in the UNet's type."""
        dtype = self.pipeline.unet.dtype
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    @property
    def _has_pooled_text(self) -> bool:
        return len(self.pipeline.text_encoders.pairs) > 1

    def _time_ids(self, *pairs: tuple[int, ...]) -> tuple[int, ...]:
        """SDXL's size condition from original size, top-left corner of the crop and target size, height first."""
        if self.pipeline.realcustom_config.method.time_ids == "width_first":
            pairs = tuple(pair[::-1] for pair in pairs)
        return tuple(int(side) for pair in pairs for side in pair)

    def encode_images(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        """Scaled latents [C, h, w] of each sample, as a tuple of one; all samples have one size."""
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).to(self.device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return [(latents,) for latents in self._decoder.scaled(self._decoder.encode(pixels))]

    def encode_texts(self, texts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """Per text, embeds [T, D] and, if the model takes it, the pooled text [P]; the last texts are cached."""
        if new := sorted(set(texts) - self._texts.keys()):
            for text, condition in zip(new, self.pipeline.text_encoders.encode_batch(new), strict=True):
                self._texts[text] = condition.embeds, condition.pooled
        found = [self._texts[text] for text in texts]
        for text in texts:
            self._texts.move_to_end(text)
        largest = TEXT_CACHE_BYTES // found[0][0].nbytes
        while len(self._texts) > largest:
            self._texts.popitem(last=False)
        return [(embeds,) if pooled is None else (embeds, pooled) for embeds, pooled in found]

    def encode_references(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        """Shallow, deep and local features of each sample's reference, see `VisionFeatures`, without the batch axis."""
        encoders = self.pipeline.vision_encoders
        assert encoders is not None
        features = encoders.encode([sample.reference for sample in samples])
        return list(zip(features.shallow, features.deep, features.local, strict=True))
