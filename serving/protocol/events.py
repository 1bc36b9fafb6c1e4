"""Events of one image: its position in the queue, its progress, its result."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from PIL import Image

from .errors import ServerError


@dataclass(frozen=True)
class Queued:
    """The image is waiting; `position` images are ahead of it (0: next)."""

    position: int


@dataclass(frozen=True)
class Progress:
    """`step` of `num_steps` denoising steps are done.

    Attributes:
        step, num_steps: the number of finished steps, and of all steps.
        preview: the current estimate of the image, if one was rendered at this step.
        masks: the current guidance masks if there is a preview: mode "L", one per subject, in the size of the image.
    """

    step: int
    num_steps: int
    preview: Image.Image | None = None
    masks: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Result:
    """The finished image.

    Attributes:
        image: the image.
        masks: its final guidance masks, mode "L", one per subject.
        seed: reproduces it.
        warnings: sentences about parts of the request that had no effect, such as a truncated prompt.
    """

    image: Image.Image
    masks: tuple[Image.Image, ...]
    seed: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """The replica is alive, but has no event. Sent from a replica to `HandleClient`, which does not pass it on."""


Event = Queued | Progress | Result
HEARTBEAT_S = 2.0  # seconds between two items from a replica to `HandleClient`, whatever the length of a step


async def result_of(events: AsyncGenerator[Event, None]) -> Result:
    """Read a stream to its result and close it.

    Raises:
        ServerError: the stream ended without a result.
    """
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return event
    raise ServerError("the server ended the stream without a result.")
