"""The evaluation asks fair questions and counts right."""

import torch

from train.evaluate.judges import RenderJudged
from train.evaluate.report import CANDIDATES, Case, judge, markdown


class _Oracle:
    """Judges that see nothing but brightness: enough to count with."""

    def embed(self, pixels):
        return torch.nn.functional.normalize(torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))], -1), dim=-1)

    def scene(self, pixels):
        return torch.nn.functional.one_hot(torch.zeros(len(pixels), dtype=torch.long), 8)

    def category(self, pixels):
        return torch.nn.functional.one_hot(torch.ones(len(pixels), dtype=torch.long), 16)


def test_case_is_seeded_and_shows_the_given_individual_in_another_view():
    one, again = Case(3), Case(3)
    assert one.prompt == again.prompt and one.given.tobytes() == again.given.tobytes()
    assert len(one.references) == CANDIDATES and one.given.tobytes() != one.references[0].tobytes()
    assert one.request("words alone").subjects == () and one.request("masked").subjects[0].target_phrase in one.prompt


def test_judge_counts_right_answers():
    """A picture that is the first reference itself is picked; scene and category count where the judge names them."""
    cases = [Case(i) for i in range(4)]
    result = judge(_Oracle(), cases, [case.references[0] for case in cases])
    assert result["individual"] == 1.0
    assert result["scene"] == sum(case.scene == 0 for case in cases) / 4
    assert result["category"] == 1 / 4  # one case of each of the first four
    assert "100.0%" in markdown({"exact": result})


def test_judges_batches_hold_kin():
    """Neighbouring samples are of one category, so that individuals and not categories must be told apart."""
    category = RenderJudged()(range(16))["category"]
    assert len(set(category[:8])) == 1 and category[0] != category[8]
