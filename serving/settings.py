"""Settings: the arguments of `serve run serving:app key=value` and of configuration files, with their defaults."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator

from realcustom.config import Execution, MemoryTier

from .protocol.limits import Limits

PROJECT_ROOT = Path(__file__).resolve().parent.parent
API_KEY_VARIABLE = "REALCUSTOM_API_KEY"
REPLICA = "Replica"  # name of the deployment that computes images


class LiveSettings(Limits):
    """Settings that can change without a restart: the `user_config` of the deployment `Replica`.

    Attributes:
        max_batch_size: images that are active at the same time in a replica, if its memory allows.
        max_queued: images that may wait in a replica, and as many in each process of the HTTP interface; further ones
            are rejected.
        preview_every: steps between previews.
        stall_timeout_s: seconds without progress after which a replica is unhealthy. A step of a large image may take
            longer: up to 10 times the time expected from measured steps.
    """

    max_batch_size: int = Field(default=8, ge=1)
    max_queued: int = Field(default=32, ge=1)
    preview_every: int = Field(default=3, ge=1)
    stall_timeout_s: float = Field(default=300, gt=0)

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})

    @property
    def live(self) -> "LiveSettings":
        return LiveSettings(**{name: getattr(self, name) for name in LiveSettings.model_fields})


def _parts(value: object) -> object:
    """Split text from the command line, such as "1,2,4"; lists from a configuration file are returned unchanged."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _api_key_of_environment() -> SecretStr | None:
    key = os.environ.get(API_KEY_VARIABLE)
    return None if key is None else SecretStr(key)


class Settings(LiveSettings):
    """All settings of a server.

    Attributes:
        model: folder in the diffusers layout, relative to the project or to the current folder, or a hub id.
        adapter: file of a RealCustom++ adapter that replaces the model's; None uses the model's.
        device: "auto" selects the GPU if the machine that starts the server has one.
        dtype: "auto" selects bfloat16 on a GPU and float32 on a CPU.
        memory: which weights stay on the device, see `realcustom.memory.apply_memory_tier`.
        num_replicas: fixed number of replicas; sets min_replicas and max_replicas.
        min_replicas, max_replicas: bounds of autoscaling; with 0, an idle server stops its last replica.
        num_ingresses: processes of the HTTP interface; with 2, the server stays reachable while one restarts.
        body_timeout_s: seconds within which the body of an HTTP request must arrive; otherwise the response is 408.
        max_unread_bodies: bodies that a process of the HTTP interface receives at the same time; further requests
            receive 503.
        trusted_hosts: names that the Host header of HTTP requests may have; "*" accepts all names, "*.example.com" all
            subdomains. None accepts all names for connections from other machines, and only the names of this machine
            and IP addresses for local connections, which protects a local server from DNS rebinding.
        client_header: header with the address of the client, such as X-Forwarded-For, if a trusted proxy sets it.
            Clients share the queue equally; without it, the address of the connection identifies a client.
        target_backlog_s: seconds of queued work per replica; the target of autoscaling.
        upscale_delay_s, downscale_delay_s: seconds for which more (fewer) replicas must be required before replicas are
            added (removed).
        drain_timeout_s: seconds that a stopping replica has to finish its images.
        num_cpus, num_gpus: resources that Ray reserves per replica; num_gpus None is 1 on a GPU and 0 on a CPU.
        cpu_threads: torch threads of a replica; None uses torch's default.
        execution: how UNet calls run, see `RealCustomPipeline.execution`. With CUDA graphs, a replica captures those of
            its image sizes and batch sizes before it accepts requests.
        compile: compile the transformer "blocks" of the UNet, or these and the residual blocks ("resnets"), with
            `torch.compile`. Steps are faster; a replica starts later.
        image_sizes: sizes "HEIGHTxWIDTH" in px to prepare for at the start; empty for the model's default size.
        memory_gb: memory for the active images of a replica, in GiB; None uses most of what is free after loading.
        text_cache_gb, reference_cache_gb: memory for encoded texts and references of earlier requests, in GiB. Not part
            of `memory_gb`. If `memory_gb` is None, the caches take at most half of the usable memory and the images the
            rest.
        reference_memory_gb: memory for the decoded references of all requests in a process of the HTTP interface, in
            GiB; further requests receive 429.
        max_retries: how often an image is restarted on another replica after its replica failed.
        log_format: format of Ray Serve's log files; "JSON" includes the request id as a field.
        api_key: if set, HTTP requests must send it as `Authorization: Bearer <api_key>`. The default is the
            environment variable REALCUSTOM_API_KEY of the process that builds the application. Prefer the variable:
            Ray logs the arguments of `serve run` and of configuration files, and its dashboard displays them.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # the input may contain the API key

    model: str = "assets/mini"
    adapter: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory: MemoryTier = "high"
    num_replicas: int | None = Field(default=None, ge=1)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    num_ingresses: int = Field(default=1, ge=1)
    body_timeout_s: float = Field(default=60, gt=0)
    max_unread_bodies: int = Field(default=256, ge=1)
    trusted_hosts: Annotated[tuple[str, ...] | None, BeforeValidator(_parts)] = None
    client_header: str | None = None
    target_backlog_s: float = Field(default=10, gt=0)
    upscale_delay_s: float = Field(default=3, ge=0)
    downscale_delay_s: float = Field(default=120, ge=0)
    drain_timeout_s: float = Field(default=120, gt=0)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    cpu_threads: int | None = Field(default=None, ge=1)
    execution: Execution = "auto"
    compile: Literal["off", "blocks", "resnets"] = "off"
    image_sizes: Annotated[tuple[str, ...], BeforeValidator(_parts)] = ()
    memory_gb: float | None = Field(default=None, gt=0)
    text_cache_gb: float = Field(default=0.25, ge=0)
    reference_cache_gb: float = Field(default=1, ge=0)
    reference_memory_gb: float = Field(default=1, gt=0)
    max_retries: int = Field(default=2, ge=0)
    log_format: Literal["TEXT", "JSON"] = "JSON"
    api_key: SecretStr | None = Field(default_factory=_api_key_of_environment, validate_default=True)

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not key.get_secret_value().strip():
            raise ValueError(
                f"api_key (or {API_KEY_VARIABLE}) is empty, which would leave the server open; set a key, or omit it "
                "to accept requests without one."
            )
        return key

    @model_validator(mode="before")
    @classmethod
    def _fixed_replicas(cls, values: dict) -> dict:
        fixed = values.get("num_replicas")
        if fixed is None:
            return values
        if "min_replicas" in values or "max_replicas" in values:
            raise ValueError("num_replicas excludes min_replicas and max_replicas; set one or the other.")
        return {**values, "num_replicas": None, "min_replicas": fixed, "max_replicas": fixed}

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas is {self.max_replicas}; raise max_replicas."
            )
        for size in self.image_sizes:
            if not re.fullmatch(r"\d{1,5}x\d{1,5}", size):
                raise ValueError(f"image_sizes contains {size[:20]!r}; write HEIGHTxWIDTH in px, for example 1024x768.")
        return self

    @property
    def warm_up_sizes(self) -> list[tuple[int, int]]:
        """`image_sizes` as (height, width)."""
        return [(int(height), int(width)) for height, width in (size.split("x") for size in self.image_sizes)]

    def resolved(self) -> "Settings":
        """Settings that are valid on every machine: with the device selected, and with absolute paths."""
        device = self.device
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        num_gpus = self.num_gpus if self.num_gpus is not None else float(device == "cuda")
        paths = {"model": _absolute(self.model), "adapter": self.adapter and _absolute(self.adapter)}
        return self.model_copy(update={"device": device, "num_gpus": num_gpus, **paths})


def _absolute(path: str) -> str:
    """Make a path relative to the current folder absolute. Paths inside the project stay relative, because each machine
    has its own copy of the project."""
    if not (PROJECT_ROOT / path).exists() and Path(path).exists():
        return str(Path(path).resolve())
    return path


def resolve_path(path: str) -> str:
    """Make a path inside the project absolute; other paths and hub ids are returned unchanged."""
    return str(PROJECT_ROOT / path) if (PROJECT_ROOT / path).exists() else path
