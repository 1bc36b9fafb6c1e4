"""Selects the images of one size that step together now: a pure function of their remaining work and the step cost.

The baseline is the optimum for batches of whole generations, a work-conserving batcher: the images that have started
finish together, then all waiting images (at most `max_batch_size`) run together, and so on. The alternative plans
differ in the number of images, in order of arrival, that step together first:

- More than have started: new images join the batch. This saves whole calls, but as long as they compute masks (up to
  T_stop), every step has a second call, which delays the images that are past T_stop.
- As many as have started: new images wait and later compute their masks in the same steps. This matters if calls
  dominate the cost and the batch is full: 25 steps with T_stop 12 are 37 calls for images in lockstep, but 50 for
  images that start one by one.
- Fewer: images finish one after another. If rows dominate the cost, two images finish at times 1 and 2 when they run
  one after another, and both at time 2 when they run together.

A plan replaces the baseline only if, by prediction,
1. the prepared images take no more device time than with the baseline,
2. the prepared and the waiting images together take no more device time either, and
3. their mean completion time is lower by at least `BUSY_GAIN` if they are more than half of `max_batch_size`. With
   fewer images, an equal mean (within `TIE`) is sufficient, so a new image joins immediately.

Conditions 1 and 2 preserve the throughput: a lower mean that costs device time delays all later requests. Condition 3
accounts for requests that have not arrived yet, which the prediction does not include: holding images back collects a
larger batch, in which each image takes less device time. In the simulation of `tests/test_serving_scheduler.py`,
choosing plans for any gain made p50 10% worse than the work-conserving batcher's at 95% load on a device where calls
and rows cost about the same. With a required gain of 10%, p50, p95 and throughput are not worse than the batcher's at
loads of 50 to 95%, within the noise of the simulation.
"""

from collections.abc import Callable, Iterator, Sequence

from .step_time import RemainingWork, StepCost

BUSY_GAIN = 0.1
TIE = 0.01
ROUNDING = 1e-9  # relative error of sums of floats


def best_batch_size(
    prepared: Sequence[RemainingWork],
    waiting: Sequence[RemainingWork],
    *,
    num_started: int,
    max_batch_size: int,
    cost: StepCost,
    rounded: Callable[[int], int] = lambda number: number,
) -> int:
    """Number of `prepared` images, counted from the first, that should step together now.

    Args:
        prepared: images of one size in order of arrival, at least one; those that have started come first.
        waiting: images of this size in the queue; only the first `max_batch_size` are considered.
        num_started: prepared images that have already been stepped.
        max_batch_size: images that may step together.
        cost: of a step.
        rounded: the allowed batch size to use for a wanted one, at most the number of prepared images.
    """
    top = len(prepared)
    if top == 1:
        return 1
    baseline = rounded(num_started or top)
    known = [*prepared, *waiting[:max_batch_size]]
    limit, _ = completion(prepared, baseline, max_batch_size, cost)
    known_limit, mean = completion(known, baseline, max_batch_size, cost)
    busy = 2 * len(known) > max_batch_size
    plans = [(mean * (1 - BUSY_GAIN) if busy else mean, baseline)]
    for first in sorted({rounded(number) for number in range(1, top + 1)}):
        for later in {first, max_batch_size}:
            device_time, mean = completion(known, first, later, cost)
            if mean >= plans[0][0] * (1 if busy else 1 + TIE) or device_time > known_limit * (1 + ROUNDING):
                continue
            if completion(prepared, first, later, cost)[0] <= limit * (1 + ROUNDING):
                plans.append((mean, first))
    lowest, best = min(plans)
    return best if busy else max(first for mean, first in plans if mean <= lowest * (1 + TIE))


def completion(images: Sequence[RemainingWork], first: int, later: int, cost: StepCost) -> tuple[float, float]:
    """(seconds until all images are done, mean seconds until an image is done).

    The first `first` images run together until the last of them is done, then the next `later`, and so on.
    """
    now = total = 0.0
    start, size = 0, first
    while start < len(images):
        group = images[start : start + size]
        start, size = start + size, later
        for seconds, num_done in _lockstep(group, cost):
            now += seconds
            total += num_done * now
    return now, total / max(1, len(images))


def first_completion(images: Sequence[RemainingWork], cost: StepCost) -> float:
    """Seconds until the first of the images is done if all run together."""
    now = 0.0
    for seconds, num_done in _lockstep(images, cost):
        now += seconds
        if num_done:
            break
    return now


def _lockstep(group: Sequence[RemainingWork], cost: StepCost) -> Iterator[tuple[float, int]]:
    """(seconds, images done at their end) of each stretch of equal steps of a group that runs together."""
    ends = {image.num_steps for image in group}
    ends.update(image.num_guided_steps for image in group)
    ends.discard(0)
    per_row = cost.per_row(group[0].pixels)
    begin = 0
    for end in sorted(ends):
        guided_share, rows, num_done = 0.0, 0.0, 0
        for image in group:
            if image.num_steps > begin:
                rows += image.rows
                if image.num_guided_steps > begin:
                    rows += image.guided_share
                    guided_share = max(guided_share, image.guided_share)
                num_done += image.num_steps == end
        yield (end - begin) * ((1 + guided_share) * cost.per_call + rows * per_row), num_done
        begin = end
