"""The curriculum of RealCustom++ (Sec. 3.2.2): references change from the target image itself to other views and sizes.

Pure functions of `progress` = S_cur / S_total in [0, 1].
"""

import math

R_MIN, R_MAX = 1.0, math.sqrt(10)


def multiview_probability(progress: float) -> float:
    """Probability that the reference is another view of the subject instead of the target image (Eq. 10, 11)."""
    return min(1.0, max(0.0, progress))


def resize_ratio(progress: float, draw: float, r_min: float = R_MIN, r_max: float = R_MAX) -> float:
    """Resize ratio from U(r_min, r_cur) (Eq. 12, 13); `draw` is uniform in [0, 1)."""
    r_cur = r_min + (r_max - r_min) * min(1.0, max(0.0, progress))
    return r_min + (r_cur - r_min) * draw
