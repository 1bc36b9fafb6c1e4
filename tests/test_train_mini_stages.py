"""Every stage of the embedded model's pretraining runs, resumes and ends on a signal; recipe `mini` trains the adapter
of the folder that they export."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from toy_training import toy_config

from realcustom import RealCustomPipeline, Request, Subject
from realcustom.assets import EXAMPLE_IMAGES
from train.evaluate import classifiers
from train.mini import text_to_image, vae, vision_encoders
from train.mini.__main__ import main
from train.mini.loop import stage_state
from train.mini.pool import SamplePool
from train.trainer import run

ROOT = Path(__file__).parents[1]
BATCH = 8


def small_pool(*arguments, start, capacity, per_step):
    """A pool with a few samples, which needs no worker processes."""
    return SamplePool(*arguments, start=min(start, 24), capacity=64, per_step=per_step)


@pytest.fixture
def toy_sizes(monkeypatch):
    """Batches, pools and held-out sets of a few samples."""
    for module in (vae, text_to_image, vision_encoders, classifiers):
        monkeypatch.setattr(module, "SamplePool", small_pool)
        monkeypatch.setattr(module, "BATCH_SIZE", BATCH)
        if hasattr(module, "NUM_HELD_OUT"):
            monkeypatch.setattr(module, "NUM_HELD_OUT", 16)
    monkeypatch.setattr(text_to_image, "PREVIEW_PROMPTS", text_to_image.PREVIEW_PROMPTS[:2])
    monkeypatch.setattr(text_to_image, "sample_latents", functools.partial(text_to_image.sample_latents, num_steps=1))
    monkeypatch.setattr(text_to_image, "GROUNDED_EVERY", 2)
    monkeypatch.setattr(text_to_image, "TEXT_STEPS", 3)  # the last step uses cached texts


def test_model_from_scratch(toy_sizes, tmp_path):
    """All stages make two steps and resume to four; the exported folder has no adapter; recipe `mini` trains one, and
    the folder that contains it generates an image."""
    stages = tmp_path / "stages"
    (stages / "vae").mkdir(parents=True)
    (stages / "vae" / "scaling_factor.json").write_text("1.0")  # otherwise measured on 256 images
    for stage in ("vae", "base", "vision", "classifiers"):
        for steps in (2, 4):
            main([stage, "--out", str(stages), "--max-samples", str(steps * BATCH), "--device", "cpu"])
            assert stage_state(stages / stage)["step"] == steps
        lines = [json.loads(line) for line in (stages / stage / "log.jsonl").read_text().splitlines()]
        assert lines and all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float)), stage
    main(["export", "--out", str(stages), "--model", str(tmp_path / "base")])
    assert RealCustomPipeline.from_pretrained(tmp_path / "base").adapter is None

    settings = [f"model.base={tmp_path / 'base'}", "data.resolution=128", "steps=1", "data.validation=none"]
    assert run(toy_config("mini", tmp_path / "run", settings)) == 1
    main(["export", "--out", str(stages), "--run", str(tmp_path / "run"), "--model", str(tmp_path / "model")])
    samples = json.loads((tmp_path / "model" / "training.json").read_text())
    assert samples == {"vae": 4 * BATCH, "base": 4 * BATCH, "vision": 4 * BATCH, "adapter": 2}
    pipeline = RealCustomPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    subject = Subject(image=Image.open(EXAMPLE_IMAGES / "dog.png"), target_phrase="dog")
    generation = pipeline.prepare(Request(prompt="a dog in the snow", subjects=(subject,), num_inference_steps=1))
    pipeline.run([generation])
    assert pipeline.decode([generation])[0].size == (128, 128)


@contextmanager
def rendering_stage(out: Path) -> Iterator[subprocess.Popen]:
    """A stage in a process group of its own, while its workers render samples. All processes must end at the end."""
    command = [sys.executable, "-m", "train.mini", "vae", "--out", str(out), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            while "Rendering 4000 samples" not in (line := process.stderr.readline()):
                assert line, "the stage ended before it rendered samples"
            time.sleep(1)
            yield process
            deadline = time.monotonic() + 30
            while group_exists(process.pid):
                assert time.monotonic() < deadline, "worker processes are left"
                time.sleep(0.1)
        finally:
            if group_exists(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_stage_while_samples_are_rendered(tmp_path, number):
    """All processes of the group receive it, as with Ctrl-C. The stage ends within 20 seconds with a checkpoint."""
    with rendering_stage(tmp_path) as process:
        os.killpg(process.pid, number)
        sent = time.monotonic()
        assert process.wait(60) == 0 and time.monotonic() - sent < 20
    assert stage_state(tmp_path / "vae")["step"] == 0


def test_workers_of_a_stage_end_with_it(tmp_path):
    """If the main process is killed while it renders samples, its workers end too."""
    with rendering_stage(tmp_path) as process:
        process.kill()
        process.wait()
