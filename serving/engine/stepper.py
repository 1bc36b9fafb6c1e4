"""Stepper: one step of several images. A failed step is undone and retried with each half of the images.

Memory may suffice for half of the images, and a fault in one image must not affect the others. Only an image whose step
fails alone ends with an error.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from realcustom.execution import GraphCaptureError
from realcustom.generation import Generation

from ..protocol.errors import Unavailable
from .device_clock import DeviceClock
from .job import Job
from .memory import is_out_of_memory, release
from .observer import Observer
from .step_time import StepKind

logger = logging.getLogger("ray.serve.realcustom")


class Checkpoint:
    """The state of a generation before a step. Tensors are not copied, because a step replaces them and never modifies
    them in place. A scheduler's lists of earlier outputs are modified in place, so they are copied."""

    def __init__(self, generation: Generation) -> None:
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
        if generation.generator is not None and self._random is not None:
            generation.generator.set_state(self._random)
        if self._masks is None:
            generation.guidance_masks = None
        else:
            generation.set_masks(self._masks)


def num_rows(generation: Generation) -> int:
    """Rows of the next step: conditional, unconditional (with classifier-free guidance), guidance branch."""
    return 1 + (generation.negative_text is not None) + generation.needs_guidance_branch


def step_kind(generations: Sequence[Generation]) -> StepKind:
    """The kind of the next step of images of one size."""
    height, width = generations[0].size
    rows = sum(map(num_rows, generations))
    guided = any(generation.needs_guidance_branch for generation in generations)
    return StepKind(1 + guided, rows * height * width, height * width)


class Stepper:
    """Steps groups of images on one pipeline; used by one thread.

    Args:
        pipeline: a `RealCustomPipeline`, or an object with its `step`.
        clock: times steps on the device.
        observer: receives the numbers of every successful step.
        on_out_of_memory: called when a group did not fit into memory, before its halves are retried.
        on_step: called after every successful step with its kind and seconds.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        clock: DeviceClock,
        observer: Observer,
        on_out_of_memory: Callable[[], None],
        on_step: Callable[[StepKind, float], None],
    ) -> None:
        self._pipeline, self._clock, self._observer = pipeline, clock, observer
        self._on_out_of_memory, self._on_step = on_out_of_memory, on_step

    def step(self, batch: Sequence[Job]) -> dict[Job, Exception]:
        """Advance images of one size by one step. Returns the images whose step failed, each with its error."""
        generations = [job.generation for job in batch if job.generation is not None]
        assert len(generations) == len(batch), "an image must be prepared before it steps"
        fields = {"request_ids": [job.request_id for job in batch]}
        checkpoints = [Checkpoint(generation) for generation in generations]
        rows, mask_rows = sum(map(num_rows, generations)), sum(g.needs_guidance_branch for g in generations)
        kind = step_kind(generations)

        def report(seconds: float) -> None:
            logger.debug("step of %d images in %.3f s", len(batch), seconds, extra=fields)
            self._on_step(kind, seconds)
            self._observer.step(images=len(batch), rows=rows, mask_rows=mask_rows, seconds=seconds)

        try:
            due = self._clock.time(lambda: self._pipeline.step(generations), report)
        except GraphCaptureError:
            raise  # the process cannot use the device any more: the step thread ends, and the replica is unhealthy
        except Exception as error:
            out_of_memory, name = is_out_of_memory(error), type(error).__name__
            exc_info = None if out_of_memory else error
            logger.warning("a step of %d images failed", len(batch), exc_info=exc_info, extra=fields)
        else:
            for report_step, seconds in due:
                report_step(seconds)
            return {}
        # Outside the handler, so that the failed step's traceback does not hold its tensors.
        for checkpoint in checkpoints:
            checkpoint.restore()
        if out_of_memory:
            release()
            self._on_out_of_memory()
        if len(batch) == 1:
            reason = "it did not fit into the server's memory" if out_of_memory else f"a step failed ({name})"
            return {batch[0]: Unavailable(f"the image was not finished: {reason}; try again.")}
        middle = len(batch) // 2
        return self.step(batch[:middle]) | self.step(batch[middle:])
