"""A run that is killed at random moments and resumed equals an unbroken one, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import losses, toy_config, write_base

from train.trainer import run

DRIVER = Path(__file__).parent / "kill_driver.py"
CHECKPOINT = "checkpoints/step_{:08d}"
# The metrics that depend on the time.
TIMES = {"time", "samples_per_second"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "mini")


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """Run without a kill, by number of steps."""
    runs = {}

    def get(steps):
        if steps not in runs:
            runs[steps] = tmp_path_factory.mktemp("unbroken")
            assert run(toy_config("mini", runs[steps], [*base, f"steps={steps}", "data.validation=none"])) == steps
        return runs[steps]

    return get


def assert_equal(one: Path, other: Path, steps: int) -> None:
    """Losses of all steps, other metrics, final weights, EMA and optimizer state are bit-identical."""
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, other)]
    assert [{k: v for k, v in line.items() if k not in TIMES} for line in logs[0]] == [
        {k: v for k, v in line.items() if k not in TIMES} for line in logs[1]
    ]
    for name in ("adapter", "ema", "optimizer"):
        first, second = (load_file(out / CHECKPOINT.format(steps) / f"{name}.safetensors") for out in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def kill_and_resume(base, out: Path, *, steps: int, kills: int, workers: int, seed: int) -> None:
    assignments = [*base, f"steps={steps}", f"data.workers={workers}", "data.validation=none"]
    settings = {"out": str(out), "assignments": assignments, "kills": kills, "seed": seed}
    done = subprocess.run([sys.executable, DRIVER, json.dumps(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["killed"] == kills


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_equals_an_unbroken_one(base, unbroken, tmp_path, workers):
    """Three kills: in a step, in a file of a checkpoint, and before the checkpoint is renamed."""
    kill_and_resume(base, tmp_path, steps=10, kills=3, workers=workers, seed=workers)
    assert_equal(unbroken(10), tmp_path, 10)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_ten_times_equals_an_unbroken_one(base, unbroken, tmp_path, workers):
    kill_and_resume(base, tmp_path, steps=40, kills=10, workers=workers, seed=10 + workers)
    assert_equal(unbroken(40), tmp_path, 40)


def test_number_of_loader_workers_does_not_change_the_run(base, unbroken, tmp_path):
    """An unbroken run with three workers gives the same losses as one without workers."""
    run(toy_config("mini", tmp_path, [*base, "steps=4", "data.workers=3", "data.validation=none"]))
    assert losses(tmp_path) == losses(unbroken(10))[:4]
