"""How many bytes an image under way takes, measured on the loaded model, and whether one more still fits.

Legend: an image *holds* its text, noise, masks and share of the references between steps; while its group steps, or
while it is decoded, activations come on top for a moment.
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

logger = logging.getLogger("ray.serve.realcustom")

USABLE = 0.9  # share of a GPU's free memory given to images: the rest is fragmentation
USABLE_MAIN = 0.5  # share of free main memory: other replicas and programs live there, too


@dataclass(frozen=True)
class AffineCost:
    """bytes = fixed + per_pixel x pixels."""

    fixed: float
    per_pixel: float

    @classmethod
    def through(cls, points: list[tuple[int, int]]) -> "AffineCost":
        """Through the measured (pixels, bytes); what grows slower than the image is taken as fixed."""
        (small, few), (large, many) = points
        per_pixel = max(0.0, (many - few) / (large - small))
        return cls(max(0.0, many - per_pixel * large), per_pixel)

    def at(self, pixels: int) -> float:
        return self.fixed + self.per_pixel * pixels


@dataclass(frozen=True)
class MemoryModel:
    """Measured bytes.

    Attributes:
        held: by one image between steps, without references.
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
        """Bytes at the worst moment for images of (pixels, subjects) under way together.

        Images of one size step together; another size steps at another time, while one image is decoded.
        """
        groups: dict[int, int] = {}
        total = 0.0
        for pixels, subjects in images:
            total += self.resident.at(pixels) + subjects * self.reference
            groups[pixels] = groups.get(pixels, 0) + 1
        step = max((self.call.at(p) + n * self.stepping.at(p) for p, n in groups.items()), default=0.0)
        return total + step + max((self.decoding.at(p) for p in groups), default=0.0)


class MemoryBudget:
    """Decides whether one more image fits.

    Args:
        footprint: of the loaded model.
        num_bytes: for all images under way together.
    """

    def __init__(self, memory_model: MemoryModel, num_bytes: float) -> None:
        self.memory_model, self.num_bytes = memory_model, num_bytes

    def fits(self, images: Iterable[tuple[int, int]]) -> bool:
        return self.memory_model.needed(images) <= self.num_bytes

    def shrink(self, images: Iterable[tuple[int, int]]) -> None:
        """These did not fit after all: from now on fewer are let in together."""
        self.num_bytes = min(self.num_bytes, 0.9 * self.memory_model.needed(images))


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of main memory, where torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release() -> None:
    """Give what torch keeps for later back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- measuring ---------------------------------------------------------------------------------------------------


class _TensorAccount(TorchDispatchMode):
    """Counts bytes of storages that torch's operations make inside the block, and their peak; for devices without
    statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._lock = threading.Lock()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
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
        start = self.peak = self.live
        work()
        return self.peak - start


class _DeviceAccount:
    """The same from the statistics of a GPU's allocator."""

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
    """Make gray images of the default size and of half its sides, alone and in twos, and count the bytes.

    Call it before `pipeline.compile()`: counting main memory sees single operations.
    """
    account = _DeviceAccount() if pipeline.unet.device.type == "cuda" else _TensorAccount()
    sampling, grid = pipeline.sampling, pipeline.vae_scale_factor
    half = tuple(max(grid, side // 2 // grid * grid) for side in (sampling.height, sampling.width))
    names = ("resident", "call", "stepping", "decoding")
    points: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    with account if isinstance(account, TorchDispatchMode) else nullcontext():
        for height, width in (half, (sampling.height, sampling.width)):
            measured, reference = _measure_at(pipeline, account, height, width)
            for name, value in zip(names, measured, strict=True):
                points[name].append((height * width, value))
    lines = {name: AffineCost.through(values) for name, values in points.items()}
    memory_model = MemoryModel(reference=reference, **lines)
    one = memory_model.needed([(sampling.height * sampling.width, 1)])
    two = memory_model.needed([(sampling.height * sampling.width, 1)] * 2)
    logger.info("one image of the default size takes %.1f MB, each further one %.1f MB", one / 1e6, (two - one) / 1e6)
    return memory_model


def _measure_at(pipeline, account, height: int, width: int) -> tuple[tuple[int, int, int, int], int]:
    """((held, call, stepping, decoding), reference) in bytes for one size."""
    subjects = ()
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
    return (resident, max(0, alone - stepping), stepping, decoding), reference


def available(device: str) -> float:
    """Bytes that images may take on this machine, with the model loaded."""
    if device == "cuda":
        release()
        return USABLE * torch.cuda.mem_get_info()[0]
    return USABLE_MAIN * psutil.virtual_memory().available
