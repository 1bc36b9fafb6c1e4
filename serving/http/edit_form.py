"""The form fields of `POST /v1/images/edits`, OpenAI's and additional ones, and their conversion to a `Request`."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from realcustom.config import MaskSource
from realcustom.reference_image import ReferenceImage
from realcustom.request import MAX_SEED, Request, ResolvedRequest, Subject
from realcustom.words import shorten

from ..protocol.errors import DeadlineExceeded, InvalidRequest, TooLarge
from ..protocol.image_codec import decode_image, read_header
from ..protocol.limits import Limits
from ..protocol.model_info import ModelInfo

FILE_FIELDS = ("image", "image[]")
JSON_BYTES_PER_CHAR = 12  # at most: a surrogate pair, both halves escaped
MAX_SIDES = {"webp": 16_383, "jpeg": 65_500}  # of the encoders, in pixels
SUBJECT_CHARS = 200  # of the JSON of a subject, without its phrase
PLACEHOLDER = ReferenceImage(np.zeros((1, 1, 3), dtype=np.uint8))


def _number(value: Any) -> Any:
    """Text as a number: "12" as an int (steps), "0.5" as a float (a fraction); anything else unchanged."""
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            try:
                return float(value)
            except ValueError:
                return value
    return value


class SubjectField(BaseModel):
    """One entry of `subjects`."""

    model_config = ConfigDict(extra="forbid")

    target_phrase: str
    image: int | None = Field(default=None, description="index of the uploaded file; default: the index of this entry")
    scope_ratio: float | None = None


@dataclass(frozen=True)
class SubjectEntry:
    """A subject whose `image` is the index of an uploaded file."""

    target_phrase: str
    image: int
    scope_ratio: float | None


class EditForm(BaseModel):
    """A prompt and reference images. Each subject replaces its target phrase, whole words of the prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="text of the image", examples=["a dog on the beach"])
    image: list[UploadFile] = Field(
        [], description="reference images of the subjects; without any, plain text-to-image"
    )
    image_list: list[UploadFile] = Field(
        default=[], alias="image[]", description="`image`, as OpenAI's clients send lists"
    )
    subjects: str | None = Field(
        default=None, description='full form, JSON: [{"target_phrase": "dog", "image": 0, "scope_ratio": 0.2}, ...]'
    )
    target_phrase: list[str] = Field(
        [], description="short form: one phrase per image, or several phrases for one image"
    )
    scope_ratio: list[float] = Field(
        [], description="with `target_phrase`: one value for all subjects, or one per subject; in (0, 1]"
    )
    target_phrase_list: list[str] = Field(
        default=[], alias="target_phrase[]", description="as OpenAI's clients send lists"
    )
    scope_ratio_list: list[float] = Field(
        default=[], alias="scope_ratio[]", description="as OpenAI's clients send lists"
    )
    negative_prompt: str = ""
    n: int = Field(default=1, ge=1, description="number of images, with the seeds seed, seed + 1, ...")
    size: str | None = Field(
        default=None, description='"<width>x<height>" in pixels, or "auto"', examples=["1024x1024"]
    )
    num_inference_steps: int | None = Field(default=None, ge=1)
    early_stop_step: Annotated[int | float | None, BeforeValidator(_number)] = Field(
        default=None, description="T_stop: a number of steps, or a fraction of the steps"
    )
    guidance_scale: float | None = Field(default=None, description="at least 1; 0 or 1 disables guidance")
    mask_source: MaskSource | None = Field(
        default=None, description='"guidance_branch" is exact; "generation_branch" is faster and approximate'
    )
    mask_interval: int | None = Field(
        default=None, ge=1, description="compute the mask in every k-th step up to T_stop; more than 1 is approximate"
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    model: str | None = Field(default=None, description="id of the loaded model")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=100, description="with `stream`: number of previews per image")
    previews: bool = Field(
        default=False, description="with `stream`: a preview every few steps instead of `partial_images`"
    )
    progress: bool = Field(default=False, description="with `stream`: events for queue position and step count")
    timeout_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="deadline in seconds, after which the response is 504"
    )
    user: str | None = Field(default=None, description="accepted for OpenAI's clients, not used")
    quality: Literal["auto"] | None = Field(default=None, description="accepted for OpenAI's clients, not used")
    background: Literal["auto", "opaque"] | None = Field(
        default=None, description="accepted for OpenAI's clients, not used"
    )

    def resolve(self, info: ModelInfo) -> tuple[ResolvedRequest, list[SubjectEntry]]:
        """Return the request of all `n` images, which differ only in the seed, with placeholders in place of images.

        Raises:
            InvalidRequest: the message names the first invalid field.
        """
        self._check_lengths(info.limits)
        if self.model is not None and self.model != info.id:
            raise InvalidRequest(f"model {shorten(self.model)} is not loaded; omit it or use {info.id!r}.")
        if self.n > info.limits.max_images:
            raise InvalidRequest(
                f"n is {cut(self.n)}; this server accepts at most {info.limits.max_images} images per request."
            )
        files = self._files
        entries = self._entries(len(files))
        info.limits.check_num_subjects(len(entries))
        for entry in entries:
            info.limits.check_text("target_phrase", entry.target_phrase)
        request = self._request(entries).resolve(info.sampling)
        info.limits.check(request, num_images=self.n)
        max_side = MAX_SIDES.get(self.output_format)
        if max_side is not None and max(request.height, request.width) > max_side:
            raise InvalidRequest(
                f"the size is {request.width}x{request.height}; {self.output_format} images have at most {max_side} px "
                "per side. Request a smaller size, or the output_format png."
            )
        return request, entries

    async def count_pixels(self, limits: Limits) -> int:
        """Pixels of all files, read from their headers in a thread.

        Raises:
            InvalidRequest: a file is not an image, or the images have too many bytes or pixels.
        """
        return await asyncio.to_thread(_count_pixels, self._files, limits)

    async def with_images(
        self, request: ResolvedRequest, entries: Sequence[SubjectEntry], limits: Limits, deadline: float
    ) -> ResolvedRequest:
        """Return the request with its images, which are decoded in a thread.

        Raises:
            InvalidRequest: an image is damaged.
            DeadlineExceeded: the images were not decoded before `deadline` (`time.monotonic()`).
        """
        decoding = asyncio.to_thread(_decode, self._files, limits)
        try:
            images = await asyncio.wait_for(decoding, max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise DeadlineExceeded("the images were not decoded in time; request a longer timeout_s.") from None
        subjects = [
            replace(subject, image=images[entry.image])
            for subject, entry in zip(request.subjects, entries, strict=True)
        ]
        return replace(request, subjects=tuple(subjects))

    @property
    def _files(self) -> list[UploadFile]:
        return [*self.image, *self.image_list]

    def _check_lengths(self, limits: Limits) -> None:
        """Check the lengths of texts before any code that takes time proportional to them."""
        limits.check_text("prompt", self.prompt)
        limits.check_text("negative_prompt", self.negative_prompt)
        if self.subjects is not None:
            # All phrases occur in the prompt and do not overlap there
            max_chars = JSON_BYTES_PER_CHAR * limits.max_prompt_chars + SUBJECT_CHARS * limits.max_subjects
            limits.check_text("the JSON of subjects", self.subjects, max_chars)

    def _request(self, entries: list[SubjectEntry]) -> Request:
        """The request, with a placeholder in place of each image."""
        width, height = self._size()
        try:
            return Request(
                prompt=self.prompt,
                subjects=tuple(
                    Subject(image=PLACEHOLDER, target_phrase=entry.target_phrase, scope_ratio=entry.scope_ratio)
                    for entry in entries
                ),
                negative_prompt=self.negative_prompt,
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                early_stop_step=self.early_stop_step,
                guidance_scale=self.guidance_scale,
                mask_source=self.mask_source,
                mask_interval=self.mask_interval,
                seed=self.seed,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def _size(self) -> tuple[int | None, int | None]:
        """(width, height); None takes the model's defaults."""
        if self.size is None or self.size == "auto":
            return None, None
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", self.size)
        if not match:
            raise InvalidRequest(
                f"size is {shorten(self.size)}; give <width>x<height>, for example '1024x1024', or 'auto'."
            )
        return int(match[1]), int(match[2])

    def _entries(self, num_files: int) -> list[SubjectEntry]:
        """The subjects, checked: each one refers to an uploaded file, and each file is used."""
        phrases = [*self.target_phrase, *self.target_phrase_list]
        scopes = [*self.scope_ratio, *self.scope_ratio_list]
        if self.subjects is None:
            entries = _short_form(phrases, scopes, num_files)
        elif phrases or scopes:
            raise InvalidRequest("subjects excludes target_phrase and scope_ratio; send one form, not both.")
        else:
            entries = _full_form(self.subjects)
        for position, entry in enumerate(entries):
            if not 0 <= entry.image < num_files:
                raise InvalidRequest(
                    f"subject {position} ({shorten(entry.target_phrase)}) refers to image {cut(entry.image)}, but the "
                    f"request has {num_files} images, counted from 0."
                )
        if unused := sorted(set(range(num_files)) - {entry.image for entry in entries}):
            raise InvalidRequest(
                f"image {unused[0]} has no subject; name the word of the prompt that it replaces in target_phrase."
            )
        return entries


def _full_form(subjects: str) -> list[SubjectEntry]:
    """The field `subjects`, a JSON list."""
    try:
        items = json.loads(subjects)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"subjects is not JSON: {error}.") from None
    if not isinstance(items, list):
        raise InvalidRequest('subjects must be a JSON list, for example [{"target_phrase": "dog", "image": 0}].')
    try:
        fields = [SubjectField.model_validate(item) for item in items]
    except ValidationError as error:
        raise InvalidRequest(f"subjects: {sentence(error.errors())}") from None
    return [
        SubjectEntry(field.target_phrase, position if field.image is None else field.image, field.scope_ratio)
        for position, field in enumerate(fields)
    ]


def _short_form(phrases: list[str], scopes: list[float], num_files: int) -> list[SubjectEntry]:
    """The fields `target_phrase` and `scope_ratio`: phrase i belongs to image i, or all phrases to the only image."""
    if num_files > 1 and len(phrases) != num_files:
        raise InvalidRequest(
            f"the request has {num_files} images and {len(phrases)} target_phrase fields; send one phrase per image."
        )
    if len(scopes) not in (0, 1, len(phrases)):
        raise InvalidRequest(
            f"the request has {len(scopes)} scope_ratio fields for {len(phrases)} subjects; send one for all, or one "
            "per subject."
        )
    ratios = scopes * len(phrases) if len(scopes) == 1 else scopes or [None] * len(phrases)
    return [
        SubjectEntry(phrase, 0 if num_files == 1 else position, ratio)
        for position, (phrase, ratio) in enumerate(zip(phrases, ratios, strict=True))
    ]


def _names(files: Sequence[UploadFile]) -> list[str]:
    return [f"image {i} ({shorten(file.filename or '')})" for i, file in enumerate(files)]


def _count_pixels(files: Sequence[UploadFile], limits: Limits) -> int:
    """Pixels of all files, after their headers have been checked against the limits."""
    headers = [read_header(file.file, limits, name) for file, name in zip(files, _names(files), strict=True)]
    if (total := sum(header.width * header.height for header in headers)) > limits.max_reference_pixels_total:
        raise TooLarge(
            f"the images have {total} pixels in total; this server accepts at most "
            f"{limits.max_reference_pixels_total}. Send smaller images."
        )
    return total


def _decode(files: Sequence[UploadFile], limits: Limits) -> list[ReferenceImage]:
    return [decode_image(file.file, limits, name) for file, name in zip(files, _names(files), strict=True)]


def sentence(errors: Sequence[Any]) -> str:
    """The first error of pydantic's list as a sentence."""
    error = errors[0]
    where = [cut(part) for part in error["loc"] if part != "body"]
    name = cut(".".join(where)) or "the request"
    if error["type"] == "missing":
        return f"{name} is missing."
    if error["type"] == "extra_forbidden":
        return f"{name} is not a known field; /docs lists the fields."
    if where and where[0] in FILE_FIELDS:
        return f"{name} is not a file; upload an image as a file with a name."
    value = error.get("input")
    shown = f" is {cut(repr(value))}" if isinstance(value, str | int | float) else ""
    return f"{name}{shown}: {error['msg'][0].lower()}{error['msg'][1:]}."


def cut(value: object) -> str:
    """The text of a value, truncated to 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
