"""StepTimeModel: seconds of a step, fitted to measured steps. The only model of time in a replica.

    seconds = calls * per_call + row_pixels * (per_row_pixel + pixels * per_row_pixel_squared)

A step has one UNet call, or two while an image of the group still computes masks (the guidance branch). `pixels` is the
number of pixels of an image, and `row_pixels` this number times the number of rows of both calls. `per_call` dominates
where the host launches kernels more slowly than the device runs them (small images, large GPUs); `per_row_pixel`
dominates where one image keeps the device busy (large images, CPUs); `per_row_pixel_squared` is self-attention, which
dominates in very large images. Batch size (`plan.py`), backlog, autoscaling, Retry-After and the time after which a
step counts as hung follow from these numbers.
"""

import itertools
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from realcustom.request import ResolvedRequest

NUM_REMEMBERED = 256  # steps; older ones are discarded, so that the model adapts when the speed of the device changes
REFIT_EVERY = 8  # steps; the first steps are all fitted
SMALLEST_SINGULAR_VALUE = 0.01  # relative to the largest; below it, the parts cannot be distinguished


@dataclass(frozen=True)
class RemainingWork:
    """Remaining work of an image in plain numbers, so that plans can be computed without the model.

    Attributes:
        pixels: height * width.
        rows: rows of the generation branch per step: 2 with classifier-free guidance, else 1.
        num_steps: denoising steps left.
        num_guided_steps: how many of these, up to and including the last step that runs the guidance branch.
        guided_share: fraction of the guided steps that run the guidance branch; below 1 with a mask interval.
    """

    pixels: int
    rows: int
    num_steps: int
    num_guided_steps: int
    guided_share: float = 1.0

    @classmethod
    def of(cls, request: ResolvedRequest, step_index: int, num_steps: int) -> "RemainingWork":
        """Work left of an image that has done `step_index` of its `num_steps` UNet steps."""
        last_guided = 0
        if request.subjects:
            last_guided = 1 if request.mask_source == "generation_branch" else min(request.early_stop_step, num_steps)
        return cls(
            pixels=request.height * request.width,
            rows=2 if request.guidance_scale > 1 else 1,
            num_steps=max(1, num_steps - step_index),
            num_guided_steps=max(0, last_guided - step_index),
            guided_share=1 / request.mask_interval if request.mask_source == "guidance_branch" else 1.0,
        )


class StepCost(NamedTuple):
    """Seconds per UNet call, per row and pixel of a call, and per row and squared number of pixels."""

    per_call: float
    per_row_pixel: float
    per_row_pixel_squared: float = 0.0

    def per_row(self, pixels: float) -> float:
        """Seconds of a row of an image with this number of pixels."""
        return pixels * (self.per_row_pixel + pixels * self.per_row_pixel_squared)

    def seconds(self, calls: float, row_pixels: float, pixels: float) -> float:
        return calls * self.per_call + row_pixels / pixels * self.per_row(pixels)


class StepKind(NamedTuple):
    """A kind of step: number of UNet calls, rows times pixels, pixels per image."""

    calls: int
    row_pixels: float
    pixels: float


class StepTimeModel:
    """Fits a `StepCost` to measured steps.

    The fit is robust: it takes the median of equal steps and minimizes relative errors, so a step that took 100 times
    as long counts as one wrong step. All parts are at least 0. While the measured steps cannot distinguish the parts
    (only one kind of step so far), the time is shared equally between them. The quadratic part needs two image sizes.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[StepKind, float]] = deque(maxlen=NUM_REMEMBERED)
        self._cost: StepCost | None = None
        self._num_unfitted = 0

    def add(self, calls: int, row_pixels: float, seconds: float, pixels: float) -> None:
        """Record a step of `calls` UNet calls that took `seconds`."""
        assert calls >= 1 and row_pixels >= pixels > 0, (calls, row_pixels, pixels)
        self._steps.append((StepKind(calls, row_pixels, pixels), max(seconds, 1e-9)))
        self._num_unfitted += 1

    @property
    def cost(self) -> StepCost | None:
        """The fitted cost; None before the first measurement."""
        if self._num_unfitted >= min(REFIT_EVERY, len(self._steps) - self._num_unfitted + 1):
            self._cost, self._num_unfitted = _fit(self._times()), 0
        return self._cost

    def seconds(self, calls: float, row_pixels: float, pixels: float) -> float | None:
        """Predicted seconds of a step, also of a size never measured; None before the first measurement."""
        return None if self.cost is None else self.cost.seconds(calls, row_pixels, pixels)

    def upper_bound(self, calls: int, row_pixels: float, pixels: float) -> float | None:
        """Seconds that a step does not exceed on the device as measured; None before the first measurement.

        A step of a size never measured takes at most as long as a measured one times the ratios of calls, of rows and,
        because of self-attention, of the squared numbers of pixels, as far as these are above 1.
        """

        def bound(step: StepKind, seconds: float) -> float:
            rows = (row_pixels / pixels) / (step.row_pixels / step.pixels)
            return seconds * max(1, calls / step.calls) * max(1, rows) * max(1, pixels / step.pixels) ** 2

        times = self._times().items()
        return min((bound(step, statistics.median(seconds)) for step, seconds in times), default=None)

    def _times(self) -> dict[StepKind, list[float]]:
        """Measured seconds of each kind of step."""
        times: dict[StepKind, list[float]] = {}
        for step, seconds in self._steps:
            times.setdefault(step, []).append(seconds)
        return times


def _fit(times: Mapping[StepKind, list[float]]) -> StepCost:
    """Least squares of relative errors over the median time of each kind of step, weighted by how often it occurred.

    Of the fits without a negative part, the best one with the most parts is taken.
    """
    work = np.array([(s.calls, s.row_pixels, s.row_pixels * s.pixels) for s in times], dtype=np.float64)  # [kinds, 3]
    seconds = np.array([statistics.median(values) for values in times.values()])
    weight = np.sqrt([len(values) for values in times.values()])
    unit = work.mean(axis=0)  # columns of equal size, so that the minimum-norm solution shares the time equally
    rows = work / unit / seconds[:, None] * weight[:, None]
    num_parts = 3 if len({step.pixels for step in times}) > 1 else 2
    best, lowest = np.zeros(3), np.inf
    for number in range(num_parts, 0, -1):
        for parts in map(list, itertools.combinations(range(num_parts), number)):
            solution = np.linalg.lstsq(rows[:, parts], weight, rcond=SMALLEST_SINGULAR_VALUE)[0]
            error = float(np.square(rows[:, parts] @ solution - weight).sum())
            if (solution >= 0).all() and error < lowest:
                best, lowest = np.zeros(3), error
                best[parts] = solution
        if lowest < np.inf:  # a single part is never negative
            break
    per_call, per_row_pixel, per_row_pixel_squared = best / unit
    return StepCost(float(per_call), float(per_row_pixel), float(per_row_pixel_squared))
