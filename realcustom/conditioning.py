"""Request -> Conditioning: encoded texts and references, each encoded once and cached by content.

Legend: S subjects, T text tokens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .adapter import RealCustomAdapter
from .cache import Cache
from .config import MethodConfig
from .keys_values import PackedKeysValues
from .reference_image import ReferenceImage
from .request import ResolvedRequest
from .text import TextCondition, TextEncoders
from .vision import VisionEncoders, VisionFeatures

logger = logging.getLogger(__name__)

REFERENCE_CACHE_BYTES = 1 << 30  # two references of SDXL in bf16, or four with the authors' adapter
TEXT_CACHE_BYTES = 1 << 28  # about ten prompts of SDXL in bf16


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Everything a request contributes to the UNet's inputs; see `Generation` for the attributes."""

    text: TextCondition
    negative_text: TextCondition | None
    references: tuple[PackedKeysValues, ...]
    negative_references: tuple[PackedKeysValues, ...]
    target_tokens: Tensor


class Conditioner:
    """Encodes the texts and references of requests.

    Args:
        method: what the unconditional row attends to (`MethodConfig.unconditional_vision`).
        zero_empty_prompt: encode an empty negative prompt as zeros, as stock SDXL does.
        prepare_text: adds the UNet's keys and values to an encoded text (`Denoiser.prepare_text`).

    Attributes:
        text_cache, reference_cache: encoded texts, and keys and values of references.
    """

    def __init__(
        self,
        method: MethodConfig,
        *,
        zero_empty_prompt: bool,
        prepare_text: Callable[[TextCondition], TextCondition],
    ) -> None:
        self._method, self._zero_empty_prompt, self._prepare_text = method, zero_empty_prompt, prepare_text
        self.text_cache: Cache[TextCondition] = Cache(TEXT_CACHE_BYTES, _text_bytes)
        self.reference_cache: Cache[PackedKeysValues] = Cache(REFERENCE_CACHE_BYTES, lambda packed: packed.nbytes)

    def clear(self) -> None:
        self.reference_cache.clear()
        self.text_cache.clear()

    @torch.no_grad()
    def encode(
        self,
        request: ResolvedRequest,
        text_encoders: TextEncoders,
        vision_encoders: VisionEncoders | None,
        adapter: RealCustomAdapter | None,
        dtype: torch.dtype,
    ) -> Conditioning:
        """Encode a request. Vision encoders and adapter are only needed if it has subjects.

        Components run in their own types, also under autocast, so that cached values fit every later call.

        Args:
            dtype: that the UNet computes in; the references are cast to it.
        Raises:
            ValueError: a target phrase is beyond the text encoder's limit, or the request has subjects but the adapter
                or the vision encoders are not loaded.
        """
        if request.subjects and (adapter is None or vision_encoders is None):
            raise ValueError(
                "the request has subjects, but no RealCustom++ adapter with its vision encoders is loaded; "
                "call load_realcustom or load a model that has them."
            )

        def reference(image: ReferenceImage) -> PackedKeysValues:
            assert adapter is not None and vision_encoders is not None
            return self._reference(image, vision_encoders, adapter, dtype)

        target_tokens = text_encoders.target_tokens(request.prompt, [s.target_phrase for s in request.subjects])
        for warning in text_encoders.truncation_warnings(request.prompt, request.negative_prompt):
            logger.warning(warning)
        text = self._text(request.prompt, text_encoders)
        negative_references: tuple[PackedKeysValues, ...] = ()
        black = self._method.unconditional_vision == "black_image"
        if black and request.subjects and request.guidance_scale > 1:
            black_image = ReferenceImage.from_pil(Image.new("RGB", (8, 8)))
            negative_references = (reference(black_image),) * len(request.subjects)
        return Conditioning(
            text=text,
            negative_text=self._negative_text(request, text, text_encoders),
            references=tuple(reference(s.image) for s in request.subjects),
            negative_references=negative_references,
            target_tokens=target_tokens,
        )

    def _text(self, text: str, encoders: TextEncoders) -> TextCondition:
        return self.text_cache.get(text, lambda: self._prepare_text(encoders.encode(text)))

    def _negative_text(
        self, request: ResolvedRequest, text: TextCondition, encoders: TextEncoders
    ) -> TextCondition | None:
        if request.guidance_scale <= 1:
            return None
        if request.negative_prompt or not self._zero_empty_prompt:
            return self._text(request.negative_prompt, encoders)

        def zeros() -> TextCondition:
            pooled = None if text.pooled is None else torch.zeros_like(text.pooled)
            return self._prepare_text(TextCondition(embeds=torch.zeros_like(text.embeds), pooled=pooled))

        return self.text_cache.get(None, zeros)

    def _reference(
        self, image: ReferenceImage, encoders: VisionEncoders, adapter: RealCustomAdapter, dtype: torch.dtype
    ) -> PackedKeysValues:
        """Keys and values of a reference in every layer."""

        def encode() -> PackedKeysValues:
            features = encoders.encode([image])
            tokens = {name: v.to(adapter.device, adapter.dtype) for name, v in vars(features).items()}
            return adapter(VisionFeatures(**tokens), packed=True).cast(dtype)

        return self.reference_cache.get((image.digest, dtype), encode)


def _text_bytes(text: TextCondition) -> int:
    pooled = 0 if text.pooled is None else text.pooled.nbytes
    keys_values = 0 if text.keys_values is None else text.keys_values.nbytes
    return text.embeds.nbytes + pooled + keys_values
