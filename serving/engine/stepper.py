"""One step of several images, and what becomes of them when it fails: as if it had not been tried, then in halves.

A step that fails for a group may succeed for its parts: memory may suffice for half of it, and a fault that one image
brings along must not reach its neighbors. Only an image that fails alone is told so.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..protocol.errors import Unavailable
from .job import Job
from .memory import is_out_of_memory, release
from .observer import Observer

logger = logging.getLogger("ray.serve.realcustom")


class Checkpoint:
    """A generation as it was before a step. Tensors are replaced by steps, never written to, so references suffice;
    a scheduler's lists of earlier outputs are shifted in place and are copied."""

    def __init__(self, generation) -> None:
        self._generation = generation
        self._masks = generation.guidance_masks
        self._fields = {name: getattr(generation, name) for name in ("latents", "predicted_clean", "step_index")}
        self._scheduler = {k: list(v) if isinstance(v, list) else v for k, v in vars(generation.scheduler).items()}
        self._random = None if generation.generator is None else generation.generator.get_state()

    def restore(self) -> None:
        generation = self._generation
        for name, value in self._fields.items():
            setattr(generation, name, value)
        vars(generation.scheduler).clear()
        vars(generation.scheduler).update(self._scheduler)
        if self._random is not None:
            generation.generator.set_state(self._random)
        if self._masks is None:
            generation.guidance_masks = None
        else:
            generation.set_masks(self._masks)


def rows(generation) -> int:
    """Rows of the UNet's batch in the next step: with the text, without it, and for the mask."""
    return 1 + (generation.negative_text is not None) + generation.needs_guidance_branch


def work(generation) -> float:
    """What the time of the next step grows with: rows x pixels."""
    height, width = generation.size
    return rows(generation) * height * width


class Stepper:
    """Steps groups of images on one pipeline; used by one thread.

    Args:
        pipeline: `step` of `RealCustomPipeline`.
        synchronize: waits for the device after a step.
        observer: is told of steps that were made.
        out_of_memory: called when a group did not fit, before its halves are tried.
        made: called with the images of a step, the work it was, and its seconds.
    """

    def __init__(
        self,
        pipeline,
        *,
        synchronize: Callable[[], None],
        observer: Observer,
        out_of_memory: Callable[[], None],
        made: Callable[[Sequence[Job], float, float], None],
    ) -> None:
        self._pipeline, self._synchronize, self._observer = pipeline, synchronize, observer
        self._out_of_memory, self._made = out_of_memory, made

    def step(self, group: Sequence[Job]) -> dict[Job, Exception]:
        """Advance all of one size by one step. Returns whose step failed, and what to tell them."""
        generations = [job.generation for job in group]
        about: dict[str, Any] = {"request_ids": [job.request_id for job in group]}
        before = [Checkpoint(generation) for generation in generations]
        mask_rows = sum(g.needs_guidance_branch for g in generations)
        num_rows, amount = sum(map(rows, generations)), sum(map(work, generations))
        start = time.monotonic()
        try:
            self._pipeline.step(generations)
            self._synchronize()
        except Exception as error:
            full, name = is_out_of_memory(error), type(error).__name__
            logger.warning("a step of %d images failed", len(group), exc_info=None if full else error, extra=about)
        else:
            seconds = time.monotonic() - start
            logger.debug("step of %d images in %.3f s", len(group), seconds, extra=about)
            self._made(group, amount, seconds)
            self._observer.step(images=len(group), rows=num_rows, mask_rows=mask_rows, seconds=seconds)
            return {}
        # Outside the handler, so that the failed step's traceback does not hold its tensors.
        for checkpoint in before:
            checkpoint.restore()
        if full:
            release()
            self._out_of_memory()
        if len(group) == 1:
            why = "the server's memory did not suffice for the image" if full else f"a step of it failed ({name})"
            return {group[0]: Unavailable(f"the image was not finished: {why}; try again.")}
        middle = len(group) // 2
        return self.step(group[:middle]) | self.step(group[middle:])
