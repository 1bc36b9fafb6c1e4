"""Configuration of a training run: frozen dataclasses, and `--set key=value` overrides with the types of their fields.

Imports no torch, so that the command line starts quickly.
"""

import json
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from realcustom.assets import EXAMPLE_IMAGES
from realcustom.config import DINOV2, SIGLIP

from .curriculum import Curriculum

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of samples.

    Attributes:
        kind: "text_image" for tar shards, "multiview" for folders of views, "sprite_world" for the procedural world.
        path: folder of the data; None for the sprite world.
        weight: relative frequency among the sources of the same role.
        min_side: smallest height and width of an image in px; smaller ones are not used.
        flip: mirror half of the samples, except those whose caption names left or right; not for images of text.
    """

    kind: Literal["text_image", "multiview", "sprite_world"]
    path: Path | None = None
    weight: float = 1.0
    min_side: int = 256
    flip: bool = False

    def __post_init__(self) -> None:
        _require(self.min_side >= 1, f"min_side of source {self.kind!r} is {self.min_side}; it must be at least 1.")
        _require(self.weight > 0, f"weight of source {self.kind!r} is {self.weight}; it must be positive.")
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
        crop: part of an image that is longer than its bucket; "random" is for models with a crop condition (SDXL).
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
        _require(self.timestep_exponent > 0, f"objective.timestep_exponent is {self.timestep_exponent}; use > 0.")
        _require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            f"objective.min_snr_gamma is {self.min_snr_gamma}; it must be positive, or none to disable it.",
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
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive.")
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
    """Images of fixed subjects, which are not training data, generated with the EMA weights.

    Attributes:
        every_steps: steps between previews, and between validations; both also run at the end. 0 disables them.
        subjects: see `PreviewSubject`.
        seed: of each image.
        num_inference_steps, height, width: of the images; None for the pipeline's default.
    """

    every_steps: int = 1000
    subjects: tuple[PreviewSubject, ...] = EXAMPLES
    seed: int = 0
    num_inference_steps: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"preview.every_steps is {self.every_steps}; it must be at least 0.")


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
        seed: of the data order, noise, timesteps and dropout.
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
        for name in ("steps", "batch_size", "micro_batch_size"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.seed >= 0, f"seed is {self.seed}; it must be at least 0.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """Apply assignments such as "optimizer.learning_rate=2e-4", in order.

    Keys are names of fields, separated by dots; an element of a tuple is addressed by its index, as in
    "data.sources.0.path=/data". Values have the type of the field. "none" unsets an optional field. A tuple is a list
    of comma-separated values; a dataclass or a tuple of dataclasses is JSON.

    Raises:
        ValueError: an assignment without "=", an unknown key, or a value of another type. The message names the key,
            the value and what is possible.
    """
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment} has no '='; write --set key=value, such as --set steps=1000.")
        config = _assign(config, key.strip().split("."), value.strip(), key.strip())
    return config


def changed_fields(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Descriptions of all fields that differ between two results of `TrainConfig.to_dict`."""
    changes = []
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_fields(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} was {old}, is {new}")
    return sorted(changes)


def _assign(node: Any, path: list[str], text: str, key: str) -> Any:
    """A copy of `node` in which the value at `path` is replaced."""
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ValueError(f"--set {key}: {name!r} is not an index of a tuple of {len(node)} elements.")
        index = int(name)
        value = _assign(node[index], rest, text, key) if rest else _parse(type(node[index]), text, key)
        return (*node[:index], value, *node[index + 1 :])
    known = [f.name for f in fields(node)] if is_dataclass(node) else []
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        where = f"{type(node).__name__} has {', '.join(known)}" if known else f"{key} does not have fields"
        raise ValueError(f"--set {key}: there is no field {name!r};{hint} {where}.")
    current: Any = node
    if rest:
        value = _assign(getattr(current, name), rest, text, key)
    else:
        value = _parse(get_type_hints(type(current))[name], text, key)
    return replace(current, **{name: value})


def _parse(kind: Any, text: str, key: str) -> Any:
    """Convert the text of an assignment to a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _parse(kind, text, key)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"--set {key}={text}: use one of {', '.join(map(str, args))}.")
        return text
    if is_dataclass(kind) or (origin is tuple and is_dataclass(args[0])):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--set {key}={text} is not JSON ({error}).") from error
        return from_json(kind, value, key)
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        kinds = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
        if len(parts) != len(kinds):
            raise ValueError(f"--set {key}={text}: give {len(kinds)} comma-separated values, not {len(parts)}.")
        return tuple(_parse(part_kind, part, key) for part_kind, part in zip(kinds, parts, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {key}={text}: use true or false.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"--set {key}={text}: the value must be of type {kind.__name__}.") from error


def from_json(kind: Any, value: Any, key: str) -> Any:
    """Build a configuration of type `kind` from JSON values; the inverse of `TrainConfig.to_dict`.

    Raises:
        ValueError: an unknown or missing field, or a value of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return from_json(kind, value, key)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{key} is {value!r}; it must be a JSON object.")
        hints = get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise ValueError(f"{key}: there is no field {unknown[0]!r}; the fields are {', '.join(hints)}.")
        values = {name: from_json(hints[name], item, f"{key}.{name}") for name, item in value.items()}
        try:
            return cast(Callable, kind)(**values)
        except TypeError as error:  # a required field is missing
            raise ValueError(f"{key}: {error}.") from error
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{key} is {value!r}; it must be a JSON list.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(from_json(part, item, f"{key}.{i}") for i, (part, item) in enumerate(zip(kinds, value)))
    if origin is Literal:
        return _parse(kind, str(value), key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path:
        return Path(str(value))
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{key} is {value!r}; it must be of type {kind.__name__}.")
    return value
