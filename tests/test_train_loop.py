"""The training loop: exact resume, schedules, averages, a polite stop."""

import json
import math

import pytest
import torch
from torch import nn

from train.checkpoint import Average, load_average
from train.curriculum import R_MAX, R_MIN, multiview_probability, resize_ratio
from train.loop import LoopConfig, learning_rate, run_loop


def _run(folder, stop_after=None, **options):
    """A toy regression; with `stop_after` it is stopped by its stop file after so many steps."""
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    config = LoopConfig(out=folder, batch_size=8, warmup_steps=3, log_every=1, average_decay=0.9, **options)

    def loss_of_step(step, generator):
        if stop_after is not None and step + 1 == stop_after:
            (folder / "stop").touch()
        x = torch.randn(8, 4, generator=generator)
        return (module(x) - x[:, :2]).pow(2).mean(), {}

    run_loop(config, module, loss_of_step)
    return module


def _losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_resumed_run_equals_unbroken_one(tmp_path):
    """A run stopped at step 5 and resumed gives the same losses and weights as one that never stopped."""
    whole = _run(tmp_path / "whole", max_samples=96)
    _run(tmp_path / "cut", max_samples=96, stop_after=5)
    assert len(_losses(tmp_path / "cut")) == 5
    resumed = _run(tmp_path / "cut", max_samples=96)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    for one, other in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(one, other)


def test_training_lowers_the_loss_and_average_loads(tmp_path):
    module = _run(tmp_path, max_samples=1600, learning_rate=0.05)
    losses = _losses(tmp_path)
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    averaged = load_average(tmp_path / "checkpoint", nn.Linear(4, 2))
    assert torch.allclose(averaged.weight, module.weight, atol=0.05)


def test_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="stage 'vision'"):
        load_average(tmp_path / "vision" / "checkpoint", nn.Linear(1, 1))


def test_learning_rate_warms_up_stays_and_falls():
    config = LoopConfig(out=None, batch_size=10, learning_rate=1.0, warmup_steps=10, max_samples=1000, decay=0.3)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10:70] == [1.0] * 60
    assert rates[70:] == sorted(rates[70:], reverse=True) and 0 < rates[-1] < 0.1


def test_swapping_twice_changes_nothing():
    module = nn.Linear(3, 3)
    average = Average(module, 0.9)
    module.weight.data += 1
    before = module.weight.clone()
    average.swap(module)
    assert torch.allclose(module.weight, before - 1, atol=1e-6)
    average.swap(module)
    assert torch.equal(module.weight, before)


def test_curriculum_goes_from_easy_to_hard():
    """Eq. 10-13: other views and size variance grow linearly from none to all."""
    assert [multiview_probability(p) for p in (0, 0.25, 1, 2)] == [0, 0.25, 1, 1]
    assert resize_ratio(0.0, 0.9) == R_MIN == 1
    assert resize_ratio(1.0, 1.0) == pytest.approx(R_MAX) == pytest.approx(math.sqrt(10))
    assert resize_ratio(0.5, 0.5) == pytest.approx(1 + (math.sqrt(10) - 1) / 4)
