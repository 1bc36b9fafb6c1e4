"""One training step of SDXL at full size on the CPU: `python -m pytest -m slow -s tests/test_train_full_size.py`.

Needs 16 GB of memory and several minutes. Weights are random, and the layers of a frozen model share them.
"""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from toy_training import write_data

from benchmarks.full_size import random_pipeline
from realcustom import RealCustomConfig
from realcustom.convert import convert_official
from train import startup, trainer
from train.overrides import override
from train.recipes import RECIPES

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parent / "golden"


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of the authors' two checkpoints, by this project's names.

    Each of their two projectors uses one of the two attentions of Eq. 9; the trained adapter has both.
    """
    shapes = {}
    for layout in ("highres", "shallow"):
        listed = json.loads((GOLDEN / f"official_{layout}_keys.json").read_text())["keys"]
        own, _ = convert_official({name: torch.empty(shape, device="meta") for name, shape in listed.items()})
        shapes |= {name: tuple(value.shape) for name, value in own.items()}
    return shapes


def test_recipe_sdxl_512_makes_one_step(tmp_path, monkeypatch):
    """The trained parameters are those that the authors publish; each has changed after one step; the frozen models
    have no gradient. Prints time and peak memory."""
    pipeline = random_pipeline("sdxl", dtype=torch.float32, repeat_all=True)
    saved = {}

    def load(model, dtype):
        assert dtype == torch.float32
        return pipeline

    def save(folder, tensors, state, *, keep):
        saved.update({name: dict(values) for name, values in tensors.items()}, step=state["step"])
        return folder

    start = {}
    start_adapter = startup.start_adapter

    def keep_start(*arguments):
        adapter = start_adapter(*arguments)
        start.update({name: float(value.detach().double().sum()) for name, value in adapter.named_parameters()})
        return adapter

    monkeypatch.setattr(startup, "load_pipeline", load)
    monkeypatch.setattr(trainer, "save_checkpoint", save)  # 9 GB
    monkeypatch.setattr(startup, "start_adapter", keep_start)
    monkeypatch.setattr(trainer, "is_complete", lambda base: False)
    monkeypatch.setattr(trainer, "write_results", lambda *_, **options: None)
    settings = [
        f"out={tmp_path}", "device=cpu", "precision=fp32", "steps=1", "batch_size=1", "micro_batch_size=1",
        "data.aspect_buckets=false", "data.workers=0", "log.every_steps=1", "log.trackers=", "preview.every_steps=0",
        "objective.drop_text=0", "objective.drop_vision=0", "objective.drop_both=0", *write_data(tmp_path / "data"),
    ]  # fmt: skip
    before = time.monotonic()
    assert trainer.run(override(RECIPES["sdxl_512"](), settings)) == 1
    seconds = time.monotonic() - before

    adapter = saved["adapter"]
    assert {name: tuple(value.shape) for name, value in adapter.items()} == published_shapes()
    assert sum(value.numel() for value in adapter.values()) == 455_626_752
    assert all(float(value.double().sum()) != start[name] for name, value in adapter.items())
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in adapter.values())
    assert saved["optimizer"].keys() == {
        f"{name}.{part}" for name in adapter for part in ("step", "exp_avg", "exp_avg_sq")
    }
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert pipeline.realcustom_config == RealCustomConfig.preset("paper", "sdxl")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nsdxl_512, one step of one sample in float32: {seconds:.0f} s, peak memory {peak:.1f} GiB")
