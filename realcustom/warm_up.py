"""Warm-up: runs every kind of step once, so that the first real request does not wait for compilation or capture."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from PIL import Image

from .config import MaskSource
from .execution import GraphExecutor
from .generation import Generation
from .request import Request, Subject
from .unet_call import POSITION_BUCKETS, pair_bucket

EXACT, APPROXIMATE = get_args(MaskSource)
# Groups of generations that step together, each generation given by its number of subjects and its mask source. They
# cover every kind of program of compiled blocks. Each kind is compiled with two batch sizes; after that, the batch size
# is dynamic.
GROUPS: tuple[tuple[tuple[int, MaskSource], ...], ...] = (
    *(
        tuple((number, EXACT) for number in numbers)
        for numbers in ((1,), (2,), (1, 1), (2, 1, 1), (2, 2), (0,), (0, 0), (0, 0, 0), (1, 0, 2))
    ),
    ((1, APPROXIMATE),),
    ((2, APPROXIMATE),),
    ((1, APPROXIMATE), (0, EXACT)),
    ((2, APPROXIMATE), (1, EXACT)),
    ((1, APPROXIMATE), (1, APPROXIMATE)),
    ((2, APPROXIMATE), (1, APPROXIMATE), (1, EXACT)),
)


@dataclass(frozen=True)
class WarmUpReport:
    """What a warm-up did.

    Attributes:
        seconds: time of the whole warm-up.
        num_graphs: CUDA graphs that exist afterwards.
    """

    seconds: float
    num_graphs: int


def warm_up(
    pipeline: Any, sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int], *, compiled: bool
) -> WarmUpReport:
    """Run every kind of step, plus a preview and a decode.

    CUDA graphs are captured for images with one subject at the default settings: the guidance branch, and the
    generation branch at each number of masked positions. Other kinds of images are captured when they first occur.

    Args:
        pipeline: a `RealCustomPipeline`.
        sizes: (height, width) in px; empty for the default size.
        batch_sizes: numbers of images that will step together.
        compiled: whether there are programs to compile.
    """
    start = time.monotonic()
    executor = pipeline.denoiser.executor
    for height, width in sizes or [(None, None)]:
        if isinstance(executor, GraphExecutor):
            # The largest batch first: it allocates the slots and the pool that the others use too.
            for batch_size in sorted(set(batch_sizes), reverse=True):
                with executor.capturing_at_once():
                    _capture(pipeline, executor, batch_size, height=height, width=width)
        elif compiled:
            for guidance_scale, group in product((None, 1.0), GROUPS):
                _step(pipeline, group, height=height, width=width, guidance_scale=guidance_scale)
        generations = _step(pipeline, GROUPS[0], height=height, width=width)
        pipeline.preview(generations)
        pipeline.decode(generations)
    pipeline.clear_caches()
    num_graphs = executor.num_graphs if isinstance(executor, GraphExecutor) else 0
    return WarmUpReport(time.monotonic() - start, num_graphs)


def _capture(pipeline: Any, executor: GraphExecutor, batch_size: int, **settings) -> None:
    """Capture the calls of `batch_size` images.

    At the largest resolution, the scope determines how many positions are masked. At the others it also depends on the
    shape of a mask, so each number that calls are padded to is captured there.
    """
    settings["num_inference_steps"] = len(POSITION_BUCKETS) + 1
    generations = [_gray_generation(pipeline, 1, **settings) for _ in range(batch_size)]
    _reserve(executor, generations)
    pipeline.step(generations)
    for fraction in POSITION_BUCKETS:
        for generation in generations:
            if generation.guidance_masks is None:  # a pipeline without an adapter
                continue
            generation.masks_fixed = True
            generation.set_masks(torch.zeros_like(generation.guidance_masks))
            for height, width in sorted(generation.largest_masks)[:-1]:
                generation.largest_masks[height, width] = int(fraction * height * width)
        pipeline.step(generations)


def _reserve(executor: GraphExecutor, generations: Sequence[Generation]) -> None:
    """Provide the slots for a step of these generations before the first capture: more slots discard all graphs."""
    first = generations[0]
    if first.text.keys_values is None:  # runs eagerly
        return
    texts = sum(1 + (g.negative_text is not None) for g in generations)
    references = [r for g in generations for r in (*g.references, *g.negative_references)]
    reference = references[0] if references else None
    executor.reserve(texts, pair_bucket(len(references)), first.text.keys_values, reference)


def _step(pipeline: Any, group: Sequence[tuple[int, MaskSource]], **settings) -> list[Generation]:
    """One step of a group of generations with gray references."""
    generations = [_gray_generation(pipeline, number, mask_source=source, **settings) for number, source in group]
    pipeline.step(generations)
    return generations


def _gray_generation(pipeline: Any, num_subjects: int, **settings) -> Generation:
    names = ("ball", "box")[: num_subjects if pipeline.adapter is not None else 0]
    gray = Image.new("RGB", (64, 64), "gray")
    subjects = tuple(Subject(image=gray, target_phrase=name) for name in names)
    return pipeline.prepare(Request(prompt="a ball and a box", subjects=subjects, seed=0, **settings))
