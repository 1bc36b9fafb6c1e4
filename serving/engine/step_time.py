"""StepTimeModel: seconds of a step, fitted to measured steps. The only model of time in a replica.

    seconds = calls * per_call + row_pixels * per_row_pixel

A step has one UNet call, or two while an image of the group still computes masks (the guidance branch). `row_pixels` is
the number of pixels per image times the number of rows of both calls. `per_call` dominates where the host launches
kernels more slowly than the device runs them (small images, large GPUs); `per_row_pixel` dominates where one image
keeps the device busy (large images, CPUs). Batch size (`plan.py`), backlog, autoscaling and Retry-After follow from
these two numbers.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from realcustom.request import ResolvedRequest

NUM_REMEMBERED = 256  # steps; older ones are discarded, so that the model adapts when the speed of the device changes
REFIT_EVERY = 8  # steps; the first steps are all fitted
SMALLEST_SINGULAR_VALUE = 0.01  # relative to the largest; below it, the two parts cannot be distinguished


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
    """Seconds per UNet call, and seconds per row and pixel of a call."""

    per_call: float
    per_row_pixel: float

    def seconds(self, calls: float, row_pixels: float) -> float:
        return calls * self.per_call + row_pixels * self.per_row_pixel


class StepTimeModel:
    """Fits a `StepCost` to measured steps.

    The fit is robust: it takes the median of equal steps and minimizes relative errors, so a step that took 100 times
    as long counts as one wrong step. Both parts are at least 0. While the measured steps cannot distinguish
    the two parts (only one kind of step so far), half of the time is assigned to each part.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=NUM_REMEMBERED)
        self._cost: StepCost | None = None
        self._num_unfitted = 0

    def add(self, calls: int, row_pixels: float, seconds: float) -> None:
        """Record a step of `calls` UNet calls that took `seconds`."""
        assert calls >= 1 and row_pixels > 0, (calls, row_pixels)
        self._steps.append((calls, row_pixels, max(seconds, 1e-9)))
        self._num_unfitted += 1

    @property
    def cost(self) -> StepCost | None:
        """The fitted cost; None before the first measurement."""
        if self._num_unfitted >= min(REFIT_EVERY, len(self._steps) - self._num_unfitted + 1):
            self._cost, self._num_unfitted = _fit(self._steps), 0
        return self._cost

    def seconds(self, calls: float, row_pixels: float) -> float | None:
        """Predicted seconds of a step, also of a size never measured; None before the first measurement."""
        return None if self.cost is None else self.cost.seconds(calls, row_pixels)


def _fit(steps: Iterable[tuple[int, float, float]]) -> StepCost:
    """Least squares of relative errors over the median time of each kind of step, weighted by how often it occurred."""
    times: dict[tuple[int, float], list[float]] = {}
    for calls, row_pixels, seconds in steps:
        times.setdefault((calls, row_pixels), []).append(seconds)
    work = np.array(list(times), dtype=np.float64)  # [kinds, 2]
    seconds = np.array([statistics.median(values) for values in times.values()])
    weight = np.sqrt([len(values) for values in times.values()])
    unit = work.mean(axis=0)  # columns of equal size, so that the minimum-norm solution shares the time equally
    rows = work / unit / seconds[:, None] * weight[:, None]
    solution = np.linalg.lstsq(rows, weight, rcond=SMALLEST_SINGULAR_VALUE)[0]
    if (solution < 0).any():
        only = int(solution.argmax())  # the other part is 0
        column = rows[:, only]
        solution = np.zeros(2)
        solution[only] = column @ weight / (column @ column)
    per_call, per_row_pixel = solution / unit
    return StepCost(float(per_call), float(per_row_pixel))
