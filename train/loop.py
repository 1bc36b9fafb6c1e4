"""The training loop of every stage: steps, schedule, averages, checkpoints, log, and a polite way to stop.

All randomness of step s comes from a generator seeded by (seed, s), so a run that is killed and resumed gives the same
losses as an unbroken one. To stop a run, send SIGTERM or create a file named `stop` in its folder: it finishes the
step, writes a checkpoint and ends.
"""

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Average, find_checkpoint, load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Attributes:
    out: folder of the stage: checkpoint, log.jsonl, pictures.
    max_samples: where training ends; the learning rate falls over the last `decay` fraction of it. None: no end.
    max_seconds: stop, resumable, after so long.
    save_every_s, log_every, preview_every_s: seconds, steps, seconds.
    """

    out: Path
    batch_size: int
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: float = 0.3
    max_samples: int | None = None
    max_seconds: float | None = None
    average_decay: float = 0.999
    save_every_s: float = 180
    preview_every_s: float = 300
    log_every: int = 25
    seed: int = 0

    def remaining(self, step: int) -> float:
        """1 until the learning rate begins to fall, 0 at the end; always 1 if there is no end."""
        if self.max_samples is None:
            return 1.0
        return max(0.0, min(1.0, (1 - step * self.batch_size / self.max_samples) / self.decay))


def learning_rate(config: LoopConfig, step: int, begun: int = 0) -> float:
    """Warm up, stay, and fall towards the end if there is one; an end can be set, or moved, at any resume.

    `begun`: the step at which the optimizer was new.
    """
    rate = config.learning_rate * min(1.0, (step - begun + 1) / config.warmup_steps)
    return rate * max(0.02, config.remaining(step))


def new_optimizer(parameters) -> torch.optim.AdamW:
    """Every stage's; its learning rate is set at each step."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 40) + step)


def run_loop(
    config: LoopConfig,
    module: nn.Module,
    loss_of_step: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    preview: Callable[[int], dict[str, float] | None] | None = None,
) -> int:
    """Train the parameters of `module` that require gradients; returns the number of steps done.

    Args:
        loss_of_step: step and its generator -> loss and further numbers to log.
        preview: called with averaged weights in place now and then; what it returns is logged.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    stop_file = config.out / "stop"
    stop_file.unlink(missing_ok=True)
    stopping = []
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stopping.append(True))

    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = new_optimizer(parameters)
    average = Average(module, config.average_decay)
    checkpoint, step, begun = config.out / "checkpoint", 0, 0
    if (found := find_checkpoint(checkpoint)) is not None:
        state = load_checkpoint(found, module, average, optimizer)
        step, begun = state["step"], state["begun"]
        log.info("resuming at step %d", step)

    def save() -> None:
        state = {"step": step, "samples": step * config.batch_size, "begun": begun}
        save_checkpoint(checkpoint, module, average, optimizer, state)

    def show() -> None:
        if preview is None:
            return
        average.swap(module)
        try:
            with torch.no_grad():
                write(preview(step) or {})
        finally:
            average.swap(module)

    def write(numbers: dict[str, float]) -> None:
        line = {"step": step, "samples": step * config.batch_size, "time": round(time.time(), 1), **numbers}
        with open(config.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        log.info("%s", line)

    start = saved = shown = time.monotonic()
    sums: dict[str, float] = {}
    logged_at, logged_step = start, step
    while config.max_samples is None or step * config.batch_size < config.max_samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, begun)
        loss, numbers = loss_of_step(step, step_generator(config.seed, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            sums["skipped"] = sums.get("skipped", 0.0) + 1
        optimizer.zero_grad(set_to_none=True)
        average.update(module, step)
        step += 1
        for name, value in {"loss": float(loss.detach()), "norm": float(norm), **numbers}.items():
            sums[name] = sums.get(name, 0.0) + value
        now = time.monotonic()
        if step % config.log_every == 0:
            count = step - logged_step
            rate = count * config.batch_size / (now - logged_at)
            write({**{k: round(v / count, 5) for k, v in sums.items()}, "per_second": round(rate, 1)})
            sums, logged_at, logged_step = {}, now, step
        if now - saved > config.save_every_s:
            save()
            saved = now
        if now - shown > config.preview_every_s:
            show()
            shown = time.monotonic()
        out_of_time = config.max_seconds is not None and now - start > config.max_seconds
        if stopping or out_of_time or stop_file.exists():
            break
    save()
    show()
    return step
