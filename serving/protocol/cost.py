"""What an image costs, in one unit for limits, queues and autoscaling, and how fast a replica pays it off."""

import math

from realcustom.request import ResolvedRequest

MEGAPIXEL = 2**20
MEMORY_S = 10.0  # the measured rate forgets with this time constant


def image_cost(request: ResolvedRequest) -> float:
    """Megapixels x steps x (1 + subjects): the text row, and one visual attention per subject.

    An image of 1024 x 1024 px with one subject in 25 steps costs 50.
    """
    return request.height * request.width / MEGAPIXEL * request.num_inference_steps * (1 + len(request.subjects))


class Rate:
    """Cost per second of stepping, measured; recent steps weigh most. None before the first."""

    def __init__(self) -> None:
        self._cost = self._seconds = 0.0

    def add(self, cost: float, seconds: float) -> None:
        keep = math.exp(-seconds / MEMORY_S)
        self._cost = self._cost * keep + cost
        self._seconds = self._seconds * keep + seconds

    @property
    def per_second(self) -> float | None:
        return self._cost / self._seconds if self._seconds > 0 else None

    def seconds(self, cost: float) -> float:
        """How long `cost` will take; 0 as long as nothing has been measured."""
        return cost / self.per_second if self.per_second else 0.0
