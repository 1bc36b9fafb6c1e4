"""Scheduler: which images wait, which is prepared next, and which step now. Pure: no threads, clock or tensors.

    add -> waiting -> admit -> preparing -> prepared -> active -> next_batch / end_step -> finished -> next_finished
                                  |                                                                        |
                                  +-> requeue (back to the head of the queue)                   decoding -> end_decode

`remove` takes an image out of any of these states. The engine calls all methods under its lock.

- The queue is bounded, and clients share it equally (`FairQueue`). Images of one client are first in, first out, and no
  image overtakes one that waits for memory.
- Images of one size step together; `plan.py` decides how many. They are always the first ones in order of arrival, so
  the oldest image of a size advances in every step of its size: no image waits for more than the work before it.
- Device time is shared equally among sizes: the size that has used the least time steps next.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from ..protocol.cost import image_cost
from ..protocol.errors import InvalidRequest, QueueFull
from ..protocol.fair_queue import FairQueue
from .job import Job
from .memory import MemoryBudget
from .plan import best_batch_size, completion, first_completion
from .step_time import StepTimeModel

Size = tuple[int, int]  # (height, width) of an image

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 120.0


class Scheduler:
    """The waiting and running images of one engine.

    Args:
        max_batch_size: maximum number of images that are being prepared or active.
        max_queued: maximum number of images that wait beyond these.
        batch_sizes: numbers of images that may step together; empty allows any number.
        budget: memory for the images that are prepared, active or being decoded; None does not limit it.
        step_time: predicts the seconds of a step. Before its first measurement all images of a size step together.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_queued: int,
        batch_sizes: Sequence[int] = (),
        budget: MemoryBudget | None = None,
        step_time: StepTimeModel | None = None,
    ) -> None:
        assert not batch_sizes or min(batch_sizes) == 1, "batch_sizes must contain 1, so that any image can step alone"
        self.max_batch_size, self.max_queued = max_batch_size, max_queued
        self.step_time = step_time or StepTimeModel()
        self._batch_sizes, self._budget = tuple(batch_sizes), budget
        self.waiting: FairQueue[Job] = FairQueue()
        self.preparing: Job | None = None
        self.active: list[Job] = []  # prepared, not done; in order of arrival
        self.stepping: tuple[Job, ...] = ()  # the part of `active` in the current step
        self.finished: deque[Job] = deque()  # all steps done, to be decoded
        self.decoding: Job | None = None
        self._device_seconds: dict[Size, float] = {}  # device time used by each active size

    # ---- queue -----------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Add an image to the queue, in the order of `FairQueue`.

        Raises:
            InvalidRequest: the image alone exceeds the memory budget.
            QueueFull: `max_batch_size + max_queued` images wait or run.
        """
        request = job.request
        if self._budget and not self._budget.fits([job.memory]):
            raise InvalidRequest(
                f"an image of {request.width}x{request.height} with {len(request.subjects)} subjects exceeds this "
                "server's memory; request a smaller image or fewer subjects."
            )
        self.check_capacity()
        self.waiting.add(job, job.client, image_cost(request))

    def check_capacity(self, number: int = 1) -> None:
        """Raise `QueueFull` if there is no place for `number` more images."""
        if self.num_running + len(self.waiting) + number > self.max_batch_size + self.max_queued:
            retry_after_s = self.retry_after_s()
            raise QueueFull(
                f"{self.num_running} images run and {len(self.waiting)} wait, at most "
                f"{self.max_batch_size + self.max_queued} are accepted; retry after {retry_after_s:.0f} s.",
                retry_after_s=retry_after_s,
            )

    def can_admit(self) -> bool:
        """Whether `admit` returns an image now."""
        if not self.waiting or self.preparing or len(self.active) >= self.max_batch_size:
            return False
        if len(self.finished) >= self.max_batch_size:  # decoding is slower than stepping
            return False
        resident = [job.memory for job in self._resident()]
        return not resident or not self._budget or self._budget.fits([*resident, self.waiting[0].memory])

    def admit(self) -> Job | None:
        """Move the first waiting image to `preparing` and return it; None if it must wait."""
        if not self.can_admit():
            return None
        self.preparing = self.waiting.popleft()
        return self.preparing

    def prepared(self) -> None:
        """Make the preparing image active, or drop it if it was removed in the meantime."""
        job, self.preparing = self.preparing, None
        assert job is not None, "no image is being prepared"
        if not job.closed:
            self.active.append(job)

    def requeue(self) -> None:
        """Return the preparing image to the head of the queue, because it did not fit into memory."""
        job, self.preparing = self.preparing, None
        assert job is not None, "no image is being prepared"
        if not job.closed:
            self.waiting.appendleft(job, job.client)

    def remove(self, job: Job) -> None:
        """Drop an image. If it is in the current step or is being decoded, it is dropped when that ends."""
        job.closed = True
        if job in self.waiting:
            self.waiting.remove(job)
        if job in self.active and job not in self.stepping:
            self.active.remove(job)

    def clear(self) -> list[Job]:
        """Drop all images and return them."""
        jobs = list(self._all_jobs())
        self.waiting.clear()
        self.active.clear()
        self.finished.clear()
        return jobs

    # ---- steps -----------------------------------------------------------------------------------------------------

    def next_batch(self) -> tuple[Job, ...]:
        """The images that take the next step together, all of one size; empty if none is active."""
        if not self.active:
            return ()
        candidates = self._of_size(self._next_size())
        self.stepping = tuple(candidates[: self._batch_size(candidates)])
        return self.stepping

    def end_step(self, seconds: float) -> None:
        """End the current step, which took `seconds`. Done images move to `finished`; removed ones are dropped."""
        if self.stepping:
            self._device_seconds[self.stepping[0].size] += seconds
        for job in self.stepping:
            if job not in self.active:  # `clear` was called in the meantime
                continue
            if job.closed or job.done:
                self.active.remove(job)
                if not job.closed:
                    self.finished.append(job)
        self.stepping = ()

    def next_finished(self) -> Job | None:
        """Move the first finished image to `decoding` and return it."""
        self.decoding = self.finished.popleft() if self.finished else None
        return self.decoding

    def end_decode(self) -> None:
        self.decoding = None

    def shrink_budget(self) -> bool:
        """Reduce the memory budget, because the active images did not fit into memory. Returns False if no image is
        active or memory is not limited."""
        if not self._budget or not self.active:
            return False
        self._budget.shrink([job.memory for job in self.active])
        return True

    def _next_size(self) -> Size:
        """The size that has used the least device time. A size that becomes active starts with the minimum of the
        others, so that time used before it became active does not count."""
        sizes = dict.fromkeys(job.size for job in self.active)
        known = {size: seconds for size, seconds in self._device_seconds.items() if size in sizes}
        start = min(known.values(), default=0.0)
        self._device_seconds = {size: known.get(size, start) for size in sizes}
        return min(sizes, key=self._device_seconds.__getitem__)

    def _of_size(self, size: Size) -> list[Job]:
        return [job for job in self.active if job.size == size]

    def _batch_size(self, candidates: Sequence[Job]) -> int:
        def rounded(wanted: int) -> int:
            if not self._batch_sizes:
                return wanted
            allowed = [number for number in self._batch_sizes if number <= len(candidates)]
            return min((number for number in allowed if number >= wanted), default=max(allowed))

        if self.step_time.cost is None:
            return rounded(len(candidates))
        return best_batch_size(
            [job.remaining_work() for job in candidates],
            [job.remaining_work() for job in self.waiting if job.size == candidates[0].size],
            num_started=sum(job.steps_done > 0 for job in candidates),
            max_batch_size=self._largest_batch(),
            cost=self.step_time.cost,
            rounded=rounded,
        )

    def _largest_batch(self) -> int:
        return max((n for n in self._batch_sizes if n <= self.max_batch_size), default=self.max_batch_size)

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Images that are being prepared or active."""
        return len(self.active) + int(self.preparing is not None)

    @property
    def num_images(self) -> int:
        """Images in any state."""
        return sum(1 for _ in self._all_jobs())

    def backlog_s(self) -> float:
        """Predicted seconds until every accepted image has done its steps; 0 before the first measured step."""
        cost = self.step_time.cost
        if cost is None:
            return 0.0
        sizes: dict[Size, list[Job]] = {}
        for job in self._unfinished():
            sizes.setdefault(job.size, []).append(job)
        largest = self._largest_batch()
        return sum(
            completion([job.remaining_work() for job in jobs], largest, largest, cost)[0] for jobs in sizes.values()
        )

    def retry_after_s(self) -> float:
        """Predicted seconds until an image is done, limited to [`MIN_RETRY_AFTER_S`, `MAX_RETRY_AFTER_S`]; the minimum
        before the first measured step."""
        cost = self.step_time.cost
        if cost is None:
            return MIN_RETRY_AFTER_S
        sizes = dict.fromkeys(job.size for job in self.active)
        per_size = [first_completion([job.remaining_work() for job in self._of_size(size)], cost) for size in sizes]
        expected = len(per_size) * min(per_size, default=0.0)  # sizes share the device
        return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, expected))

    def _resident(self) -> Iterator[Job]:
        """Images whose tensors are in memory."""
        yield from self.active
        yield from self.finished
        if self.decoding:
            yield self.decoding

    def _unfinished(self) -> Iterable[Job]:
        """Images with steps to do, in order of arrival."""
        preparing = [self.preparing] if self.preparing else []
        return (job for job in (*self.active, *preparing, *self.waiting) if not job.closed)

    def _all_jobs(self) -> Iterator[Job]:
        yield from self._resident()
        if self.preparing:
            yield self.preparing
        yield from self.waiting
