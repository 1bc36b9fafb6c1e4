"""The evaluation asks fair questions and counts right."""

import pytest
import torch

from train.evaluate.cases import CANDIDATES, KINDS, TASKS, Case
from train.evaluate.judges import RenderJudged
from train.evaluate.report import judge, markdown


class _Oracle:
    """Judges that see nothing but brightness: enough to count with."""

    def embed(self, pixels):
        return torch.nn.functional.normalize(torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))], -1), dim=-1)

    def scene(self, pixels):
        return torch.nn.functional.one_hot(torch.zeros(len(pixels), dtype=torch.long), 8)

    def category(self, pixels):
        return torch.nn.functional.one_hot(torch.ones(len(pixels), dtype=torch.long), 16)


@pytest.mark.parametrize("task", TASKS)
def test_case_is_seeded_and_shows_the_given_individuals_in_other_views(task):
    one, again = Case(3, task), Case(3, task)
    assert one.prompt == again.prompt and [p.tobytes() for p in one.given] == [p.tobytes() for p in again.given]
    for given, candidates in zip(one.given, one.references, strict=True):
        assert len(candidates) == CANDIDATES and given.tobytes() not in [view.tobytes() for view in candidates]
    assert one.request(subjects=()).subjects == ()
    assert [s.target_phrase for s in one.request().subjects] == list(one.categories)
    assert all(f" {category} " in one.prompt for category in one.categories)


def test_tasks_with_two_subjects_ask_for_the_same_individuals():
    """One2Many gives one image of both, Many2Many an image of each."""
    together, apart = Case(5, "One2Many"), Case(5, "Many2Many")
    assert together.prompt == apart.prompt and len(set(together.categories)) == 2
    assert [p.tobytes() for kin in together.references for p in kin] == [
        p.tobytes() for kin in apart.references for p in kin
    ]
    assert together.given[0] is together.given[1] and apart.given[0].tobytes() != apart.given[1].tobytes()


def test_views_hold_one_subject_each():
    """Left and right half differ, each of the image's size; one subject has all of the image."""
    case = Case(5, "Many2Many")
    left, right = case.views(case.truth)
    assert left.size == right.size == case.truth.size and left.tobytes() != right.tobytes()
    assert Case(5).views(case.truth) == [case.truth]


def test_judge_counts_right_answers():
    """An image that is the first reference itself is picked; scene and category count where the judge names them."""
    cases = [Case(i) for i in range(4)]
    result = judge(_Oracle(), cases, [case.references[0][0] for case in cases])
    assert result["individual"] == 1.0
    assert result["scene"] == sum(case.scene == 0 for case in cases) / 4
    assert result["category"] == 1 / 4  # one case of each of the first four
    assert "100.0%" in markdown({"One2One": {"masked": result}})


def test_judge_asks_about_each_of_two_subjects():
    """The category that the oracle always names is right for every subject of it, wherever it stands."""
    cases = [Case(i, "Many2Many") for i in range(16)]
    result = judge(_Oracle(), cases, [case.truth for case in cases])
    assert result["category"] == sum(case.categories.count(KINDS[1]) for case in cases) / 32


def test_judges_batches_hold_kin():
    """Neighboring samples are of one category, so that individuals and not categories must be told apart."""
    category = RenderJudged()(range(16))["category"]
    assert len(set(category[:8])) == 1 and category[0] != category[8]
