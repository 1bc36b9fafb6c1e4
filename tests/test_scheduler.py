"""The sampler of the authors' release: agreement with stored numbers, and convergence.

The environment variable REALCUSTOM_GOLDEN selects another set of stored numbers, as in test_golden.py.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realcustom.scheduler import AlternatingDPMSolverScheduler

FOLDER = Path(os.environ.get("REALCUSTOM_GOLDEN", Path(__file__).parent / "golden"))
GOLDEN = load_file(FOLDER / "scheduler.safetensors")
STORED_STEPS = sorted({int(name.split("/")[1]) for name in GOLDEN if name.startswith("dpm/")})


@pytest.mark.parametrize("steps", STORED_STEPS)
def test_matches_the_authors_scheduler(steps):
    """Noise schedule and timesteps equal the stored ones; for the stored model outputs, so do the sample and the clean
    estimate after every step."""
    stored = {name.rsplit("/", 1)[1]: v for name, v in GOLDEN.items() if name.startswith(f"dpm/{steps}/")}
    scheduler = AlternatingDPMSolverScheduler()
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.alphas_cumprod, GOLDEN["alphas_cumprod"])
    assert scheduler.timesteps.tolist() == stored["timesteps"].tolist()
    sample = stored["initial_sample"]
    for i, timestep in enumerate(scheduler.timesteps):
        out = scheduler.step(stored["model_outputs"][i], timestep, sample)
        for computed, name in ((out.prev_sample, "prev_samples"), (out.pred_original_sample, "pred_original_samples")):
            expected = stored[name][i]
            assert (computed - expected).abs().max() <= 2e-5 * expected.abs().max()
        sample = out.prev_sample


def solve(scheduler, steps: int, data_scale: float = 0.7) -> torch.Tensor:
    """Relative error at the end of a run with the exact model output for Gaussian data, whose trajectory is known."""
    scheduler.set_timesteps(steps)
    sample = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[timestep].double()
        variance = kept * data_scale**2 + 1 - kept
        noise, clean = (1 - kept).sqrt() / variance * sample, kept.sqrt() * data_scale**2 / variance * sample
        output = (
            noise if scheduler.config.prediction_type == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * clean
        )
        sample = scheduler.step(output, timestep, sample).prev_sample
    kept = scheduler.alphas_cumprod[[999, 0]].double()
    first, last = (kept * data_scale**2 + 1 - kept).sqrt()
    return (sample / (last / first) - 1).abs().item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_error_decreases_with_more_steps(prediction_type):
    """The error to the exact solution more than halves each time the number of steps is tripled."""
    scheduler = AlternatingDPMSolverScheduler(prediction_type=prediction_type)
    errors = [solve(scheduler, steps) for steps in (9, 25, 81)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 2e-3


def test_set_timesteps_resets_the_state():
    """After `set_timesteps`, a second run yields the same result as the first."""
    scheduler = AlternatingDPMSolverScheduler()
    first = solve(scheduler, 7)
    assert solve(scheduler, 7) == first


def test_configuration_round_trip(tmp_path):
    """`from_pretrained` restores a saved configuration."""
    AlternatingDPMSolverScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    assert AlternatingDPMSolverScheduler.from_pretrained(tmp_path).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("steps", [0, 1001])
def test_invalid_number_of_steps_raises(steps):
    """A number of steps outside [1, num_train_timesteps] raises a ValueError."""
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
        AlternatingDPMSolverScheduler().set_timesteps(steps)
