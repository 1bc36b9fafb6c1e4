"""Engine: step-level continuous batching on one pipeline. Owns threads, locks and the delivery of events.

Besides the event loop, three threads run: one prepares images (text, references, noise), one steps them, one decodes.
`scheduler.py` decides which image comes next. `_condition` guards the scheduler and the jobs. No torch operation and no
work proportional to the size of an image runs while it is held, or on the event loop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from realcustom.request import ResolvedRequest

from ..protocol.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServerError, Unavailable
from ..protocol.events import Event, Progress, Queued, Result
from .device_clock import DeviceClock, HostClock
from .health import Health
from .job import Job
from .memory import MemoryBudget, is_out_of_memory, release
from .observer import Observer
from .scheduler import Scheduler
from .step_time import StepKind, StepTimeModel
from .stepper import Stepper, step_kind

logger = logging.getLogger("ray.serve.realcustom")  # below Ray Serve's logger, so that its handlers and format apply


def _kind(batch: Sequence[Job]) -> StepKind:
    return step_kind([job.generation for job in batch if job.generation is not None])


class Engine:
    """Generates the images of many requests together on one pipeline.

    Args:
        pipeline: a `RealCustomPipeline`, or an object with its `prepare`, `step`, `decode`, `preview` and
            `reference_cache`.
        max_batch_size: maximum number of images that are being prepared or active.
        max_queued: maximum number of images that wait beyond these; further ones raise `QueueFull`.
        preview_every: steps between previews.
        stall_timeout_s: see `check_health`.
        batch_sizes: numbers of images that may step together, so that programs compiled for a batch size are reused.
            Empty allows any number.
        budget: memory for all images in the engine; None does not limit it.
        step_time: predicts the seconds of a step; updated with each measured step.
        clock: times steps on the device; default: the clock of a CPU.
        observer: receives the engine's numbers, for metrics.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        max_batch_size: int = 8,
        max_queued: int = 32,
        preview_every: int = 3,
        stall_timeout_s: float = 300,
        batch_sizes: Sequence[int] = (),
        budget: MemoryBudget | None = None,
        step_time: StepTimeModel | None = None,
        clock: DeviceClock | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._observer = observer or Observer()
        self._condition = threading.Condition()
        self._scheduler = Scheduler(
            max_batch_size=max_batch_size,
            max_queued=max_queued,
            batch_sizes=batch_sizes,
            budget=budget,
            step_time=step_time,
        )
        self._preview_every, self._stall_timeout_s = preview_every, stall_timeout_s
        self._previews: deque[Job] = deque()  # previews to be decoded
        self._previewing: Job | None = None
        self._stepper = Stepper(
            pipeline,
            clock=clock or HostClock(),
            observer=self._observer,
            on_out_of_memory=self._shrink_budget,
            on_step=self._learn_step_time,
        )
        self._health = Health()
        self._num_steps = 0
        self._closed: str | None = None  # the reason why requests are no longer accepted
        self._threads = [
            threading.Thread(target=self._repeat, args=(function,), name=f"engine-{name}", daemon=True)
            for name, function in (
                ("prepare", self._prepare_next),
                ("step", self._step_next),
                ("decode", self._decode_next),
            )
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
        """Change these settings while images are active. Accepted images are not affected."""
        with self._condition:
            self._scheduler.max_batch_size, self._scheduler.max_queued = max_batch_size, max_queued
            self._preview_every, self._stall_timeout_s = preview_every, stall_timeout_s
            self._condition.notify_all()

    async def stream(
        self,
        request: ResolvedRequest,
        previews: bool | int = True,
        timeout_s: float | None = None,
        request_id: str = "",
        client: str = "",
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of one image, `Result` last. Closing the generator removes the image before the next step.

        Args:
            previews: True sends one every `preview_every` steps, False sends none, an int sends this many in total.
            timeout_s: deadline in seconds from now.
            request_id: for the log.
            client: name of the sender; senders share the queue equally.
        Raises:
            QueueFull: the queue is full.
            InvalidRequest: the pipeline rejected the request, or the image alone exceeds the memory budget.
            DeadlineExceeded: the deadline has passed.
            Unavailable: a fault; the request may succeed on another replica.
            ServerError: another fault of the server.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        job = Job(
            request,
            previews,
            deliver=lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
            request_id=request_id,
            client=client,
        )
        self._add(job)
        # Not `wait_for`: before Python 3.12 it loses a cancellation that coincides with an event.
        deadline = None if timeout_s is None else loop.call_later(timeout_s, self._expire, job, timeout_s)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            if deadline is not None:
                deadline.cancel()
            self._remove(job)

    def check_capacity(self, number: int) -> None:
        """Raise `QueueFull` if the queue has no place for `number` more images."""
        with self._condition:
            self._scheduler.check_capacity(number)

    def stats(self) -> dict[str, float]:
        """Images in each state, steps done so far, and `backlog_s`: predicted seconds until all accepted images are
        done (0 before the first step)."""
        with self._condition:
            scheduler = self._scheduler
            decoding = (scheduler.decoding is not None) + (self._previewing is not None)
            return {
                "waiting": len(scheduler.waiting),
                "preparing": int(scheduler.preparing is not None),
                "active": len(scheduler.active),
                "decoding": len(scheduler.finished) + len(self._previews) + decoding,
                "steps": self._num_steps,
                "backlog_s": scheduler.backlog_s(),
            }

    def check_health(self) -> None:
        """Raise `RuntimeError` if the engine has stopped or makes no progress; see `Health.check`."""
        with self._condition:
            if self._closed:
                raise RuntimeError(f"the engine has stopped: {self._closed}")
            self._health.check(self._threads, self._stall_timeout_s)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Stop: every image in the engine ends with `Unavailable`. Waits up to 10 s per thread for its work to end."""
        self._stop(reason)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    # ---- callers ---------------------------------------------------------------------------------------------------

    def _add(self, job: Job) -> None:
        with self._condition:
            if self._closed:
                raise Unavailable(f"the engine accepts no requests: {self._closed}.")
            try:
                self._scheduler.add(job)
            except QueueFull:
                self._observer.rejected()
                raise
            self._send_positions()
            self._condition.notify_all()

    def _remove(self, job: Job) -> None:
        with self._condition:
            self._scheduler.remove(job)
            self._send_positions()
            seconds = time.monotonic() - job.arrived
            self._observer.image(job.outcome, seconds=seconds)
            self._observe_queue()
            self._condition.notify_all()
        fields = {"request_id": job.request_id, "outcome": job.outcome, "seconds": round(seconds, 3)}
        logger.info("image %s after %.2f s and %d steps", job.outcome, seconds, job.step_sent, extra=fields)

    def _expire(self, job: Job, timeout_s: float) -> None:
        with self._condition:
            job.send(
                DeadlineExceeded(f"the image was not finished within {timeout_s:.3g} s; request a longer timeout_s.")
            )

    def _send_positions(self) -> None:
        for position, job in enumerate(self._scheduler.waiting):
            if job.position != position:
                job.position = position
                job.send(Queued(position))

    def _observe_queue(self) -> None:
        scheduler = self._scheduler
        self._observer.queue(
            waiting=len(scheduler.waiting), active=scheduler.num_running, backlog_s=scheduler.backlog_s()
        )

    # ---- threads ---------------------------------------------------------------------------------------------------

    def _repeat(self, function: Callable[[], None]) -> None:
        """Call `function` until the engine closes. If it raises, the engine stops and all callers receive an error."""
        try:
            while not self._closed:
                function()
        except BaseException as error:
            logger.exception("the engine stops")
            self._stop(f"an internal error ({type(error).__name__})")

    def _stop(self, reason: str) -> None:
        with self._condition:
            self._closed = self._closed or reason
            for job in self._scheduler.clear():
                job.send(Unavailable(f"the image was not finished: {reason}."))
            self._previews.clear()
            self._condition.notify_all()

    def _wait(self, ready: Callable[[], Any]) -> bool:
        """Wait until there is work; return False if the engine has closed. The lock must be held."""
        self._health.idle()
        self._condition.wait_for(lambda: self._closed or ready())
        self._health.busy()
        return not self._closed

    def _prepare_next(self) -> None:
        with self._condition:
            if not self._wait(self._scheduler.can_admit):
                return
            job = self._scheduler.admit()
            assert job is not None
            self._send_positions()
        failure: Exception | None = None
        out_of_memory = False
        hits, misses = self._pipeline.reference_cache.hits, self._pipeline.reference_cache.misses
        try:
            job.generation = self._pipeline.prepare(job.request)
        except ValueError as error:
            failure = InvalidRequest(str(error))
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            logger.exception("prepare failed", extra={"request_id": job.request_id})
            failure = Unavailable(f"the image could not be prepared ({type(error).__name__}); try again.")
        if out_of_memory:  # outside the handler, whose traceback holds tensors
            release()
        cache = self._pipeline.reference_cache
        with self._condition:
            self._observer.references(hits=cache.hits - hits, misses=cache.misses - misses)
            if out_of_memory and self._scheduler.shrink_budget():
                self._scheduler.requeue()
                self._send_positions()
            else:
                if failure is not None:
                    job.send(failure)
                if job.generation is not None:
                    job.num_steps = job.generation.num_steps
                self._scheduler.prepared()
            self._observe_queue()
            self._condition.notify_all()

    def _step_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._scheduler.active):
                return
            batch = self._scheduler.next_batch()
            self._health.expect(self._scheduler.step_time.upper_bound(*_kind(batch)))
        start = time.monotonic()
        failed = self._stepper.step(batch)
        seconds = time.monotonic() - start
        with self._condition:
            self._num_steps += 1
            self._health.step(failed=len(failed) == len(batch))
            for job in batch:
                if job in failed:
                    job.send(failed[job])
                elif not job.closed:
                    self._report_step(job)
            self._scheduler.end_step(seconds)
            self._observe_queue()
            self._condition.notify_all()

    def _report_step(self, job: Job) -> None:
        assert job.generation is not None
        job.steps_done = job.generation.step_index
        job.send(Progress(job.steps_done, job.num_steps))
        # One pending preview per image: on a slow device, previews are skipped instead of queued.
        if not job.done and job.preview_due(self._preview_every) and not job.preview_pending:
            job.preview_pending = True
            self._previews.append(job)

    def _shrink_budget(self) -> None:
        with self._condition:
            self._scheduler.shrink_budget()

    def _learn_step_time(self, kind: StepKind, seconds: float) -> None:
        with self._condition:
            self._scheduler.step_time.add(kind.calls, kind.row_pixels, seconds, kind.pixels)

    def _decode_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._scheduler.finished or self._previews):
                return
            job = self._scheduler.next_finished()  # finished images before previews
            if job is None:
                self._previewing = self._previews.popleft()
        if job is not None:
            self._decode_result(job)
        elif self._previewing is not None:
            self._decode_preview(self._previewing)

    def _decode_result(self, job: Job) -> None:
        event: Event | Exception | None = None
        if not job.closed:
            try:
                event = self._result(job)
            except Exception as error:
                logger.exception("decode failed", extra={"request_id": job.request_id})
                event = Unavailable(f"the image could not be decoded ({type(error).__name__}); try again.")
        with self._condition:
            self._scheduler.end_decode()
            if event is not None:
                job.send(event)
            self._condition.notify_all()

    def _result(self, job: Job) -> Result | Exception:
        generation = job.generation
        assert generation is not None
        if not generation.latents.isfinite().all():
            return ServerError("the image became invalid (not a number); try another seed or guidance_scale.")
        image = self._pipeline.decode([generation])[0]
        return Result(image, tuple(generation.mask_images()), generation.request.seed)

    def _decode_preview(self, job: Job) -> None:
        preview: Progress | None = None
        if not job.closed and not job.done:
            try:
                preview = self._render_preview(job)
            except Exception:  # the image itself is not affected
                logger.exception("preview failed", extra={"request_id": job.request_id})
        with self._condition:
            self._previewing = None
            job.preview_pending = False
            if preview is not None and not job.closed and not job.done:  # after the last step it would be outdated
                if not job.preview_sent:
                    job.preview_sent = True
                    self._observer.first_preview(time.monotonic() - job.arrived)
                job.send(preview)
            self._condition.notify_all()

    def _render_preview(self, job: Job) -> Progress:
        generation = job.generation
        assert generation is not None
        preview, masks = self._pipeline.preview([generation])[0], tuple(generation.mask_images())
        return Progress(generation.step_index, generation.num_steps, preview, masks)
