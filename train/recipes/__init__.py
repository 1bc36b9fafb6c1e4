"""Recipes: functions that return the configuration of a training run.

The docstring of each recipe states the hardware it is meant for, the expected time and the memory. Times and memory
are estimates, not measurements, unless the docstring says otherwise. The floating-point operations per sample were
counted by PyTorch's `FlopCounterMode`, with gradient checkpointing and all encoders.
"""

from collections.abc import Callable

from ..config import TrainConfig
from .mini import mini, mini_gpu
from .sd15 import sd15_512
from .sdxl import sdxl_512, sdxl_1024

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (sdxl_512, sdxl_1024, sd15_512, mini, mini_gpu)
}
