"""Samples of consecutive steps from worker processes, for stages that never reuse a sample."""

import os
from collections.abc import Generator
from typing import Generic, TypeVar

from ..data.loader import StepSource, batches

T = TypeVar("T")
NUM_STEPS = 1 << 40  # more than a run ever has


class SampleStream(Generic[T]):
    """Calls a source for one step after the other; the first call of `samples` starts the workers.

    Args:
        source: makes the samples of a step; must be picklable if there are workers.
        workers: number of processes; None for one fewer than the cores.
    """

    def __init__(self, source: StepSource[T], workers: int | None = None) -> None:
        self._source = source
        self._workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
        self._steps: Generator[tuple[int, T], None, None] | None = None

    def samples(self, step: int) -> T:
        """The samples of a step, which must follow that of the last call."""
        if self._steps is None:
            self._steps = batches(self._source, first_step=step, last_step=NUM_STEPS, workers=self._workers)
        number, samples = next(self._steps)
        assert number == step, f"samples of step {number} in step {step}"
        return samples

    def close(self) -> None:
        """End the workers."""
        if self._steps is not None:
            self._steps.close()
