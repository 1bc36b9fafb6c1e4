"""Limits, LiveSettings, Settings: everything `serve run serving:app key=value` and the YAML files accept, with defaults."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from realcustom.config import MemoryTier

from .protocol.limits import Limits

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class LiveSettings(Limits):
    """What can change without a restart: the `user_config` of the deployment `Replica`.

    Attributes:
        max_batch_size: images under way together in a replica, if their memory allows it.
        max_queued: images waiting in a replica, and again in front of the replicas; more are refused.
        preview_every: steps between previews.
        stall_timeout_s: seconds after which a piece of work that does not end makes the replica unhealthy.
    """

    max_batch_size: int = Field(8, ge=1)
    max_queued: int = Field(32, ge=1)
    preview_every: int = Field(3, ge=1)
    stall_timeout_s: float = Field(300, gt=0)

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})

    @property
    def live(self) -> "LiveSettings":
        return LiveSettings(**{name: getattr(self, name) for name in LiveSettings.model_fields})

    @property
    def engine_options(self) -> dict[str, int | float]:
        """Keyword arguments of `Engine.reconfigure`."""
        return {name: getattr(self, name) for name in LiveSettings.model_fields if name not in Limits.model_fields}


def _numbers(value: object) -> object:
    """The command line's "1,2,4" -> the list of a configuration file."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


class Settings(LiveSettings):
    """One server.

    Attributes:
        model: folder in diffusers layout, relative to the project or to the current folder, or a hub name.
        adapter: RealCustom++ adapter file to load over the model; None if the model brings its own.
        device: "auto" is a GPU if the starting machine has one.
        dtype: "auto" is float32 on a CPU and bfloat16 on a GPU.
        memory: which weights stay on the device, see `realcustom.memory.place`.
        num_replicas: fixed number of replicas; it sets min_replicas and max_replicas.
        min_replicas, max_replicas: bounds of autoscaling; 0 lets the last replica go when nothing is asked for.
        num_ingresses: processes that answer HTTP; with 2, one that dies is not missed while it is started again.
        target_backlog_s: autoscaling wants each replica to have this many seconds of work ahead.
        upscale_delay_s, downscale_delay_s: how long more or fewer replicas must be wanted before it happens.
        drain_timeout_s: how long a replica that leaves may finish its images.
        num_cpus, num_gpus: what Ray reserves for a replica; num_gpus None is 1 on a GPU and 0 otherwise.
        cpu_threads: torch threads of a replica; None is torch's own choice.
        compile: `torch.compile` the UNet's "blocks", or the "whole" of it; the replica starts later, "whole" minutes
            later, and steps faster.
        batch_sizes: numbers of images that may step together; empty allows any.
        memory_gb: memory for images under way in a replica; None is most of what is free once the model is loaded.
        max_retries: how often an image is begun again elsewhere after its replica failed.
        log_format: of Ray Serve's log files; "JSON" has the request id as a field.
        api_key: if set, HTTP requests must carry it as `Authorization: Bearer <api_key>`.
    """

    model: str = "assets/mini"
    adapter: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory: MemoryTier = "high"
    num_replicas: int | None = Field(None, ge=1)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    num_ingresses: int = Field(1, ge=1)
    target_backlog_s: float = Field(10, gt=0)
    upscale_delay_s: float = Field(3, ge=0)
    downscale_delay_s: float = Field(120, ge=0)
    drain_timeout_s: float = Field(120, gt=0)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    cpu_threads: int | None = Field(None, ge=1)
    compile: Literal["off", "blocks", "whole"] = "off"
    batch_sizes: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = ()
    memory_gb: float | None = Field(None, gt=0)
    max_retries: int = Field(2, ge=0)
    log_format: Literal["TEXT", "JSON"] = "JSON"
    api_key: SecretStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _fixed_replicas(cls, values: dict) -> dict:
        fixed = values.get("num_replicas")
        if fixed is None:
            return values
        if "min_replicas" in values or "max_replicas" in values:
            raise ValueError("give num_replicas, or min_replicas and max_replicas; not both.")
        return {**values, "num_replicas": None, "min_replicas": fixed, "max_replicas": fixed}

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}; max_replicas must be at least that.")
        if self.compile == "whole" and self.memory == "low":
            raise ValueError(
                "memory 'low' brings the UNet over layer by layer; compile 'blocks' fits it, 'whole' does not."
            )
        if self.batch_sizes and min(self.batch_sizes) != 1:
            raise ValueError(f"batch_sizes is {list(self.batch_sizes)}; 1 must be among them, and nothing below it.")
        return self

    def resolved(self) -> "Settings":
        """The settings as a replica on another machine needs them: device chosen, `cwd`-relative paths absolute."""
        device = self.device
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        num_gpus = self.num_gpus if self.num_gpus is not None else float(device == "cuda")
        paths = {"model": _absolute(self.model), "adapter": self.adapter and _absolute(self.adapter)}
        return self.model_copy(update={"device": device, "num_gpus": num_gpus, **paths})


def _absolute(path: str) -> str:
    """Relative to the current folder -> absolute; paths of the project stay, each machine has its own copy."""
    if not (PROJECT_ROOT / path).exists() and Path(path).exists():
        return str(Path(path).resolve())
    return path


def resolve_path(path: str) -> str:
    """A path of the project as this machine has it; anything else (absolute, a hub name) unchanged."""
    return str(PROJECT_ROOT / path) if (PROJECT_ROOT / path).exists() else path
