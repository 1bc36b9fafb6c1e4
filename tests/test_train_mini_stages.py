"""Every stage of the embedded model's pretraining runs and resumes; recipe `mini` trains the adapter of the folder that
they export."""

import functools
import json
import math

import pytest
import torch
from PIL import Image
from toy_training import toy_config
from transformers import CLIPTokenizer

from benchmarks import training
from realcustom import RealCustomPipeline, Request, Subject
from realcustom.assets import EXAMPLE_IMAGES, MINI_MODEL
from train.evaluate import classifiers
from train.mini import latent_samples, text_to_image, vae, vision_encoders
from train.mini.__main__ import main
from train.mini.loop import stage_state
from train.mini.pool import SamplePool
from train.trainer import run

BATCH = 8


def small_pool(*arguments, start, capacity, per_step):
    """A pool with a few samples, which needs no worker processes."""
    return SamplePool(*arguments, start=min(start, 24), capacity=64, per_step=per_step)


@pytest.fixture
def toy_sizes(monkeypatch):
    """Batches, pools and held-out sets of a few samples."""
    for module in (vae, latent_samples, classifiers):
        monkeypatch.setattr(module, "SamplePool", small_pool)
    for module in (vae, text_to_image, vision_encoders, classifiers):
        monkeypatch.setattr(module, "BATCH_SIZE", BATCH)
        if hasattr(module, "NUM_HELD_OUT"):
            monkeypatch.setattr(module, "NUM_HELD_OUT", 16)
    monkeypatch.setattr(text_to_image, "PREVIEW_PROMPTS", text_to_image.PREVIEW_PROMPTS[:2])
    monkeypatch.setattr(text_to_image, "sample_latents", functools.partial(text_to_image.sample_latents, num_steps=1))
    monkeypatch.setattr(text_to_image, "GROUNDED_EVERY", 2)
    monkeypatch.setattr(text_to_image, "TEXT_SAMPLES", 3 * BATCH)  # the last step uses cached texts


def test_model_from_scratch(toy_sizes, tmp_path):
    """All stages make two steps and resume to four; the exported folder has no adapter; recipe `mini` trains one, and
    the folder that contains it generates an image."""
    stages = tmp_path / "stages"
    (stages / "vae").mkdir(parents=True)
    (stages / "vae" / "scaling_factor.json").write_text("1.0")  # otherwise measured on 256 images
    main(["tokenizer", "--out", str(stages)])
    vocabulary = json.loads((stages / "tokenizer" / "vocab.json").read_text())
    # The same tokens; the order of equally frequent ones differs from run to run.
    assert vocabulary.keys() == CLIPTokenizer.from_pretrained(MINI_MODEL / "tokenizer").get_vocab().keys()
    for stage in ("vae", "base", "vision", "classifiers"):
        for steps in (2, 4):
            main([stage, "--out", str(stages), "--max-samples", str(steps * BATCH), "--device", "cpu"])
            assert stage_state(stages / stage)["step"] == steps
        lines = [json.loads(line) for line in (stages / stage / "log.jsonl").read_text().splitlines()]
        assert lines and all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float)), stage
    main(["export", "--out", str(stages), "--model", str(tmp_path / "base")])
    keep = ["--keep", "--model", str(tmp_path / "base")]
    main(["vision", "--out", str(stages), "--max-samples", str(5 * BATCH), "--device", "cpu", *keep])
    assert "held_out_change" in (stages / "vision" / "log.jsonl").read_text().splitlines()[-1]
    assert RealCustomPipeline.from_pretrained(tmp_path / "base").adapter is None

    settings = [f"model.base={tmp_path / 'base'}", "data.resolution=128", "steps=1", "data.validation=none"]
    assert run(toy_config("mini", tmp_path / "run", settings)) == 1
    main(["export", "--out", str(stages), "--run", str(tmp_path / "run"), "--model", str(tmp_path / "model")])
    samples = json.loads((tmp_path / "model" / "training.json").read_text())
    assert samples == {"vae": 4 * BATCH, "base": 4 * BATCH, "vision": 5 * BATCH, "adapter": 2}
    pipeline = RealCustomPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    subject = Subject(image=Image.open(EXAMPLE_IMAGES / "dog.png"), target_phrase="dog")
    generation = pipeline.prepare(Request(prompt="a dog in the snow", subjects=(subject,), num_inference_steps=1))
    pipeline.run([generation])
    assert pipeline.decode([generation])[0].size == (128, 128)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("vae --device foo", "--device: foo cannot be used on this machine"),
        ("vae --device meta", "--device: meta cannot be used on this machine"),
        ("vae --threads 0", "--threads: the value is 0; it must be an integer of at least 1"),
        ("vae --max-samples -5", "--max-samples: the value is -5; it must be an integer of at least 1"),
        ("vae --max-seconds -1", "--max-seconds: the value is -1; it must be a finite number of at least 0"),
        ("vae --max-seconds nan", "--max-seconds: the value is nan; it must be a finite number"),
        ("base --batch-size 0", "--batch-size: the value is 0; it must be an integer of at least 1"),
        ("evaluate --instances 1", "--instances: the value is 1; it must be an integer of at least 2"),
        ("sprites --sprites /none", "--sprites is /none, which contains no 1f436.webp; give the `assets` folder"),
        ("start --model /none", "--model is /none, which contains no training.json; give a folder"),
        ("evaluate --model /none", "--model is /none, which contains no model_index.json; give a folder"),
        ("vision --keep --model /none", "--model is /none, which contains no model_index.json; give a folder"),
    ],
)
def test_wrong_argument_is_an_error_message(tmp_path, monkeypatch, capsys, arguments, message):
    """It names the option, its value and the limit, before the stage starts."""
    monkeypatch.setattr("train.mini.__main__.run_stage", lambda _: pytest.fail("the stage was started"))
    with pytest.raises(SystemExit, match="2"):
        main([*arguments.split(), "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(
            "", "--device: cuda cannot be used on this machine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the default device exists"),
        ),
        ("--device foo", "--device: foo cannot be used on this machine"),
        ("--device cpu --steps 0", "--steps: the value is 0; it must be an integer of at least 1"),
        ("--device cpu --batch -1", "--batch: the value is -1; it must be an integer of at least 1"),
        ("--device cpu --batch 0", "--batch: the value is 0; it must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_wrong_argument_of_the_benchmark_is_an_error_message(monkeypatch, capsys, arguments, message):
    """As for the stages; nothing is measured."""
    monkeypatch.setattr(training, "measure_variant", lambda *_: pytest.fail("a step was measured"))
    with pytest.raises(SystemExit, match="2"):
        training.main(arguments.split())
    assert message in capsys.readouterr().err
