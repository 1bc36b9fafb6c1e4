"""Training checkpoints: weights and their EMA as safetensors, the optimizer state, and the step number.

Random generator state is not stored: each step uses a generator seeded by (seed, step), see `loop.py`.
"""

import json
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class EMA:
    """Exponential moving average of the trainable parameters of a module, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average toward the current parameters.

        In early steps the decay is smaller, so that the initial values lose their influence quickly.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        named = [(n, p) for n, p in module.named_parameters() if n in self.values]
        get_ema_multi_avg_fn(decay)([self.values[n] for n, _ in named], [p.detach() for _, p in named], step)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the parameters of the module and the average. A second call restores both."""
        for name, parameter in module.named_parameters():
            if name in self.values:
                current = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(current)


def save_checkpoint(
    folder: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, state: dict[str, int]
) -> None:
    """Write a checkpoint next to the previous one, then replace it, so that one of the two is complete at any time."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    trained = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    save_file(trained, new / "model.safetensors")
    save_file({n: v.contiguous() for n, v in ema.values.items()}, new / "ema.safetensors")
    torch.save(optimizer.state_dict(), new / "optimizer.pt")
    (new / "state.json").write_text(json.dumps(state))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint at `folder`, the previous one if the process was killed during the swap, or None."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "state.json").exists():
            return candidate
    return None


def checkpoint_state(folder: Path) -> dict[str, int]:
    """`step`, `samples` and `warmup_start_step` of the checkpoint at `folder`; zeros if there is none.

    `warmup_start_step` is the step at which the optimizer was created.
    """
    found = find_checkpoint(folder)
    if found is None:
        return {"step": 0, "samples": 0, "warmup_start_step": 0}
    return json.loads((found / "state.json").read_text())


def load_checkpoint(folder: Path, module: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Load weights, EMA and optimizer state in place; returns the state that was passed to `save_checkpoint`."""
    load_trained(module, load_file(folder / "model.safetensors"))
    saved = load_file(folder / "ema.safetensors")
    assert saved.keys() == ema.values.keys(), f"{folder} belongs to a different network"
    for name, value in saved.items():
        ema.values[name].copy_(value)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return json.loads((folder / "state.json").read_text())


@torch.no_grad()
def load_trained(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Load the trainable parameters of `module`. The names must match exactly."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert named.keys() == values.keys(), sorted(named.keys() ^ values.keys())[:8]
    for name, parameter in named.items():
        parameter.copy_(values[name])


def load_ema(folder: Path, module: ModuleT) -> ModuleT:
    """Load the EMA weights of a training stage into `module` and return it.

    Raises:
        FileNotFoundError: the stage has no checkpoint yet.
    """
    found = find_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(f"No checkpoint in {folder}. Run the stage '{folder.parent.name}' first.")
    load_trained(module, load_file(found / "ema.safetensors"))
    return module
