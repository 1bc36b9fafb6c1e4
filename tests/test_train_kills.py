"""A run that is killed at random moments and resumed equals an uninterrupted one, bit for bit."""

import json
import os
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
def uninterrupted(base, tmp_path_factory):
    """Run without a kill, by number of steps."""
    runs = {}

    def get(steps):
        if steps not in runs:
            runs[steps] = tmp_path_factory.mktemp("uninterrupted")
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


def kill_and_resume(base, folder: Path, *, steps: int, kills: int) -> list[Path]:
    """Folders of two killed and resumed runs, without loader workers and with two."""
    runs = []
    for workers in (0, 2):
        assignments = [*base, f"steps={steps}", f"data.workers={workers}", "data.validation=none"]
        out = folder / str(workers)
        runs.append({"out": str(out), "assignments": assignments, "kills": kills, "seed": 10 * steps + workers})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, DRIVER, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == [{"killed": kills}] * 2
    return [Path(settings["out"]) for settings in runs]


def test_killed_run_equals_an_uninterrupted_one(base, uninterrupted, tmp_path):
    """Three kills: in a step, in a file of a checkpoint, and before the checkpoint is renamed; for any number of loader
    workers."""
    for out in kill_and_resume(base, tmp_path, steps=6, kills=3):
        assert_equal(uninterrupted(6), out, 6)


@pytest.mark.slow
def test_run_killed_ten_times_equals_an_uninterrupted_one(base, uninterrupted, tmp_path):
    for out in kill_and_resume(base, tmp_path, steps=40, kills=10):
        assert_equal(uninterrupted(40), out, 40)


def test_number_of_loader_workers_does_not_change_the_run(base, uninterrupted, tmp_path):
    """An uninterrupted run with three workers gives the same losses as one without workers."""
    run(toy_config("mini", tmp_path, [*base, "steps=4", "data.workers=3", "data.validation=none"]))
    assert losses(tmp_path) == losses(uninterrupted(6))[:4]
