"""The training loop of RealCustom++: trains the adapter (projector, W_Ki, W_Vi) of a frozen text-to-image model.

Everything random is a function of the seed, the step and the position in the global batch (`data/mixture.py`,
`objective.draw`). To resume, a run therefore needs the weights, the optimizer state and the number of the step; and any
number of processes trains on the same samples with the same noise.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .checkpoint import (
    Checkpoint,
    has_checkpoint,
    load_optimizer,
    load_trained,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    trained_tensors,
)
from .config import TrainConfig
from .data.features import open_features
from .data.loader import batches, count_other_views, count_skipped
from .data.mixture import Mixture
from .data.sprite_world.batches import SpriteMixture
from .data.sprite_world.rendered import BatchRenderer
from .ema import EMA
from .frozen import FrozenModels, load_pipeline, start_adapter
from .metrics import MetricWindow, append_json, remove_later_steps, rounded
from .monitor import Monitor
from .objective import Objective, draw
from .overrides import changed_fields
from .precision import differentiable_attention, frozen_dtype
from .preview import adapter_with, render_previews
from .publish import push_to_hub, write_results
from .results import CHECKPOINTS, LOG, PREVIEWS, TRACKERS
from .schedule import learning_rate
from .sources import open_training_data
from .stop import StopSignal
from .validation import Validation

logger = logging.getLogger(__name__)

# Fields that a resumed run may change without changing its results.
_FREE_FIELDS = (
    "out", "max_seconds", "device", "checkpoint.", "log.", "preview.", "hub.", "data.workers", "data.validation",
    "data.features", "data.evaluation",
)  # fmt: skip


def run(config: TrainConfig, *, resume: bool = False, monitor: Monitor | None = None) -> int:
    """Train as configured. SIGTERM and SIGINT end the run with a checkpoint.

    Args:
        resume: continue from the newest undamaged checkpoint in `config.out`; start from the beginning if there is
            none. Otherwise, `config.out` must not contain a checkpoint.
        monitor: receives the progress.
    Returns:
        Number of steps done, including those of earlier runs.
    Raises:
        ValueError: a configuration that does not fit the models, the data or the checkpoints.
    """
    with StopSignal().listen() as stop:
        return _run(config, resume, monitor or Monitor(), stop)


def _run(config: TrainConfig, resume: bool, monitor: Monitor, stop: StopSignal) -> int:
    start_time = time.monotonic()

    # ---- processes and trackers ----------------------------------------------------------------------------------
    config.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no",  # applied below, to the parts that need it
        log_with=_trackers(config) or None,
        project_dir=config.out / TRACKERS,
    )
    is_main, device = accelerator.is_main_process, accelerator.device
    rank, world_size = accelerator.process_index, accelerator.num_processes
    check_folder(config, resume)
    accelerator.wait_for_everyone()  # every process checks the folder before anything is written
    found = _find_checkpoint(config, accelerator)
    if is_main:
        remove_later_steps(config.out / LOG, 0 if found is None else found.step)
    accelerator.init_trackers(config.name, config={key: str(value) for key, value in config.to_dict().items()})

    # ---- frozen models -------------------------------------------------------------------------------------------
    pipeline = load_pipeline(config.model, frozen_dtype(config.precision, device.type))
    pipeline.set_progress_bar_config(disable=True)
    adapter = start_adapter(config.model, pipeline, config.seed)
    frozen = FrozenModels(pipeline, device, open_features(config.data.features, pipeline))
    if config.model.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if config.model.compile_blocks:
        pipeline.unet.compile_repeated_blocks(fullgraph=True)
    objective = Objective(pipeline.unet, pipeline.scheduler, frozen.empty_text(), config.objective, device)

    # ---- trained parameters --------------------------------------------------------------------------------------
    model = accelerator.prepare(adapter)  # on the device, with synchronized gradients
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(
        parameters, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay, fused=device.type != "cpu"
    )
    ema = EMA(adapter, config.optimizer.ema_decay)

    # ---- data ----------------------------------------------------------------------------------------------------
    mixture = open_training_data(config, frozen.reference_size)
    render = _rendering(mixture, config.data.resolution, frozen.reference_size, device)
    first = config.batch_size * rank // world_size  # of this process in the global batch
    validation = None
    if config.data.validation is not None and config.preview.every_steps and is_main and not monitor.validates:
        validation = Validation(config, frozen, objective)

    # ---- resume --------------------------------------------------------------------------------------------------
    step, window, saved_step = 0, MetricWindow(), -1
    if found is not None:
        load_trained(adapter, found.tensors("adapter"))
        ema.load(found.tensors("ema"))
        load_optimizer(optimizer, found.tensors("optimizer"))
        step = saved_step = found.step
        window = MetricWindow.restored(found.state["window"])
        if is_main:
            _warn_about_changes(found, config, mixture.fingerprint)
            logger.info("Resuming at step %d from %s.", step, found.path)

    def any_process(flag: bool) -> bool:
        if world_size == 1:
            return flag
        return bool(_sum_over_processes(accelerator, torch.tensor([float(flag)], device=device))[0] > 0)

    def save(metrics: dict[str, Any]) -> None:
        path = None
        if is_main:
            tensors = {
                "adapter": trained_tensors(adapter),
                "ema": ema.values,
                "optimizer": optimizer_tensors(optimizer),
            }
            state = {
                "step": step,
                "processes": world_size,
                "config": config.to_dict(),
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
            if config.preview.every_steps and step % config.preview.every_steps == 0 and step < config.steps:
                evaluate()
            if step % config.checkpoint.every_steps == 0 or monitor.wants_checkpoint(step):
                save(metrics)
                saved_step = step

    # ---- the end -------------------------------------------------------------------------------------------------
    if step != saved_step:
        save(metrics)
    if not any_process(stop.requested):
        if config.preview.every_steps:
            evaluate()
        if is_main:
            write_results(config, adapter_with(ema.values, adapter, torch.float32), step)
            if step == config.steps:
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


def _trackers(config: TrainConfig) -> list[Any]:
    """The names of the trackers, after a check that they are installed."""
    available = [str(name) for name in get_available_trackers()]
    for name in config.log.trackers:
        if name not in available:
            raise ValueError(
                f"log.trackers contains {name!r}, which is not installed; install it, or use "
                f"{', '.join(available) or 'no tracker (--set log.trackers=)'}."
            )
    return list(config.log.trackers)


def check_folder(config: TrainConfig, resume: bool) -> None:
    """Refuse to start a new run in the folder of another one.

    Raises:
        ValueError: `config.out` contains checkpoints and `resume` is false.
    """
    folder = config.out / CHECKPOINTS
    if not resume and has_checkpoint(folder):
        raise ValueError(
            f"{folder} already contains checkpoints; add --resume to continue that run, or choose another folder "
            "with --set out=FOLDER."
        )


def _find_checkpoint(config: TrainConfig, accelerator: Accelerator) -> Checkpoint | None:
    """The newest undamaged checkpoint. The main process selects it for all."""
    answer = [newest_checkpoint(config.out / CHECKPOINTS) if accelerator.is_main_process else None]
    broadcast_object_list(answer)
    return answer[0]


def _warn_about_changes(found: Checkpoint, config: TrainConfig, fingerprint: str) -> None:
    """Warn if the resumed run will differ from an uninterrupted one."""
    changes = changed_fields(found.state["config"], config.to_dict())
    changes = [change for change in changes if not change.startswith(_FREE_FIELDS)]
    if found.state["data"] != fingerprint:
        changes.append("the records of the data have changed")
    if changes:
        logger.warning("The resumed run will differ from an uninterrupted one: %s.", "; ".join(changes))
