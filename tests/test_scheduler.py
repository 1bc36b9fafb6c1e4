"""The release's sampler: stored numbers of the authors' scheduler, and the properties of any solver of its kind.

REALCUSTOM_GOLDEN names another set of stored numbers, as in test_golden.py.
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
def test_agrees_with_the_authors_scheduler(steps):
    """Timesteps, noise schedule, sample and clean estimate after every step, fed with the stored model outputs."""
    stored = {name.rsplit("/", 1)[1]: v for name, v in GOLDEN.items() if name.startswith(f"dpm/{steps}/")}
    scheduler = AlternatingDPMSolverScheduler()
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.alphas_cumprod, GOLDEN["alphas_cumprod"])
    assert scheduler.timesteps.tolist() == stored["timesteps"].tolist()
    sample = stored["initial_sample"]
    for i, timestep in enumerate(scheduler.timesteps):
        out = scheduler.step(stored["model_outputs"][i], timestep, sample)
        for ours, theirs in ((out.prev_sample, "prev_samples"), (out.pred_original_sample, "pred_original_samples")):
            scale = stored[theirs][i].abs().max()
            assert (ours - stored[theirs][i]).abs().max() <= 2e-5 * scale
        sample = out.prev_sample


def solve(scheduler, steps: int, data_scale: float = 0.7) -> torch.Tensor:
    """Sample with the exact noise prediction for Gaussian data, whose trajectory is known."""
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
def test_more_steps_come_closer_to_the_exact_trajectory(prediction_type):
    scheduler = AlternatingDPMSolverScheduler(prediction_type=prediction_type)
    errors = [solve(scheduler, steps) for steps in (9, 25, 81)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 2e-3


def test_a_run_begins_anew_after_set_timesteps():
    scheduler = AlternatingDPMSolverScheduler()
    first = solve(scheduler, 7)
    assert solve(scheduler, 7) == first


def test_configuration_survives_saving(tmp_path):
    AlternatingDPMSolverScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    assert AlternatingDPMSolverScheduler.from_pretrained(tmp_path).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
        AlternatingDPMSolverScheduler().set_timesteps(steps)
