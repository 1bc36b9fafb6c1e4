"""Limits: upper bounds on one request, checked once, on the resolved request."""

from pydantic import BaseModel, ConfigDict, Field

from realcustom.request import ResolvedRequest
from realcustom.words import is_encodable, shorten

from .cost import image_cost
from .errors import InvalidRequest


class Limits(BaseModel):
    """Upper bounds on one request.

    Attributes:
        max_subjects: subjects per image.
        max_images: images per HTTP request (`n`).
        max_pixels: width x height of an image.
        min_side: shortest side of an image in pixels; below it, the deepest feature map is empty.
        max_steps: denoising steps.
        max_guidance_scale: guidance scale; far beyond usual values, images overflow.
        max_cost: megapixels x steps x (1 + subjects), summed over the images of a request (see `cost.image_cost`).
        max_timeout_s: default and longest deadline of a request, in seconds.
        max_prompt_chars: characters of the prompt, of the negative prompt, and of each target phrase.
        max_image_bytes: bytes of an uploaded file.
        max_reference_pixels: width x height of an uploaded image, checked before it is decoded.
        max_reference_pixels_total: the same, summed over the uploaded images of a request.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_subjects: int = Field(default=8, ge=1)
    max_images: int = Field(default=8, ge=1)
    max_pixels: int = Field(default=2048 * 2048, ge=64)
    min_side: int = Field(default=64, ge=8)
    max_steps: int = Field(default=200, ge=1)
    max_guidance_scale: float = Field(default=100, ge=1)
    max_cost: float = Field(default=2000, gt=0)
    max_timeout_s: float = Field(default=600, gt=0)
    max_prompt_chars: int = Field(default=2000, ge=1)
    max_image_bytes: int = Field(default=20 * 2**20, ge=1024)
    max_reference_pixels: int = Field(default=24_000_000, ge=1024)
    max_reference_pixels_total: int = Field(default=48_000_000, ge=1024)

    def check(self, request: ResolvedRequest, num_images: int = 1) -> None:
        """Raise `InvalidRequest` if `num_images` images of this request exceed a limit."""
        height, width = request.height, request.width
        self.check_num_subjects(len(request.subjects))
        if height * width > self.max_pixels:
            raise InvalidRequest(
                f"the size {width}x{height} has {height * width} pixels; this server accepts at most {self.max_pixels}."
            )
        if min(height, width) < self.min_side:
            raise InvalidRequest(f"the size is {width}x{height}; each side must be at least {self.min_side} px.")
        if request.num_inference_steps > self.max_steps:
            raise InvalidRequest(
                f"num_inference_steps is {request.num_inference_steps}; this server runs at most {self.max_steps}."
            )
        if request.guidance_scale > self.max_guidance_scale:
            raise InvalidRequest(
                f"guidance_scale is {request.guidance_scale:.4g}; this server accepts at most "
                f"{self.max_guidance_scale:.4g}."
            )
        if (cost := num_images * image_cost(request)) > self.max_cost:
            raise InvalidRequest(
                f"the request costs {cost:.4g} (megapixels x steps x (1 + subjects) x images); this server accepts at "
                f"most {self.max_cost:.4g}. Request fewer images or steps, or a smaller size."
            )
        self.check_text("prompt", request.prompt)
        self.check_text("negative_prompt", request.negative_prompt)

    def check_text(self, name: str, text: str, max_chars: int | None = None) -> None:
        """Raise `InvalidRequest` if a text has more than `max_chars` characters (default: `max_prompt_chars`), or half
        of a surrogate pair."""
        max_chars = max_chars or self.max_prompt_chars
        if len(text) > max_chars:
            raise InvalidRequest(f"{name} has {len(text)} characters; this server accepts at most {max_chars}.")
        if not is_encodable(text):
            raise InvalidRequest(f"{name} is {shorten(text)}, which contains half of a surrogate pair; remove it.")

    def check_num_subjects(self, num_subjects: int) -> None:
        """Raise `InvalidRequest` if a request has too many subjects."""
        if num_subjects > self.max_subjects:
            raise InvalidRequest(
                f"the request has {num_subjects} subjects; this server accepts at most {self.max_subjects}."
            )

    def timeout_s(self, requested_s: float | None) -> float:
        """Deadline in seconds of a request with the timeout `requested_s`."""
        return self.max_timeout_s if requested_s is None else min(requested_s, self.max_timeout_s)
