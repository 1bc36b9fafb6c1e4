"""Training configurations: overrides with the types of their fields, errors that name the remedy, the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import PreviewSubject, SourceConfig, TrainConfig
from train.overrides import changed_fields, from_json, override
from train.recipes import RECIPES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=12", 12),
        ("optimizer.learning_rate=2e-4", 2e-4),
        ("optimizer.betas=0.8,0.95", (0.8, 0.95)),
        ("model.gradient_checkpointing=true", True),
        ("model.base=org/model=v2", "org/model=v2"),
        ("objective.min_snr_gamma=none", None),
        ("max_seconds=90", 90.0),
        ("out=runs/a b", Path("runs/a b")),
        ("device=cpu", "cpu"),
        ("log.trackers=tensorboard,wandb", ("tensorboard", "wandb")),
        ("log.trackers=", ()),
        ("data.sources.0.weight=2", 2.0),
        (
            'data.sources=[{"kind": "text_image", "path": "/data", "weight": 2}, {"kind": "sprite_world"}]',
            (SourceConfig(kind="text_image", path=Path("/data"), weight=2.0), SourceConfig(kind="sprite_world")),
        ),
        (
            'preview.subjects=[{"image": "a.png", "prompt": "a cup", "target_phrase": "cup"}]',
            (PreviewSubject(image=Path("a.png"), prompt="a cup", target_phrase="cup"),),
        ),
    ],
)
def test_assignment_has_the_type_of_its_field(assignment, value):
    """The field has the value with its own type, and nothing else changes."""
    before = RECIPES["mini"]()
    after = override(before, [assignment])
    node, path = after, assignment.split("=")[0].split(".")
    for name in path:
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    assert node == value and type(node) is type(value)
    changes = changed_fields(before.to_dict(), after.to_dict())
    assert all(change.startswith(path[0] if len(path) == 1 else ".".join(path[:2])) for change in changes)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "has no '='"),
        ("stepz=3", "Did you mean 'steps'"),
        ("optimizer.lr=3", "OptimizerConfig has learning_rate, betas"),
        ("steps.more=3", "does not have fields"),
        ("steps=many", "must be of type int"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("device=tpu", "use one of auto, cpu"),
        ("model.gradient_checkpointing=yes", "use true or false"),
        ("optimizer.betas=0.9", "give 2 comma-separated values, not 1"),
        ("data.sources.3.weight=1", "'3' is not an index of a tuple of 1"),
        ("data.sources=[]", "add at least one source"),
        ("data.sources=[{]", "is not JSON"),
        ('data.sources=[{"kind": "video"}]', "use one of text_image, multiview, sprite_world"),
        ('data.sources=[{"kind": "text_image"}]', "has no path"),
        ('data.sources=[{"kind": "sprite_world", "wait": 1}]', "there is no field 'wait'"),
        ('data.sources=[{"weight": 1}]', "kind"),
        ("data.resolution=100", "multiple of 8"),
        ("objective.drop_text=0.95", "a sum <= 1"),
        ("curriculum.total_steps=0", "at least 1"),
        ("curriculum.r_max=0.5", "cannot be larger than the reference"),
        ("curriculum.r_max=inf", "use finite 1 <= r_min <= r_max"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate is inf; it must be positive and finite"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0; it must be at least 0"),
        ("optimizer.betas=1.5,2", "optimizer.betas is (1.5, 2.0); give two values in \\[0, 1"),
        ('optimizer={"betas": [0.9]}', "optimizer.betas is \\[0.9]; it must be a list of 2 values"),
        ("data.sources.0.weight=inf", "weight of source 'sprite_world' is inf; it must be positive and finite"),
        ("objective.min_snr_gamma=inf", "objective.min_snr_gamma is inf; it must be positive and finite"),
        ("max_seconds=-5", "max_seconds is -5.0; it must be at least 0 and finite"),
        ("max_seconds=nan", "max_seconds is nan; it must be at least 0 and finite"),
        ("preview.num_inference_steps=0", "preview.num_inference_steps is 0; it must be at least 1"),
        ("preview.seed=-1", "preview.seed is -1; it must be in"),
        (f"seed={2**63}", "seed is 9223372036854775808; it must be in"),
        ("out=", "out= is empty; give a path"),
        ("name=../elsewhere", "name is '../elsewhere'; it must consist of letters, digits"),
        ("model.base=", "model.base is empty; give a hub id, a folder or a .safetensors file"),
        ("data.features=features", "the sprite world has no precomputed features"),
    ],
)
def test_wrong_assignment_is_explained(assignment, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        override(RECIPES["mini"](), [assignment])


@pytest.mark.parametrize(
    "assignments",
    [
        ["data.sources.0.kind=text_image", "data.sources.0.path=/data"],
        ["data.sources.0.path=/data", "data.sources.0.kind=text_image"],
        ["curriculum.r_min=2", "curriculum.r_max=3"],
        ["curriculum.r_max=3", "curriculum.r_min=2"],
    ],
)
def test_assignments_are_checked_together(assignments):
    """Fields that fit together only after the last assignment can be changed in any order."""
    config = override(RECIPES["mini"](), assignments)
    assert (config.data.sources[0].kind, config.curriculum.r_min) in (("text_image", 1.0), ("sprite_world", 2.0))
    with pytest.raises(ValueError):
        override(RECIPES["mini"](), assignments[:1] if "kind" in assignments[0] else ["curriculum.r_min=2"])


def test_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    """Folders of data, features, previews and results are made absolute, as are local models; hub ids stay."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "siglip").mkdir()
    Path("adapter.safetensors").touch()
    settings = ["model.siglip=siglip", "model.adapter=adapter.safetensors", "data.features=features"]
    validation = 'data.validation={"kind": "text_image", "path": "held_out"}'
    subjects = 'preview.subjects=[{"image": "a.png", "prompt": "a cup", "target_phrase": "cup"}]'
    config = override(RECIPES["sdxl_512"](), [*settings, validation, subjects, "data.evaluation=eval"])
    there = config.with_absolute_paths()
    assert there.model.base == config.model.base and there.model.dinov2 == config.model.dinov2
    assert (there.model.siglip, there.model.adapter) == (f"{tmp_path}/siglip", f"{tmp_path}/adapter.safetensors")
    assert [source.path for source in there.data.sources] == [tmp_path / source.path for source in config.data.sources]
    assert there.data.validation.path == tmp_path / "held_out" and there.data.evaluation == (tmp_path / "eval",)
    assert there.preview.subjects[0].image == tmp_path / "a.png" and there.data.features == tmp_path / "features"
    assert there.out == tmp_path / config.out


@pytest.mark.parametrize("recipe", RECIPES)
def test_configuration_survives_json(recipe):
    """A configuration that is stored in a checkpoint is read back unchanged."""
    config = RECIPES[recipe]()
    assert from_json(TrainConfig, json.loads(json.dumps(config.to_dict())), "config") == config


def test_changed_fields_are_named():
    config = RECIPES["mini"]()
    other = dataclasses.replace(config, steps=7, data=dataclasses.replace(config.data, workers=5))
    assert changed_fields(config.to_dict(), other.to_dict()) == ["data.workers was 1, is 5", "steps was 16000, is 7"]


def test_mistake_on_the_command_line_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        main(["mini", "--set", "stepz=3"])
    assert error.value.code == 2 and "Did you mean 'steps'" in capsys.readouterr().err


def test_help_describes_the_recipes_without_heavy_imports():
    """`--help` shows what each recipe costs and does not import torch, diffusers or Ray."""
    script = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('train', run_name='__main__')"
    script += "\nfinally: print({'torch', 'diffusers', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert all(f"{name}: " in done.stdout for name in RECIPES) and "Hardware:" in done.stdout


def test_missing_ray_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import of a module that is not installed raises
    monkeypatch.delitem(sys.modules, "train.ray", raising=False)
    with pytest.raises(SystemExit) as error:
        main(["mini", "--ray", "2"])
    message = capsys.readouterr().err
    assert error.value.code == 1 and message.startswith("python -m train: error: --ray needs Ray")
    assert message.endswith("; pip install 'ray[train]'.\n") and message.count("\n") == 1
