"""How far batching pays, learned from the steps as they are made.

A step takes about fixed + work / rate seconds. Where the fixed part is large (small images on a large GPU) all
images should step together. Where the device is busy with one image already (large images, or a CPU) a larger
group only makes everybody late: two images one after the other are finished at 1 and 2, side by side both at 2.
"""

import statistics
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

ENOUGH = 0.95  # of the work per second that the largest group would do
KEPT_WORKS, KEPT_SECONDS = 64, 9  # different amounts of work remembered, and last times of each
LOOK_AGAIN = 32  # every so many groups all step together, so that what was learned stays true


class StepTimeModel:
    """Seconds of a step against its work, in any unit that grows with rows and positions."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[float, deque[float]] = OrderedDict()
        self._asked = 0

    def add(self, work: float, seconds: float) -> None:
        """A step that did `work` took `seconds`."""
        self._seconds.setdefault(work, deque(maxlen=KEPT_SECONDS)).append(seconds)
        self._seconds.move_to_end(work)
        if len(self._seconds) > KEPT_WORKS:
            self._seconds.popitem(last=False)

    def efficient_batch_size(self, works: Sequence[float]) -> int:
        """How many of these images, the first ones, should step together; all, as long as little is known.

        Args:
            works: of a step of each image, in the order in which they should be finished.
        """
        self._asked += 1
        if len(self._seconds) < 2 or self._asked % LOOK_AGAIN == 0:
            return len(works)
        fixed, per_work = self._fit()
        speeds = [work / (fixed + per_work * work) for work in np.cumsum(works)]
        return next(number for number, speed in enumerate(speeds, 1) if speed >= ENOUGH * speeds[-1])

    def _fit(self) -> tuple[float, float]:
        """Least squares over the median of every amount of work; neither part is negative."""
        work = np.array(list(self._seconds))
        seconds = np.array([statistics.median(times) for times in self._seconds.values()])
        per_work, fixed = np.polyfit(work, seconds, 1)
        if per_work <= 0:
            return float(seconds.mean()), 0.0
        return max(0.0, float(fixed)), float(per_work)
