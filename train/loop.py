"""The training loop of every stage: steps, learning-rate schedule, EMA, checkpoints, logging and graceful shutdown.

All random numbers of a step come from a generator seeded by (seed, step). A run that is stopped and resumed therefore
gives the same losses as an uninterrupted one. To stop a run, send SIGTERM or create a file named `stop` in its folder:
the loop finishes the current step, writes a checkpoint and returns.
"""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import EMA, find_checkpoint, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

LossOfStep = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
Preview = Callable[[int], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of a training run.

    Attributes:
        out: folder for the checkpoint, `log.jsonl` and previews.
        batch_size: samples per step.
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warmup.
        decay: fraction of `max_samples` over which the learning rate falls at the end.
        max_samples: total number of training samples; None trains without a limit and without a decay.
        max_seconds: stop after this time. The run can be resumed.
        ema_decay: decay of the exponential moving average of the weights, per step.
        save_every_s: seconds between checkpoints.
        preview_every_s: seconds between previews.
        log_every: steps per line of the log.
        seed: seed of all steps.
    """

    out: Path
    batch_size: int
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: float = 0.3
    max_samples: int | None = None
    max_seconds: float | None = None
    ema_decay: float = 0.999
    save_every_s: float = 180
    preview_every_s: float = 300
    log_every: int = 25
    seed: int = 0

    def decay_factor(self, step: int) -> float:
        """1 until the learning rate starts to fall, 0 at the end; always 1 without `max_samples`."""
        if self.max_samples is None:
            return 1.0
        return max(0.0, min(1.0, (1 - step * self.batch_size / self.max_samples) / self.decay))


def learning_rate(config: LoopConfig, step: int, warmup_start_step: int = 0) -> float:
    """Linear warmup, a constant rate, then a linear decay if the run has an end.

    The schedule depends only on the step and `config.max_samples`, so a resumed run may set or move its end.

    Args:
        warmup_start_step: step at which the optimizer was created.
    """
    rate = config.learning_rate * min(1.0, (step - warmup_start_step + 1) / config.warmup_steps)
    return rate * max(0.02, config.decay_factor(step))


def new_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every stage. `run_loop` sets its learning rate at each step."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step."""
    return torch.Generator().manual_seed((seed << 40) + step)


class MetricWindow:
    """Means of the metrics of one logging window.

    Values that are not finite are excluded from the mean, so that one such step does not hide the others. A step whose
    gradient is not finite is counted in `skipped_steps`.
    """

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def summary(self) -> dict[str, float]:
        """Mean of each metric over the steps that reported a finite value, and `skipped_steps` if there are any."""
        means = {name: round(total / self._counts[name], 5) for name, total in self._sums.items()}
        return {**means, "skipped_steps": self.skipped_steps} if self.skipped_steps else means


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets; the previous handlers are restored on exit.

    Only the main thread may install signal handlers. In other threads nothing is installed, and the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, lambda *_: stop.set())
        yield stop
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python; it cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run_loop(config: LoopConfig, module: nn.Module, loss_of_step: LossOfStep, preview: Preview | None = None) -> int:
    """Train the parameters of `module` that require gradients. Resumes from a checkpoint in `config.out`.

    Args:
        loss_of_step: step and its generator -> loss (a scalar) and further metrics to log.
        preview: called every `preview_every_s` seconds and at the end, with the EMA weights in `module`. The metrics
            it returns are logged.

    Returns:
        Number of steps done, including those of earlier runs.
    """
    with stop_on_signal() as stop:
        return _run_loop(config, module, loss_of_step, preview, stop)


def _run_loop(
    config: LoopConfig, module: nn.Module, loss_of_step: LossOfStep, preview: Preview | None, stop: threading.Event
) -> int:
    config.out.mkdir(parents=True, exist_ok=True)
    stop_file = config.out / "stop"
    stop_file.unlink(missing_ok=True)

    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = new_optimizer(parameters)
    ema = EMA(module, config.ema_decay)
    checkpoint, step, warmup_start_step = config.out / "checkpoint", 0, 0
    if (found := find_checkpoint(checkpoint)) is not None:
        state = load_checkpoint(found, module, ema, optimizer)
        step, warmup_start_step = state["step"], state["warmup_start_step"]
        log.info("Resuming at step %d.", step)

    def save() -> None:
        state = {"step": step, "samples": step * config.batch_size, "warmup_start_step": warmup_start_step}
        save_checkpoint(checkpoint, module, ema, optimizer, state)

    def run_preview() -> None:
        if preview is None:
            return
        ema.swap(module)
        try:
            with torch.no_grad():
                write(preview(step) or {})
        finally:
            ema.swap(module)

    def write(metrics: Mapping[str, Any]) -> None:
        line = {"step": step, "samples": step * config.batch_size, "time": round(time.time(), 1), **metrics}
        line = {name: _json_value(value) for name, value in line.items()}
        with open(config.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        log.info("%s", line)

    start = saved = previewed = time.monotonic()
    window, window_start, window_step = MetricWindow(), start, step
    while config.max_samples is None or step * config.batch_size < config.max_samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, warmup_start_step)
        loss, metrics = loss_of_step(step, step_generator(config.seed, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            window.skipped_steps += 1
        optimizer.zero_grad(set_to_none=True)
        ema.update(module, step)
        step += 1
        window.add({"loss": float(loss.detach()), "norm": float(norm), **metrics})
        now = time.monotonic()
        if step % config.log_every == 0:
            samples_per_second = (step - window_step) * config.batch_size / (now - window_start)
            write({**window.summary(), "samples_per_second": round(samples_per_second, 1)})
            window, window_start, window_step = MetricWindow(), now, step
        if now - saved > config.save_every_s:
            save()
            saved = now
        if now - previewed > config.preview_every_s:
            run_preview()
            previewed = time.monotonic()
        out_of_time = config.max_seconds is not None and now - start > config.max_seconds
        if stop.is_set() or out_of_time or stop_file.exists():
            break
    save()
    run_preview()
    return step


def _json_value(value: Any) -> Any:
    """`value` with null in place of numbers that JSON cannot represent."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
