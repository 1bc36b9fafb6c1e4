"""A stand-in for CUDA graphs on a CPU: it records tensor operations and repeats them on the same memory.

Like a CUDA graph, a tape reads and writes fixed addresses and holds the Python numbers of the recorded run, so it shows
the same errors when an executor does not notice a change.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Tape(TorchDispatchMode):
    """Records the operations inside a `with` block; `replay` repeats them.

    Attributes:
        closed: whether the tape has been reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple, dict, Any]] = []
        self.closed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._is_view(func):  # views of recorded memory remain valid
            self._operations.append((func, args, kwargs or {}, result))
        return result

    @staticmethod
    def _is_view(func) -> bool:
        returns = func._schema.returns
        return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    def replay(self) -> None:
        assert not self.closed, "a graph was replayed after its reset"
        for func, args, kwargs, recorded in self._operations:
            result = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)

    def reset(self) -> None:
        self.closed = True
        self._operations.clear()


class TapeBackend:
    """`GraphBackend` that records tapes.

    Attributes:
        tapes: all recorded tapes.
        fail: raise an error during the next capture.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.num_bytes = 0
        self.fail = False

    def capture(self, work: Callable[[], T]) -> tuple[Tape, T] | None:
        from realcustom.execution import GraphCaptureError

        work()
        if self.fail:
            raise GraphCaptureError("a UNet call could not be captured as a CUDA graph")
        tape = Tape()
        with tape:
            result = work()
        self.tapes.append(tape)
        return tape, result

    def reset(self, graphs: Sequence[Any]) -> None:
        for graph in graphs:
            graph.reset()
