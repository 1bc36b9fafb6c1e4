"""The training loop of RealCustom++: trains the adapter (projector, W_Ki, W_Vi) of a frozen text-to-image model.

Everything random is a function of the seed, the step and the position in the global batch (`data/mixture.py`,
`objective.draw`). To resume, a run therefore needs only the weights, their EMA, the optimizer state and the number of
the step. Any number of processes trains on the same samples with the same noise.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from .checkpoint import (
    load_optimizer,
    load_trained,
    optimizer_tensors,
    save_checkpoint,
    trained_tensors,
)
from .config import TrainConfig
from .data.loader import batches, count_other_views, count_skipped
from .data.mixture import Mixture
from .data.sprite_world.batches import SpriteMixture
from .data.sprite_world.rendered import BatchRenderer
from .ema import EMA
from .frozen import is_complete
from .metrics import MetricWindow, append_json, remove_later_steps, rounded
from .monitor import Monitor
from .objective import draw
from .precision import differentiable_attention
from .preview import adapter_with, render_previews
from .publish import push_to_hub, write_results
from .results import CHECKPOINTS, LOG, PREVIEWS, TRACKERS
from .schedule import learning_rate
from .startup import check_folder, check_outputs, create_folder, find_checkpoint, load, warn_about_changes
from .stop import StopSignal

logger = logging.getLogger(__name__)


def run(config: TrainConfig, *, resume: bool = False, monitor: Monitor | None = None) -> int:
    """Train as configured. SIGTERM and SIGINT end the run with a checkpoint, or without one before the first step.

    Args:
        resume: continue from the newest undamaged checkpoint in `config.out`; start from the beginning if there are
            no checkpoints. Otherwise, `config.out` must not contain a checkpoint.
        monitor: receives the progress.
    Returns:
        Number of steps done, including those of earlier runs.
    Raises:
        ValueError: a configuration that does not fit the models, the data or the checkpoints.
        RuntimeError: a loader process failed.
    """
    with StopSignal().listen() as stop:
        return _run(config, resume, monitor or Monitor(), stop)


def _run(config: TrainConfig, resume: bool, monitor: Monitor, stop: StopSignal) -> int:
    start_time = time.monotonic()

    # ---- processes and checks ------------------------------------------------------------------------------------
    check_outputs(config)
    create_folder(config.out)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no",  # applied below, to the parts that need it
        log_with=list(config.log.trackers) or None,
        project_dir=config.out / TRACKERS,
    )
    is_main, device = accelerator.is_main_process, accelerator.device
    rank, world_size = accelerator.process_index, accelerator.num_processes
    check_folder(config, resume)
    accelerator.wait_for_everyone()  # every process checks the folder before anything is written
    found = find_checkpoint(config, resume, accelerator)
    step = 0 if found is None else found.step

    def any_process(flag: bool) -> bool:
        if world_size == 1:
            return flag
        return bool(_sum_over_processes(accelerator, torch.tensor([float(flag)], device=device))[0] > 0)

    # ---- frozen models and data ----------------------------------------------------------------------------------
    validates = is_main and not monitor.validates_separately
    loaded = stop.interruptible(lambda: load(config, device, found, validates))
    if any_process(loaded is None or stop.requested):
        logger.info("Stopped before the first step.")
        return step
    assert loaded is not None
    pipeline, adapter, frozen, objective = loaded.pipeline, loaded.adapter, loaded.frozen, loaded.objective
    mixture, validation = loaded.mixture, loaded.validation
    render = _rendering(mixture, config.data.resolution, frozen.reference_size, device)
    first = config.batch_size * rank // world_size  # of this process in the global batch

    # ---- trained parameters --------------------------------------------------------------------------------------
    model = accelerator.prepare(adapter)  # on the device, with synchronized gradients
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(
        parameters, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay, fused=device.type != "cpu"
    )
    ema = EMA(adapter, config.optimizer.ema_decay)

    # ---- log and resume ------------------------------------------------------------------------------------------
    if is_main:
        remove_later_steps(config.out / LOG, step)
    accelerator.init_trackers(config.name, config={key: str(value) for key, value in config.to_dict().items()})
    window, saved_step = MetricWindow(), -1
    if found is not None:
        load_trained(adapter, found.tensors("adapter"))
        ema.load(found.tensors("ema"))
        load_optimizer(optimizer, adapter, found.tensors("optimizer"))
        saved_step = step
        window = MetricWindow.restored(found.state["window"])
        if is_main:
            warn_about_changes(found, config, mixture.fingerprint)
            logger.info("Resuming at step %d from %s.", step, found.path)

    def save(metrics: dict[str, Any]) -> None:
        path = None
        if is_main:
            tensors = {
                "adapter": trained_tensors(adapter),
                "ema": ema.values,
                "optimizer": optimizer_tensors(optimizer, adapter),
            }
            state = {
                "step": step,
                "processes": world_size,
                "config": config.to_dict(),
                "adapter": dict(adapter.config),
                "data": mixture.fingerprint,
                "window": window.state(),
            }
            path = save_checkpoint(config.out / CHECKPOINTS, tensors, state, keep=config.checkpoint.keep)
            logger.info("Saved %s.", path)
        accelerator.wait_for_everyone()
        monitor.report(metrics, path)

    def write(values: dict[str, Any]) -> None:
        if is_main:
            line = {"step": step, "samples": step * config.batch_size, "time": time.time(), **values}
            append_json(config.out / LOG, line)
            logger.info("%s", rounded(line))
        accelerator.log(values, step=step)

    def evaluate() -> None:
        if not is_main:
            return
        if validation is not None:
            write(validation(adapter_with(ema.values, adapter, torch.float32)))
        if config.preview.subjects:
            averaged = adapter_with(ema.values, adapter, pipeline.unet.dtype)
            path = config.out / PREVIEWS / f"{step:08d}.png"
            size = config.data.resolution
            render_previews(pipeline, averaged, config.preview, size, path, lambda: stop.requested)

    # ---- the loop ------------------------------------------------------------------------------------------------
    metrics: dict[str, Any] = {}
    window_start, window_step = time.monotonic(), step
    loader = batches(
        mixture,
        first_step=step,
        last_step=config.steps,
        rank=rank,
        world_size=world_size,
        workers=config.data.workers,
    )
    with closing(loader) as steps:
        while step < config.steps:
            batch = stop.interruptible(lambda: next(steps))
            out_of_time = config.max_seconds is not None and time.monotonic() - start_time > config.max_seconds
            if any_process(batch is None or out_of_time):
                break
            assert batch is not None and batch[0] == step
            samples = batch[1]

            rate = learning_rate(
                step,
                peak=config.optimizer.learning_rate,
                warmup_steps=config.optimizer.warmup_steps,
                steps=config.steps,
                decay_fraction=config.optimizer.decay_fraction,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate

            loss_sum = torch.zeros((), device=device)
            for part, is_last in _micro_batches(len(samples), config.micro_batch_size):
                encoded = frozen.encode(render(samples[part.start : part.stop]))
                draws = draw(
                    config.objective,
                    encoded.latents.shape[1:],
                    range(first + part.start, first + part.stop),
                    seed=config.seed,
                    step=step,
                    batch_size=config.batch_size,
                    num_timesteps=objective.num_timesteps,
                    device=device,
                )
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with frozen.autocast():
                        keys_values = model(encoded.features)
                    # Both contexts include the backward pass, because gradient checkpointing repeats the forward pass.
                    with objective.attending(keys_values, draws.keep_vision), differentiable_attention(device.type):
                        with frozen.autocast():
                            losses = objective.losses(encoded, draws)
                        # Gradients are averaged over processes. Dividing by the global batch size, not by the local
                        # one, gives every sample the same weight for any number of processes.
                        (losses.sum() * (world_size / config.batch_size)).backward()
                loss_sum += losses.detach().sum()

            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
            if torch.isfinite(norm):
                optimizer.step()
            else:
                window.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)
            ema.update(adapter, step)
            counts = [count_other_views(samples), sum(count_skipped(samples).values())]
            totals = torch.cat([loss_sum[None], torch.tensor(counts, dtype=torch.float32, device=device)])
            loss, other_views, skipped = _sum_over_processes(accelerator, totals).tolist()
            window.add(
                {
                    "loss": loss / config.batch_size,
                    "grad_norm": float(norm),
                    "other_views": other_views / config.batch_size,
                    "skipped_records": skipped,
                }
            )

            # ---- after the step ----------------------------------------------------------------------------------
            step += 1
            if step % config.log.every_steps == 0:
                now = time.monotonic()
                metrics = {
                    **window.summary(),
                    "learning_rate": rate,
                    "other_view_probability": config.curriculum.other_view_probability(step - 1),
                    "r_cur": config.curriculum.resize_ratio_bounds(step - 1)[1],
                    "samples_per_second": (step - window_step) * config.batch_size / (now - window_start),
                }
                write(metrics)
                window, window_start, window_step = MetricWindow(), now, step
            if step % config.checkpoint.every_steps == 0 or monitor.wants_checkpoint(step):
                save(metrics)
                saved_step = step
            if config.preview.every_steps and step % config.preview.every_steps == 0 and step < config.steps:
                evaluate()

    # ---- the end -------------------------------------------------------------------------------------------------
    if step != saved_step:
        save(metrics)
    if not any_process(stop.requested):
        if is_main:
            averaged = adapter_with(ema.values, adapter, torch.float32)
            write_results(config, averaged, step, complete=is_complete(config.model.base))
        if config.preview.every_steps:
            evaluate()
        if is_main and step == config.steps:
            push_to_hub(config.out, config.hub)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return step


def _micro_batches(count: int, size: int) -> Iterator[tuple[range, bool]]:
    """Parts of at most `size` of `count` samples, and whether each is the last."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count)), start + size >= count


def _rendering(
    mixture: Mixture | SpriteMixture, size: int, reference_size: int, device: torch.device
) -> Callable[[Any], Any]:
    """Gives pixels to the samples of a mixture that have none."""
    if isinstance(mixture, SpriteMixture):
        return BatchRenderer(size, reference_size, device)
    return lambda samples: samples


def _sum_over_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    return cast(Tensor, accelerator.reduce(values, reduction="sum"))
