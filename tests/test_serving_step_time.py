"""StepTimeModel: seconds of a step, fitted to measured steps."""

import numpy as np
import pytest
from tiny import PROMPT, cat, dog, tiny_pipeline

from realcustom.request import Request
from serving.engine.step_time import NUM_REMEMBERED, RemainingWork, StepTimeModel
from serving.engine.stepper import num_rows

PIXELS = 1024 * 1024
KINDS = [(2, 3 * PIXELS), (1, 2 * PIXELS), (2, 24 * PIXELS), (1, 16 * PIXELS)]  # one and eight images, guided and not


def learned(per_call: float, per_row: float, kinds=KINDS, noise: float = 0.0) -> StepTimeModel:
    model, draw = StepTimeModel(), np.random.default_rng(0)
    for _ in range(10):
        for calls, row_pixels in kinds:
            seconds = calls * per_call + row_pixels / PIXELS * per_row
            model.add(calls, row_pixels, seconds * (1 + noise * draw.standard_normal()), PIXELS)
    return model


@pytest.mark.parametrize("per_call, per_row", [(0.08, 0.0), (0.08, 0.02), (0.01, 0.5), (0.0, 0.5)])
def test_unmeasured_sizes_are_predicted(per_call, per_row):
    """Whichever part dominates: four images of a size between the measured ones, and one of four times the pixels."""
    model = learned(per_call, per_row)
    for calls, rows in ((2, 12), (1, 8), (1, 4 * 2)):
        assert model.seconds(calls, rows * PIXELS, PIXELS) == pytest.approx(calls * per_call + rows * per_row, rel=1e-6)


def test_noise_of_5_percent_changes_the_prediction_by_less():
    model = learned(0.08, 0.02, noise=0.05)
    assert model.seconds(2, 12 * PIXELS, PIXELS) == pytest.approx(2 * 0.08 + 12 * 0.02, rel=0.03)


def test_one_image_determines_the_costs_of_calls_and_rows():
    """Steps before and after T_stop of a single image are two kinds of step, so they determine both parts."""
    model = learned(0.08, 0.02, kinds=KINDS[:2])
    assert model.seconds(2, 24 * PIXELS, PIXELS) == pytest.approx(2 * 0.08 + 24 * 0.02, rel=1e-6)


def test_nothing_is_predicted_before_the_first_measurement():
    assert StepTimeModel().cost is None and StepTimeModel().seconds(1, PIXELS, PIXELS) is None


@pytest.mark.parametrize("kinds", [KINDS[:1], [(1, PIXELS), (2, 2 * PIXELS)]], ids=["one kind", "proportional kinds"])
def test_time_is_split_equally_between_parts_that_cannot_be_distinguished(kinds):
    """The measured steps are predicted exactly, and a step with twice the rows takes between once and twice as long."""
    model = learned(0.1, 0.1, kinds=kinds)
    calls, row_pixels = kinds[0]
    seconds = calls * 0.1 + row_pixels / PIXELS * 0.1
    assert model.seconds(calls, row_pixels, PIXELS) == pytest.approx(seconds, rel=1e-6)
    assert model.seconds(calls, 2 * row_pixels, PIXELS) == pytest.approx(1.5 * seconds, rel=1e-6)


CPU_SECONDS = {512: 1.6, 1024: 11, 1536: 50}  # measured seconds of a step by the side of the image, on a CPU


def test_steps_whose_time_grows_faster_than_the_pixels():
    """Two sizes predict a third one within 30%; a model that is linear in the pixels predicts half of the time."""
    model = StepTimeModel()
    for side in (512, 1024):
        for calls, rows in ((2, 3), (1, 2)):
            model.add(calls, rows * side**2, CPU_SECONDS[side] * rows / 3, side**2)
    assert model.seconds(2, 3 * 1536**2, 1536**2) == pytest.approx(CPU_SECONDS[1536], rel=0.3)
    for side in (512, 1024):
        assert model.seconds(2, 3 * side**2, side**2) == pytest.approx(CPU_SECONDS[side], rel=1e-3)


@pytest.mark.parametrize("measured", CPU_SECONDS)
@pytest.mark.parametrize("side", CPU_SECONDS)
@pytest.mark.parametrize("num_images", [1, 4])
def test_the_first_step_of_a_size_has_an_upper_bound(measured, side, num_images):
    """After one step of any size, the bound for another size is not exceeded, and not infinite."""
    model = StepTimeModel()
    assert model.upper_bound(1, side**2, side**2) is None
    model.add(1, 2 * measured**2, CPU_SECONDS[measured], measured**2)
    bound = model.upper_bound(2, 3 * num_images * side**2, side**2)
    assert CPU_SECONDS[side] * 1.5 * num_images <= bound <= CPU_SECONDS[1536] * 3 * num_images * 9
    model.add(2, 3 * num_images * side**2, CPU_SECONDS[side], side**2)
    assert model.upper_bound(2, 3 * num_images * side**2, side**2) <= max(CPU_SECONDS[side], bound)


def test_no_part_is_negative():
    """If steps with more rows are faster, an unconstrained fit would predict negative seconds for a large batch."""
    model = StepTimeModel()
    for rows, seconds in ((2, 1.0), (4, 0.9), (8, 0.7)):
        model.add(1, rows * PIXELS, seconds, PIXELS)
    assert model.cost.per_row_pixel == 0 and 0.7 <= model.seconds(1, 100 * PIXELS, PIXELS) <= 1.0
    superlinear = StepTimeModel()
    for rows, seconds in ((2, 1.0), (4, 3.0), (8, 9.0)):
        superlinear.add(1, rows * PIXELS, seconds, PIXELS)
    assert superlinear.cost.per_call == 0 and superlinear.cost.per_row_pixel > 0


def test_one_slow_step_hardly_changes_the_prediction():
    """One step takes 1000 times as long, for example because a program is compiled."""
    model = learned(0.08, 0.02)
    model.add(2, 30 * PIXELS, 1000.0, PIXELS)
    assert model.seconds(2, 12 * PIXELS, PIXELS) == pytest.approx(2 * 0.08 + 12 * 0.02, rel=0.05)


def test_the_model_adapts_to_a_change_of_the_device():
    """After `NUM_REMEMBERED` steps, measurements from when the device was twice as slow have no effect."""
    model = learned(0.16, 0.04)
    for step in range(NUM_REMEMBERED):
        calls, row_pixels = KINDS[step % 2]
        model.add(calls, row_pixels, calls * 0.08 + row_pixels / PIXELS * 0.02, PIXELS)
    assert model.seconds(2, 24 * PIXELS, PIXELS) == pytest.approx(2 * 0.08 + 24 * 0.02, rel=1e-6)


@pytest.mark.parametrize("mask_source", ["guidance_branch", "generation_branch"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("subjects", [(), (dog(),), (dog(), cat())], ids=len)
def test_remaining_work_counts_the_rows_that_the_pipeline_runs(subjects, guidance_scale, mask_source):
    """Rows predicted from the request equal the rows of every step of the real generation."""
    pipeline = tiny_pipeline()
    settings = {"num_inference_steps": 6, "early_stop_step": 4, "mask_source": mask_source}
    request = Request(prompt=PROMPT, subjects=subjects, guidance_scale=guidance_scale, **settings)
    generation = pipeline.prepare(request.resolve(pipeline.sampling))
    predicted = [RemainingWork.of(generation.request, step, generation.num_steps) for step in range(6)]
    measured = []
    while not generation.done:
        measured.append(num_rows(generation))
        pipeline.step([generation])
    assert [work.rows + (work.num_guided_steps > 0) for work in predicted] == measured
    assert [work.num_steps for work in predicted] == [6, 5, 4, 3, 2, 1]
