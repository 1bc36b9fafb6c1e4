"""Training goes on from a shipped model where it ended."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoint import checkpoint_state, load_average
from train.export import EXPORTED
from train.networks import build_vae
from train.stages.base import load_base
from train.warm_start import warm_start

MINI = Path(__file__).parents[1] / "assets/mini"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    warm_start(MINI, out)
    return out


def test_weights_and_sample_counts_are_the_models(started):
    """The averages that other stages load equal the shipped weights; unseen stages have no checkpoint."""
    base = load_base(started)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        shipped = {k: v for f in (MINI / part).glob("*.safetensors") for k, v in load_file(f).items()}
        mine = getattr(base, part).state_dict()
        assert all(
            torch.equal(mine[name], value.float()) for name, value in shipped.items() if "position_ids" not in name
        )
    load_average(started / "vae/checkpoint", build_vae())
    samples = json.loads((MINI / "training.json").read_text())
    for stage in EXPORTED:
        state = checkpoint_state(started / stage / "checkpoint")
        assert 0 <= samples[stage] - state["samples"] < 128
        assert state["step"] == state["begun"]


def test_checkpoints_are_not_overwritten(started):
    with pytest.raises(FileExistsError, match="has a checkpoint already"):
        warm_start(MINI, started)
