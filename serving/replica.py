"""The deployment `Replica`: one pipeline, one engine, health checks. Ray Serve scales the number of replicas."""

import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from realcustom import MethodConfig, RealCustomPipeline, Request, apply_memory_tier
from realcustom.request import ResolvedRequest
from realcustom.words import PromptLength

from .clients.admission import Reservation
from .clients.merge import merge_streams
from .engine.device_clock import CudaClock
from .engine.engine import Engine
from .engine.memory import MemoryBudget, available, measure
from .engine.step_time import StepTimeModel
from .engine.stepper import step_kind
from .metrics import RayMetrics
from .protocol.errors import EXPECTED_ERRORS
from .protocol.events import HEARTBEAT_S, Event, Heartbeat, Result, result_of
from .protocol.model_info import ModelInfo
from .ray_private import current_request_id
from .settings import LiveSettings, Settings, resolve_path

logger = logging.getLogger("ray.serve.realcustom")

PRESETS = ("paper", "release")


def model_path(settings: Settings) -> str:
    """Folder of the model on this machine, or its hub id.

    Raises:
        FileNotFoundError: the path does not exist on this machine.
    """
    path = resolve_path(settings.model)
    if not Path(path).exists() and (Path(path).is_absolute() or path.count("/") != 1 or path.startswith("assets/")):
        raise FileNotFoundError(
            f"model {settings.model!r} does not exist. Give a folder in the diffusers layout or a hub id (owner/name)."
        )
    return path


def load_pipeline(settings: Settings) -> RealCustomPipeline:
    """Load the pipeline of `settings.model` onto its device.

    Raises:
        FileNotFoundError: see `model_path`.
        ValueError: the adapter does not fit the model.
    """
    path = model_path(settings)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.device == "cuda" else "float32"
    pipeline = RealCustomPipeline.from_pretrained(path, dtype=getattr(torch, dtype))
    if settings.adapter:
        pipeline.load_realcustom(resolve_path(settings.adapter))
    pipeline.set_progress_bar_config(disable=True)
    apply_memory_tier(pipeline, settings.device, settings.memory)
    return pipeline


def model_info(pipeline: RealCustomPipeline, settings: Settings) -> ModelInfo:
    """Description of the model for clients. The vocabulary is read from `vocabulary.json` in the model, if present."""
    method = pipeline.realcustom_config.method
    vocabulary = Path(resolve_path(settings.model)) / "vocabulary.json"
    return ModelInfo(
        id=Path(settings.model).name,
        preset=next((name for name in PRESETS if MethodConfig.preset(name) == method), "custom"),
        sampling=pipeline.sampling,
        limits=settings.limits,
        max_tokens=pipeline.tokenizer.model_max_length,
        vocabulary=json.loads(vocabulary.read_text()) if vocabulary.is_file() else {},
    )


@dataclass(frozen=True)
class MemoryShares:
    """Bytes for active images and for the caches of a replica."""

    images: float
    text_cache: float
    reference_cache: float

    @classmethod
    def of(cls, settings: Settings) -> "MemoryShares":
        """The shares of the device with the loaded model. Without `memory_gb`, the caches take at most half of what is
        available and the images take the rest."""
        text, reference = settings.text_cache_gb * 2**30, settings.reference_cache_gb * 2**30
        if settings.memory_gb:
            return cls(settings.memory_gb * 2**30, text, reference)
        total = available(settings.device)
        scale = min(1.0, total / 2 / (text + reference)) if text + reference else 1.0
        return cls(total - scale * (text + reference), scale * text, scale * reference)


def first_step_time(pipeline: RealCustomPipeline, synchronize: Callable[[], None]) -> StepTimeModel:
    """A model of the step time with one measured step, so that the first step of each size has an upper bound."""
    model = StepTimeModel()
    generation = pipeline.prepare(Request(prompt="a ball", seed=0))
    kind = step_kind([generation])
    start = time.monotonic()
    pipeline.step([generation])
    synchronize()
    model.add(kind.calls, kind.row_pixels, time.monotonic() - start, kind.pixels)
    pipeline.clear_caches()
    return model


def prepare_execution(pipeline: RealCustomPipeline, settings: Settings) -> tuple[int, ...]:
    """Compile the UNet and capture its CUDA graphs as configured, before the replica accepts requests.

    Returns:
        the numbers of images that may step together; empty for any number. With graphs, they are powers of two, so that
        few graphs are needed.
    """
    pipeline.execution = settings.execution
    if settings.compile != "off":
        pipeline.compile(resnets=settings.compile == "resnets")
    graphs = pipeline.uses_graphs
    powers = tuple(2**n for n in range(settings.max_batch_size.bit_length()))
    if graphs or settings.compile != "off":
        report = pipeline.warm_up(settings.warm_up_sizes, powers)
        logger.info("warm-up took %.0f s, %d CUDA graphs were captured", report.seconds, report.num_graphs)
    return powers if graphs else ()


class Replica:
    """One pipeline and its engine. `serving.build` sets how many replicas there are, and their resources.

    Args:
        settings: resolved, see `Settings.resolved`.
        metrics: export the metrics of the engine; requires Ray Serve.
    """

    def __init__(self, settings: Settings, metrics: bool = False) -> None:
        if settings.cpu_threads:
            torch.set_num_threads(settings.cpu_threads)
        self._settings = settings.live
        self._pipeline = load_pipeline(settings)
        self._info = model_info(self._pipeline, settings)
        memory_model = measure(self._pipeline)  # also warms up; a broken model fails here
        batch_sizes = prepare_execution(self._pipeline, settings)
        synchronize = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
        shares = MemoryShares.of(settings)
        self._pipeline.text_cache.resize(int(shares.text_cache))
        self._pipeline.reference_cache.resize(int(shares.reference_cache))
        self._engine = Engine(
            self._pipeline,
            max_batch_size=settings.max_batch_size,
            max_queued=settings.max_queued,
            preview_every=settings.preview_every,
            stall_timeout_s=settings.stall_timeout_s,
            batch_sizes=batch_sizes,
            budget=MemoryBudget(memory_model, shares.images),
            step_time=first_step_time(self._pipeline, synchronize),
            clock=CudaClock() if settings.device == "cuda" else None,
            observer=RayMetrics() if metrics else None,
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply the deployment's `user_config`. Ray Serve calls this at the start and after every change.

        Args:
            user_config: fields of `LiveSettings`; unset fields keep the values that the replica was started with.
        Raises:
            ValidationError: an unknown field or an invalid value; the deployment keeps its configuration.
        """
        live = LiveSettings.model_validate({**self._settings.model_dump(), **user_config})
        self._info = self._info.with_limits(live.limits)
        self._engine.reconfigure(
            max_batch_size=live.max_batch_size,
            max_queued=live.max_queued,
            preview_every=live.preview_every,
            stall_timeout_s=live.stall_timeout_s,
        )

    async def model(self) -> ModelInfo:
        """The loaded model."""
        return self._info

    async def prompt_length(self, prompt: str) -> PromptLength:
        """How much of a prompt the text encoder reads.

        Raises:
            InvalidRequest: the prompt has more than `max_prompt_chars` characters.
        """
        self._info.limits.check_text("prompt", prompt)
        return self._pipeline.text_encoders.prompt_length(prompt)

    async def stats(self) -> dict[str, float]:
        """See `Engine.stats`."""
        return self._engine.stats()

    def reserve(self, number: int, client: str = "") -> AbstractContextManager[Reservation]:
        """A place for each of `number` images, for an HTTP interface in the same process. The engine's queue is the
        only one, so places are checked, but not held.

        Raises:
            QueueFull: there are not enough places.
        """
        self._engine.check_capacity(number)
        return nullcontext(Reservation(client, number))

    async def stream(
        self,
        request: Request | ResolvedRequest,
        *,
        previews: bool | int = True,
        timeout_s: float | None = None,
        client: str = "",
        reservation: Reservation | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of one image. Closing the iterator cancels the image within one step.

        Args:
            request: a `Request` is resolved and checked against the limits; a `ResolvedRequest` is not checked again.
            previews: True sends one every few steps, False sends none, an int sends this many in total.
            timeout_s: deadline in seconds from now; at most, and by default, the limit `max_timeout_s`.
            client: name of the sender; senders share the replica equally.
            reservation: no effect.
        Raises:
            InvalidRequest, QueueFull, ServerError: see `serving.protocol.errors`.
        """
        limits = self._info.limits
        if isinstance(request, Request):
            request = request.resolve(self._info.sampling)
            limits.check(request)
        events = self._engine.stream(request, previews, limits.timeout_s(timeout_s), current_request_id(), client)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Result):
                    encoders = self._pipeline.text_encoders
                    warnings = encoders.truncation_warnings(request.prompt, request.negative_prompt)
                    event = replace(event, warnings=warnings)
                yield event

    async def events(
        self,
        request: Request | ResolvedRequest,
        previews: bool | int = True,
        timeout_s: float | None = None,
        client: str = "",
    ) -> AsyncGenerator[Event | Heartbeat | Exception, None]:
        """`stream` for Ray Serve handles: an expected error is yielded as the last item instead of raised.

        Ray Serve logs a traceback for each error that a replica raises, including errors of the caller. After
        `HEARTBEAT_S` seconds without an event, a `Heartbeat` is yielded.
        """
        events = self.stream(request, previews=previews, timeout_s=timeout_s, client=client)
        try:
            async with aclosing(merge_streams([events], heartbeat_s=HEARTBEAT_S)) as batches:
                async for batch in batches:
                    for _, event in batch:
                        yield event
                    if not batch:
                        yield Heartbeat()
        except EXPECTED_ERRORS as error:
            yield error

    async def generate(self, request: Request | ResolvedRequest, *, timeout_s: float | None = None) -> Result:
        """Return the finished image of one request. Raises as `stream` does."""
        return await result_of(self.stream(request, previews=False, timeout_s=timeout_s))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Input of `autoscaling.BacklogPolicy`; Ray Serve calls this every second (`metrics_interval_s`)."""
        stats = self._engine.stats()
        images = stats["waiting"] + stats["preparing"] + stats["active"]
        return {"backlog_s": stats["backlog_s"], "images": images}

    def check_health(self) -> None:
        """Raise if the engine has stopped or stalled; Ray Serve then replaces the replica."""
        self._engine.check_health()

    def close(self) -> None:
        """Stop the engine; images that are not finished end with `Unavailable`."""
        self._engine.close()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self.close()
