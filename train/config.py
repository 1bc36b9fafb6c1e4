"""Configuration of a training run: frozen dataclasses that check their fields.

Imports no torch, so that the command line starts quickly.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from realcustom.assets import EXAMPLE_IMAGES
from realcustom.config import DINOV2, SIGLIP

from .curriculum import Curriculum

MAX_SEED = 2**63 - 1  # of PyTorch's generators


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_MODEL_HINTS = {
    "base": "give a hub id, a folder or a .safetensors file",
    "siglip": "give a hub id or a folder",
    "dinov2": "give a hub id or a folder",
    "adapter": "use new, base or the path of an adapter",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen models and the weights that the adapter starts from.

    Attributes:
        base: SDXL, SD1.5 or a fine-tune of either (hub id, diffusers folder or .safetensors file), or the folder of a
            complete RealCustom++ pipeline such as `assets/mini`, which contains its own vision encoders.
        siglip, dinov2: hub id or folder of each vision encoder; not used if `base` is a complete pipeline.
        variant: variant of the base's files, such as "fp16".
        adapter: "new" initializes W_Ki and W_Vi from the UNet's text projections and the projector at random; "base"
            continues the adapter of a complete pipeline; otherwise, the path of an adapter.
        gradient_checkpointing: recompute the UNet's activations in the backward pass: less memory, a third more time.
        compile_blocks: compile the UNet's transformer blocks.
    """

    base: str
    siglip: str = SIGLIP
    dinov2: str = DINOV2
    variant: str | None = None
    adapter: str = "new"
    gradient_checkpointing: bool = True
    compile_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("base", "siglip", "dinov2", "adapter"):
            _require(bool(getattr(self, name).strip()), f"model.{name} is empty; {_MODEL_HINTS[name]}.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of samples.

    Attributes:
        kind: "text_image" for tar shards, "multiview" for folders of views, "sprite_world" for the procedural world.
        path: folder of the data; None for the sprite world.
        weight: relative frequency within the source's group (other views, or the target image as the reference).
        min_side: smallest height and width of an image in px; smaller ones are not used.
        flip: mirror half of the samples, except those whose caption names left or right; do not use it for
            images that contain text.
    """

    kind: Literal["text_image", "multiview", "sprite_world"]
    path: Path | None = None
    weight: float = 1.0
    min_side: int = 256
    flip: bool = False

    def __post_init__(self) -> None:
        _require(self.min_side >= 1, f"min_side of source {self.kind!r} is {self.min_side}; it must be at least 1.")
        _require(
            0 < self.weight < math.inf,
            f"weight of source {self.kind!r} is {self.weight}; it must be positive and finite.",
        )
        needs_path = self.kind != "sprite_world"
        _require(
            not needs_path or self.path is not None,
            f"source {self.kind!r} has no path; set data.sources.N.path to its folder.",
        )
        _require(
            needs_path or (self.path is None and not self.flip),
            "source 'sprite_world' has a path or flip; its images are rendered, so remove both.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data.

    Attributes:
        sources: see `SourceConfig`.
        resolution: side of a square image in px; other aspect ratios have about the same area.
        aspect_buckets: also train at other aspect ratios; otherwise images are cropped to a square.
        workers: loader processes; 0 loads in the training process. The number does not change the samples.
        features: folder of precomputed features (`python -m train.data precompute`); None computes all in the run.
        validation: source of samples that are not trained on; their loss is logged with each preview.
        crop: which part is kept if the aspect ratio of an image differs from that of its bucket; "random" is for models
            with a crop condition (SDXL).
        evaluation: folders of images that must not be in the sources; a warning names those that are.
    """

    sources: tuple[SourceConfig, ...]
    resolution: int
    aspect_buckets: bool = False
    workers: int = 4
    features: Path | None = None
    validation: SourceConfig | None = None
    crop: Literal["random", "center"] = "random"
    evaluation: tuple[Path, ...] = (EXAMPLE_IMAGES,)

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources is empty; add at least one source.")
        _require(
            self.resolution >= 32 and self.resolution % 8 == 0,
            f"data.resolution is {self.resolution}; it must be a multiple of 8 and at least 32.",
        )
        _require(self.workers >= 0, f"data.workers is {self.workers}; it must be at least 0.")
        _require(
            self.features is None or any(source.kind != "sprite_world" for source in self.sources),
            f"data.features is {self.features}, but the sprite world has no precomputed features; remove it, or add a "
            "source of files.",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The training loss (Eq. 1, 2) and the dropout of conditions.

    Attributes:
        drop_text, drop_vision, drop_both: probability that a sample is trained without its caption, without its
            reference, or without both, for classifier-free guidance (Eq. 17).
        min_snr_gamma: γ of min-SNR loss weights; None weights all timesteps equally.
        timestep_exponent: timesteps are 1000 * u^exponent for uniform u; below 1, noisy timesteps are more frequent.
        outside_weight: loss weight of positions outside the subjects, for sources that mark them; 1 weights all
            positions equally.
    """

    drop_text: float = 0.05
    drop_vision: float = 0.05
    drop_both: float = 0.05
    min_snr_gamma: float | None = None
    timestep_exponent: float = 1.0
    outside_weight: float = 1.0

    def __post_init__(self) -> None:
        drops = (self.drop_text, self.drop_vision, self.drop_both)
        _require(
            min(drops) >= 0 and sum(drops) <= 1,
            f"objective.drop_text, drop_vision and drop_both are {drops}; use values >= 0 with a sum <= 1.",
        )
        _require(
            0 < self.timestep_exponent < math.inf,
            f"objective.timestep_exponent is {self.timestep_exponent}; it must be positive and finite.",
        )
        _require(
            self.min_snr_gamma is None or 0 < self.min_snr_gamma < math.inf,
            f"objective.min_snr_gamma is {self.min_snr_gamma}; it must be positive and finite, or none to disable it.",
        )
        _require(
            0 < self.outside_weight <= 1,
            f"objective.outside_weight is {self.outside_weight}; it must be in (0, 1].",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, the schedule of its learning rate, and the EMA of the weights.

    Attributes:
        learning_rate: peak learning rate.
        betas, weight_decay: of AdamW.
        warmup_steps: steps of linear warmup.
        decay_fraction: fraction of the run over which the learning rate falls linearly to zero at the end.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of the EMA per step; it is smaller in early steps.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 500
    decay_fraction: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        _require(
            0 < self.learning_rate < math.inf,
            f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite.",
        )
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas is {self.betas}; give two values in [0, 1).",
        )
        _require(
            0 <= self.weight_decay < math.inf,
            f"optimizer.weight_decay is {self.weight_decay}; it must be at least 0 and finite.",
        )
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 0.")
        for name in ("decay_fraction", "ema_decay"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1].")
        _require(self.max_grad_norm > 0, f"optimizer.max_grad_norm is {self.max_grad_norm}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints in `out/checkpoints`: one every `every_steps` steps and at the end; the last `keep` remain."""

    every_steps: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, f"checkpoint.every_steps is {self.every_steps}; it must be at least 1.")
        _require(self.keep > 0, f"checkpoint.keep is {self.keep}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics: one line of `out/log.jsonl` every `every_steps` steps, also sent to the trackers.

    Attributes:
        every_steps: steps per line.
        trackers: names of accelerate's trackers, such as "tensorboard" or "wandb".
    """

    every_steps: int = 25
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        _require(self.every_steps > 0, f"log.every_steps is {self.every_steps}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PreviewSubject:
    """One preview: `image` becomes the `target_phrase` of `prompt`."""

    image: Path
    prompt: str
    target_phrase: str


EXAMPLES = tuple(
    PreviewSubject(image=EXAMPLE_IMAGES / f"{word}.png", prompt=f"a {word} {scene}", target_phrase=word)
    for word, scene in (("dog", "on the beach"), ("fox", "in the snow"), ("robot", "in the jungle"))
)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Images of fixed subjects, which are not training data, generated with the EMA weights at `data.resolution`.

    Attributes:
        every_steps: steps between previews, and between validations; both also run at the end. 0 disables them.
        subjects: see `PreviewSubject`.
        seed: of each image.
        num_inference_steps: of each image; None for the pipeline's default.
    """

    every_steps: int = 1000
    subjects: tuple[PreviewSubject, ...] = EXAMPLES
    seed: int = 0
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"preview.every_steps is {self.every_steps}; it must be at least 0.")
        _require(0 <= self.seed <= MAX_SEED, f"preview.seed is {self.seed}; it must be in [0, 2**63).")
        _require(
            self.num_inference_steps is None or self.num_inference_steps >= 1,
            f"preview.num_inference_steps is {self.num_inference_steps}; it must be at least 1, or none for the "
            "pipeline's default.",
        )


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Upload of the trained adapter to the Hugging Face Hub at the end; `repo_id` None uploads nothing."""

    repo_id: str | None = None
    private: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: name of the recipe.
        out: folder of checkpoints, logs, previews and the trained adapter.
        steps: optimizer steps.
        batch_size: samples per step, over all processes.
        micro_batch_size: samples per forward pass of a process; gradients are accumulated.
        seed: of the data order, noise, timesteps, dropout and the initialization of a new adapter.
        max_seconds: stop after this time with a checkpoint; `--resume` continues.
        device: "auto" uses a GPU if there is one.
        precision: of the frozen models and the forward pass; the adapter is always float32. "auto" is bfloat16 where it
            is fast.
        model, data, objective, optimizer, curriculum, checkpoint, log, preview, hub: see the classes.
    """

    name: str
    out: Path
    steps: int
    batch_size: int
    micro_batch_size: int
    seed: int = 0
    max_seconds: float | None = None
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    curriculum: Curriculum
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        _require(  # trackers create a folder of this name
            re.fullmatch(r"\w[\w.-]*", self.name) is not None,
            f"name is {self.name!r}; it must consist of letters, digits, '_', '-' and '.', and begin with a letter, a "
            "digit or '_'.",
        )
        for name in ("steps", "batch_size", "micro_batch_size"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be at least 1.")
        _require(0 <= self.seed <= MAX_SEED, f"seed is {self.seed}; it must be in [0, 2**63).")
        _require(
            self.max_seconds is None or 0 <= self.max_seconds < math.inf,
            f"max_seconds is {self.max_seconds}; it must be at least 0 and finite, or none for no limit.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def with_absolute_paths(self) -> "TrainConfig":
        """A copy that means the same in any working directory."""
        model = self.model
        names = {name: getattr(model, name) for name in ("base", "siglip", "dinov2", "adapter")}
        local = {
            name: str(Path(value).absolute())
            for name, value in names.items()
            if Path(value).exists() and (name != "adapter" or value not in ("new", "base"))
        }
        return replace(_with_absolute_paths(self), model=replace(model, **local))


def _with_absolute_paths(node: Any) -> Any:
    if isinstance(node, Path):
        return node.absolute()
    if isinstance(node, tuple):
        return tuple(_with_absolute_paths(part) for part in node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{f.name: _with_absolute_paths(getattr(node, f.name)) for f in fields(node)})
    return node
