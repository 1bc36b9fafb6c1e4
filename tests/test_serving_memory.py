"""MemoryModel and MemoryBudget: measured bytes predict the peak of larger groups, and budgets are respected."""

import pytest
import torch
from tiny import subject_image, tiny_pipeline

from realcustom import Request, Subject
from serving.engine.memory import AffineCost, MemoryBudget, MemoryModel, TensorAccount, measure

FLAT = MemoryModel(
    resident=AffineCost(10, 0),
    reference=5,
    call=AffineCost(0, 0),
    stepping=AffineCost(0, 1),
    decoding=AffineCost(100, 0),
)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def test_the_account_counts_live_bytes_and_their_peak():
    """Bytes of results are counted once, views not at all, and subtracted when the last reference is dropped."""
    with TensorAccount() as account:
        kept = torch.zeros(100)
        view = kept.view(10, 10)[1:]
        assert account.live == 400
        assert account.peak_during(lambda: (torch.zeros(1000), torch.zeros(10))) == 4040
        assert account.live == 400
        del kept
        assert account.live == 400
        del view
    assert account.live == 0


def test_the_model_predicts_the_peak_of_a_larger_group(pipeline):
    """Measured with one and two images, it predicts the peak of five images of another size within 15%."""
    memory_model = measure(pipeline)
    colors = ("red", "green", "blue", "gold", "navy")
    wanted = [
        Request(
            prompt="a dog",
            subjects=(Subject(image=subject_image(color), target_phrase="dog"),),
            height=96,
            width=64,
            seed=1,
        )
        for color in colors
    ]
    with TensorAccount() as account:

        def step() -> None:
            pipeline.step([pipeline.prepare(request) for request in wanted])

        pipeline.clear_caches()
        peak = account.peak_during(step)
    without_decoding = MemoryModel(**{**vars(memory_model), "decoding": AffineCost(0, 0)})
    assert without_decoding.needed([(96 * 64, 1)] * 5) == pytest.approx(peak, rel=0.15)


def test_sizes_step_at_different_times():
    """Activations count for the largest group of one size, resident bytes for all images, decoding for one."""
    assert FLAT.needed([]) == 0
    assert FLAT.needed([(50, 1)]) == 15 + 50 + 100
    assert FLAT.needed([(50, 1), (50, 0), (80, 2)]) == 15 + 10 + 20 + 100 + 100


def test_a_budget_shrinks_below_images_that_did_not_fit():
    budget = MemoryBudget(FLAT, 1000)
    two = [(300, 0)] * 2
    assert budget.fits(two)
    budget.shrink(two)
    assert not budget.fits(two) and budget.fits(two[:1])
