"""Step-level continuous batching: many people's pictures advance together, joining and leaving between steps.

Three threads beside the event loop: one prepares (text, references, noise), one steps, one decodes. A picture goes
waiting -> preparing -> active -> decoding -> told. `_condition` guards every list; no torch work happens under it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from realcustom.request import Request

from .errors import InvalidRequest, Overloaded, ServerError
from .events import Event, Progress, Queued, Result

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One picture's place in the engine and its line to the caller. `previews`: none, every few steps, or a number."""

    request: Request
    previews: bool | int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    generation: Any = None
    told: bool = False  # the result or an error has been sent, or nobody listens any more
    position: int | None = None  # place in line last told
    preview_pending: bool = False
    step_told: int = 0

    def tell(self, event: Event | Exception) -> None:
        """Hand an event to the caller; from any thread, under the engine's lock, so that order holds."""
        if self.told:
            return
        self.told = isinstance(event, Result | Exception)
        if isinstance(event, Progress):  # a preview is made beside the steps and may be behind them: never count back
            self.step_told = max(self.step_told, event.step)
            event = replace(event, step=self.step_told)
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the caller's loop has closed; nobody is left to tell
            self.told = True


class Engine:
    """Advance any number of requests on one pipeline.

    Args:
        pipeline: prepare, step, decode and preview of `RealCustomPipeline`.
        max_batch_size: pictures prepared or under way together.
        max_queued: pictures waiting beyond these; more are refused with `Overloaded`.
        preview_every: steps between previews.
        stall_timeout_s: see `check_health`.
        synchronize: waits for the device after a step; without it a GPU would be steps behind every cancel.
    """

    def __init__(
        self,
        pipeline,
        *,
        max_batch_size: int = 8,
        max_queued: int = 32,
        preview_every: int = 3,
        stall_timeout_s: float = 300,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._max_batch_size, self._max_queued = max_batch_size, max_queued
        self._preview_every, self._stall_timeout_s = preview_every, stall_timeout_s
        self._synchronize = synchronize or (lambda: None)
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._preparing: Job | None = None
        self._active: list[Job] = []
        self._stepping: list[Job] = []  # the part of _active inside pipeline.step
        self._finished: deque[Job] = deque()
        self._previews: deque[Job] = deque()
        self._decoding: Job | None = None
        self._last_turn: dict[tuple[int, int], int] = {}  # size -> number of the step it last had
        self.num_steps = 0
        self._busy_since: dict[str, float | None] = {}
        self._closed: str | None = None  # why nothing is accepted any more
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=f"engine-{work.__name__.strip('_')}", daemon=True)
            for work in (self._prepare_next, self._step_next, self._decode_next)
        ]
        for thread in self._threads:
            thread.start()

    async def stream(self, request: Request, previews: bool | int = True) -> AsyncIterator[Event]:
        """Events of one picture, `Result` last. Closing the iterator frees the place before the next step.

        Raises:
            Overloaded: no place. InvalidRequest: the pipeline refused the request. ServerError: a fault of ours.
        """
        job = Job(request, previews, asyncio.get_running_loop())
        self._enter(job)
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            self._leave(job)

    def stats(self) -> dict[str, int]:
        """Pictures in each state."""
        with self._condition:
            return {
                "waiting": len(self._waiting),
                "preparing": int(self._preparing is not None),
                "active": len(self._active),
                "decoding": len(self._finished) + len(self._previews) + int(self._decoding is not None),
                "steps": self.num_steps,
            }

    def check_health(self) -> None:
        """Raise `RuntimeError` if a thread has died or a piece of work has not ended within `stall_timeout_s`."""
        with self._condition:
            if self._closed:
                raise RuntimeError(f"the engine has stopped: {self._closed}")
            busy = {name: since for name, since in self._busy_since.items() if since is not None}
        if dead := [thread.name for thread in self._threads if not thread.is_alive()]:
            raise RuntimeError(f"threads have died: {', '.join(dead)}")
        for name, since in busy.items():
            if time.monotonic() - since > self._stall_timeout_s:
                raise RuntimeError(f"{name} has not advanced for {time.monotonic() - since:.0f} s")

    def close(self, reason: str = "the server is shutting down") -> None:
        """Stop; everyone still here is told. Waits shortly for work on the device to end."""
        with self._condition:
            self._closed = self._closed or reason
            self._tell_everyone(reason)
            self._condition.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    # ---- callers' side -----------------------------------------------------------------------------------------

    def _enter(self, job: Job) -> None:
        with self._condition:
            if self._closed:
                raise ServerError(f"no pictures are made here any more: {self._closed}.")
            under_way = len(self._active) + int(self._preparing is not None)
            if under_way + len(self._waiting) >= self._max_batch_size + self._max_queued:
                raise Overloaded(f"{len(self._waiting)} pictures are waiting already; try again in a few seconds.")
            self._waiting.append(job)
            self._tell_positions()
            self._condition.notify_all()

    def _leave(self, job: Job) -> None:
        with self._condition:
            job.told = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_positions()
            if job in self._active and job not in self._stepping:
                self._active.remove(job)
            self._condition.notify_all()

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._waiting):
            if job.position != position:
                job.position = position
                job.tell(Queued(position))

    def _tell_everyone(self, reason: str) -> None:
        everyone = [*self._waiting, *self._active, *self._finished, *self._previews, self._preparing, self._decoding]
        for job in everyone:
            if job is not None:
                job.tell(ServerError(f"the picture was not finished: {reason}."))
        for jobs in (self._waiting, self._active, self._finished, self._previews):
            jobs.clear()

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
                self._tell_everyone(self._closed)
                self._condition.notify_all()

    def _wait(self, ready: Callable[[], Any]) -> bool:
        """Sleep until there is work; False if the engine closed instead. The lock must be held."""
        self._busy_since[threading.current_thread().name] = None
        self._condition.wait_for(lambda: self._closed or ready())
        self._busy_since[threading.current_thread().name] = time.monotonic()
        return not self._closed

    def _has_place(self) -> bool:
        return len(self._active) < self._max_batch_size and len(self._finished) < self._max_batch_size

    def _prepare_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._waiting and self._has_place()):
                return
            job = self._preparing = self._waiting.popleft()  # first come, first served, whatever the size
            self._tell_positions()
        outcome: Exception | None = None
        try:
            job.generation = self._pipeline.prepare(job.request)
        except ValueError as error:
            outcome = InvalidRequest(str(error))
        except Exception as error:
            logger.exception("prepare failed")
            outcome = ServerError(f"the picture could not be prepared ({type(error).__name__}).")
        with self._condition:
            self._preparing = None
            if outcome is not None:
                job.tell(outcome)
            elif not job.told:
                self._active.append(job)
            self._condition.notify_all()

    def _next_group(self) -> list[Job]:
        """The pictures of the size that has waited longest for a step."""
        sizes = list(dict.fromkeys(job.generation.size for job in self._active))
        self._last_turn = {size: self._last_turn.get(size, 0) for size in sizes}
        size = min(sizes, key=self._last_turn.__getitem__)
        self._last_turn[size] = self.num_steps + 1
        return [job for job in self._active if job.generation.size == size]

    def _step_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._active):
                return
            group = self._stepping = self._next_group()
        outcome: Exception | None = None
        try:
            self._pipeline.step([job.generation for job in group])
            self._synchronize()
        except Exception as error:
            logger.exception("a step of %d pictures failed", len(group))
            outcome = error
        with self._condition:
            self.num_steps += 1
            self._stepping = []
            for job in group:
                if outcome is not None:
                    job.tell(ServerError(f"a step of the picture failed ({type(outcome).__name__}); try again."))
                self._after_step(job)
            self._condition.notify_all()

    def _after_step(self, job: Job) -> None:
        if job not in self._active:  # the engine has closed in the meantime
            return
        generation = job.generation
        if job.told:
            self._active.remove(job)
            return
        job.tell(Progress(generation.step_index, generation.num_steps))
        if generation.done:
            self._active.remove(job)
            self._finished.append(job)
        elif self._preview_due(job) and not job.preview_pending:  # a slow decoder gets fewer, not a backlog
            job.preview_pending = True
            self._previews.append(job)

    def _preview_due(self, job: Job) -> bool:
        step, num_steps = job.generation.step_index, job.generation.num_steps
        if job.previews is True:
            return step % self._preview_every == 0
        return step in {round(i * num_steps / (job.previews + 1)) for i in range(1, job.previews + 1)}

    def _decode_next(self) -> None:
        with self._condition:
            if not self._wait(lambda: self._finished or self._previews):
                return
            final = bool(self._finished)  # finished pictures go before previews
            job = self._decoding = (self._finished if final else self._previews).popleft()
            skip = job.told or (not final and job.generation.done)
        event: Event | Exception | None = None
        if not skip:
            try:
                event = self._finish(job) if final else self._look(job)
            except Exception as error:
                logger.exception("decode failed")
                event = ServerError(f"the picture could not be decoded ({type(error).__name__}).") if final else None
        with self._condition:
            self._decoding = None
            job.preview_pending = False
            # A preview that comes after the last step would be older news than what the caller knows.
            if event is not None and (final or not job.generation.done):
                job.tell(event)
            self._condition.notify_all()

    def _finish(self, job: Job) -> Event | Exception:
        generation = job.generation
        if not generation.latents.isfinite().all():
            return ServerError("the picture became invalid (not a number); try another seed or guidance_scale.")
        image = self._pipeline.decode([generation])[0]
        return Result(image, tuple(generation.mask_images()), generation.request.seed)

    def _look(self, job: Job) -> Progress:
        generation = job.generation
        preview, masks = self._pipeline.preview([generation])[0], tuple(generation.mask_images())
        return Progress(generation.step_index, generation.num_steps, preview, masks)
