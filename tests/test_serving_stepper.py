"""A step that failed is as if it had not been tried, and a fault reaches only the image that brings it."""

import asyncio
import copy

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from tiny import subject_image, tiny_pipeline

from realcustom import Request, Subject
from serving.engine.job import Job
from serving.engine.observer import Observer
from serving.engine.stepper import Checkpoint, Stepper
from serving.protocol.errors import Unavailable

SCHEDULERS = {
    "deterministic": DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False),
    "remembers earlier outputs": DPMSolverMultistepScheduler(solver_order=2),
    "draws noise": EulerAncestralDiscreteScheduler(),
}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline().to(torch.float64)


def request(seed: int) -> Request:
    dog = Subject(image=subject_image(), target_phrase="dog")
    return Request(prompt="a dog and a cat", subjects=(dog,), seed=seed, num_inference_steps=5, early_stop_step=3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("failing_step", [0, 2, 4])
def test_a_step_undone_and_made_again_gives_the_same_image(pipeline, name, failing_step):
    """Latents, masks, the scheduler's memory and the random numbers are as before the step that failed."""
    expected, undone = (pipeline.prepare(request(3), scheduler=copy.deepcopy(SCHEDULERS[name])) for _ in range(2))
    for step in range(5):
        pipeline.step([expected])
        if step == failing_step:
            checkpoint = Checkpoint(undone)
            pipeline.step([undone])
            checkpoint.restore()
            assert undone.step_index == step
        pipeline.step([undone])
    assert torch.equal(undone.latents, expected.latents)
    assert torch.equal(undone.guidance_masks, expected.guidance_masks)


def test_the_faulty_image_fails_alone_and_its_neighbours_are_unharmed(pipeline):
    """An image whose step always fails, after its neighbors have already advanced, is the only one that is told."""

    class Poisoned:
        def step(self, generations) -> None:
            if healthy := [g for g in generations if g.request.seed != 2]:
                pipeline.step(healthy)
            if any(g.request.seed == 2 for g in generations):
                raise ZeroDivisionError

    made = []
    stepper = Stepper(
        Poisoned(),
        synchronize=lambda: None,
        observer=Observer(),
        out_of_memory=lambda: pytest.fail("it was another fault"),
        made=lambda group, amount, seconds: made.append([job.request.seed for job in group]),
    )
    loop = asyncio.new_event_loop()
    jobs = [Job(request(seed), False, loop, cost=1.0, generation=pipeline.prepare(request(seed))) for seed in range(4)]
    expected = [pipeline.prepare(request(seed)) for seed in range(4)]
    failed = stepper.step(jobs)
    for generation in expected:
        pipeline.step([generation])
    assert list(failed) == [jobs[2]] and isinstance(failed[jobs[2]], Unavailable)
    assert "ZeroDivisionError" in str(failed[jobs[2]])
    assert made == [[0, 1], [3]]
    for seed in (0, 1, 3):
        torch.testing.assert_close(jobs[seed].generation.latents, expected[seed].latents, rtol=0, atol=1e-6)
        assert jobs[seed].generation.step_index == 1
    loop.close()
