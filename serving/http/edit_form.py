"""The fields of `POST /v1/images/edits` (OpenAI's shape, and ours beside it) -> Request."""

import asyncio
import json
import re
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from realcustom.config import MaskSource
from realcustom.reference_image import ReferenceImage
from realcustom.request import MAX_SEED, Request, Subject

from ..protocol.errors import InvalidRequest
from ..protocol.image_codec import decode_image
from ..protocol.limits import Limits


def _number(value: Any) -> Any:
    """ "12" -> 12 whole steps, "0.5" -> the fraction 0.5; anything else is left for the type to refuse."""
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
    image: int | None = Field(None, description="index of the uploaded file; default: the entry's own position")
    scope_ratio: float | None = None


class EditForm(BaseModel):
    """A prompt and images of subjects; each subject becomes its target phrase, real words of the prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="text of the image", examples=["a dog on the beach"])
    image: list[UploadFile] = Field([], description="images of the subjects; none makes plain text-to-image")
    image_list: list[UploadFile] = Field([], alias="image[]", description="`image`, as the OpenAI clients send lists")
    subjects: str | None = Field(
        None, description='JSON: [{"target_phrase": "dog", "image": 0, "scope_ratio": 0.2}, ...]; the full form'
    )
    target_phrase: list[str] = Field([], description="the short form: one phrase per image, or several for one")
    scope_ratio: list[float] = Field([], description="with `target_phrase`: one for all, or one each; in (0, 1]")
    target_phrase_list: list[str] = Field([], alias="target_phrase[]", description="as the OpenAI clients send lists")
    scope_ratio_list: list[float] = Field([], alias="scope_ratio[]", description="as the OpenAI clients send lists")
    negative_prompt: str = ""
    n: int = Field(1, ge=1, description="images, with seeds seed, seed + 1, ...")
    size: str | None = Field(None, description='"<width>x<height>" in pixels, or "auto"', examples=["1024x1024"])
    num_inference_steps: int | None = Field(None, ge=1)
    early_stop_step: Annotated[int | float | None, BeforeValidator(_number)] = Field(
        None, description="T_stop: whole steps, or a fraction of the steps"
    )
    guidance_scale: float | None = None
    mask_source: MaskSource | None = Field(
        None, description='"guidance_branch" is exact; "generation_branch" is faster and approximate'
    )
    mask_interval: int | None = Field(
        None, ge=1, description="a new mask at every k-th step; more than 1 is approximate"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    model: str | None = Field(None, description="id of the loaded model")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=100, description="with `stream`: previews of each image")
    previews: bool = Field(False, description="with `stream`: a preview every few steps, in place of partial_images")
    progress: bool = Field(False, description="with `stream`: also place in line and step count, as events")
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds after which the request is given up with 504"
    )
    user: str | None = Field(None, description="accepted for OpenAI clients; not used")
    quality: Literal["auto"] | None = Field(None, description="accepted for OpenAI clients; only auto")
    background: Literal["auto", "opaque"] | None = Field(None, description="accepted for OpenAI clients")

    async def to_request(self, limits: Limits, model_id: str) -> Request:
        """The request of all `n` images, which differ in the seed.

        Raises:
            InvalidRequest: a sentence about the first thing that is wrong.
        """
        if self.model not in (None, model_id):
            raise InvalidRequest(f"model {self.model!r} is not loaded here; leave it out or use {model_id!r}.")
        if self.n > limits.max_images:
            raise InvalidRequest(f"n is {self.n}; this server makes at most {limits.max_images} images per request.")
        files = [*self.image, *self.image_list]
        entries = self._entries(len(files))
        if len(entries) > limits.max_subjects:
            raise InvalidRequest(f"there are {len(entries)} subjects; this server takes at most {limits.max_subjects}.")
        images = [await _read(file, limits, f"image {i} ({file.filename!r})") for i, file in enumerate(files)]
        width, height = self._size()
        try:
            request = Request(
                prompt=self.prompt,
                subjects=tuple(
                    Subject(image=images[e.image], target_phrase=e.target_phrase, scope_ratio=e.scope_ratio)
                    for e in entries
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
        return request

    def _size(self) -> tuple[int | None, int | None]:
        if self.size in (None, "auto"):
            return None, None
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", self.size)
        if not match:
            raise InvalidRequest(f"size is {self.size!r}; give <width>x<height>, for example '1024x1024', or 'auto'.")
        return int(match[1]), int(match[2])

    def _entries(self, num_files: int) -> list[SubjectField]:
        """The subjects, each with the index of an existing file; every file is used."""
        phrases = [*self.target_phrase, *self.target_phrase_list]
        scopes = [*self.scope_ratio, *self.scope_ratio_list]
        if self.subjects is not None and (phrases or scopes):
            raise InvalidRequest("give subjects, or target_phrase and scope_ratio; not both.")
        entries = _short_form(phrases, scopes, num_files) if self.subjects is None else self._full_form()
        for position, entry in enumerate(entries):
            if entry.image is None:
                entry.image = position
            if not 0 <= entry.image < num_files:
                raise InvalidRequest(
                    f"subject {position} ({entry.target_phrase!r}) asks for image {entry.image}; "
                    f"{num_files} images were sent, counted from 0."
                )
        if unused := sorted(set(range(num_files)) - {entry.image for entry in entries}):
            raise InvalidRequest(
                f"image {unused[0]} belongs to no subject; say with target_phrase which word of the prompt it becomes."
            )
        return entries

    def _full_form(self) -> list[SubjectField]:
        try:
            items = json.loads(self.subjects)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"subjects is not JSON: {error}.") from None
        if not isinstance(items, list):
            raise InvalidRequest('subjects must be a JSON list, for example [{"target_phrase": "dog", "image": 0}].')
        try:
            return [SubjectField.model_validate(item) for item in items]
        except ValidationError as error:
            raise InvalidRequest(f"subjects: {sentence(error.errors())}") from None


def _short_form(phrases: list[str], scopes: list[float], num_files: int) -> list[SubjectField]:
    if num_files > 1 and len(phrases) != num_files:
        raise InvalidRequest(
            f"{num_files} images and {len(phrases)} target_phrase fields were sent; give one phrase per image."
        )
    if len(scopes) not in (0, 1, len(phrases)):
        raise InvalidRequest(
            f"{len(scopes)} scope_ratio fields for {len(phrases)} subjects; give one for all or one each."
        )
    scopes = scopes * len(phrases) if len(scopes) == 1 else scopes or [None] * len(phrases)
    return [
        SubjectField(target_phrase=phrase, image=0 if num_files == 1 else i, scope_ratio=scope)
        for i, (phrase, scope) in enumerate(zip(phrases, scopes, strict=True))
    ]


async def _read(file: UploadFile, limits: Limits, name: str) -> ReferenceImage:
    data = await file.read(limits.max_image_bytes + 1)
    return await asyncio.to_thread(decode_image, data, limits, name)


def sentence(errors: list[dict[str, Any]]) -> str:
    """The first of pydantic's errors as a sentence."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    name = ".".join(where) or "the request"
    if error["type"] == "missing":
        return f"{name} is missing."
    if error["type"] == "extra_forbidden":
        return f"{name} is not a known field; see /docs for those there are."
    value = error.get("input")
    shown = f" is {value!r:.80}" if isinstance(value, str | int | float) else ""
    return f"{name}{shown}: {error['msg'][0].lower()}{error['msg'][1:]}."
