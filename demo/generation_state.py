"""State of the images that one click on "Generate" requests, updated from the server's events."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from PIL import Image

from serving.clients import Client, Event, Progress, Queued, Request, seed_variations
from serving.clients.merge import merge_streams

HEARTBEAT_S = 1.0  # the page is updated at least this often: Gradio detects a closed tab only when it sends an update


@dataclass
class ImageState:
    """State of one image.

    Attributes:
        position: number of images ahead in the queue; None once the image is in progress.
        step, num_steps: completed and total denoising steps; `num_steps` is 0 before the first progress event.
        image: latest preview, or the result.
        masks: guidance masks of `image`, mode "L", one per subject.
        seed: seed of the result; None until the image is done.
    """

    position: int | None = None
    step: int = 0
    num_steps: int = 0
    image: Image.Image | None = None
    masks: tuple[Image.Image, ...] = ()
    seed: int | None = None

    def apply(self, event: Event) -> None:
        if isinstance(event, Queued):
            self.position = event.position
        elif isinstance(event, Progress):
            self.position, self.step, self.num_steps = None, event.step, event.num_steps
            if event.preview is not None:
                self.image, self.masks = event.preview, event.masks
        else:
            self.position, self.step = None, self.num_steps
            self.image, self.masks, self.seed = event.image, event.masks, event.seed


@dataclass
class GenerationState:
    """State of all images of one click."""

    images: list[ImageState] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(image.seed is not None for image in self.images)

    @property
    def fraction(self) -> float:
        """Completed fraction of all steps, in [0, 1]."""
        if self.done:
            return 1.0
        return sum(image.step / image.num_steps for image in self.images if image.num_steps) / len(self.images)

    def status(self) -> str:
        """One line of text."""
        if self.done:
            seeds = [str(image.seed) for image in self.images]
            return f"Done. Seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}."
        active = [image for image in self.images if image.num_steps]
        if active:  # the average; images of one click run together
            step, num_steps = sum(image.step for image in active), sum(image.num_steps for image in active)
            return f"Step {step // len(active)} of {num_steps // len(active)}"
        positions = [image.position for image in self.images if image.position is not None]
        if not positions:
            return "Starting…"
        if min(positions) == 0:
            return "Queued: yours is next."
        return f"Queued: {min(positions)} image{'s' if min(positions) > 1 else ''} ahead of yours."


async def generate_images(client: Client, request: Request, num_images: int) -> AsyncGenerator[GenerationState, None]:
    """Request `num_images` images with consecutive seeds at the same time.

    Yields the same state object whenever it has changed, and at least every `HEARTBEAT_S` seconds; events that arrive
    together are one update. Closing the generator cancels all images.
    """
    state = GenerationState([ImageState() for _ in range(num_images)])
    requests = seed_variations(request.with_seed(), num_images)
    streams = [client.stream(request, previews=True) for request in requests]
    async with aclosing(merge_streams(streams, heartbeat_s=HEARTBEAT_S)) as batches:
        async for batch in batches:
            for index, event in batch:
                state.images[index].apply(event)
            yield state
            if state.done:
                return
