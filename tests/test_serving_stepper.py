"""Stepper: a failed step is undone and retried in halves, so that only the faulty image ends with an error."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from tiny import PROMPT, dog, tiny_pipeline

from realcustom.request import Request, ResolvedRequest
from serving.engine.device_clock import CudaClock, HostClock
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


def request(pipeline, seed: int) -> ResolvedRequest:
    wanted = Request(prompt=PROMPT, subjects=(dog(),), seed=seed, num_inference_steps=5, early_stop_step=3)
    return wanted.resolve(pipeline.sampling)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("failing_step", [0, 2, 4])
def test_a_step_that_is_undone_and_repeated_gives_the_same_image(pipeline, name, failing_step):
    """Latents, masks, the scheduler's state and the random numbers are restored."""
    expected, undone = (
        pipeline.prepare(request(pipeline, 3), scheduler=copy.deepcopy(SCHEDULERS[name])) for _ in range(2)
    )
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


def prepared_job(pipeline, seed: int) -> Job:
    job = Job(request(pipeline, seed), previews=False, deliver=lambda event: None)
    job.generation = pipeline.prepare(job.request)
    return job


def test_only_the_faulty_image_of_a_batch_fails(pipeline):
    """An image whose step always fails, after the others have already advanced, is the only one that ends with an
    error; the others advance by exactly one step."""

    class Faulty:
        def step(self, generations) -> None:
            if healthy := [g for g in generations if g.request.seed != 2]:
                pipeline.step(healthy)
            if any(g.request.seed == 2 for g in generations):
                raise ZeroDivisionError

    batches = []

    class Recorder(Observer):
        def step(self, *, images, rows, mask_rows, seconds) -> None:
            batches.append(images)

    stepper = Stepper(
        Faulty(),
        clock=HostClock(),
        observer=Recorder(),
        on_out_of_memory=lambda: pytest.fail("the fault was another one"),
        on_step=lambda kind, seconds: None,
    )
    jobs = [prepared_job(pipeline, seed) for seed in range(4)]
    expected = [pipeline.prepare(request(pipeline, seed)) for seed in range(4)]
    failed = stepper.step(jobs)
    for generation in expected:
        pipeline.step([generation])
    assert list(failed) == [jobs[2]] and isinstance(failed[jobs[2]], Unavailable)
    assert "ZeroDivisionError" in str(failed[jobs[2]])
    assert batches == [2, 1]
    for seed in (0, 1, 3):
        assert jobs[seed].generation.step_index == 1
        torch.testing.assert_close(jobs[seed].generation.latents, expected[seed].latents, rtol=0, atol=1e-6)


def test_calls_and_rows_of_a_step_are_measured(pipeline):
    """Two images with classifier-free guidance: two calls and six rows before T_stop, one call and four rows after."""
    measured = []
    stepper = Stepper(
        pipeline,
        clock=HostClock(),
        observer=Observer(),
        on_out_of_memory=lambda: None,
        on_step=lambda kind, seconds: measured.append((kind.calls, kind.row_pixels / kind.pixels)),
    )
    jobs = [prepared_job(pipeline, seed) for seed in range(2)]
    for _ in range(5):
        assert not stepper.step(jobs)
    assert measured == [(2, 6.0)] * 3 + [(1, 4.0)] * 2


class Event:
    """A CUDA event whose time is the number of events recorded before it."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1

    def record(self) -> None:
        self.at = Event.recorded
        Event.recorded += 1

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0 * (end.at - self.at)


def test_the_clock_of_a_gpu_reports_a_step_when_the_next_one_has_been_started(monkeypatch):
    """Python runs one step ahead of the GPU: each step is reported after the following one was queued, and a failed
    step is not reported."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, started, reported = CudaClock(), [], []

    def step(number: int) -> None:
        due = clock.time(lambda: started.append(number), lambda seconds: reported.append((number, seconds)))
        for report, seconds in due:
            report(seconds)

    step(1)
    assert (started, reported) == ([1], [])
    step(2)
    assert (started, reported) == ([1, 2], [(1, 1.0)])
    with pytest.raises(ZeroDivisionError):
        clock.time(lambda: 1 / 0, lambda seconds: reported.append((3, seconds)))
    step(4)
    assert [number for number, _ in reported] == [1, 2]
