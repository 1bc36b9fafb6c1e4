"""Request and Subject: what a person asks for, checked at construction; the schema behind every door."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from PIL import Image, ImageOps

from .config import MaskSource, SamplingDefaults
from .words import find_phrase

MAX_SEED = 2**63 - 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as 8-bit RGB, upright: EXIF rotation applied, transparency laid on white, 16 bits scaled to 8."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"a subject's image must be a PIL picture, not {type(image).__name__}.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, integers or floats to 8 bits: scaled by the range of their kind, then clipped."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F" and values.max(initial=0) <= 1:
        top = 1.0
    elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
        top = 65535.0
    else:
        top = 255.0
    return Image.fromarray((values * (255 / top)).clip(0, 255).round().astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One subject: a picture and the real word(s) of the prompt that it becomes.

    Attributes:
        image: any PIL picture; kept as upright 8-bit RGB.
        target_phrase: whole words of the prompt, in any case.
        scope_ratio: γ_scope, fraction of positions it may influence, in (0, 1]; None takes the model's default.
    Raises:
        ValueError: not a picture, an empty picture or phrase, a ratio outside (0, 1].
    """

    image: Image.Image
    target_phrase: str
    scope_ratio: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", to_rgb(self.image))
        if min(self.image.size) < 1:
            raise ValueError(f"the subject's image is {self.image.size[0]}x{self.image.size[1]}; it has no pixels.")
        if not isinstance(self.target_phrase, str) or not self.target_phrase.strip():
            raise ValueError("target_phrase is empty; name the word of the prompt that the subject becomes.")
        if self.scope_ratio is not None:
            _check_number("scope_ratio", self.scope_ratio)
            if not 0 < self.scope_ratio <= 1:
                raise ValueError(f"scope_ratio is {self.scope_ratio}; it must lie in (0, 1], for example 0.25.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make. One2One, One2Many and Many2Many differ in `subjects` alone.

    Attributes:
        prompt: text of the picture.
        subjects: several may share one image (One2Many) or bring their own (Many2Many); none is plain text-to-image.
        negative_prompt: text of the unconditional row of Eq. 17.
        height, width: pixels, multiples of the model's grid (8).
        num_inference_steps: denoising steps, at least 1.
        early_stop_step: T_stop: a step count (int, at least 1) or a fraction of the steps (float in (0, 1]).
        guidance_scale: ω of Eq. 17, at least 1; 1 runs no unconditional row.
        mask_source: "guidance_branch" is the paper's method: up to T_stop every step has a text-only row whose
            attention becomes the mask. "generation_branch" is an approximation without that row: the mask comes from
            the text attention of the picture's own row in the step before; only the first step runs the other branch.
        mask_interval: a new mask at every k-th step up to T_stop, at least 1; more than 1 is an approximation, too.
        seed: in [0, 2**63); the same seed gives the same picture, alone or in any batch.
        None takes the loaded model's default; a missing seed is drawn.
    Raises:
        ValueError: a value out of range, or a target phrase that the prompt does not contain.
    """

    prompt: str
    subjects: tuple[Subject, ...] = ()
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    early_stop_step: int | float | None = None
    guidance_scale: float | None = None
    mask_source: MaskSource | None = None
    mask_interval: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", tuple(self.subjects))
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, not {type(getattr(self, name)).__name__}.")
        if not self.prompt.strip():
            raise ValueError("prompt is empty; describe the picture, for example 'a dog on the beach'.")
        for name in ("height", "width", "num_inference_steps", "mask_interval"):
            _check_integer(name, getattr(self, name), minimum=1)
        if self.mask_source not in (None, *get_args(MaskSource)):
            raise ValueError(
                f"mask_source is {self.mask_source!r}; it must be one of {', '.join(map(repr, get_args(MaskSource)))}."
            )
        _check_integer("seed", self.seed, minimum=0, maximum=MAX_SEED)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale)
            if self.guidance_scale < 1:
                raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be at least 1 (1 is no guidance).")
        self._check_early_stop()
        self._check_subjects()

    def _check_early_stop(self) -> None:
        stop = self.early_stop_step
        if stop is None:
            return
        if isinstance(stop, float) and not stop.is_integer():
            if not 0 < stop < 1:
                raise ValueError(
                    f"early_stop_step is {stop}; give whole steps (at least 1) or a fraction of the steps in (0, 1]."
                )
        elif not isinstance(stop, float):
            _check_integer("early_stop_step", stop, minimum=1)
        elif stop < 1:
            raise ValueError(f"early_stop_step is {stop}; give at least 1 step or a fraction in (0, 1].")

    def _check_subjects(self) -> None:
        taken: dict[tuple[int, int], str] = {}
        for subject in self.subjects:
            if not isinstance(subject, Subject):
                raise ValueError(f"subjects must hold Subject objects, not {type(subject).__name__}.")
            for span in find_phrase(self.prompt, subject.target_phrase):
                for (start, end), other in taken.items():
                    if span[0] < end and start < span[1]:
                        raise ValueError(
                            f"target_phrase {subject.target_phrase!r} overlaps with {other!r}; "
                            "give each subject words of its own."
                        )
                taken[span] = subject.target_phrase

    def with_defaults(self, defaults: SamplingDefaults) -> Request:
        """Every None replaced: by the model's defaults, T_stop by whole steps, a missing seed by a random one."""
        steps = self.num_inference_steps or defaults.num_inference_steps
        return replace(
            self,
            subjects=tuple(
                replace(s, scope_ratio=s.scope_ratio if s.scope_ratio is not None else defaults.scope_ratio)
                for s in self.subjects
            ),
            height=self.height or defaults.height,
            width=self.width or defaults.width,
            num_inference_steps=steps,
            early_stop_step=self._whole_early_stop(steps, defaults),
            guidance_scale=self.guidance_scale if self.guidance_scale is not None else defaults.guidance_scale,
            mask_source=self.mask_source or defaults.mask_source,
            mask_interval=self.mask_interval or defaults.mask_interval,
            seed=self.seed if self.seed is not None else secrets.randbelow(2**32),
        )

    def variations(self, number: int) -> list[Request]:
        """`number` requests that differ in the seed alone: seed, seed + 1, ... (needs a seed)."""
        assert self.seed is not None
        return [replace(self, seed=(self.seed + i) % (MAX_SEED + 1)) for i in range(number)]

    def _whole_early_stop(self, steps: int, defaults: SamplingDefaults) -> int:
        stop = self.early_stop_step
        if stop is None:  # the default scales with the steps, so that few-step sampling keeps its proportion
            stop = steps * defaults.early_stop_step / defaults.num_inference_steps
        elif isinstance(stop, float) and stop <= 1:
            stop = stop * steps
        return min(steps, max(1, math.floor(stop + 0.5)))


def _check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    if value < minimum or (maximum is not None and value > maximum):
        limit = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{name} is {value}; it must be {limit}.")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
