"""The deployment that makes pictures: one pipeline, one engine, health. Ray Serve runs as many as the load needs."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from PIL import Image

from realcustom import MethodConfig, RealCustomPipeline, Request, Subject

from .client import ModelInfo
from .engine import Engine
from .events import Event, Result
from .settings import Settings, locate

PRESETS = ("paper", "release")


def load_pipeline(settings: Settings) -> RealCustomPipeline:
    """The pipeline of `settings.model` on its device.

    Raises:
        FileNotFoundError: a path that this machine does not have.
    """
    path = locate(settings.model)
    if not Path(path).exists() and (Path(path).is_absolute() or path.count("/") != 1 or path.startswith("assets/")):
        raise FileNotFoundError(f"model {settings.model!r} is neither a folder of the project nor of this machine.")
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.device == "cuda" else "float32"
    pipeline = RealCustomPipeline.from_pretrained(path, dtype=getattr(torch, dtype))
    if settings.adapter:
        pipeline.load_realcustom(locate(settings.adapter))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(settings.device)


def model_info(pipeline: RealCustomPipeline, settings: Settings) -> ModelInfo:
    """What clients need to know; the vocabulary is `vocabulary.json` beside the model, if it has one."""
    method = pipeline.realcustom_config.method
    vocabulary = Path(locate(settings.model)) / "vocabulary.json"
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
    """

    def __init__(self, settings: Settings) -> None:
        if settings.cpu_threads:
            torch.set_num_threads(settings.cpu_threads)
        self._pipeline = load_pipeline(settings)
        self._info = model_info(self._pipeline, settings)
        self._warm_up()
        self._engine = Engine(
            self._pipeline,
            max_batch_size=settings.max_batch_size,
            max_queued=settings.max_queued,
            preview_every=settings.preview_every,
            stall_timeout_s=settings.stall_timeout_s,
            synchronize=torch.cuda.synchronize if settings.device == "cuda" else None,
        )

    async def model(self) -> ModelInfo:
        return self._info

    async def stats(self) -> dict[str, int]:
        return self._engine.stats()

    async def stream(self, request: Request, previews: bool | int = True) -> AsyncIterator[Event]:
        """Events of one picture. Cancelling the call, or closing the iterator, frees its place within one step."""
        self._info.limits.check(request, self._info.sampling)
        events = self._engine.stream(request, previews)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def generate(self, request: Request) -> Result:
        """The finished picture of one request."""
        return [event async for event in self.stream(request, previews=False)][-1]

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises."""
        self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()

    def _warm_up(self) -> None:
        """One step and one decode, so that a broken model fails here, and the first visitor does not wait longer."""
        subjects = ()
        if self._pipeline.adapter is not None:
            subjects = (Subject(image=Image.new("RGB", (64, 64), "grey"), target_phrase="ball"),)
        generation = self._pipeline.prepare(Request(prompt="a ball", subjects=subjects, seed=0))
        self._pipeline.step([generation])
        self._pipeline.preview([generation])
        self._pipeline.clear_caches()
