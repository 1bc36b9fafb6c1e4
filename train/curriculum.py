"""The curriculum of RealCustom++ (Sec. 3.2.2): references change from the target image itself to other views and sizes.

Pure functions of the training step. S_cur is the number of steps done before, so that the first step is at S_cur = 0.
"""

import math
from dataclasses import dataclass

R_MIN, R_MAX = 1.0, math.sqrt(10)  # with sqrt(10), the smallest crop has 10% of the reference's area


def progress(step: int, total: int) -> float:
    """S_cur / S_total, limited to [0, 1]."""
    return min(1.0, max(0.0, step / total))


def other_view_probability(step: int, total: int) -> float:
    """P_multiview: probability that a sample's reference is another view of its subject (Eq. 10).

    With the remaining probability (Eq. 11), the reference is the target image itself.
    """
    return progress(step, total)


def resize_ratio_bounds(step: int, total: int, r_min: float = R_MIN, r_max: float = R_MAX) -> tuple[float, float]:
    """(r_min, r_cur): the interval of the resize ratio r ~ U(r_min, r_cur) (Eq. 12, 13).

    The reference is resized to r times the encoder's input size, and a random square of the input size is cropped.
    """
    return r_min, r_min + (r_max - r_min) * progress(step, total)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The curriculum of a run.

    Attributes:
        total_steps: S_total.
        first_step: S_cur at the run's first step; a run that continues another one starts where that one ended.
        r_min, r_max: bounds of the resize ratio (Eq. 12).
    """

    total_steps: int
    first_step: int = 0
    r_min: float = R_MIN
    r_max: float = R_MAX

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.first_step < 0:
            raise ValueError(
                f"curriculum has total_steps={self.total_steps} and first_step={self.first_step}; total_steps must be "
                "at least 1 and first_step at least 0."
            )
        if not 1 <= self.r_min <= self.r_max < math.inf:
            raise ValueError(
                f"curriculum has r_min={self.r_min} and r_max={self.r_max}; use finite 1 <= r_min <= r_max, because a "
                "crop cannot be larger than the reference."
            )

    def other_view_probability(self, step: int) -> float:
        """See `other_view_probability`; `step` counts from the start of this run."""
        return other_view_probability(self.first_step + step, self.total_steps)

    def resize_ratio_bounds(self, step: int) -> tuple[float, float]:
        """See `resize_ratio_bounds`; `step` counts from the start of this run."""
        return resize_ratio_bounds(self.first_step + step, self.total_steps, self.r_min, self.r_max)
