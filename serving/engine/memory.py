"""MemoryModel and MemoryBudget: how many bytes images take, measured on the loaded model, and whether one more fits.

Between steps, an image keeps its text, latents, masks and references (*resident*). Activations are added while its
group steps and while it is decoded.

The private APIs of torch that count bytes in main memory are used in this file only.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realcustom import RealCustomPipeline, Request, Subject
from realcustom.execution import device_lock

logger = logging.getLogger("ray.serve.realcustom")

USABLE_GPU = 0.9  # share of a GPU's free memory for images; the rest is lost to fragmentation
USABLE_MAIN = 0.5  # share of free main memory for images; the rest is for other replicas and programs


@dataclass(frozen=True)
class AffineCost:
    """Bytes as an affine function of the image size: fixed + per_pixel * pixels."""

    fixed: float
    per_pixel: float

    @classmethod
    def through(cls, points: list[tuple[int, int]]) -> "AffineCost":
        """The line through two measured points (pixels, bytes). A negative part is set to 0, so that the bytes at the
        larger size are exact or overestimated."""
        (small, few), (large, many) = points
        per_pixel = max(0.0, (many - few) / (large - small))
        return cls(max(0.0, many - per_pixel * large), per_pixel)

    def at(self, pixels: int) -> float:
        return self.fixed + self.per_pixel * pixels


@dataclass(frozen=True)
class MemoryModel:
    """Measured bytes.

    Attributes:
        resident: of one image between steps, without its references.
        reference: keys and values of one reference.
        call: activations of a step that do not grow with the number of images.
        stepping: activations of a step, per image.
        decoding: activations of decoding one image.
    """

    resident: AffineCost
    reference: float
    call: AffineCost
    stepping: AffineCost
    decoding: AffineCost

    def needed(self, images: Iterable[tuple[int, int]]) -> float:
        """Peak bytes of images, each given as (pixels, subjects).

        Images of one size step together. Different sizes step at different times, while one image may be decoded.
        """
        groups: dict[int, int] = {}
        resident = 0.0
        for pixels, subjects in images:
            resident += self.resident.at(pixels) + subjects * self.reference
            groups[pixels] = groups.get(pixels, 0) + 1
        step = max((self.call.at(p) + n * self.stepping.at(p) for p, n in groups.items()), default=0.0)
        return resident + step + max((self.decoding.at(p) for p in groups), default=0.0)


class MemoryBudget:
    """Decides whether images fit into memory together.

    Args:
        memory_model: of the loaded model.
        num_bytes: available for images.
    """

    def __init__(self, memory_model: MemoryModel, num_bytes: float) -> None:
        self.memory_model, self.num_bytes = memory_model, num_bytes

    def fits(self, images: Iterable[tuple[int, int]]) -> bool:
        """Whether images, each given as (pixels, subjects), fit together."""
        return self.memory_model.needed(images) <= self.num_bytes

    def shrink(self, images: Iterable[tuple[int, int]]) -> None:
        """Reduce the budget to 90% of what these images need, because they did not fit."""
        self.num_bytes = min(self.num_bytes, 0.9 * self.memory_model.needed(images))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or main memory is exhausted; for the latter torch raises a plain `RuntimeError`."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    """Release the GPU memory that torch caches."""
    if torch.cuda.is_available():
        with device_lock.shared():
            torch.cuda.empty_cache()


def available(device: str) -> float:
    """Bytes that images may take on `device` ("cuda" or "cpu") of this machine once the model is loaded."""
    if device == "cuda":
        release()
        return USABLE_GPU * torch.cuda.mem_get_info()[0]
    return USABLE_MAIN * psutil.virtual_memory().available


# ---- measuring -----------------------------------------------------------------------------------------------------


class TensorAccount(TorchDispatchMode):
    """Counts the bytes that torch operations allocate inside a `with` block, and their peak, for devices without
    allocator statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._known:
                return
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            self._known.discard(key)
            self.live -= size

    def peak_during(self, work: Callable[[], object]) -> int:
        """Bytes that `work` allocates at its peak, beyond those live before."""
        start = self.peak = self.live
        work()
        return self.peak - start


class GpuAccount:
    """The numbers of `TensorAccount`, from the statistics of the GPU's allocator."""

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_during(self, work: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = self.live
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start


def measure(pipeline: RealCustomPipeline) -> MemoryModel:
    """Generate gray images of the default size and of half its sides, one and two at a time, and count bytes.

    Calls run eagerly: in main memory, only single operations can be counted, and the memory of CUDA graphs is part of
    what is used when `available` is called after the warm-up. Call it before `pipeline.compile()`.
    """
    execution, pipeline.execution = pipeline.execution, "eager"
    account = GpuAccount() if pipeline.unet.device.type == "cuda" else TensorAccount()
    sampling, grid = pipeline.sampling, pipeline.vae_scale_factor
    full = (sampling.height, sampling.width)
    half = (max(grid, full[0] // 2 // grid * grid), max(grid, full[1] // 2 // grid * grid))
    with account if isinstance(account, TensorAccount) else nullcontext():
        small, large = (_measure_at(pipeline, account, *size) for size in (half, full))
    pipeline.execution = execution

    def line(name: str) -> AffineCost:
        pixels = (half[0] * half[1], full[0] * full[1])
        return AffineCost.through([(pixels[0], getattr(small, name)), (pixels[1], getattr(large, name))])

    memory_model = MemoryModel(
        resident=line("resident"),
        reference=large.reference,
        call=line("call"),
        stepping=line("stepping"),
        decoding=line("decoding"),
    )
    one = memory_model.needed([(full[0] * full[1], 1)])
    two = memory_model.needed([(full[0] * full[1], 1)] * 2)
    logger.info("one image of the default size takes %.1f MB, each further one %.1f MB", one / 1e6, (two - one) / 1e6)
    return memory_model


@dataclass(frozen=True)
class _Measured:
    """Bytes at one size; see `MemoryModel`."""

    resident: int
    reference: int
    call: int
    stepping: int
    decoding: int


def _measure_at(
    pipeline: RealCustomPipeline, account: TensorAccount | GpuAccount, height: int, width: int
) -> _Measured:
    subjects: tuple[Subject, ...] = ()
    if pipeline.adapter is not None:
        subjects = (Subject(image=Image.new("RGB", (64, 64), "gray"), target_phrase="ball"),)
    request = Request(prompt="a ball", subjects=subjects, height=height, width=width, seed=0)
    pipeline.clear_caches()
    before = account.live
    first = pipeline.prepare(request)
    alone = account.peak_during(lambda: pipeline.step([first]))
    reference = sum(k.nbytes + v.nbytes for k, v in first.references[0].values()) if subjects else 0
    resident = max(0, account.live - before - reference)
    pair = [pipeline.prepare(request) for _ in range(2)]
    together = account.peak_during(lambda: pipeline.step(pair))
    decoding = account.peak_during(lambda: pipeline.decode([first]))
    pipeline.clear_caches()
    stepping = max(0, together - alone)
    return _Measured(
        resident=resident, reference=reference, call=max(0, alone - stepping), stepping=stepping, decoding=decoding
    )
