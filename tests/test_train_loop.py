"""The pretraining loop of the embedded model: exact resume, schedules, logging and graceful shutdown."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from train.mini.loop import CHECKPOINTS, LoopConfig, load_stage, run_loop, stage_state


def _run(folder, at_step=lambda step: None, nan_steps=(), preview=None, log_every=1, **options):
    """A toy regression. `at_step` is called at the start of each step; the loss of the steps in `nan_steps` is NaN."""
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    config = LoopConfig(out=folder, batch_size=8, warmup_steps=3, log_every=log_every, ema_decay=0.9, **options)

    def loss_of_step(step, generator):
        at_step(step)
        x = torch.randn(8, 4, generator=generator)
        loss = (module(x) - x[:, :2]).pow(2).mean()
        return loss * (math.nan if step in nan_steps else 1), {}

    run_loop(config, module, loss_of_step, preview)
    return module


def _log(folder):
    """Lines of the log. NaN and Infinity, which are not JSON, raise."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def _losses(folder):
    return [line["loss"] for line in _log(folder)]


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    """A run that its stop file stops after 5 steps and that is resumed gives the losses and weights of one run."""
    stop_file = tmp_path / "resumed" / "stop"
    uninterrupted = _run(tmp_path / "uninterrupted", max_samples=96)
    _run(tmp_path / "resumed", at_step=lambda step: stop_file.touch() if step == 4 else None, max_samples=96)
    assert len(_losses(tmp_path / "resumed")) == 5
    resumed = _run(tmp_path / "resumed", max_samples=96)
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "uninterrupted")
    for one, other in zip(uninterrupted.parameters(), resumed.parameters()):
        assert torch.equal(one, other)


def test_training_lowers_the_loss_and_ema_weights_load(tmp_path):
    """The loss falls to less than a fifth, and the EMA weights of the checkpoint are close to the final weights."""
    module = _run(tmp_path, max_samples=1600, learning_rate=0.05)
    losses = _losses(tmp_path)
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    averaged = load_stage(tmp_path, nn.Linear(4, 2))
    assert torch.allclose(averaged.weight, module.weight, atol=0.05)


def test_error_names_the_missing_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="stage 'vision'"):
        load_stage(tmp_path / "vision", nn.Linear(1, 1))


def test_learning_rate_warms_up_stays_constant_and_decays(tmp_path):
    config = LoopConfig(
        out=tmp_path, batch_size=10, learning_rate=1.0, warmup_steps=10, max_samples=1000, decay_fraction=0.3
    )
    rates = [config.rate(step, 0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10:70] == [1.0] * 60
    assert rates[70:] == sorted(rates[70:], reverse=True) and 0 < rates[-1] < 0.1


def test_loop_runs_outside_the_main_thread(tmp_path):
    """Only the main thread may install signal handlers; another thread trains without them."""
    errors = []

    def target():
        try:
            _run(tmp_path, max_samples=16)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    assert not errors and len(_losses(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_run_with_a_checkpoint(tmp_path, number):
    """A signal ends the step in progress, and the previous handlers are restored. The resumed run gives the losses of
    an uninterrupted one."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stop = lambda step: os.kill(os.getpid(), number) if step == 2 else None
    _run(tmp_path / "stopped", at_step=stop, max_samples=40)
    assert stage_state(tmp_path / "stopped")["step"] == 2
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    _run(tmp_path / "stopped", max_samples=40)
    _run(tmp_path / "uninterrupted", max_samples=40)
    assert _losses(tmp_path / "stopped") == _losses(tmp_path / "uninterrupted")


def test_damaged_checkpoint_of_a_stage_is_not_used(tmp_path):
    """If the newest checkpoint is damaged, the stage resumes from the one before it."""
    for samples in (16, 32):
        _run(tmp_path, max_samples=samples)
    damaged = tmp_path / CHECKPOINTS / "step_00000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert stage_state(tmp_path)["step"] == 2


def test_signal_handlers_are_restored_after_an_error(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def fail(step):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        _run(tmp_path, at_step=fail, max_samples=16)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_non_finite_step_is_skipped_and_does_not_enter_the_averages(tmp_path):
    """The log stays valid JSON: the averages are those of the finite steps, and the skipped step is counted."""
    module = _run(tmp_path / "nan", nan_steps=(2,), max_samples=64, log_every=4)
    first, second = _log(tmp_path / "nan")
    assert math.isfinite(first["loss"]) and math.isfinite(first["norm"]) and first["skipped_steps"] == 1
    assert "skipped_steps" not in second
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    _run(tmp_path / "each", nan_steps=(2,), max_samples=32)  # the same steps, one per line of the log
    losses = [line["loss"] for line in _log(tmp_path / "each") if "loss" in line]
    assert len(losses) == 3 and first["loss"] == pytest.approx(sum(losses) / 3, abs=2e-5)


def test_non_finite_preview_metrics_are_logged_as_null(tmp_path):
    _run(tmp_path, preview=lambda step: {"psnr": math.inf, "mean": [0.0, math.nan]}, max_samples=16)
    assert _log(tmp_path)[-1]["psnr"] is None and _log(tmp_path)[-1]["mean"] == [0.0, None]
