"""How many images should step together follows from how the time of a step grows."""

import numpy as np
import pytest

from serving.engine.step_time import ENOUGH, LOOK_AGAIN, StepTimeModel


def learnt(fixed_s: float, per_work_s: float, works=(2, 3, 6, 16), noise: float = 0.0) -> StepTimeModel:
    pace, draw = StepTimeModel(), np.random.default_rng(0)
    for work in works:
        for _ in range(5):
            pace.add(work, (fixed_s + per_work_s * work) * (1 + noise * draw.standard_normal()))
    return pace


@pytest.mark.parametrize("fixed_s", [0.0, 0.01, 0.03, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_smallest_group_that_gets_nearly_all_of_the_speed(fixed_s, noise):
    pace, works = learnt(fixed_s, 0.02, noise=noise), [2, 3, 2, 2, 3, 2, 3, 2]
    speed = lambda number: (total := sum(works[:number])) / (fixed_s + 0.02 * total)
    number = pace.efficient_batch_size(works)
    slack = 3 * noise
    assert speed(number) >= (ENOUGH - slack) * speed(8)
    assert number == 1 or speed(number - 1) < (ENOUGH + slack) * speed(8)


def test_all_step_together_until_enough_is_known():
    pace = StepTimeModel()
    assert pace.efficient_batch_size([1, 1, 1]) == 3
    pace.add(1, 0.5)
    assert pace.efficient_batch_size([1, 1, 1]) == 3


def test_time_that_does_not_grow_lets_all_step():
    assert learnt(1.0, -0.01).efficient_batch_size([2] * 5) == 5


def test_one_slow_step_does_not_change_the_answer():
    pace = learnt(0.0, 0.02)
    pace.add(2, 100.0)
    assert pace.efficient_batch_size([2] * 5) == 1


def test_what_was_learnt_is_looked_at_again():
    """A device that was busy with one image, and no longer is, is found out."""
    pace = learnt(0.0, 0.02)
    numbers = []
    for _ in range(20 * LOOK_AGAIN):
        number = pace.efficient_batch_size([2] * 8)
        numbers.append(number)
        pace.add(2 * number, 1.0)
    assert numbers[0] == 1 and numbers[-2] >= 7
