"""Warm-up: runs every kind of step once, so that the first real request does not wait for compilation."""

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

from PIL import Image

from .config import MaskSource
from .generation import Generation
from .request import Request, Subject

EXACT, APPROXIMATE = get_args(MaskSource)
# Groups of generations that step together, each generation given by its number of subjects and its mask source. They
# cover every kind of UNet call. Each kind is compiled with two batch sizes; after that, the batch size is dynamic.
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


def warm_up(pipeline: Any, sizes: Sequence[tuple[int, int]], *, compiled: bool) -> None:
    """Run one step of each group, with and without classifier-free guidance, plus a preview and a decode.

    Args:
        pipeline: a `RealCustomPipeline`.
        sizes: (height, width) in px; empty for the default size.
        compiled: whether there are programs to compile; otherwise a single group suffices.
    """
    groups = GROUPS if compiled else GROUPS[:1]
    scales = (None, 1.0) if compiled else (None,)
    for (height, width), guidance_scale, group in product(sizes or [(None, None)], scales, groups):
        settings = dict(height=height, width=width, guidance_scale=guidance_scale, seed=0)
        generations = [_gray_generation(pipeline, number, mask_source=source, **settings) for number, source in group]
        pipeline.step(generations)
        if group is groups[-1]:
            pipeline.preview(generations[:1])
            pipeline.decode(generations[:1])
    pipeline.clear_caches()


def _gray_generation(pipeline: Any, num_subjects: int, **settings) -> Generation:
    names = ("ball", "box")[: num_subjects if pipeline.adapter is not None else 0]
    gray = Image.new("RGB", (64, 64), "gray")
    subjects = tuple(Subject(image=gray, target_phrase=name) for name in names)
    return pipeline.prepare(Request(prompt="a ball and a box", subjects=subjects, **settings))
