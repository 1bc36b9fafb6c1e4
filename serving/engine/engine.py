"""Step-level continuous batching: many people's images advance together, joining and leaving between steps.

Three threads beside the event loop: one prepares (text, references, noise), one steps, one decodes. An image goes
waiting -> preparing -> active -> decoding -> told. `_condition` guards every list; no torch work happens under it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from realcustom.request import ResolvedRequest

from ..protocol.cost import Rate, image_cost
from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from .health import Health
from .job import Job
from .memory import MemoryBudget
from .observer import Observer
from .step_time import StepTimeModel
from .stepper import Stepper, work

logger = logging.getLogger("ray.serve.realcustom")  # under Ray Serve's logger: its handlers and JSON are ours, too

RETRY_AFTER_S = (1.0, 120.0)  # least and most that a refused caller is asked to wait


class Engine:
    """Advance any number of requests on one pipeline.

    Args:
        pipeline: prepare, step, decode and preview of `RealCustomPipeline`.
        max_batch_size: images prepared or under way together.
        max_queued: images waiting beyond these; more are refused with `QueueFull`.
        preview_every: steps between previews.
        stall_timeout_s: see `check_health`.
        batch_sizes: numbers of images that may step together, so that programs compiled for a batch size are used
            again; a larger group takes turns. Empty allows any number.
        budget: memory that the images under way may take together; None does not ask.
        synchronize: waits for the device after a step; without it a GPU would be steps behind every cancel.
        observer: is told what happens, for metrics.
    """

    def __init__(
        self,
        pipeline,
        *,
        max_batch_size: int = 8,
        max_queued: int = 32,
        preview_every: int = 3,
        stall_timeout_s: float = 300,
        batch_sizes: Sequence[int] = (),
        budget: MemoryBudget | None = None,
        synchronize: Callable[[], None] | None = None,
        observer: Observer | None = None,
    ) -> None:
        assert not batch_sizes or min(batch_sizes) == 1, "an image alone must be able to step"
        self._pipeline = pipeline
        self._batch_sizes = tuple(batch_sizes)
        self._budget = budget
        self._observer = observer or Observer()
        self._condition = threading.Condition()
        self.reconfigure(
            max_batch_size=max_batch_size,
            max_queued=max_queued,
            preview_every=preview_every,
            stall_timeout_s=stall_timeout_s,
        )
        self._waiting: deque[Job] = deque()
        self._preparing: Job | None = None
        self._active: list[Job] = []
        self._stepping: list[Job] = []  # the part of _active inside pipeline.step
        self._finished: deque[Job] = deque()
        self._previews: deque[Job] = deque()
        self._decoding: Job | None = None
        self._rate, self._pace = Rate(), StepTimeModel()
        self._stepper = Stepper(
            pipeline,
            synchronize=synchronize or (lambda: None),
            observer=self._observer,
            out_of_memory=self._shrink_budget,
            made=self._measure,
        )
        self._health = Health()
        self.num_steps = 0
        self._closed: str | None = None  # why nothing is accepted any more
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=f"engine-{work.__name__.strip('_')}", daemon=True)
            for work in (self._prepare_next, self._step_next, self._decode_next)
        ]
        for thread in self._threads:
            thread.start()

    def reconfigure(
        self,
        *,
        max_batch_size: int,
        max_queued: int,
        preview_every: int,
        stall_timeout_s: float,
    ) -> None:
        """Change these while images are under way; the ones that are here already stay."""
        with self._condition:
            self._max_batch_size, self._max_queued = max_batch_size, max_queued
            self._preview_every, self._stall_timeout_s = preview_every, stall_timeout_s
            self._condition.notify_all()

    async def stream(
        self,
        request: ResolvedRequest,
        previews: bool | int = True,
        timeout_s: float | None = None,
        request_id: str = "",
    ) -> AsyncIterator[Event]:
        """Events of one image, `Result` last. Closing the iterator frees the place before the next step.

        Args:
            previews: every `preview_every` steps, never, or this number in all.
            timeout_s: seconds from now after which the image is given up.
            request_id: for the log.
        Raises:
            QueueFull: no place. InvalidRequest: the pipeline refused the request. DeadlineExceeded: the deadline has passed.
            Unavailable: a fault that another replica may not have. ServerError: another fault of ours.
        """
        cost = image_cost(request)
        loop = asyncio.get_running_loop()
        job = Job(request, previews, loop, cost, request_id)
        self.admit(job)
        # Not `wait_for`: before Python 3.12 it loses a cancellation that meets an event.
        deadline = None if timeout_s is None else loop.call_later(timeout_s, self._expire, job, timeout_s)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            if deadline is not None:
                deadline.cancel()
            self.remove(job)

    def stats(self) -> dict[str, float]:
        """Images in each state, steps made, cost of the steps to come, and the seconds they will take."""
        with self._condition:
            cost = self._remaining_cost()
            return {
                "waiting": len(self._waiting),
                "preparing": int(self._preparing is not None),
                "active": len(self._active),
                "decoding": len(self._finished) + len(self._previews) + int(self._decoding is not None),
                "steps": self.num_steps,
                "backlog_cost": cost,
                "backlog_s": self._rate.seconds(cost),
            }

    def check_health(self) -> None:
        """Raise `RuntimeError` if the engine has stopped or does not advance, see `Health.check`."""
        with self._condition:
            if self._closed:
                raise RuntimeError(f"the engine has stopped: {self._closed}")
            self._health.check(self._threads, self._stall_timeout_s)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Stop; everyone still here is told. Waits shortly for work on the device to end."""
        with self._condition:
            self._closed = self._closed or reason
            self._close_all(reason)
            self._condition.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    # ---- callers' side -----------------------------------------------------------------------------------------

    def admit(self, job: Job) -> None:
        with self._condition:
            if self._closed:
                raise Unavailable(f"no images are made here any more: {self._closed}.")
            if self._budget and not self._budget.fits([job.memory]):
                raise InvalidRequest(
                    f"an image of {job.request.width}x{job.request.height} with {len(job.request.subjects)} subjects "
                    "does not fit this server's memory; ask for a smaller one."
                )
            if self.num_running() + len(self._waiting) >= self._max_batch_size + self._max_queued:
                self._observer.rejected()
                raise QueueFull(
                    f"{len(self._waiting)} images are waiting already; try again in a few seconds.",
                    retry_after_s=self._seconds_to_a_place(),
                )
            self._waiting.append(job)
            self._send_positions()
            self._condition.notify_all()

    def num_running(self) -> int:
        return len(self._active) + int(self._preparing is not None)

    def _seconds_to_a_place(self) -> float:
        least, most = RETRY_AFTER_S
        expected = self._rate.seconds(self._remaining_cost()) / max(1, self.num_running() + len(self._waiting))
        return min(most, max(least, expected))

    def _remaining_cost(self) -> float:
        preparing = [self._preparing] if self._preparing else []
        return sum(job.remaining_cost for job in (*self._waiting, *preparing, *self._active) if not job.closed)

    def remove(self, job: Job) -> None:
        with self._condition:
            job.closed = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._send_positions()
            if job in self._active and job not in self._stepping:
                self._active.remove(job)
            seconds = time.monotonic() - job.arrived
            self._observer.image(job.outcome, seconds=seconds)
            self._observe_queue()
            self._condition.notify_all()
        about = {"request_id": job.request_id, "outcome": job.outcome, "seconds": round(seconds, 3)}
        logger.info("image %s after %.2f s and %d steps", job.outcome, seconds, job.step_sent, extra=about)

    def _expire(self, job: Job, timeout_s: float) -> None:
        with self._condition:
            job.send(DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s."))

    def _send_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.position != position:
                job.position = position
                job.send(Queued(position))

    def _close_all(self, reason: str) -> None:
        everyone = [*self._waiting, *self._active, *self._finished, *self._previews, self._preparing, self._decoding]
        for job in everyone:
            if job is not None:
                job.send(Unavailable(f"the image was not finished: {reason}."))
        for jobs in (self._waiting, self._active, self._finished, self._previews):
            jobs.clear()

    def _observe_queue(self) -> None:
        backlog_s = self._rate.seconds(self._remaining_cost())
        self._observer.queue(waiting=len(self._waiting), active=self.num_running(), backlog_s=backlog_s)

    # ---- the three threads -------------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        """Repeat one kind of work until the engine closes; if it fails beyond repair, nobody is left waiting."""
        try:
            while not self._closed:
                work()
        except BaseException as error:
            logger.exception("the engine stops")
            with self._condition:
                self._closed = f"an internal error ({type(error).__name__})"
                self._close_all(self._closed)
                self._condition.notify_all()

    def _wait(self, ready: Callable[[], Any]) -> bool:
        """Sleep until there is work; False if the engine closed instead. The lock must be held."""
        self._health.idle()
        self._condition.wait_for(lambda: self._closed or ready())
        self._health.busy()
        return not self._closed

    def _next_has_place(self) -> bool:
        """Whether the first in line may come in. If its memory is not free yet, nobody passes it: none starves."""
        if not self._waiting or len(self._active) >= self._max_batch_size:
            return False
        if len(self._finished) >= self._max_batch_size:
            return False
        here = [job.memory for job in (*self._active, *self._finished)]
        return not here or not self._budget or self._budget.fits([*here, self._waiting[0].memory])

    def _prepare_next(self) -> None:
        with self._condition:
            if not self._wait(self._next_has_place):
                return
            job = self._preparing = self._waiting.popleft()  # first come, first served, whatever the size
            self._send_positions()
        outcome: Exception | None = None
        hits, misses = self._reference_counts()
        try:
            job.generation = self._pipeline.prepare(job.request)
        except ValueError as error:
            outcome = InvalidRequest(str(error))
        except Exception as error:
            logger.exception("prepare failed", extra={"request_id": job.request_id})
            outcome = Unavailable(f"the image could not be prepared ({type(error).__name__}); try again.")
        new_hits, new_misses = self._reference_counts()
        with self._condition:
            self._preparing = None
            self._observer.references(hits=new_hits - hits, misses=new_misses - misses)
            if outcome is not None:
                job.send(outcome)
            elif not job.closed:
                job.last_turn = self.num_steps
                self._active.append(job)
            self._observe_queue()
            self._condition.notify_all()

    def _reference_counts(self) -> tuple[int, int]:
        return self._pipeline.reference_cache.hits, self._pipeline.reference_cache.misses

    def _next_group(self) -> list[Job]:
        """Of the size whose turn is longest ago, the first that came. Sizes take turns, so a huge image does not hold
        up small ones; images of one size are much alike and are made in order, as many at once as batching pays for.
        While others wait for a place, whatever makes the most of the device is best for all."""
        turns: dict[tuple[int, int], int] = {}
        for job in self._active:
            turns[job.generation.size] = max(job.last_turn, turns.get(job.generation.size, 0))
        size = min(turns, key=turns.__getitem__)
        candidates = [job for job in self._active if job.generation.size == size]
        wanted = (
            len(candidates)
            if self._waiting
            else self._pace.efficient_batch_size([work(job.generation) for job in candidates])
        )
        if self._batch_sizes:
            allowed = [n for n in self._batch_sizes if n <= len(candidates)]
            wanted = min((n for n in allowed if n >= wanted), default=max(allowed))
        return candidates[:wanted]

    def _step_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._active):
                return
            group = self._stepping = self._next_group()
            for job in group:
                job.last_turn = self.num_steps + 1
        failed = self._stepper.step(group)
        with self._condition:
            self.num_steps += 1
            self._health.step(failed=len(failed) == len(group))
            self._stepping = []
            for job in group:
                if job in failed:
                    job.send(failed[job])
                self._after_step(job)
            self._observe_queue()
            self._condition.notify_all()

    def _shrink_budget(self) -> None:
        with self._condition:
            if self._budget:
                self._budget.shrink([job.memory for job in self._active])

    def _measure(self, group: Sequence[Job], done: float, seconds: float) -> None:
        with self._condition:
            self._pace.add(done, seconds)
            self._rate.add(sum(job.cost / job.generation.num_steps for job in group), seconds)

    def _after_step(self, job: Job) -> None:
        if job not in self._active:  # the engine has closed in the meantime
            return
        generation = job.generation
        if job.closed:
            self._active.remove(job)
            return
        job.send(Progress(generation.step_index, generation.num_steps))
        if generation.done:
            self._active.remove(job)
            self._finished.append(job)
        elif job.preview_due(self._preview_every) and not job.preview_pending:  # a slow device gets fewer, no backlog
            job.preview_pending = True
            self._previews.append(job)

    def _decode_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._finished or self._previews):
                return
            final = bool(self._finished)  # finished images go before previews
            job = self._decoding = (self._finished if final else self._previews).popleft()
            skip = job.closed or (not final and job.generation.done)
        event: Event | Exception | None = None
        if not skip:
            try:
                event = self._finish(job) if final else self.render_preview(job)
            except Exception as error:
                logger.exception("decode failed", extra={"request_id": job.request_id})
                event = Unavailable(f"the image could not be decoded ({type(error).__name__}); try again.")
                event = event if final else None
        with self._condition:
            self._decoding = None
            job.preview_pending = False
            # A preview that comes after the last step would be older news than what the caller knows.
            if event is not None and (final or not job.generation.done):
                if not final and not job.preview_sent and not job.closed:
                    job.preview_sent = True
                    self._observer.first_preview(time.monotonic() - job.arrived)
                job.send(event)
            self._condition.notify_all()

    def _finish(self, job: Job) -> Event | Exception:
        generation = job.generation
        if not generation.latents.isfinite().all():
            return ServerError("the image became invalid (not a number); try another seed or guidance_scale.")
        image = self._pipeline.decode([generation])[0]
        return Result(image, tuple(generation.mask_images()), generation.request.seed)

    def render_preview(self, job: Job) -> Progress:
        generation = job.generation
        preview, masks = self._pipeline.preview([generation])[0], tuple(generation.mask_images())
        return Progress(generation.step_index, generation.num_steps, preview, masks)
