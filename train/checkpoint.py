"""Checkpoints: weights and their average as safetensors, optimizer state loaded with `weights_only`, a step number.

Randomness needs no state here: every step draws from a generator seeded by (seed, step), see `loop.py`.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Average:
    """Exponential moving average of a module's parameters, fp32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # a young average follows quickly
        named = [(n, p) for n, p in module.named_parameters() if n in self.values]
        torch._foreach_lerp_([self.values[n] for n, _ in named], [p.detach() for _, p in named], 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange weights and average; call twice to get back."""
        for name, parameter in module.named_parameters():
            if name in self.values:
                kept = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(kept)


def save_checkpoint(folder: Path, module: nn.Module, average: Average, optimizer, state: dict) -> None:
    """Write everything beside the old checkpoint, then swap, so that a kill at any moment leaves a whole one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    trained = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    save_file(trained, fresh / "model.safetensors")
    save_file({n: v.contiguous() for n, v in average.values.items()}, fresh / "average.safetensors")
    torch.save(optimizer.state_dict(), fresh / "optimizer.pt")
    (fresh / "state.json").write_text(json.dumps(state))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint, or the previous one if the run was killed in the middle of the swap; None if there is none."""
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "state.json").exists():
            return candidate
    return None


def checkpoint_state(folder: Path) -> dict[str, int]:
    """`step`, `samples` and `begun` (the step at which its optimizer was new) of the checkpoint; zeros without one."""
    found = find_checkpoint(folder)
    if found is None:
        return {"step": 0, "samples": 0, "begun": 0}
    return json.loads((found / "state.json").read_text())


def load_checkpoint(folder: Path, module: nn.Module, average: Average, optimizer) -> dict:
    load_trained(module, load_file(folder / "model.safetensors"))
    saved = load_file(folder / "average.safetensors")
    assert saved.keys() == average.values.keys(), "the checkpoint is of another network"
    for name, value in saved.items():
        average.values[name].copy_(value)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return json.loads((folder / "state.json").read_text())


@torch.no_grad()
def load_trained(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Strictly load the trained parameters of `module`."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert named.keys() == values.keys(), sorted(named.keys() ^ values.keys())[:8]
    for name, parameter in named.items():
        parameter.copy_(values[name])


def load_average(folder: Path, module: nn.Module) -> nn.Module:
    """Averaged weights of a finished or running stage; FileNotFoundError says which stage is missing."""
    found = find_checkpoint(folder)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {folder}; run the stage '{folder.parent.name}' first.")
    load_trained(module, load_file(found / "average.safetensors"))
    return module
