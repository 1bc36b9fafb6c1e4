"""Training on a Ray cluster with Ray Train (v2): `python -m train RECIPE --ray N`.

Checkpoints stay in the run's own folder `out`, which all nodes must share; Ray receives a pointer to each. After a
failure or a change of the number of workers, Ray starts the workers again, and they resume from the newest checkpoint.
Ray runs the training function in a thread, which receives no signals. Instead, Ray announces that a machine will be
preempted, and the run writes a checkpoint at once.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
    get_preemption_info,
    report,
)
from ray.train.torch import TorchTrainer

from .checkpoint import Checkpoint as SavedCheckpoint
from .config import TrainConfig
from .frozen import FrozenModels, adapter_of_structure, load_pipeline
from .monitor import Monitor
from .objective import Objective
from .overrides import from_json
from .precision import frozen_dtype
from .preview import adapter_with
from .startup import check_folder, check_outputs
from .trainer import run
from .validation import Validation

POINTER = "checkpoint.json"  # in a checkpoint of Ray: the path of the checkpoint in `out`
PREEMPTION_CHECK_STEPS = 10  # each check waits for all workers
MISTAKE = "mistake.txt"  # in Ray's folder in `out`: the message of a ValueError in a worker
MAX_FAILURES = 3  # failures of workers after which the run ends; lost machines do not count


def parse_workers(text: str) -> int | tuple[int, int]:
    """Parse "4", or "1:8" for an elastic number of workers.

    Raises:
        ValueError: something else.
    """
    parts = text.split(":")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise ValueError(f"--ray {text}: write the number of workers, such as 4, or a range, such as 1:8.")
    low, high = int(parts[0]), int(parts[-1])
    if low > high:
        raise ValueError(f"--ray {text}: the minimum is larger than the maximum.")
    return low if len(parts) == 1 else (low, high)


def run_on_ray(
    config: TrainConfig,
    *,
    num_workers: int | tuple[int, int],
    resume: bool = False,
    resources_per_worker: dict[str, float] | None = None,
) -> Result:
    """Run a recipe on the cluster that `ray.init` connects to, one GPU per worker if the cluster has any.

    Args:
        config: `out` must be on storage that all nodes share. Paths are relative to the working directory of the
            caller.
        num_workers: a number, or a minimum and maximum between which Ray resizes the run.
        resume: continue from the newest checkpoint in `out`.
        resources_per_worker: see `ray.train.ScalingConfig`.
    Returns:
        Ray's result with the metrics of the last checkpoint.
    Raises:
        ValueError: a configuration that does not fit the models, the data or the checkpoints, also if only a worker
            notices it. Such a mistake is not retried.
    """
    config = config.with_absolute_paths()  # Ray Train changes the working directory of the workers
    check_folder(config, resume)
    check_outputs(config)
    mistake = _mistake(config)
    mistake.unlink(missing_ok=True)
    if not ray.is_initialized():
        ray.init()
    use_gpu = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    validation = None
    if config.data.validation is not None and config.preview.every_steps:
        validation = ValidationConfig(fn=_validate, ray_remote_kwargs={"num_gpus": 1 if use_gpu else 0})
    trainer = TorchTrainer(
        _train,
        train_loop_config={"config": config},
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources_per_worker
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(mistake.parent),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
        ),
        validation_config=validation,
    )
    result = trainer.fit()
    if mistake.exists():
        raise ValueError(mistake.read_text())
    return result


class RayMonitor(Monitor):
    """Reports checkpoints to Ray and asks it whether machines will be preempted."""

    def __init__(self, validates: bool) -> None:
        self.validates_separately = validates
        self._announced = False

    def wants_checkpoint(self, step: int) -> bool:
        """Whether a machine will be preempted; true once."""
        if self._announced or step % PREEMPTION_CHECK_STEPS:
            return False
        self._announced = get_preemption_info() is not None
        return self._announced

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is None:
            report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / POINTER).write_text(json.dumps(str(checkpoint)))
            report(metrics, checkpoint=Checkpoint.from_directory(folder), validation=self.validates_separately)


def _train(settings: dict[str, Any]) -> None:
    """The function of each worker, which Ray calls again after a failure.

    Ray has no way to mark a failure as final. After a mistake of the user, all workers therefore return at once when
    they are called again, and `run_on_ray` raises the error.
    """
    config: TrainConfig = settings["config"]
    mistake = _mistake(config)
    if mistake.exists():
        return
    validates = config.data.validation is not None and config.preview.every_steps > 0
    try:
        run(config, resume=True, monitor=RayMonitor(validates))
    except ValueError as error:
        mistake.parent.mkdir(parents=True, exist_ok=True)
        mistake.write_text(str(error))
        raise


def _mistake(config: TrainConfig) -> Path:
    return config.out / "ray" / MISTAKE


def _validate(checkpoint: Checkpoint, **_: Any) -> dict[str, float]:
    """Validation of a checkpoint as a task of its own, beside the training."""
    with checkpoint.as_directory() as folder:
        saved = SavedCheckpoint.verified(Path(json.loads((Path(folder) / POINTER).read_text())))
    config = from_json(TrainConfig, saved.state["config"], "config")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(config.model, frozen_dtype(config.precision, device.type))
    adapter = adapter_of_structure(saved.state["adapter"], pipeline)
    frozen = FrozenModels(pipeline, device)
    objective = Objective(pipeline.unet, pipeline.scheduler, frozen.empty_text(), config.objective, device)
    weights = {name: value.to(device) for name, value in saved.tensors("ema").items()}
    averaged = adapter_with(weights, adapter, torch.float32)
    return {"step": saved.step, **Validation(config, frozen, objective)(averaged)}
