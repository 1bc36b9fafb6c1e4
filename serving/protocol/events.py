"""What a caller hears about an image under way: its place in line, its progress, its result."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Queued:
    """Waiting; `position` images are ahead of this one (0: next)."""

    position: int


@dataclass(frozen=True)
class Progress:
    """`step` of `num_steps` steps are done. `preview` is the current estimate of the image, when one was made;
    `masks` are then the guidance masks in force, mode "L", one per subject, of the image's size."""

    step: int
    num_steps: int
    preview: Image.Image | None = None
    masks: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Result:
    """The finished image, its final guidance masks (mode "L", one per subject) and the seed that repeats it."""

    image: Image.Image
    masks: tuple[Image.Image, ...]
    seed: int


Event = Queued | Progress | Result
