"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step_00001000` with safetensors files, `state.json`, and `manifest.json` with the size and
SHA-256 hash of each file. It is written under another name, flushed to disk and renamed: a folder with the final name
is complete. Hashes are compared on loading: a damaged checkpoint is reported and set aside, and the one before
it is used. No state of random generators is stored, because all randomness is a function of the seed and the step.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 2  # 1: optimizer state by the number of the parameter
_PREFIX, _UNFINISHED, _REPLACED, _DAMAGED = "step_", "unfinished_", "replaced_", "damaged_"


class DamagedCheckpoint(Exception):
    """A checkpoint whose files do not agree with its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        state: JSON values; "step" is the number of steps done.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that were saved as `name`."""
        return load_file(self.path / f"{name}.safetensors")

    @classmethod
    def verified(cls, path: Path) -> "Checkpoint":
        """Open a checkpoint and compare its files with the manifest.

        Raises:
            DamagedCheckpoint: a file is missing or differs.
            ValueError: the checkpoint has another format.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            for name, expected in manifest["files"].items():
                size = (path / name).stat().st_size
                if size != expected["bytes"]:
                    raise DamagedCheckpoint(f"{name} has {size} bytes instead of {expected['bytes']}")
                if _sha256(path / name) != expected["sha256"]:
                    raise DamagedCheckpoint(f"the hash of {name} differs from the manifest")
            checkpoint, written = cls(path, json.loads((path / STATE).read_text())), manifest["format"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{type(error).__name__}: {error}") from error
        if written != FORMAT:
            raise ValueError(
                f"{path} has format {written}, but this version of the trainer reads {FORMAT}; continue the "
                "run with the version that wrote it, or start it again in another folder."
            )
        return checkpoint


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint to `folder` and remove all but the last `keep`.

    Args:
        tensors: name of a file -> its tensors.
        state: JSON values with the "step".
    Returns:
        The checkpoint's folder.
    Raises:
        ValueError: the disk is full, or the folder cannot be written to. Earlier checkpoints are kept.
    """
    try:
        return _save(folder, tensors, state, keep)
    except (OSError, SafetensorError) as error:
        for unfinished in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(
            f"the checkpoint of step {state['step']} cannot be written to {folder}: {error}. Free some space and "
            "continue from the previous checkpoint."
        ) from error


def _save(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_REPLACED}*")]:
        shutil.rmtree(leftover)
    target = folder / f"{_PREFIX}{state['step']:08d}"
    new, replaced = folder / f"{_UNFINISHED}{target.name}", folder / f"{_REPLACED}{target.name}"
    new.mkdir()
    for name, values in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in values.items()}, new / f"{name}.safetensors")
    (new / STATE).write_text(json.dumps(state, indent=2) + "\n")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())}
    (new / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    for path in [*new.iterdir(), new]:
        _flush(path)
    if target.exists():
        target.rename(replaced)
    new.rename(target)
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`; None if there is none.

    A damaged checkpoint is reported in the log and renamed, so that it is not found again.
    """
    for path in reversed(_folders(folder)):
        try:
            return Checkpoint.verified(path)
        except DamagedCheckpoint as error:
            aside = path.with_name(_DAMAGED + path.name)
            logger.warning("%s is damaged (%s). It is renamed to %s and not used.", path, error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` contains a checkpoint, which may be damaged."""
    return bool(_folders(folder))


def damaged_checkpoints(folder: Path) -> list[str]:
    """Names of the damaged checkpoints that `newest_checkpoint` has renamed."""
    return sorted(path.name for path in folder.glob(f"{_DAMAGED}{_PREFIX}*"))


def _folders(folder: Path) -> list[Path]:
    """Folders of checkpoints, in the order of their steps."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Write a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The state of an optimizer of parameters of `module` as tensors: "<name of the parameter>.<name of the state>"."""
    names = _parameter_names(optimizer, module)
    state = optimizer.state_dict()["state"]
    return {f"{names[number]}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned. Settings such as the learning rate are not changed.

    Raises:
        ValueError: the state belongs to another network.
    """
    numbers = {name: number for number, name in enumerate(_parameter_names(optimizer, module))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, name = key.rsplit(".", 1)
        if parameter not in numbers:
            raise ValueError(f"the optimizer state belongs to another network: it has no parameter {parameter}.")
        state.setdefault(numbers[parameter], {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameter_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Names of the parameters, in the order by which `state_dict` of the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of a module, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Load the trainable parameters of `module`.

    Raises:
        ValueError: the names or shapes are not exactly those of the trainable parameters.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if named.keys() != values.keys():
        different = sorted(named.keys() ^ values.keys())
        raise ValueError(f"the checkpoint belongs to another network: {different[0]} is in only one of the two.")
    for name, parameter in named.items():
        if parameter.shape != values[name].shape:
            raise ValueError(
                f"the checkpoint belongs to another network: {name} has the shape {tuple(values[name].shape)}, not "
                f"{tuple(parameter.shape)}."
            )
        parameter.copy_(values[name])
