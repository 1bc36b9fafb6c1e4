"""RealCustomPipeline: prepare, step, decode, and the diffusers-style call over them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from . import adapter as _adapter  # noqa: F401  diffusers finds the adapter's class through the imported module
from .adapter import RealCustomAdapter
from .attention import KeysValues
from .cache import Cache
from .config import MaskSource, RealCustomConfig, SamplingDefaults
from .decoder import LatentDecoder
from .denoiser import Denoiser
from .generation import Generation
from .lora import LoraLoader
from .reference_image import ReferenceImage
from .request import Request, ResolvedRequest, Subject, seed_variations
from .text import TextCondition, TextEncoders
from .vision import VisionEncoders, VisionFeatures

REFERENCE_CACHE_BYTES = 1 << 30  # about four references of SDXL in bf16
TEXT_CACHE_BYTES = 1 << 28  # about ten prompts of SDXL in bf16
# Images that step together, each as its number of subjects and where its masks come from: what makes `torch.compile`
# see every kind of call, each twice with different batch sizes, after which it takes these as dynamic.
EXACT, FAST = get_args(MaskSource)
WARM_UP_GROUPS: tuple[tuple[tuple[int, MaskSource], ...], ...] = (
    *(
        tuple((number, EXACT) for number in numbers)
        for numbers in ((1,), (2,), (1, 1), (2, 1, 1), (2, 2), (0,), (0, 0), (0, 0, 0), (1, 0, 2))
    ),
    ((1, FAST),),
    ((2, FAST),),
    ((1, FAST), (0, EXACT)),
    ((2, FAST), (1, EXACT)),
    ((1, FAST), (1, FAST)),
    ((2, FAST), (1, FAST), (1, EXACT)),
)


@dataclass
class RealCustomOutput(BaseOutput):
    """Images and what explains them.

    Attributes:
        images: PIL images, or what `output_type` asked for.
        masks: per image the final guidance mask of each subject, fp32 [S, h, w] in [0, 1]; None without subjects.
        seeds: the seed of each image; an image drawn from a caller's generator has None.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    masks: list[Tensor | None]
    seeds: list[int | None]


class RealCustomPipeline(DiffusionPipeline, LoraLoader):
    """Text-to-image in which real words of the prompt become given subjects (RealCustom++).

    Args:
        vae: `AutoencoderKL` or `AutoencoderDC`.
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: CLIP; the second pair is None for SD1.5.
        unet: a stock `UNet2DConditionModel`; it gets attention processors that equal the stock ones for plain use.
        scheduler: any diffusers scheduler; each generation works on a copy of its own.
        image_encoder: `SiglipVisionModel`.
        image_encoder_2: `Dinov2WithRegistersModel`.
        adapter: projector and W_Ki, W_Vi; without it only plain text-to-image is possible.
        realcustom_config: `RealCustomConfig` or its dict.
        force_zeros_for_empty_prompt: an empty negative prompt becomes zeros, as stock SDXL does.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->image_encoder_2->adapter->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "image_encoder", "image_encoder_2", "adapter"]

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        text_encoder_2=None,
        tokenizer_2=None,
        image_encoder=None,
        image_encoder_2=None,
        adapter: RealCustomAdapter | None = None,
        realcustom_config: RealCustomConfig | dict[str, Any] | None = None,
        force_zeros_for_empty_prompt: bool = True,
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
        if not isinstance(realcustom_config, RealCustomConfig):
            realcustom_config = RealCustomConfig.from_dict(realcustom_config or {})
        self.register_to_config(
            realcustom_config=realcustom_config.to_dict(), force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.realcustom_config = realcustom_config
        for part in (unet, vae):
            # What fast convolutions want. Here, as the order of sums depends on it: every door makes the same bytes.
            part.to(memory_format=torch.channels_last)
        self._decoder = LatentDecoder(vae)
        self.vae_scale_factor = self._decoder.factor
        self.denoiser = Denoiser(unet, realcustom_config.method)
        self._compiled = False
        self.offload_hooks: dict[str, Any] = {}  # of components that are on the device only while in use, see memory.py
        self.text_cache: Cache[TextCondition] = Cache(TEXT_CACHE_BYTES, _text_bytes)
        self.reference_cache: Cache[KeysValues] = Cache(REFERENCE_CACHE_BYTES, _keys_values_bytes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **options) -> "RealCustomPipeline":
        """As in diffusers, with fp32 as the default type, whatever type the files have."""
        if "torch_dtype" not in options:
            options.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(pretrained_model_name_or_path), **options)

    @classmethod
    def from_parts(cls, base: str | PathLike, adapter: str | PathLike | None = None, **options) -> "RealCustomPipeline":
        """From a base model (SDXL or SD1.5), public vision encoders and an adapter; see `assemble.from_parts`."""
        from .assemble import from_parts

        return from_parts(base, adapter, **options)

    def to(self, *args, **options) -> "RealCustomPipeline":
        """As in diffusers; what is cached on the former device, or in the former type, is forgotten."""
        self.clear_caches()
        return super().to(*args, **options)

    @property
    def decoder(self) -> LatentDecoder:
        """Of the present `vae`, which people exchange by assignment."""
        if self._decoder.vae is not self.vae:
            self._decoder = LatentDecoder(self.vae)
        return self._decoder

    @property
    def sampling(self) -> SamplingDefaults:
        """What a request that says nothing is sampled with."""
        return self.realcustom_config.sampling

    def load_realcustom(self, path: str | PathLike, replace_unet: bool = False) -> None:
        """Put the adapter of a safetensors file, or of the authors' .pth, in force (see `weights.load_adapter`).

        Args:
            replace_unet: plain UNet weights in the same file replace those of the UNet, instead of being refused.
        Raises:
            ValueError: not such a file, or one for another model; nothing has been changed then.
        """
        from .weights import load_adapter

        if self.image_encoder is None or self.image_encoder_2 is None:
            raise ValueError("load both vision encoders first: an adapter must fit the width of their features.")
        vision_dim = self._vision_encoders().num_channels
        adapter, plain = load_adapter(path, self.unet, vision_dim=vision_dim, replace_unet=replace_unet)
        self.unet.load_state_dict(plain, strict=False)
        self.register_modules(adapter=adapter.to(self._execution_device, self.unet.dtype))
        self.clear_caches()

    def save_realcustom(self, path: str | PathLike) -> None:
        """The adapter alone as one safetensors file, as `load_realcustom` reads it."""
        from .weights import save_adapter

        assert self.adapter is not None
        save_adapter(self.adapter, path)

    def clear_caches(self) -> None:
        """Forget encoded texts and references; needed after changing weights in place."""
        self.reference_cache.clear()
        self.text_cache.clear()

    def compile(self, *, whole: bool = False, **options) -> None:
        """Compile the UNet with `torch.compile`: its transformer blocks, or all of it.

        Programs are made when first needed; `warm_up` makes them all. Batch sizes are dynamic, image sizes are not.

        Args:
            whole: one program for a UNet call in place of one for all blocks of a shape: faster steps, and many times
                longer to make. Texts and references of images that step together are then copied for all layers at
                once. New weights and LoRAs take effect as ever; after any other change of the UNet's modules, such as a
                hook or FreeU, compile anew.
            options: of `torch.compile`, such as `mode="max-autotune-no-cudagraphs"`.
        Raises:
            ValueError: the UNet is brought over layer by layer (memory tier "low") and cannot be one program.
        """
        # There are programs for one row and for several, with and without references, recording and not; for blocks
        # all that at each level, for whole UNets all that of each.
        torch._dynamo.config.recompile_limit += 64
        if whole:
            self.denoiser.compile(**options)
        else:
            self.unet.compile_repeated_blocks(fullgraph=True, **options)
        self._compiled = True

    def warm_up(self, sizes: Sequence[tuple[int, int]] = ()) -> None:
        """Do each kind of work once, so that the first real image does not wait and a broken model fails here.

        Args:
            sizes: (height, width) in px to be ready for; the default size if there are none.
        """
        groups = WARM_UP_GROUPS if self._compiled else WARM_UP_GROUPS[:1]
        scales = (None, 1.0) if self._compiled else (None,)
        for (height, width), guidance_scale, group in product(sizes or [(None, None)], scales, groups):
            settings = dict(height=height, width=width, guidance_scale=guidance_scale, seed=0)
            generations = [self._gray_generation(number, mask_source=source, **settings) for number, source in group]
            self.step(generations)
            if group is groups[-1]:
                self.preview(generations[:1])
                self.decode(generations[:1])
        self.clear_caches()

    def _gray_generation(self, num_subjects: int, **settings) -> Generation:
        names = ("ball", "box")[: num_subjects if self.adapter is not None else 0]
        gray = Image.new("RGB", (64, 64), "gray")
        subjects = tuple(Subject(image=gray, target_phrase=name) for name in names)
        return self.prepare(Request(prompt="a ball and a box", subjects=subjects, **settings))

    # ---- prepare: everything that depends on the request alone -------------------------------------------------

    @torch.no_grad()
    def prepare(
        self,
        request: Request | ResolvedRequest,
        *,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        masks: Tensor | None = None,
        scheduler=None,
    ) -> Generation:
        """Text, references, noise and a scheduler of its own: an image ready for its first step.

        Args:
            request: missing settings are filled from `sampling`.
            generator: draws the noise in place of the request's seed.
            latents: initial noise [channels, height, width] in place of drawing it.
            masks: guidance masks [S, h, w] in [0, 1] in place of the guidance branch's.
            scheduler: in place of a copy of the pipeline's; it is copied too.
        Raises:
            ValueError: the size does not fit the model's grid, a phrase is beyond the text encoder's limit, or the
                request has subjects and no adapter is loaded.
        """
        if isinstance(request, Request):
            request = request.resolve(self.sampling)
        self._check(request)
        device = self._execution_device  # walks all modules, so it is asked once an image and not in every step
        scheduler = copy.deepcopy(scheduler if scheduler is not None else self.scheduler)
        scheduler.set_timesteps(request.num_inference_steps, device=device)
        generator = generator or torch.Generator("cpu").manual_seed(request.seed)
        if latents is None:
            factor = self.vae_scale_factor
            shape = (self.unet.config.in_channels, request.height // factor, request.width // factor)
            latents = torch.randn(shape, generator=generator, device=generator.device)
        latents = latents.to(device, torch.float32) * scheduler.init_noise_sigma
        text_encoders = self._text_encoders()
        tokens = text_encoders.target_tokens(request.prompt, [s.target_phrase for s in request.subjects])
        generation = Generation(
            request=request,
            latents=latents,
            scheduler=scheduler,
            generator=generator,
            text=self._encode_text(request.prompt),
            negative_text=self._negative_text(request),
            references=tuple(self._encode_reference(s.image) for s in request.subjects),
            negative_references=self._negative_references(request),
            target_tokens=tokens.to(device),
            time_ids=self._time_ids(request).to(device),
        )
        if masks is not None:
            generation.set_masks(masks.to(device, torch.float32))
            generation.masks_fixed = True
        return generation

    def _check(self, request: ResolvedRequest) -> None:
        for name in ("height", "width"):
            if getattr(request, name) % self.vae_scale_factor:
                raise ValueError(
                    f"{name} is {getattr(request, name)} px; this model makes multiples of {self.vae_scale_factor} px."
                )
        if request.subjects and (self.adapter is None or self.image_encoder is None or self.image_encoder_2 is None):
            raise ValueError(
                "the request has subjects, but no RealCustom++ adapter with its vision encoders is loaded; "
                "call load_realcustom or load a model that has them."
            )

    def _time_ids(self, request: ResolvedRequest) -> Tensor:
        """Original size, crop corner and target size; the image is asked for as uncropped."""
        size = (request.height, request.width)
        if self.realcustom_config.method.time_ids == "width_first":
            size = size[::-1]
        return torch.tensor([*size, 0, 0, *size], dtype=torch.float32)

    def _text_encoders(self) -> TextEncoders:
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return TextEncoders(
            [pair for pair in pairs if pair[1] is not None],
            pooled_projection=self.realcustom_config.method.pooled_projection,
        )

    def _vision_encoders(self) -> VisionEncoders:
        config = self.realcustom_config
        return VisionEncoders(self.image_encoder, self.image_encoder_2, config.vision, config.method)

    def _encode_text(self, text: str) -> TextCondition:
        def make() -> TextCondition:
            condition = self._text_encoders().encode(text)
            self._offload("text_encoder", "text_encoder_2")
            return self.denoiser.prepare_text(condition)

        return self.text_cache.get(text, make)

    def _negative_text(self, request: ResolvedRequest) -> TextCondition | None:
        if request.guidance_scale <= 1:
            return None
        if request.negative_prompt or not self.config.force_zeros_for_empty_prompt:
            return self._encode_text(request.negative_prompt)
        text = self._encode_text(request.prompt)

        def make() -> TextCondition:
            pooled = None if text.pooled is None else torch.zeros_like(text.pooled)
            return self.denoiser.prepare_text(TextCondition(embeds=torch.zeros_like(text.embeds), pooled=pooled))

        return self.text_cache.get(None, make)

    def _encode_reference(self, image: ReferenceImage) -> KeysValues:
        """Keys and values of a reference in every layer, once per content of the image."""

        def make() -> KeysValues:
            features = self._vision_encoders().encode([image.to_pil()])
            self._offload("image_encoder", "image_encoder_2")
            tokens = {name: v.to(self.adapter.device, self.adapter.dtype) for name, v in vars(features).items()}
            return self.adapter(VisionFeatures(**tokens))

        return self.reference_cache.get(image.digest, make)

    def _offload(self, *names: str) -> None:
        for name in names:
            if name in self.offload_hooks:
                self.offload_hooks[name].offload()

    def _negative_references(self, request: ResolvedRequest) -> tuple[KeysValues, ...]:
        """A black image for each subject, where the method shows the unconditional row one."""
        black = self.realcustom_config.method.unconditional_vision == "black_image"
        if not (black and request.subjects) or request.guidance_scale <= 1:
            return ()
        return (self._encode_reference(ReferenceImage.from_pil(Image.new("RGB", (8, 8)))),) * len(request.subjects)

    # ---- step ----------------------------------------------------------------------------------------------------

    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every generation by one step; see `Denoiser.step`."""
        self.denoiser.step(generations)

    # ---- decode ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, generations: Sequence[Generation]) -> list[Image.Image]:
        """Finished images; of one size, decoded one by one so that each is the same in any company."""
        return [self.decoder.decode(self._final_latents(g)) for g in generations]

    def _final_latents(self, generation: Generation) -> Tensor:
        estimate = self.realcustom_config.method.final_latents == "clean_estimate"
        return generation.predicted_clean if estimate and generation.done else generation.latents

    @torch.no_grad()
    def preview(self, generations: Sequence[Generation]) -> list[Image.Image]:
        """Current estimate of the finished images, at a glance (see `LatentDecoder.glance`)."""
        return [self.decoder.glance(g.latents if g.predicted_clean is None else g.predicted_clean) for g in generations]

    # ---- the diffusers-style call ------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        subjects: Sequence[Subject] = (),
        image: Image.Image | None = None,
        target_phrase: str | None = None,
        scope_ratio: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        early_stop_step: int | float | None = None,
        guidance_scale: float | None = None,
        mask_source: MaskSource | None = None,
        mask_interval: int | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["RealCustomPipeline", int, Tensor, dict], dict] | None = None,
        return_dict: bool = True,
    ) -> RealCustomOutput | tuple:
        """Make images; see `Request` for the settings and their ranges.

        Args:
            prompt: text of the images.
            subjects: who becomes which words. For one subject, `image`, `target_phrase` and `scope_ratio` will do.
            seed: image i uses seed + i.
            num_images_per_prompt: images made together.
            generator: draws the noise in place of seeds; a list has one per image.
            output_type: "pil", "np", "pt", or "latent" for undecoded latents [N, channels, height, width].
            callback_on_step_end: called with the pipeline, step index, timestep and {"latents": [N, ...]} after
                every step; latents it returns replace the current ones.
        Raises:
            ValueError: a setting out of range.
        """
        if image is not None or target_phrase is not None:
            if image is None or target_phrase is None or subjects:
                raise ValueError("give image and target_phrase together, or else a list of subjects; not both.")
            subjects = (Subject(image=image, target_phrase=target_phrase, scope_ratio=scope_ratio),)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'.")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; it must be at least 1.")
        request = Request(
            prompt=prompt,
            subjects=tuple(subjects),
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            early_stop_step=early_stop_step,
            guidance_scale=guidance_scale,
            mask_source=mask_source,
            mask_interval=mask_interval,
            seed=seed,
        ).resolve(self.sampling)
        generators = _one_each(generator, num_images_per_prompt)
        generations = [
            self.prepare(r, generator=g) for r, g in zip(seed_variations(request, num_images_per_prompt), generators)
        ]
        with self.progress_bar(total=generations[0].num_steps) as bar:
            for index in range(generations[0].num_steps):
                timestep = generations[0].timestep
                self.step(generations)
                if callback_on_step_end is not None:
                    latents = torch.stack([g.latents for g in generations])
                    returned = callback_on_step_end(self, index, timestep, {"latents": latents}) or {}
                    for g, new in zip(generations, returned.get("latents", latents), strict=True):
                        g.latents = new
                bar.update()
        output = RealCustomOutput(
            images=self._output(generations, output_type),
            masks=[None if g.guidance_masks is None else g.guidance_masks.float().cpu() for g in generations],
            seeds=[g.request.seed if own is None else None for g, own in zip(generations, generators)],
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _output(self, generations: Sequence[Generation], output_type: str):
        if output_type == "pil":
            return self.decode(generations)
        if output_type == "latent":
            return torch.stack([self._final_latents(g) for g in generations])
        images = [self.decoder.decode(self._final_latents(g), output_type) for g in generations]
        return torch.stack(images) if output_type == "pt" else np.stack(images)


def _text_bytes(text: TextCondition) -> int:
    pooled = 0 if text.pooled is None else text.pooled.nbytes
    return text.embeds.nbytes + pooled + _keys_values_bytes(text.keys_values or {})


def _keys_values_bytes(keys_values: KeysValues) -> int:
    return sum(k.nbytes + v.nbytes for k, v in keys_values.values())


def _one_each(generator, number: int) -> list:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * number
    if len(generator) != number:
        raise ValueError(f"generator has {len(generator)} entries for {number} images; give one per image.")
    return list(generator)
