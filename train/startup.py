"""What a run does before its first step: checks of the configuration and the folder, and loading of models and data.

Mistakes are reported here, before anything is computed.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from realcustom import RealCustomAdapter, RealCustomPipeline

from .arguments import ensure_writable
from .checkpoint import Checkpoint, damaged_checkpoints, has_checkpoint, newest_checkpoint
from .config import ModelConfig, PreviewConfig, TrainConfig
from .data.features import open_features
from .data.mixture import Mixture
from .data.sprite_world.batches import SpriteMixture
from .frozen import FrozenModels, adapter_of_structure, load_pipeline, start_adapter
from .objective import Objective
from .overrides import changed_fields
from .precision import frozen_dtype
from .preview import preview_requests
from .publish import check_hub
from .results import ADAPTER, CHECKPOINTS
from .sources import open_training_data
from .validation import Validation

logger = logging.getLogger(__name__)

# Fields that a resumed run may change without changing its results.
_FREE_FIELDS = (
    "out", "max_seconds", "device", "model.adapter", "checkpoint.", "log.", "preview.", "hub.", "data.workers",
    "data.validation", "data.features", "data.evaluation",
)  # fmt: skip


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


def create_folder(out: Path) -> None:
    """Create the folder of a run.

    Raises:
        ValueError: it cannot be created or written to, or what the run writes would replace something else.
    """
    try:
        ensure_writable(out)
        if (out / CHECKPOINTS).exists() and not (out / CHECKPOINTS).is_dir():
            raise NotADirectoryError(f"{CHECKPOINTS} in it is not a folder")
        if (out / ADAPTER).is_dir():
            raise IsADirectoryError(f"{ADAPTER} in it is a folder")
    except OSError as error:
        raise ValueError(f"out is {out}, but {error}; choose another folder with --set out=FOLDER.") from None


def check_preview_steps(config: PreviewConfig, num_train_timesteps: int) -> None:
    """Raise ValueError if a preview has more steps than the scheduler of the base."""
    steps = config.num_inference_steps
    if config.every_steps and steps is not None and steps > num_train_timesteps:
        raise ValueError(
            f"preview.num_inference_steps is {steps}; the base was trained with {num_train_timesteps} timesteps, so it "
            f"can be at most {num_train_timesteps}."
        )


def check_outputs(config: TrainConfig) -> None:
    """Check what a run uses only later: trackers, previews and the upload.

    Raises:
        ValueError: a tracker that is not installed, a preview that cannot be generated, an invalid `hub.repo_id`, or no
            token of the Hugging Face Hub.
    """
    available = [str(name) for name in get_available_trackers()]
    for name in config.log.trackers:
        if name not in available:
            raise ValueError(
                f"log.trackers contains {name!r}, which is not installed; install it, or use "
                f"{', '.join(available) or 'no tracker (--set log.trackers=)'}."
            )
    if config.preview.every_steps:
        preview_requests(config.preview, config.data.resolution)
    check_hub(config.hub)


def find_checkpoint(config: TrainConfig, resume: bool, accelerator: Accelerator) -> Checkpoint | None:
    """The newest undamaged checkpoint. The main process selects it for all.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    folder = config.out / CHECKPOINTS
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        answer = [(newest_checkpoint(folder), damaged_checkpoints(folder))]
    broadcast_object_list(answer)
    found, damaged = answer[0]
    if found is None and damaged and resume:
        raise ValueError(
            f"all checkpoints in {folder} are damaged ({', '.join(damaged)}); restore one from a copy and rename it to "
            "step_..., or move these folders away to start at step 0."
        )
    if found is None and resume and accelerator.is_main_process:
        logger.info("There is no checkpoint in %s; starting at step 0.", folder)
    return found


@dataclass(frozen=True)
class Loaded:
    """What a run works with; `validation` is None if this process does not validate."""

    pipeline: RealCustomPipeline
    adapter: RealCustomAdapter
    frozen: FrozenModels
    objective: Objective
    mixture: Mixture | SpriteMixture
    validation: Validation | None


def load(config: TrainConfig, device: torch.device, found: Checkpoint | None, validates: bool) -> Loaded:
    """Load models and data. This may take long: models are downloaded, and data is indexed when it is first used.

    Args:
        found: checkpoint to continue; the adapter then has its structure, and the weights are not loaded yet.
        validates: whether this process validates if the configuration asks for it.
    """
    pipeline = load_pipeline(config.model, frozen_dtype(config.precision, device.type))
    pipeline.set_progress_bar_config(disable=True)
    check_preview_steps(config.preview, pipeline.scheduler.config["num_train_timesteps"])
    if found is None:
        adapter = start_adapter(config.model, pipeline, config.seed)
    else:  # the adapter that the run started from is no longer needed
        adapter = adapter_of_structure(found.state["adapter"], pipeline)
    frozen = FrozenModels(pipeline, device, open_features(config.data.features, pipeline))
    prepare_unet(pipeline.unet, config.model)
    objective = Objective(pipeline.unet, pipeline.scheduler, frozen.empty_text(), config.objective, device)
    mixture = open_training_data(config, frozen.reference_size)
    validation = None
    if validates and config.data.validation is not None and config.preview.every_steps:
        validation = Validation(config, frozen, objective)
    return Loaded(pipeline, adapter, frozen, objective, mixture, validation)


def prepare_unet(unet: UNet2DConditionModel, model: ModelConfig) -> None:
    """Set up gradient checkpointing and compilation as configured."""
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if model.compile_blocks:
        unet.compile_repeated_blocks(fullgraph=True)


def warn_about_changes(found: Checkpoint, config: TrainConfig, fingerprint: str) -> None:
    """Warn if the resumed run will differ from an uninterrupted one."""
    changes = changed_fields(found.state["config"], config.to_dict())
    changes = [change for change in changes if not change.startswith(_FREE_FIELDS)]
    if found.state["data"] != fingerprint:
        changes.append("the records of the data have changed")
    if changes:
        logger.warning("The resumed run will differ from an uninterrupted one: %s.", "; ".join(changes))
