"""The pretraining loop of the embedded model's networks: the stages that a full-size model takes from public weights.

All random numbers of a step come from a generator seeded by (seed, step). A run that is stopped and resumed therefore
gives the same losses as an uninterrupted one. To stop a run, press Ctrl-C, send SIGTERM or create a file named `stop`
in its folder: the loop writes a checkpoint and returns.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoint import (
    load_optimizer,
    load_trained,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    trained_tensors,
)
from ..ema import EMA
from ..metrics import MetricWindow, append_json, rounded
from ..schedule import learning_rate
from ..stop import StopSignal

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
CHECKPOINTS = "checkpoints"  # folder of a stage's checkpoints, in the stage's folder
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
        decay_fraction: fraction of `max_samples` over which the learning rate falls at the end.
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
    decay_fraction: float = 0.3
    max_samples: int | None = None
    max_seconds: float | None = None
    ema_decay: float = 0.999
    save_every_s: float = 180
    preview_every_s: float = 300
    log_every: int = 25
    seed: int = 0

    def rate(self, step: int, warmup_start_step: int) -> float:
        """The learning rate; see `schedule.learning_rate`. A resumed run may set or move its end."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            steps=None if self.max_samples is None else self.max_samples / self.batch_size,
            decay_fraction=self.decay_fraction,
            warmup_start_step=warmup_start_step,
        )


def new_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every stage. `run_loop` sets its learning rate at each step."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one step."""
    return torch.Generator().manual_seed((seed << 40) + step)


def run_loop(config: LoopConfig, module: nn.Module, loss_of_step: LossOfStep, preview: Preview | None = None) -> int:
    """Train the parameters of `module` that require gradients. Resumes from a checkpoint in `config.out`.

    Args:
        loss_of_step: step and its generator -> loss (a scalar) and further metrics to log.
        preview: called every `preview_every_s` seconds and at the end, with the EMA weights in `module`. The metrics
            it returns are logged.

    Returns:
        Number of steps done, including those of earlier runs.

    Raises:
        ValueError: the checkpoint is from a run with a different batch size, or of another network.
    """
    with StopSignal().listen() as stop:
        return _run_loop(config, module, loss_of_step, preview, stop)


def _run_loop(
    config: LoopConfig, module: nn.Module, loss_of_step: LossOfStep, preview: Preview | None, stop: StopSignal
) -> int:
    config.out.mkdir(parents=True, exist_ok=True)
    stop_file = config.out / "stop"
    stop_file.unlink(missing_ok=True)

    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = new_optimizer(parameters)
    ema = EMA(module, config.ema_decay)
    step, warmup_start_step = 0, 0
    if (found := newest_checkpoint(config.out / CHECKPOINTS)) is not None:
        load_trained(module, found.tensors("model"))
        ema.load(found.tensors("ema"))
        load_optimizer(optimizer, module, found.tensors("optimizer"))
        step, warmup_start_step = found.step, found.state["warmup_start_step"]
        if (before := found.state["batch_size"]) != config.batch_size:
            raise ValueError(
                f"the run in {config.out} has {before} samples per step, not {config.batch_size}: continue it with "
                f"--batch-size {before}, or use another folder."
            )
        log.info("Resuming at step %d.", step)

    def save() -> None:
        save_stage(config.out, module, ema, optimizer, stage_counts(step, config.batch_size, warmup_start_step))

    def run_preview() -> None:
        if preview is None:
            return
        with ema.applied_to(module), torch.no_grad():
            write(preview(step) or {})

    def write(metrics: Mapping[str, Any]) -> None:
        line = {"step": step, "samples": step * config.batch_size, "time": round(time.time(), 1), **metrics}
        append_json(config.out / "log.jsonl", line)
        log.info("%s", rounded(line))

    start = saved = previewed = time.monotonic()
    window, window_start, window_step = MetricWindow(), start, step
    while config.max_samples is None or step * config.batch_size < config.max_samples:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step, warmup_start_step)
        # Samples may have to be rendered first, which can take minutes.
        result = stop.interruptible(lambda: loss_of_step(step, step_generator(config.seed, step)))  # noqa: B023
        if result is None:
            break
        loss, metrics = result
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
        if stop.requested or out_of_time or stop_file.exists():
            break
    save()
    if not stop.requested:
        run_preview()
    return step


def stage_counts(step: int, batch_size: int, warmup_start_step: int) -> dict[str, int]:
    """What a checkpoint stores about the progress of a stage. The optimizer was created at `warmup_start_step`."""
    return {
        "step": step, "samples": step * batch_size, "batch_size": batch_size, "warmup_start_step": warmup_start_step,
    }  # fmt: skip


def save_stage(
    out: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, state: Mapping[str, int]
) -> None:
    """Write a checkpoint of the stage whose folder is `out`."""
    tensors = {"model": trained_tensors(module), "ema": ema.values, "optimizer": optimizer_tensors(optimizer, module)}
    save_checkpoint(out / CHECKPOINTS, tensors, state, keep=2)


def stage_state(out: Path) -> dict[str, int]:
    """The counts of the stage whose folder is `out`, see `stage_counts`; zeros if it has not run."""
    found = newest_checkpoint(out / CHECKPOINTS)
    return stage_counts(0, 0, 0) if found is None else found.state


def load_stage(out: Path, module: ModuleT) -> ModuleT:
    """Load the EMA weights of the stage whose folder is `out` into `module` and return it.

    Raises:
        FileNotFoundError: the stage has no checkpoint yet.
    """
    found = newest_checkpoint(out / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"No checkpoint in {out}. Run the stage '{out.name}' first.")
    load_trained(module, found.tensors("ema"))
    return module
