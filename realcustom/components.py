"""The components of a pipeline: loading, saving, adapters, caches, compilation."""

import logging
from collections.abc import Hashable
from os import PathLike
from typing import Any, get_args

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionModel,
)
from typing_extensions import Self

from .adapter import RealCustomAdapter
from .cache import Cache
from .call import CallState
from .conditioning import Conditioner
from .config import Execution, MethodConfig, RealCustomConfig, SamplingDefaults
from .decoder import LatentDecoder
from .denoiser import Denoiser
from .execution import GraphExecutor, compile_blocks
from .fingerprint import fingerprint
from .from_parts import load_parts
from .keys_values import PackedKeysValues
from .latent_preview import LatentPreview
from .lora import LoraLoader
from .text import TextCondition, TextEncoders
from .vision import VisionEncoders
from .weights import is_official, load_adapter, save_adapter

logger = logging.getLogger(__name__)


class RealCustomComponents(DiffusionPipeline, LoraLoader):
    """Base class of `RealCustomPipeline` that holds its components.

    Args:
        vae: `AutoencoderKL` or `AutoencoderDC`.
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: CLIP; the second pair is None for SD1.5.
        unet: a stock `UNet2DConditionModel` without guidance embedding; its attention processors are replaced by
            equivalent ones.
        scheduler: any diffusers scheduler; each generation uses its own copy.
        image_encoder: `SiglipVisionModel`.
        image_encoder_2: `Dinov2WithRegistersModel`.
        adapter: projector and W_Ki, W_Vi; without it, only plain text-to-image is possible.
        realcustom_config: `RealCustomConfig` or its dict; None takes the paper's settings for SDXL, or for SD1.5 if
            there is no second text encoder.
        force_zeros_for_empty_prompt: encode an empty negative prompt as zeros; None does so for SDXL, as diffusers
            does.

    Raises:
        ValueError: the UNet has a guidance embedding, or attention processors that compute something else.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->image_encoder_2->adapter->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "image_encoder", "image_encoder_2", "adapter"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder_2: CLIPTextModelWithProjection | CLIPTextModel | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        image_encoder: SiglipVisionModel | None = None,
        image_encoder_2: Dinov2WithRegistersModel | Dinov2Model | None = None,
        adapter: RealCustomAdapter | None = None,
        realcustom_config: RealCustomConfig | dict[str, Any] | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            image_encoder=image_encoder,
            image_encoder_2=image_encoder_2,
            adapter=adapter,
        )
        is_sdxl = text_encoder_2 is not None
        if realcustom_config is None:
            realcustom_config = RealCustomConfig.preset("paper", "sdxl" if is_sdxl else "sd15")
        elif not isinstance(realcustom_config, RealCustomConfig):
            realcustom_config = RealCustomConfig.from_dict(realcustom_config)
        if force_zeros_for_empty_prompt is None:
            force_zeros_for_empty_prompt = is_sdxl
        self.register_to_config(
            realcustom_config=realcustom_config.to_dict(), force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self._realcustom_config = realcustom_config
        parts: tuple[Any, ...] = (unet, vae)
        for part in parts:
            # channels_last is fastest. Set here, because the summation order depends on it and all entry points must
            # produce identical bytes.
            part.to(memory_format=torch.channels_last)
        self._decoder = LatentDecoder(vae)
        self._latent_preview = LatentPreview(self._decoder)
        self._execution: Execution = "auto"
        self._denoiser = Denoiser(unet, realcustom_config.method)
        self.conditioner = Conditioner(
            realcustom_config.method,
            zero_empty_prompt=force_zeros_for_empty_prompt,
            prepare_text=lambda text: self.denoiser.prepare_text(text),
        )
        self._fingerprints: tuple[Hashable, Hashable] = ((), ())  # of what the cached texts and references depend on
        self._compiled = False
        self._call_state = CallState()
        self.offload_hooks: dict[str, Any] = {}  # of components that are on the device only during use, see memory.py

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "unet":
            _check_unet(value)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **options) -> Self:
        """Load a pipeline as in diffusers, but in fp32 by default, regardless of the type of the files."""
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(pretrained_model_name_or_path), **options)

    @classmethod
    def from_parts(
        cls,
        base: str | PathLike,
        adapter: str | PathLike | None = None,
        *,
        replace_unet: bool = False,
        **options,
    ) -> Self:
        """Load a base model (SDXL or SD1.5), both vision encoders and an adapter.

        Args:
            base: see `from_parts.load_parts`.
            adapter: see `load_realcustom`; None for plain text-to-image until `load_realcustom` is called.
            replace_unet: see `load_realcustom`.
            options: of `from_parts.load_parts`: siglip, dinov2, preset, base_config, variant, dtype.
        Raises:
            ValueError: a base of another family, a file that is not safetensors, an adapter that does not fit.
        """
        pipeline = cls(**load_parts(base, **options))
        if adapter is not None:
            pipeline.load_realcustom(adapter, replace_unet)
        return pipeline

    def to(self, *args, **options) -> Self:
        """Move or cast the pipeline as in diffusers. Clears the caches, whose tensors have the old device and type."""
        self.clear_caches()
        return super().to(*args, **options)

    @property
    def execution_device(self) -> torch.device:
        """The device that runs the computation, even if weights are offloaded. Reading it walks all modules."""
        return self._execution_device

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser of the current `unet`, which may be replaced by assignment."""
        if self._denoiser.unet is not self.unet:
            self._denoiser = Denoiser(self.unet, self.realcustom_config.method, self._execution)
            self._compiled = False
        return self._denoiser

    @property
    def decoder(self) -> LatentDecoder:
        """The decoder of the current `vae`, which may be replaced by assignment."""
        if self._decoder.vae is not self.vae:
            self._decoder = LatentDecoder(self.vae)
            self._latent_preview = LatentPreview(self._decoder)
        return self._decoder

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position and axis of the current `vae`."""
        return self.decoder.factor

    @property
    def latent_preview(self) -> LatentPreview:
        """The preview decoder of the current `vae`."""
        assert self.decoder is self._decoder  # also replaces the preview decoder if the VAE has been replaced
        return self._latent_preview

    @property
    def realcustom_config(self) -> RealCustomConfig:
        """The method, the sampling defaults and the layers of the vision encoders; fixed at construction."""
        return self._realcustom_config

    @realcustom_config.setter
    def realcustom_config(self, config: object) -> None:
        raise AttributeError(
            "realcustom_config cannot be changed after construction; create a pipeline of the same components with "
            "RealCustomPipeline.from_pipe(pipeline, realcustom_config=config)."
        )

    @property
    def sampling(self) -> SamplingDefaults:
        """The defaults of the settings that a request leaves unset."""
        return self.realcustom_config.sampling

    @property
    def text_encoders(self) -> TextEncoders:
        """The current text encoders with their tokenizers."""
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return TextEncoders(
            [pair for pair in pairs if pair[1] is not None],
            pooled_projection=self.realcustom_config.method.pooled_projection,
            release=lambda: self._offload("text_encoder", "text_encoder_2"),
        )

    @property
    def vision_encoders(self) -> VisionEncoders | None:
        """None unless both are loaded."""
        if self.image_encoder is None or self.image_encoder_2 is None:
            return None
        return VisionEncoders(
            self.image_encoder,
            self.image_encoder_2,
            self.realcustom_config.vision,
            self.realcustom_config.method,
            release=lambda: self._offload("image_encoder", "image_encoder_2"),
        )

    def _offload(self, *names: str) -> None:
        for name in names:
            if name in self.offload_hooks:
                self.offload_hooks[name].offload()

    @property
    def text_cache(self) -> Cache[TextCondition]:
        """Encoded texts, by text."""
        return self.conditioner.text_cache

    @property
    def reference_cache(self) -> Cache[PackedKeysValues]:
        """Keys and values of references, by digest of the image and type of the UNet."""
        return self.conditioner.reference_cache

    def clear_caches(self) -> None:
        """Discard encoded texts and references.

        Needed only after changing weights through `tensor.data`. Replacing a component, loading weights and changing a
        LoRA are detected.
        """
        self.conditioner.clear()

    def discard_outdated(self) -> None:
        """Discard encoded texts and references if a component they depend on has changed since they were encoded."""
        text = (self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2, self.unet)
        vision = (self.image_encoder, self.image_encoder_2, self.adapter)
        current = tuple(map(fingerprint, text)), tuple(map(fingerprint, vision))
        if current[0] != self._fingerprints[0]:
            self.conditioner.text_cache.clear()
        if current[1] != self._fingerprints[1]:
            self.conditioner.reference_cache.clear()
        self._fingerprints = current

    def load_realcustom(self, path: str | PathLike, replace_unet: bool = False) -> None:
        """Load an adapter from a safetensors file or from the authors' .pth (see `weights.load_adapter`).

        Args:
            replace_unet: plain UNet weights in the same file replace those of the UNet; otherwise such a file is
                rejected.
        Raises:
            ValueError: an unreadable file, or one for another model. The pipeline is not changed in this case.
        """
        if (encoders := self.vision_encoders) is None:
            raise ValueError("load both vision encoders first; the adapter must match the width of their features.")
        adapter, plain = load_adapter(path, self.unet, vision_dim=encoders.num_channels, replace_unet=replace_unet)
        if is_official(path) and self.realcustom_config.method != MethodConfig.preset("release"):
            logger.warning(
                "%s has the authors' weight names, but this pipeline computes the method of preset 'paper', for which "
                "these weights were not trained; use preset='release' (--preset release)",
                path,
            )
        self.unet.load_state_dict(plain, strict=False)
        to: Any = adapter.to  # its type is hidden by a decorator of diffusers
        adapter = to(self.execution_device, self.unet.dtype)
        self.register_modules(adapter=adapter)
        self.clear_caches()

    def save_realcustom(self, path: str | PathLike) -> None:
        """Save the adapter as one safetensors file that `load_realcustom` reads.

        Raises:
            ValueError: the pipeline has no adapter.
        """
        if self.adapter is None:
            raise ValueError("there is no adapter to save; call load_realcustom first.")
        save_adapter(self.adapter, path)

    @property
    def execution(self) -> Execution:
        """How UNet calls run: "graphs" replays CUDA graphs, "eager" launches each kernel, "auto" (default) uses graphs
        on CUDA devices. Set it to change it.

        Graphs are captured when a shape of call occurs for the second time, or in `warm_up`. Calls that cannot be
        recorded run eagerly, with a warning (see `UNetState.eager_reason`).
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in get_args(Execution):
            raise ValueError(f"execution is {execution!r}; it must be 'auto', 'eager' or 'graphs'.")
        self._execution = execution
        self.denoiser.set_execution(execution)

    @property
    def uses_graphs(self) -> bool:
        """Whether UNet calls are replayed as CUDA graphs."""
        return isinstance(self.denoiser.executor, GraphExecutor)

    def fuse_projections(self) -> None:
        """Compute query, key and value of each self-attention layer of the UNet in one matrix multiplication.

        Call it when the UNet is on its device. Results change by rounding. See `AttentionLayers.fuse_projections`.
        """
        self.denoiser.attention.fuse_projections()

    def compile(self, *, resnets: bool = False, **options) -> None:
        """Compile the transformer blocks of the UNet with `torch.compile`; CUDA graphs then replay compiled kernels.

        Programs are compiled when first needed; `warm_up` compiles all of them. Batch sizes are dynamic, image sizes
        are not.

        Args:
            resnets: also compile the residual blocks, whose group norms are then fused with their activations.
            options: of `torch.compile`, such as `mode="max-autotune-no-cudagraphs"`.
        """
        self.denoiser.retire()
        compile_blocks(self.unet, resnets=resnets, **options)
        self._compiled = True


def _check_unet(unet) -> None:
    """Raise ValueError for a UNet whose timestep embedding depends on the guidance scale."""
    width = getattr(getattr(unet, "config", None), "time_cond_proj_dim", None)
    if width is not None:
        raise ValueError(
            f"the UNet has a guidance embedding (time_cond_proj_dim is {width}), as LCM-distilled UNets have, which "
            "RealCustom++ does not support; use the UNet of the base model and load an LCM-LoRA with "
            "load_lora_weights."
        )
