"""The deployment that makes images: one pipeline, one engine, health. Ray Serve runs as many as the load needs."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from realcustom import MethodConfig, RealCustomPipeline, Request, apply_memory_tier
from realcustom.request import ResolvedRequest

from .engine.engine import Engine
from .engine.memory import MemoryBudget, available, measure
from .metrics import RayMetrics
from .protocol.events import Event, Result
from .protocol.model_info import ModelInfo
from .settings import LiveSettings, Settings, resolve_path

PRESETS = ("paper", "release")


def model_path(settings: Settings) -> str:
    """Folder of the model on this machine, or its name on the hub.

    Raises:
        FileNotFoundError: a path that this machine does not have.
    """
    path = resolve_path(settings.model)
    if not Path(path).exists() and (Path(path).is_absolute() or path.count("/") != 1 or path.startswith("assets/")):
        raise FileNotFoundError(
            f"model {settings.model!r} does not exist. Give a folder in diffusers layout or a hub name (owner/name)."
        )
    return path


def load_pipeline(settings: Settings) -> RealCustomPipeline:
    """The pipeline of `settings.model` on its device.

    Raises:
        FileNotFoundError: see `model_path`.
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
    """What clients need to know; the vocabulary is `vocabulary.json` beside the model, if it has one."""
    method = pipeline.realcustom_config.method
    vocabulary = Path(resolve_path(settings.model)) / "vocabulary.json"
    return ModelInfo(
        id=Path(settings.model).name,
        preset=next((name for name in PRESETS if MethodConfig.preset(name) == method), "custom"),
        sampling=pipeline.sampling,
        limits=settings.limits,
        vocabulary=json.loads(vocabulary.read_text()) if vocabulary.is_file() else {},
    )


class Replica:
    """One pipeline and its engine; see `serving.build` for how many there are and what they are given.

    Args:
        settings: `Settings` with the device chosen (`Settings.placed`).
        metrics: export what the engine does through Ray Serve, which must be running this replica then.
    """

    def __init__(self, settings: Settings, metrics: bool = False) -> None:
        if settings.cpu_threads:
            torch.set_num_threads(settings.cpu_threads)
        self._tuning = settings.live
        self._pipeline = load_pipeline(settings)
        self._info = model_info(self._pipeline, settings)
        memory_model = measure(self._pipeline)  # also warms up, and a broken model fails here
        if settings.compile != "off":
            self._pipeline.compile(whole=settings.compile == "whole")
            self._pipeline.warm_up()
        budget = settings.memory_gb * 2**30 if settings.memory_gb else available(settings.device)
        self._engine = Engine(
            self._pipeline,
            **settings.engine_options,
            batch_sizes=settings.batch_sizes,
            budget=MemoryBudget(memory_model, budget),
            synchronize=torch.cuda.synchronize if settings.device == "cuda" else None,
            observer=RayMetrics() if metrics else None,
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray Serve calls this with the deployment's `user_config`, at the start and whenever it changes.

        Args:
            user_config: fields of `LiveSettings`; those left out are as the replica was started with.
        Raises:
            ValidationError: not what `LiveSettings` takes; the deployment keeps its configuration then.
        """
        live = LiveSettings.model_validate({**self._tuning.model_dump(), **user_config})
        self._info = self._info.with_limits(live.limits)
        self._engine.reconfigure(**live.engine_options)

    async def model(self) -> ModelInfo:
        return self._info

    async def stats(self) -> dict[str, float]:
        return self._engine.stats()

    async def stream(
        self, request: Request | ResolvedRequest, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Events of one image. Cancelling the call, or closing the iterator, frees its place within one step."""
        limits = self._info.limits
        if isinstance(request, Request):
            request = request.resolve(self._info.sampling)
            limits.check(request)
        events = self._engine.stream(request, previews, limits.timeout_s(timeout_s), _request_id())
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def generate(self, request: Request | ResolvedRequest, timeout_s: float | None = None) -> Result:
        """The finished image of one request."""
        return [event async for event in self.stream(request, previews=False, timeout_s=timeout_s)][-1]

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `autoscaling.BacklogPolicy` decides by; Ray Serve asks every few seconds."""
        stats = self._engine.stats()
        images = stats["waiting"] + stats["preparing"] + stats["active"]
        return {"backlog_s": stats["backlog_s"], "images": images}

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _request_id() -> str:
    """Of the Ray Serve request that is being answered; the same one the HTTP answer has as X-Request-ID."""
    from ray.serve.context import _get_serve_request_context

    return _get_serve_request_context().request_id
