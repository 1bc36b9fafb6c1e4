"""Training with two processes equals training with one: same samples and noise, same losses up to rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from record_driver import record
from safetensors.torch import load_file
from toy_training import losses, toy_config, write_base

from train.trainer import run

DRIVER = Path(__file__).parent / "record_driver.py"
# Three samples per step: two processes have different parts. Two steps, then two more after a resume.
SETTINGS = ["batch_size=3", "micro_batch_size=1", "data.validation=none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return [*write_base(tmp_path_factory.mktemp("base"), "mini"), *SETTINGS]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launch(out: Path, assignments: list[str], num_processes: int) -> None:
    settings = json.dumps({"out": str(out), "assignments": assignments})
    # "--multi_gpu" selects PyTorch's launcher, also for processes on the CPU; "--cpu" would need MPI.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(_free_port())]
    command = [sys.executable, *launch, str(DRIVER), settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def _samples(out: Path) -> dict[int, list]:
    """Rank -> recorded samples."""
    files = sorted(out.glob("samples-*.jsonl"))
    return {rank: [json.loads(line) for line in file.read_text().splitlines()] for rank, file in enumerate(files)}


def assert_similar(one: Path, other: Path) -> None:
    """Losses and weights agree up to rounding. Adam enlarges the rounding of gradients that are almost zero, so a few
    weights may differ by more than 1e-5, but by far less than the steps that they have made (1e-3)."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    first, second = (load_file(out / "adapter.safetensors") for out in (one, other))
    differences = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert (differences > 1e-5).sum() <= 1e-4 * differences.numel() and differences.max() < 2e-4


def test_two_processes_train_on_the_same_samples_and_noise(base, tmp_path):
    """`accelerate launch` with two processes, resumed by one process after two of four steps."""
    record(tmp_path / "one", base)
    _launch(tmp_path / "two", [*base, "steps=2"], 2)
    recorded = _samples(tmp_path / "two")
    assert [len(samples) for samples in recorded.values()] == [2, 4]  # one and two samples in each of two steps
    record(tmp_path / "two", base, resume=True)
    expected = sorted(_samples(tmp_path / "one")[0])
    assert len(expected) == 12
    recorded = _samples(tmp_path / "two")
    assert sorted(sample for samples in recorded.values() for sample in samples) == expected
    assert_similar(tmp_path / "one", tmp_path / "two")


def test_ray_train_gives_the_same_losses(base, tmp_path, monkeypatch):
    """Ray Train with an elastic number of workers, of which two fit; checkpoints are reported, and validation runs as
    a task of its own. One process resumes the run. Paths are relative to the caller's working directory."""
    pytest.importorskip("pyarrow")
    ray = pytest.importorskip("ray")

    from train.ray import run_on_ray

    validated = [*base, 'data.validation={"kind": "sprite_world"}', "preview.every_steps=2", "preview.subjects=[]"]
    validated.append("micro_batch_size=64")
    run(toy_config("mini", tmp_path / "one", base))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # inherited by Ray's processes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        two = tmp_path / "two"
        monkeypatch.chdir(tmp_path)
        relative = [f"model.base={os.path.relpath(base[0].partition('=')[2])}", "steps=2"]
        result = run_on_ray(toy_config("mini", Path("two"), [*validated, *relative]), num_workers=(1, 2))
        assert result.error is None and result.metrics is not None
        assert result.metrics["loss"] == pytest.approx(losses(two)[-1])
        assert result.metrics["validation_loss"] > 0
        assert json.loads((two / "checkpoints/step_00000002/state.json").read_text())["processes"] == 2
        with pytest.raises(ValueError, match="already contains checkpoints"):
            run_on_ray(toy_config("mini", two, base), num_workers=1)
    finally:
        ray.shutdown()
    run(toy_config("mini", two, base), resume=True)
    assert_similar(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("text", "workers"), [("4", 4), ("1:8", (1, 8)), ("2:2", (2, 2))])
def test_number_of_workers_is_parsed(text, workers):
    pytest.importorskip("pyarrow")
    from train.ray import parse_workers

    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["", "0", "x", "8:1", "1:2:3", "-1"])
def test_wrong_number_of_workers_is_explained(text):
    pytest.importorskip("pyarrow")
    from train.ray import parse_workers

    with pytest.raises(ValueError, match=f"--ray {text}"):
        parse_workers(text)


def test_announced_loss_of_a_machine_asks_for_one_checkpoint(monkeypatch):
    """Ray is asked every tenth step, because all workers wait for each other to answer."""
    pytest.importorskip("pyarrow")
    from train import ray as ray_training

    asked = []

    def announcement():
        asked.append(None)
        return "a machine" if len(asked) == 2 else None

    monkeypatch.setattr(ray_training, "get_preemption_info", announcement)
    monitor = ray_training.RayMonitor(validates=False)
    assert [step for step in range(1, 60) if monitor.wants_checkpoint(step)] == [20]
    assert len(asked) == 2


def test_mistake_of_the_user_is_not_retried_on_ray(tmp_path, monkeypatch):
    """When Ray calls the workers again after a ValueError, they return at once, and its message is kept."""
    pytest.importorskip("pyarrow")
    from train import ray as ray_training

    calls = []

    def failing(*_, **options):
        calls.append(None)
        raise ValueError("data does not exist")

    monkeypatch.setattr(ray_training, "run", failing)
    settings = {"config": toy_config("mini", tmp_path, [])}
    with pytest.raises(ValueError, match="data does not exist"):
        ray_training._train(settings)
    ray_training._train(settings)
    assert len(calls) == 1 and (tmp_path / "ray" / ray_training.MISTAKE).read_text() == "data does not exist"
