"""The evaluation: its cases are fair, and its scores are counted correctly."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from train.data.sprite_world.world import TRAINED_CATEGORIES
from train.evaluate.cases import NUM_CANDIDATES, TASKS, Case
from train.evaluate.classifiers import RenderLabeled
from train.evaluate.report import CONDITIONS, CONDITIONS_OF_TASK, UPPER_BOUND, evaluate, markdown, score


class _BrightnessClassifiers:
    """Embeds images by brightness and contrast, and always predicts scene 0 and category 1."""

    def embed(self, pixels):
        return torch.nn.functional.normalize(torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))], -1), dim=-1)

    def scene(self, pixels):
        return torch.nn.functional.one_hot(torch.zeros(len(pixels), dtype=torch.long), 8)

    def category(self, pixels):
        return torch.nn.functional.one_hot(torch.ones(len(pixels), dtype=torch.long), 16)


@pytest.mark.parametrize("task", TASKS)
def test_case_is_deterministic_and_gives_other_views_than_the_candidates(task):
    """A case depends on its index only. The model's reference image is never one of the images to compare with."""
    one, again = Case(3, task), Case(3, task)
    assert one.prompt == again.prompt and [p.tobytes() for p in one.given] == [p.tobytes() for p in again.given]
    for given, candidates in zip(one.given, one.references, strict=True):
        assert len(candidates) == NUM_CANDIDATES
        assert given.tobytes() not in [candidate.tobytes() for candidate in candidates]
    assert one.request(subjects=()).subjects == ()
    assert [s.target_phrase for s in one.request().subjects] == list(one.categories)
    assert all(f" {category} " in one.prompt for category in one.categories)


def test_tasks_with_two_subjects_use_the_same_instances():
    """One2Many gives one image of both instances, Many2Many gives one image of each."""
    together, apart = Case(5, "One2Many"), Case(5, "Many2Many")
    assert together.prompt == apart.prompt and len(set(together.categories)) == 2
    assert [image.tobytes() for images in together.references for image in images] == [
        image.tobytes() for images in apart.references for image in images
    ]
    assert together.given[0] is together.given[1] and apart.given[0].tobytes() != apart.given[1].tobytes()


@pytest.mark.parametrize("index", range(8))
def test_cropped_references_show_the_subject_of_their_word(index):
    """A crop shares more colors with an image of its own instance than with one of the other instance."""
    case = Case(index, "One2Many")
    crops = [subject.image.pixels for subject in case.request(cropped=True).subjects]
    own = [images[0] for images in case.references]
    for crop, right, wrong in zip(crops, own, own[::-1], strict=True):
        assert _common_colors(crop, right) > _common_colors(crop, wrong)


def _common_colors(one, other) -> int:
    """Number of pixels of both images that can be paired by color, in 512 bins."""
    bins = [np.asarray(image).reshape(-1, 3) // 32 @ [64, 8, 1] for image in (one, other)]
    counts = [np.bincount(values, minlength=512) for values in bins]
    return int(np.minimum(*counts).sum())


def test_views_show_one_subject_each():
    """With two subjects, the left and right views differ and have the image's size. One subject gets the full image."""
    case = Case(5, "Many2Many")
    left, right = case.views(case.truth)
    assert left.size == right.size == case.truth.size and left.tobytes() != right.tobytes()
    assert Case(5).views(case.truth) == [case.truth]


def test_score_counts_correct_predictions():
    """An image that equals the first candidate is matched to it. Scene and category count if predicted correctly."""
    cases = [Case(i) for i in range(4)]
    result = score(_BrightnessClassifiers(), cases, [case.references[0][0] for case in cases])
    assert result["instance"] == 1.0
    assert result["scene"] == sum(case.scene == 0 for case in cases) / 4
    assert result["category"] == 1 / 4  # each of the first four cases has another category
    assert "100.0%" in markdown({"One2One": {"masked": result}})


def test_score_counts_both_subjects():
    """The predicted category is correct for each subject of that category, on the left and on the right."""
    cases = [Case(i, "Many2Many") for i in range(16)]
    result = score(_BrightnessClassifiers(), cases, [case.truth for case in cases])
    assert result["category"] == sum(case.categories.count(TRAINED_CATEGORIES[1]) for case in cases) / 32


def test_classifier_batches_contain_same_category_distractors():
    """Groups of 8 consecutive samples share a category, so that the embedding must distinguish instances."""
    category = RenderLabeled()(range(16))["category"]
    assert len(set(category[:8])) == 1 and category[0] != category[8]


def test_evaluate_reports_all_tasks_and_conditions(tmp_path):
    """Every condition generates images, and report.json, report.md and the grids contain all of them."""
    results = evaluate(tiny_pipeline(), _BrightnessClassifiers(), tmp_path, num_instances=2)
    assert list(results) == list(TASKS)
    for task in TASKS:
        assert list(results[task]) == [UPPER_BOUND, *CONDITIONS_OF_TASK[task]]
    assert json.loads((tmp_path / "report.json").read_text()) == {"instances": 2, **results}
    table = (tmp_path / "report.md").read_text()
    assert all(condition in table for condition in (*CONDITIONS, UPPER_BOUND, "correct instance of 10"))
    assert all((tmp_path / f"{task}.png").exists() for task in TASKS)
