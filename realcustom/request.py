"""Request and Subject: the input of a caller. ResolvedRequest: the same with every setting filled in.

They are checked on construction and shared by all interfaces (Python, HTTP, Ray, demo).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import TypeVar, get_args

from PIL import Image

from .config import MaskSource, SamplingDefaults
from .reference_image import ReferenceImage
from .words import find_phrase, is_encodable, shorten

MAX_SEED = 2**63 - 1
MAX_INTEGER = 2**31 - 1  # of sizes and numbers of steps


@dataclass(frozen=True, kw_only=True, init=False)
class Subject:
    """A reference image and the real words of the prompt that its subject replaces.

    Args:
        image: any PIL image, or a normalized `ReferenceImage`.
        target_phrase: whole words of the prompt; case is ignored.
        scope_ratio: γ_scope, the fraction of positions the subject may influence, in (0, 1]; None takes the model's
            default.
    Raises:
        ValueError: not an image, an empty image or phrase, a ratio outside (0, 1].
    """

    image: ReferenceImage
    target_phrase: str
    scope_ratio: float | None = None

    def __init__(
        self, *, image: Image.Image | ReferenceImage, target_phrase: str, scope_ratio: float | None = None
    ) -> None:
        if not isinstance(image, ReferenceImage):
            image = ReferenceImage.from_pil(image)
        if not isinstance(target_phrase, str) or not target_phrase.strip():
            raise ValueError("target_phrase is empty; name the word of the prompt that the subject becomes.")
        if scope_ratio is not None:
            _check_number("scope_ratio", scope_ratio)
            if not 0 < scope_ratio <= 1:
                raise ValueError(f"scope_ratio is {scope_ratio}; it must be in (0, 1], for example 0.25.")
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "target_phrase", target_phrase)
        object.__setattr__(self, "scope_ratio", scope_ratio)


@dataclass(frozen=True, kw_only=True)
class ResolvedSubject:
    """A subject with its γ_scope; see `Subject`."""

    image: ReferenceImage
    target_phrase: str
    scope_ratio: float


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with every setting filled in, created once at the entry point by `Request.resolve`.

    The attributes are those of `Request`, with T_stop as a number of steps.
    """

    prompt: str
    subjects: tuple[ResolvedSubject, ...]
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    early_stop_step: int
    guidance_scale: float
    mask_source: MaskSource
    mask_interval: int
    seed: int

    def __post_init__(self) -> None:
        assert 1 <= self.early_stop_step <= self.num_inference_steps, self


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to generate. One2One, One2Many and Many2Many differ only in `subjects`.

    A setting of None takes the default of the loaded model; a seed of None is drawn at random.

    Attributes:
        prompt: text of the image.
        subjects: several may share one image (One2Many) or have different ones (Many2Many); without subjects the
            request is plain text-to-image.
        negative_prompt: text of the unconditional row of Eq. 17.
        height, width: pixels, multiples of the VAE's scale factor (8).
        num_inference_steps: denoising steps, at least 1.
        early_stop_step: T_stop (Sec. 3.3.1): a number of steps (at least 1) or a fraction of them (float in (0, 1]).
            The type decides: 1 is one step, 1.0 is all steps.
        guidance_scale: ω of Eq. 17, at least 1; 1 runs no unconditional row. 0 means the same as 1, because the model
            cards of distilled checkpoints use it to disable guidance.
        mask_source: "guidance_branch" is the paper's method: up to T_stop, each step has a text-only row from whose
            attention the mask is computed. "generation_branch" approximates it without that row: the mask is computed
            from the text attention of the image's own row in the previous step. Only the first step runs the guidance
            branch.
        mask_interval: k, at least 1: up to T_stop, every k-th step has a new mask; more than 1 is an approximation.
        seed: in [0, 2**63); the same seed gives the same image, alone or in any batch.
    Raises:
        ValueError: a value out of range, or a target phrase that does not occur in the prompt.
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
        if not isinstance(self.subjects, Iterable):
            raise ValueError(f"subjects is {_show(self.subjects)}; give a list of Subject objects.")
        object.__setattr__(self, "subjects", tuple(self.subjects))
        self._convert_numbers()
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, not {type(getattr(self, name)).__name__}.")
            if not is_encodable(getattr(self, name)):
                raise ValueError(
                    f"{name} is {shorten(getattr(self, name))}, which contains half of a surrogate pair; remove it."
                )
        if not self.prompt.strip():
            raise ValueError("prompt is empty; describe the image, for example 'a dog on the beach'.")
        for name in ("height", "width", "num_inference_steps", "mask_interval"):
            _check_integer(name, getattr(self, name), minimum=1)
        if self.mask_source not in (None, *get_args(MaskSource)):
            choices = ", ".join(map(repr, get_args(MaskSource)))
            raise ValueError(f"mask_source is {_show(self.mask_source)}; it must be one of {choices}.")
        _check_integer("seed", self.seed, minimum=0, maximum=MAX_SEED)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale)
            if self.guidance_scale == 0:
                object.__setattr__(self, "guidance_scale", 1.0)
            elif self.guidance_scale < 1:
                raise ValueError(
                    f"guidance_scale is {self.guidance_scale}; it must be at least 1, or 0 or 1 for no guidance."
                )
        self._check_early_stop()
        self._check_subjects()

    def _convert_numbers(self) -> None:
        """Replace numbers of other types, such as NumPy's, by int and float."""
        for name, value in vars(self).items():
            if isinstance(value, Integral) and not isinstance(value, int):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, Real) and not isinstance(value, int | float):
                object.__setattr__(self, name, float(value))

    def _check_early_stop(self) -> None:
        stop = self.early_stop_step
        if stop is None:
            return
        if isinstance(stop, float) and not stop.is_integer():
            if not 0 < stop < 1:
                raise ValueError(
                    f"early_stop_step is {stop}; give a whole number of steps (at least 1) or a fraction in (0, 1]."
                )
        elif not isinstance(stop, float):
            _check_integer("early_stop_step", stop, minimum=1)
        elif stop < 1:
            raise ValueError(f"early_stop_step is {stop}; give at least 1 step or a fraction in (0, 1].")

    def _check_subjects(self) -> None:
        spans: list[tuple[int, int, str]] = []
        for subject in self.subjects:
            if not isinstance(subject, Subject):
                raise ValueError(f"subjects must contain Subject objects, not {type(subject).__name__}.")
            phrase = subject.target_phrase
            spans += [(start, end, phrase) for start, end in find_phrase(self.prompt, phrase)]
        spans.sort()  # then only neighbors can overlap
        for (_, end, phrase), (start, _, other) in pairwise(spans):
            if start < end:
                raise ValueError(
                    f"target_phrase {shorten(other)} overlaps with {shorten(phrase)}; give each subject its own words."
                )

    def with_seed(self) -> Request:
        """Return the request itself if it has a seed, otherwise a copy with a random one.

        A request that may be retried needs a seed, so that every attempt generates the same image.
        """
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    def resolve(self, defaults: SamplingDefaults) -> ResolvedRequest:
        """Fill in every unset setting: the model's defaults, T_stop as a number of steps, a random seed."""
        steps = self.num_inference_steps or defaults.num_inference_steps
        seed = self.with_seed().seed
        assert seed is not None
        return ResolvedRequest(
            prompt=self.prompt,
            subjects=tuple(
                ResolvedSubject(
                    image=s.image,
                    target_phrase=s.target_phrase,
                    scope_ratio=defaults.scope_ratio if s.scope_ratio is None else s.scope_ratio,
                )
                for s in self.subjects
            ),
            negative_prompt=self.negative_prompt,
            height=self.height or defaults.height,
            width=self.width or defaults.width,
            num_inference_steps=steps,
            early_stop_step=self._resolve_early_stop(steps, defaults),
            guidance_scale=defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            mask_source=self.mask_source or defaults.mask_source,
            mask_interval=self.mask_interval or defaults.mask_interval,
            seed=seed,
        )

    def _resolve_early_stop(self, steps: int, defaults: SamplingDefaults) -> int:
        stop = self.early_stop_step
        if stop is None:  # the default scales with the number of steps, so that T_stop keeps its proportion
            stop = steps * defaults.early_stop_step / defaults.num_inference_steps
        elif isinstance(stop, float) and stop <= 1:
            stop = stop * steps
        return min(steps, max(1, math.floor(stop + 0.5)))


R = TypeVar("R", Request, ResolvedRequest)


def seed_variations(request: R, number: int) -> list[R]:
    """`number` requests that differ only in the seed: seed, seed + 1, ..."""
    assert request.seed is not None, "draw the seed first, see Request.with_seed"
    return [replace(request, seed=(request.seed + i) % (MAX_SEED + 1)) for i in range(number)]


def _check_integer(name: str, value: object, *, minimum: int, maximum: int = MAX_INTEGER) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {_show(value)}; it must be a whole number.")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} is {_show(value)}; it must be in [{minimum}, {maximum}].")


def _check_number(name: str, value: object) -> None:
    try:
        valid = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an int beyond the range of float
        valid = False
    if not valid:
        raise ValueError(f"{name} is {_show(value)}; it must be a finite number.")


def _show(value: object) -> str:
    """The repr of a value for an error message, cut after 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print an int of more than 4300 digits
        return "too large"
    return text if len(text) <= 100 else f"{text[:100]}…"
