"""From what a visitor chose to events of the images under way. Only forwards; no model lives in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from PIL import Image

from serving.clients import Client, InvalidRequest, Progress, Queued, Request, Result, seed_variations

HEARTBEAT_S = 1.0  # an update at least this often: Gradio notices a closed tab only when it has something to send


@dataclass
class ImageState:
    """What is known of one image: its place in line, its steps, the latest view of it, and at last the result."""

    position: int | None = None
    step: int = 0
    num_steps: int = 0
    image: Image.Image | None = None
    masks: tuple[Image.Image, ...] = ()
    seed: int | None = None

    def apply(self, event: Queued | Progress | Result) -> None:
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
class ImagesState:
    """All images of one press of the button."""

    images: list[ImageState] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(p.seed is not None for p in self.images)

    @property
    def fraction(self) -> float:
        """Of all steps, how many are done, in [0, 1]; 0 before the number of steps is known."""
        return sum(p.step / p.num_steps for p in self.images if p.num_steps) / len(self.images)

    def status(self) -> str:
        if self.done:
            seeds = [str(p.seed) for p in self.images]
            return f"Done. Seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}."
        under_way = [p for p in self.images if p.num_steps]
        if under_way:
            step, steps = sum(p.step for p in under_way), sum(p.num_steps for p in under_way)
            return f"Step {step // len(under_way)} of {steps // len(under_way)}"
        places = [p.position for p in self.images if p.position is not None]
        if not places:
            return "Starting…"
        images = "image" if min(places) == 1 else "images"
        return f"Waiting in line: {min(places)} {images} before yours." if min(places) else "Next in line…"


async def generate_images(client: Client, request: Request, number: int) -> AsyncIterator[ImagesState]:
    """`number` images with consecutive seeds, made together; yields their state as it changes, and every second.

    Closing the iterator closes every stream, which frees the replica within a step.
    """
    request = request.with_seed()
    state = ImagesState([ImageState() for _ in range(number)])
    heard: asyncio.Queue = asyncio.Queue()

    async def follow(image: ImageState, own: Request) -> None:
        try:
            async with aclosing(client.stream(own, previews=True)) as events:
                async for event in events:
                    image.apply(event)
                    heard.put_nowait(None)
        except Exception as error:
            heard.put_nowait(error)

    async def beat() -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            heard.put_nowait(None)

    tasks = [asyncio.create_task(follow(p, r)) for p, r in zip(state.images, seed_variations(request, number))]
    tasks.append(asyncio.create_task(beat()))
    try:
        done = False
        while not done:
            # Not `wait_for`: before Python 3.12 it loses a cancellation that meets an event, and with it the Stop.
            if (error := await heard.get()) is not None:
                raise error
            while not heard.empty():  # several events at once are one update of the page
                if (error := heard.get_nowait()) is not None:
                    raise error
            done = state.done  # before yielding: what arrives while the page is updated must be told, too
            yield state
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def no_word_chosen(words: list[str]) -> InvalidRequest:
    offer = f": {', '.join(dict.fromkeys(words))}" if words else ""
    return InvalidRequest(f"Click the word of the prompt that the subject should become{offer}.")
