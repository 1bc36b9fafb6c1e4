"""The types of the training data: a source yields records, the mixture makes samples of them.

Legend: H, W size of the bucket; S reference size; all in px.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample.

    Attributes:
        image: the target image, resized and cropped to the bucket of its step, uint8 [H, W, 3].
        caption: its text.
        target_phrase: the words of the caption that name the subject.
        reference: the reference image after the curriculum's crop (Eq. 12-13), uint8 [S, S, 3].
        original_size: height and width of the image before resizing (SDXL's size condition).
        crop: top and left of the crop in the resized image (SDXL's crop condition).
        key: "source:record".
        other_view: whether the reference is another view of the subject instead of the target image (Eq. 10-11).
        flipped: whether image and reference are mirrored.
        content: hash of the target image's content and of the reference's, for precomputed features; None if unknown.
        reference_box: left, top, right, bottom of the reference's crop as fractions of its sides.
        extras: further arrays of a source, transformed like the image: "inside", uint8 [H, W], is 1 inside the boxes of
            the reference's subjects.
        skipped: key and reason of the broken records that were drawn before this one.
    """

    image: np.ndarray
    caption: str
    target_phrase: str
    reference: np.ndarray
    original_size: Size
    crop: tuple[int, int]
    key: str
    other_view: bool = False
    flipped: bool = False
    content: tuple[str, str] | None = None
    reference_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a source stores: RGB images at their own size, before resizing, cropping and flipping.

    Attributes:
        image, reference: the target image, and the image of its subject; the same object if there is no other view.
        caption, target_phrase, key, content: see `Sample`.
        may_flip: whether image and caption keep their meaning when mirrored.
        masks: single-channel images of the size of `image`, transformed like it.
        skipped: key and reason of broken views that were drawn before the reference.
    """

    image: Image.Image
    reference: Image.Image
    caption: str
    target_phrase: str
    key: str
    content: tuple[str, str] | None = None
    may_flip: bool = False
    masks: Mapping[str, Image.Image] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()


class BrokenRecord(Exception):
    """A record that cannot be used. Training skips it and counts it.

    Args:
        reason: one of `REASONS`.
        key: "source:record".
        detail: what exactly was found.
    """

    def __init__(self, reason: str, key: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, key, detail)
        self.reason, self.key, self.detail = reason, key, detail

    def __str__(self) -> str:
        return f"{self.key} {self.reason}" + (f" ({self.detail})" if self.detail else "")


REASONS = {
    "captionless": "no caption, or an empty one",
    "bad caption": "the caption is not valid UTF-8 or JSON, or its target_phrase does not occur in it",
    "broken image": "the image cannot be decoded",
    "truncated": "the file ends before the image or the record is complete",
    "changed": "the image is not the one that was indexed",
    "tiny": "the image is smaller than the source's minimum side",
    "huge": "the image has more pixels than the source's limit",
    "gray": "the image has a single color",
    "no other view": "the instance has no second usable image",
    "no image": "a caption without an image",
    "duplicate key": "the shard contains the key twice; the first record is used",
    "unsafe name": "an absolute name or one with '..'",
    "link": "a link, a device, a pipe or a sparse file; links are never followed",
    "unreadable": "no permission to read the file or folder",
    "bad shard": "the file is not an uncompressed tar archive, or is damaged; the records before the damage are used",
}


class Source(Protocol):
    """A numbered set of records.

    Attributes:
        name: prefix of the keys.
        sizes: height and width of each usable record, [N, 2]; None for an unlimited set of square records.
        shows_views: whether `load` can return another view of the subject as the reference.
        shows_originals: whether the source also takes part when the reference is the target image itself.
        fingerprint: hash of the records and their order; a run can be resumed exactly only with the same one.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> np.ndarray | None: ...

    @property
    def shows_views(self) -> bool: ...

    @property
    def shows_originals(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    def load(self, number: int, other_view: bool, rng: np.random.Generator) -> Record:
        """The record of a number in [0, N).

        Args:
            number: of the record.
            other_view: the reference is another view of the subject, not the target image.
            rng: chooses the view.
        Raises:
            BrokenRecord: the record cannot be used.
        """
        ...
