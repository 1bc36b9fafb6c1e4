"""Training continues from an exported model, and the export is complete."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realcustom import RealCustomPipeline
from train.mini.__main__ import main
from train.mini.export import PRETRAINED
from train.mini.loop import load_stage, stage_state
from train.mini.networks import build_vae
from train.mini.text_to_image import load_base
from train.results import ADAPTER, SUMMARY

MINI = Path(__file__).parents[1] / "assets/mini"
WEIGHTS = ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder", "image_encoder_2", "adapter")


def _weights(folder):
    values = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert values, f"no weights in {folder}"
    return values


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    main(["start", "--model", str(MINI), "--out", str(out), "--device", "cpu"])
    return out


def test_weights_and_sample_counts_are_those_of_the_model(started):
    """The EMA weights equal the model's weights, and each stage continues at the model's number of samples."""
    base = load_base(started)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        loaded = getattr(base, part).state_dict()
        exported = {name: value for name, value in _weights(MINI / part).items() if "position_ids" not in name}
        assert all(torch.equal(loaded[name], value.float()) for name, value in exported.items())
    load_stage(started / "vae", build_vae())
    samples = json.loads((MINI / "training.json").read_text())
    for stage in PRETRAINED:
        state = stage_state(started / stage)
        assert 0 <= samples[stage] - state["samples"] < 128
        assert state["step"] == state["warmup_start_step"]


def test_checkpoints_are_not_overwritten(started, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["start", "--model", str(MINI), "--out", str(started)])
    assert "already has a checkpoint" in capsys.readouterr().err


def test_batch_size_of_a_run_cannot_change(started, capsys):
    """The number of samples and the schedule are counted in steps of one batch size."""
    with pytest.raises(SystemExit, match="1"):
        main(["base", "--out", str(started), "--batch-size", "32", "--device", "cpu"])
    assert "has 64 samples per step, not 32: continue it with --batch-size 64" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["vision", "--out", str(started), "--batch-size", "48", "--device", "cpu"])
    assert "has 24 samples per step, not 48: continue it with --batch-size 24" in capsys.readouterr().err


def test_export_of_a_started_run_equals_the_model(started, tmp_path):
    """`start` then `export` without training gives all weights of the model, bit for bit, and its vocabulary. The
    adapter comes from a run of recipe `mini`."""
    target, run = tmp_path / "model", tmp_path / "run"
    RealCustomPipeline.from_pretrained(MINI).save_realcustom(_file(run / ADAPTER))
    (run / SUMMARY).write_text('{"samples": 123}')
    main(["export", "--model", str(target), "--out", str(started), "--run", str(run)])
    for part in WEIGHTS:
        expected, exported = _weights(MINI / part), _weights(target / part)
        assert expected.keys() == exported.keys()
        assert all(torch.equal(exported[name], value) for name, value in expected.items()), part
    assert (target / "vocabulary.json").read_text() == (MINI / "vocabulary.json").read_text()
    expected = {stage: stage_state(started / stage)["samples"] for stage in PRETRAINED} | {"adapter": 123}
    assert json.loads((target / "training.json").read_text()) == expected


def test_model_without_an_adapter_can_be_exported(started, tmp_path):
    """Recipe `mini` starts from such a folder."""
    main(["export", "--model", str(tmp_path / "model"), "--out", str(started)])
    assert RealCustomPipeline.from_pretrained(tmp_path / "model").adapter is None


@pytest.mark.parametrize("target", [".", "stages", "run", "other", "file"])
def test_export_replaces_only_models(tmp_path, capsys, target):
    """A folder that contains the stages or the run, or that is not a model, is refused, and nothing is deleted."""
    for name in ("stages/vae/weights", "run/adapter.safetensors", "other/notes.txt", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = ["--out", str(tmp_path / "stages"), "--run", str(tmp_path / "run"), "--model", str(tmp_path / target)]
    with pytest.raises(SystemExit) as error:
        main(["export", *arguments])
    message = capsys.readouterr().err
    assert error.value.code == 1 and f"--model {tmp_path / target}" in message and "choose another folder" in message
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def _file(path):
    path.parent.mkdir(parents=True)
    return path
