"""Every recipe at toy size: two steps, a resume, previews, results that the pipeline loads, and golden losses."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_training import losses, toy_config, write_base, write_data

from realcustom import RealCustomPipeline
from train import publish
from train.overrides import changed_fields
from train.recipes import RECIPES
from train.trainer import run

FAMILIES = {"sdxl_512": "sdxl", "sdxl_1024": "sdxl", "sd15_512": "sd15", "mini": "mini", "mini_gpu": "mini"}
# Losses of the four steps of the toy runs below. They change only if the data order, the random numbers, the loss or
# the optimizer changes, which also changes what a resumed run computes.
GOLDEN = {
    "sdxl_512": [1.155361, 1.163888, 1.052509, 1.156335],
    "sdxl_1024": [1.153619, 1.159106, 1.051282, 1.155782],
    "sd15_512": [1.239970, 1.217718, 1.094858, 1.250648],
    "mini": [0.300322, 0.358105, 0.191745, 0.146767],
    "mini_gpu": [0.300322, 0.349307, 0.183266, 0.140578],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Recipe -> settings of its toy models and data."""
    folder = tmp_path_factory.mktemp("toy")
    data = write_data(folder / "data")
    models = {family: write_base(folder / family, family) for family in ("sdxl", "sd15", "mini")}
    return {name: models[family] + (data if family != "mini" else []) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_resumes_and_gives_the_recorded_losses(recipe, settings, tmp_path):
    """Two steps, then a resume to the fourth: each step has the recorded loss, and the adapter has changed. The
    pipeline loads the result."""
    out = tmp_path / "out"
    preview = ["preview.every_steps=4", "preview.num_inference_steps=1"]
    config = toy_config(recipe, out, [*settings[recipe], *preview])
    assert run(toy_config(recipe, out, [*settings[recipe], "steps=2"])) == 2
    first = load_file(out / "adapter.safetensors")
    assert run(config, resume=True) == 4
    assert losses(out) == pytest.approx(GOLDEN[recipe], abs=1e-4)
    last = load_file(out / "adapter.safetensors")
    assert first.keys() == last.keys() and all(not torch.equal(first[name], last[name]) for name in first)
    with Image.open(out / "previews" / "00000004.png") as grid:
        assert grid.size == (3 * 64, 2 * 64)
    if FAMILIES[recipe] == "mini":
        pipeline = RealCustomPipeline.from_pretrained(config.model.base)
    else:
        encoders = {"siglip": config.model.siglip, "dinov2": config.model.dinov2}
        pipeline = RealCustomPipeline.from_parts(config.model.base, **encoders)
    pipeline.load_realcustom(out / "adapter.safetensors")
    summary = json.loads((out / "training.json").read_text())
    assert summary["samples"] == 8 and changed_fields(summary["config"], config.to_dict()) == []


def test_sdxl_1024_continues_sdxl_512():
    """The second recipe starts from the first one's adapter, where its curriculum ended."""
    first, second = RECIPES["sdxl_512"](), RECIPES["sdxl_1024"]()
    assert second.model.adapter == str(first.out / publish.ADAPTER)
    assert second.curriculum.first_step == first.steps == 60_000 and second.steps == 100_000
    assert second.curriculum.other_view_probability(second.steps) == 1.0
    before, after = (c.curriculum.other_view_probability(s) for c, s in ((first, 60_000), (second, 0)))
    assert before == after == 0.375


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_states_its_cost(recipe):
    text = RECIPES[recipe].__doc__
    assert text is not None and "Hardware:" in text and "emory:" in text and "time" in text


@pytest.mark.slow  # compiles for a minute
def test_compiled_blocks_give_the_same_losses(settings, tmp_path):
    """`model.compile_blocks` changes the losses by rounding only."""
    compiled = ["model.compile_blocks=true"]
    for name, options in (("eager", []), ("compiled", compiled)):
        assert run(toy_config("mini", tmp_path / name, [*settings["mini"], "steps=2", *options])) == 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
