"""Batches of a mixture, step by step, made in this process or in worker processes.

Every step is a pure function of the mixture and the step number. Workers therefore have no state: worker k of n makes
the steps k, k + n, k + 2n, ..., and holds each finished step until it is taken. Any number of workers gives the same
batches.
"""

import atexit
import logging
import multiprocessing.resource_tracker
import multiprocessing.util  # its exit handler must be registered before ours, so that ours runs first
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from .sample import Sample
from .sprite_world.batches import SpriteBatch

log = logging.getLogger(__name__)

T = TypeVar("T", covariant=True)
Steps = Generator[tuple[int, T], None, None]
Samples = list[Sample] | SpriteBatch
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class StepSource(Protocol[T]):
    """Makes the samples of any step, for example a `Mixture`. `batch_size` is that of the global batch."""

    @property
    def batch_size(self) -> int: ...

    def samples(self, step: int, positions: range) -> T:
        """The samples at some positions of a step's global batch; a pure function of its arguments."""
        ...


@dataclass(frozen=True)
class _Failure:
    """What a worker sends if it fails. `user_error` is the message of a ValueError."""

    traceback: str
    user_error: str | None


def batches(
    mixture: StepSource[T],
    *,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Steps[T]:
    """The samples of a rank for each step in [first_step, last_step).

    Together, the ranks of a step have the mixture's global batch. If the batch size is not a multiple of `world_size`,
    some ranks have one sample more than others.

    Args:
        mixture: must be picklable if there are workers.
        first_step: the step at which the run starts or resumes.
        last_step: one past the last step.
        rank, world_size: which part of the global batch.
        workers: number of worker processes; each holds one step in memory. 0 makes the samples in this process.
    Raises:
        ValueError: the arguments do not fit together.
        RuntimeError: a worker failed or was killed.
    """
    if not 0 <= rank < world_size <= mixture.batch_size:
        raise ValueError(
            f"rank is {rank} and world_size {world_size}; a global batch of {mixture.batch_size} serves 1 to "
            f"{mixture.batch_size} ranks."
        )
    if workers < 0 or first_step < 0:
        raise ValueError(f"workers is {workers} and first_step {first_step}; both must be at least 0.")
    positions = range(mixture.batch_size * rank // world_size, mixture.batch_size * (rank + 1) // world_size)
    num_workers = min(workers, max(1, last_step - first_step))
    return _logged(mixture, first_step, last_step, positions, num_workers)


def count_skipped(samples: Samples) -> Counter[str]:
    """Number of broken records that were skipped for these samples, by reason."""
    return Counter(_skipped(samples).values())


def count_other_views(samples: Samples) -> int:
    """Number of samples whose reference is another view of the subject."""
    if isinstance(samples, SpriteBatch):
        return int(samples.other_view.sum())
    return sum(sample.other_view for sample in samples)


def _skipped(samples: object) -> dict[str, str]:
    """Key and reason of the broken records that were skipped for these samples; only samples from disk skip any."""
    if not isinstance(samples, list):
        return {}
    return dict(skipped for sample in samples for skipped in sample.skipped)


def _logged(mixture: StepSource[T], first: int, last: int, positions: range, num_workers: int) -> Steps[T]:
    """The steps' samples; each broken record that was skipped is logged once."""
    reasons: dict[str, str] = {}
    if num_workers:
        make = _in_workers(mixture, first, last, positions, num_workers)
    else:
        make = _in_process(mixture, first, last, positions)
    with closing(make) as steps:
        for step, samples in steps:
            skipped = _skipped(samples)
            if new := [f"{key} ({reason})" for key, reason in skipped.items() if key not in reasons]:
                reasons.update(skipped)
                total = dict(Counter(reasons.values()))
                log.warning("Step %d skipped %s; broken records so far: %s.", step, ", ".join(new), total)
            yield step, samples


def _in_process(mixture: StepSource[T], first: int, last: int, positions: range) -> Steps[T]:
    for step in range(first, last):
        yield step, mixture.samples(step, positions)


def _in_workers(mixture: StepSource[T], first: int, last: int, positions: range, num_workers: int) -> Steps[T]:
    with _running(mixture, first, last, positions, num_workers) as workers:
        for step in range(first, last):
            process, connection = workers[(step - first) % num_workers]
            yield step, _receive(process, connection, step)


def _receive(process: BaseProcess, connection: Connection, step: int) -> Any:
    """The samples of a step from its worker."""
    wait([connection, process.sentinel])
    try:
        if not connection.poll():
            raise EOFError
        result = connection.recv()
    except (EOFError, OSError):
        process.join(10)
        raise RuntimeError(
            f"data worker {process.name} ended at step {step} with exit code {process.exitcode}; a negative code is "
            "the signal that killed it. -9 usually means that memory ran out: use fewer workers."
        ) from None
    if isinstance(result, _Failure):
        if result.user_error is not None:
            raise ValueError(result.user_error)
        raise RuntimeError(f"data worker {process.name} failed at step {step}:\n{result.traceback}")
    return result


@contextmanager
def _running(
    mixture: StepSource[T], first: int, last: int, positions: range, num_workers: int
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Start the workers, and end them at the end, also if the interpreter exits before."""
    context = get_context("spawn")
    workers: list[tuple[BaseProcess, Connection]] = []

    def end() -> None:
        for process, connection in workers:
            process.kill()  # workers ignore SIGTERM
            connection.close()
        for process, _ in workers:
            process.join()

    # At exit, multiprocessing sends SIGTERM to its processes and waits for them, forever if they ignore it.
    atexit.register(end)
    try:
        with _signals_blocked():  # inherited by the workers: a Ctrl-C during their start is not for them
            for number in range(num_workers):
                ours, theirs = context.Pipe(duplex=False)
                steps = range(first + number, last, num_workers)
                process = context.Process(
                    target=_work, args=(theirs, mixture, steps, positions), name=f"data-{number}", daemon=True
                )
                process.start()
                theirs.close()
                workers.append((process, ours))
        yield workers
    finally:
        end()
        atexit.unregister(end)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM in this thread; they are delivered afterwards."""
    multiprocessing.resource_tracker.ensure_running()  # starting it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, mixture: StepSource[T], steps: range, positions: range) -> None:
    """Main function of a worker: send the samples of its steps, or the traceback of what went wrong."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which only the sprite world in a mixture imports here
    try:
        for step in steps:
            connection.send(mixture.samples(step, positions))
    except BrokenPipeError:  # the parent has ended
        return
    except Exception as error:
        user_error = str(error) if isinstance(error, ValueError) else None
        connection.send(_Failure(traceback.format_exc(), user_error))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
