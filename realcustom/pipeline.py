"""RealCustomPipeline: prepare, step, decode, run, and the diffusers-style call."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from .call import call_back, check_callback, check_eta, check_number_of_images, check_unsupported, per_image
from .components import RealCustomComponents
from .config import MaskSource
from .execution import device_lock
from .generation import Generation
from .reference_image import ReferenceImage
from .request import Request, ResolvedRequest, Subject, seed_variations
from .warm_up import WarmUpReport, warm_up


@dataclass
class RealCustomOutput(BaseOutput):
    """The output of `RealCustomPipeline`.

    Attributes:
        images: PIL images, or the requested `output_type`.
        masks: the final guidance masks of each image, fp32 [S, h, w] in [0, 1]; None without subjects.
        seeds: the seed of each image; None for an image drawn from a caller's generator.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    masks: list[Tensor | None]
    seeds: list[int | None]


class RealCustomPipeline(RealCustomComponents):
    """Text-to-image pipeline in which subjects replace real words of the prompt (RealCustom++).

    `__call__` generates images as a diffusers pipeline does. `prepare`, `step` and `decode` are its parts, for callers
    that advance several generations together; `run` is the loop over them. See `RealCustomComponents` for the
    constructor.
    """

    # ---- prepare, step, decode: the parts of a generation --------------------------------------------------------

    @torch.no_grad()
    def prepare(
        self,
        request: Request | ResolvedRequest,
        *,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        masks: Tensor | None = None,
        scheduler=None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        image_index: int = 0,
    ) -> Generation:
        """Encode texts and references, draw the noise and copy the scheduler.

        Args:
            request: unset settings of a `Request` are taken from `sampling`.
            generator: draws the noise in place of the request's seed.
            latents: initial noise [channels, h, w] at latent resolution, in place of drawing it.
            masks: guidance masks [S, h, w] in [0, 1] in place of those of the guidance branch.
            scheduler: used in place of the pipeline's; it is copied.
            timesteps, sigmas: a custom schedule of `num_inference_steps` entries, if the scheduler supports it.
            eta: amount of noise that DDIM and TCD add, in [0, 1].
            image_index: number of the image among those that share `generator`.
        Returns:
            A generation ready for its first step.
        Raises:
            ValueError: the size is not a multiple of the VAE's scale factor, a target phrase is beyond the text
                encoder's limit, the request has subjects but no adapter is loaded, the latents or masks are invalid, or
                the scheduler does not support a custom schedule or `eta`.
        """
        if isinstance(request, Request):
            request = request.resolve(self.sampling)
        factor = self.vae_scale_factor
        for name in ("height", "width"):
            if getattr(request, name) % factor:
                raise ValueError(f"{name} is {getattr(request, name)} px; it must be a multiple of {factor} px.")
        device = self.execution_device  # read once per image and not in every step, because it walks all modules
        scheduler = copy.deepcopy(scheduler if scheduler is not None else self.scheduler)
        check_eta(eta, scheduler)
        # On the CPU, so that steps do not wait for a GPU to read a timestep.
        retrieve_timesteps(scheduler, request.num_inference_steps, "cpu", timesteps, sigmas)
        generator = generator or torch.Generator("cpu").manual_seed(request.seed)
        shape = (self.unet.config.in_channels, request.height // factor, request.width // factor)
        if latents is None:
            latents = torch.randn(shape, generator=generator, device=generator.device)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {list(latents.shape)} per image; this size needs {list(shape)}.")
        sample: Tensor = latents.to(device, torch.float32) * scheduler.init_noise_sigma
        if hasattr(scheduler, "noise_sampler"):
            # SDE solvers do not read the generator's state: the noise follows `noise_sampler_seed` (DPM++ SDE) or the
            # generator's initial seed (Cosine DPM++).
            noise_seed = (generator.initial_seed() + image_index) % 2**64
            generator = torch.Generator("cpu").manual_seed(noise_seed)
            scheduler.noise_sampler_seed = noise_seed
        with device_lock.shared(), torch.autocast(device.type, enabled=False):
            self.discard_outdated()
            conditioning = self.conditioner.encode(
                request, self.text_encoders, self.vision_encoders, self.adapter, self.denoiser.dtype
            )
        generation = Generation(
            request=request,
            latents=sample,
            scheduler=scheduler,
            generator=generator,
            eta=eta,
            text=conditioning.text,
            negative_text=conditioning.negative_text,
            references=conditioning.references,
            negative_references=conditioning.negative_references,
            target_tokens=conditioning.target_tokens.to(device),
            time_ids=self._time_ids(request).to(device),
        )
        if masks is not None:
            _check_masks(masks, len(request.subjects))
            generation.set_masks(masks.to(device, torch.float32))
            generation.masks_fixed = True
        return generation

    def _time_ids(self, request: ResolvedRequest) -> Tensor:
        """Original size, top-left crop corner and target size, for an uncropped image."""
        size = (request.height, request.width)
        if self.realcustom_config.method.time_ids == "width_first":
            size = size[::-1]
        return torch.tensor([*size, 0, 0, *size], dtype=torch.float32)

    def step(self, generations: Sequence[Generation]) -> None:
        """Advance every generation by one step; see `Denoiser.step`."""
        self.denoiser.step(generations)

    def run(self, generations: Sequence[Generation], on_step: Callable[[], bool] = lambda: False) -> None:
        """Advance generations of any sizes until all are done. Those of one size step together.

        Args:
            on_step: called after each step; the loop ends early if it returns True.
        """
        while active := [g for g in generations if not g.done]:
            for size in dict.fromkeys(g.size for g in active):
                self.step([g for g in active if g.size == size])
            if on_step():
                break

    @torch.no_grad()
    def decode(self, generations: Sequence[Generation]) -> list[Image.Image]:
        """Decode generations to images one by one, so that an image does not depend on its batch."""
        with device_lock.shared():
            return [self.decoder.decode(self.final_latents(g)) for g in generations]

    def final_latents(self, generation: Generation) -> Tensor:
        """The latents [channels, h, w] that `decode` decodes; see `MethodConfig.final_latents`."""
        estimate = self.realcustom_config.method.final_latents == "clean_estimate"
        if estimate and generation.done:
            assert generation.predicted_clean is not None
            return generation.predicted_clean
        return generation.latents

    @torch.no_grad()
    def preview(self, generations: Sequence[Generation]) -> list[Image.Image]:
        """Render previews of the current estimates of the final images (see `LatentPreview`)."""
        estimates = [g.latents if g.predicted_clean is None else g.predicted_clean for g in generations]
        with device_lock.shared():
            return [self.latent_preview.decode(latents) for latents in estimates]

    def warm_up(self, sizes: Sequence[tuple[int, int]] = (), batch_sizes: Sequence[int] = (1,)) -> WarmUpReport:
        """Compile programs and capture CUDA graphs, so that the first request is not delayed and a broken model fails
        early.

        Args:
            sizes: (height, width) in px to prepare for; empty for the default size.
            batch_sizes: numbers of images that will step together. CUDA graphs are captured for each of them.
        """
        return warm_up(self, sizes, batch_sizes, compiled=self._compiled)

    # ---- the diffusers-style call ------------------------------------------------------------------------------

    @property
    def _guidance_scale(self) -> float:
        """The guidance scale of the current call, for callbacks, which may set it."""
        return self._call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._call_state.guidance_scale = scale

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current call, for callbacks."""
        return self._call_state.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current call, for callbacks."""
        return self._call_state.num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        subjects: Subject | Sequence[Subject] = (),
        image: Image.Image | ReferenceImage | None = None,
        target_phrase: str | None = None,
        scope_ratio: float | None = None,
        negative_prompt: str | None = "",
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
        latents: Tensor | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["RealCustomPipeline", int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **unsupported: Any,
    ) -> RealCustomOutput | tuple:
        """Generate images; see `Request` for the settings and their ranges.

        Args:
            prompt: text of the images.
            subjects: references and their target phrases, or one `Subject`. A single subject may be given by `image`,
                `target_phrase` and `scope_ratio` instead.
            seed: image i uses seed + i.
            num_images_per_prompt: images generated together.
            generator: draws the noise in place of the seed; a list has one generator per image.
            latents: initial noise [N, channels, h, w] at latent resolution, in place of drawing it.
            timesteps, sigmas: a custom schedule, if the scheduler supports it; its length is the number of steps.
            eta: amount of noise that DDIM and TCD add, in [0, 1]; None is 0, as in diffusers.
            output_type: "pil", "np" [N, H, W, 3], "pt" [N, 3, H, W], or "latent" for undecoded latents
                [N, channels, h, w].
            callback_on_step_end: called with the pipeline, step index, timestep and {"latents": [N, ...]} after
                every step; latents it returns replace the current ones. As in diffusers, it may set
                `pipe._guidance_scale` for the next steps, and `pipe._interrupt = True` ends the loop.
            return_dict: False returns the tuple (images, masks, seeds).
        Returns:
            A `RealCustomOutput`, or the tuple.
        Raises:
            ValueError: a setting out of range, or an argument of other diffusers pipelines that is not supported.
            TypeError: an unknown argument.
        """
        check_unsupported(unsupported)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if isinstance(subjects, Subject):
            subjects = (subjects,)
        if image is not None or target_phrase is not None:
            if image is None or target_phrase is None or subjects:
                raise ValueError("give either image and target_phrase together, or a list of subjects.")
            subjects = (Subject(image=image, target_phrase=target_phrase, scope_ratio=scope_ratio),)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; it must be 'pil', 'np', 'pt' or 'latent'.")
        check_number_of_images(num_images_per_prompt)
        if timesteps is not None or sigmas is not None:
            num_inference_steps = len(timesteps if timesteps is not None else sigmas or ())
        if latents is not None and len(latents) != num_images_per_prompt:
            raise ValueError(f"latents has {len(latents)} entries; give one per image ({num_images_per_prompt}).")
        self._interrupt = False
        request = Request(
            prompt=prompt,
            subjects=subjects,  # pyright: ignore[reportArgumentType]
            negative_prompt=negative_prompt or "",
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            early_stop_step=early_stop_step,
            guidance_scale=guidance_scale,
            mask_source=mask_source,
            mask_interval=mask_interval,
            seed=seed,
        ).resolve(self.sampling)
        generators = per_image(generator, num_images_per_prompt)
        generations = [
            self.prepare(
                variation,
                generator=generators[i],
                latents=None if latents is None else latents[i],
                timesteps=timesteps,
                sigmas=sigmas,
                eta=0.0 if eta is None else eta,
                image_index=i if isinstance(generator, torch.Generator) else 0,
            )
            for i, variation in enumerate(seed_variations(request, num_images_per_prompt))
        ]
        first = generations[0]
        progress_bar: Any = self.progress_bar  # its type is hidden by a decorator of diffusers
        with progress_bar(total=first.num_steps) as bar:

            def on_step() -> bool:
                if callback_on_step_end is not None:
                    call_back(callback_on_step_end, self, self._call_state, generations)
                bar.update()
                return self._interrupt

            self.run(generations, on_step)
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
            return torch.stack([self.final_latents(g) for g in generations])
        images = [self.decoder.decode(self.final_latents(g), output_type) for g in generations]
        return torch.stack(images) if output_type == "pt" else np.stack(images)


def _check_masks(masks: Tensor, num_subjects: int) -> None:
    """Raise ValueError unless masks are finite floats [num_subjects, h, w] in [0, 1]."""
    if masks.ndim != 3 or len(masks) != num_subjects:
        raise ValueError(f"masks has shape {list(masks.shape)}; it must be [{num_subjects}, h, w], one per subject.")
    if not masks.is_floating_point() and masks.dtype != torch.bool:
        raise ValueError(f"masks has type {masks.dtype}; convert it to floats in [0, 1], for example masks / 255.")
    if not bool(((masks >= 0) & (masks <= 1)).all()):  # false for NaN
        raise ValueError("masks must be finite values in [0, 1]; 0 excludes a position, 1 includes it fully.")
