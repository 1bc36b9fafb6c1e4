"""Replicas follow seconds of queued work, not the number of requests."""

import math
from types import SimpleNamespace

import pytest

from serving.autoscaling import BacklogPolicy


def wanted(backlogs=(), images=(), requests=0.0, replicas=1, target_s=10.0) -> int:
    """What the policy asks for: `backlogs` and `images` of each replica, `requests` in all."""
    metrics = {"backlog_s": dict(enumerate(backlogs)), "images": dict(enumerate(images))}
    context = SimpleNamespace(
        aggregated_metrics=metrics, total_num_requests=requests, current_num_replicas=replicas
    )  # fmt: skip
    number, _ = BacklogPolicy(target_s)(context)
    return number


def test_nothing_to_do_needs_nobody():
    """With min_replicas=0 the last replica may go; Ray Serve applies the bounds."""
    assert wanted() == wanted(backlogs=[0.0], images=[0]) == 0


def test_somebody_is_needed_while_there_is_any_work():
    assert wanted(requests=1, replicas=0) == 1
    assert wanted(backlogs=[0.01], images=[1], requests=1) == 1


@pytest.mark.parametrize("seconds,number", [(9, 1), (11, 2), (25, 3), (95, 10)])
def test_each_replica_has_the_target_ahead(seconds, number):
    assert wanted(backlogs=[seconds], images=[4], requests=4) == number


def test_work_counts_and_not_requests():
    """Two long images ask for more than twenty short ones."""
    long = wanted(backlogs=[15, 15], images=[1, 1], requests=2, replicas=2)
    short = wanted(backlogs=[4, 4], images=[10, 10], requests=20, replicas=2)
    assert long == 3 and short == 1


def test_requests_that_no_replica_has_taken_count_as_average_images():
    assert wanted(backlogs=[8], images=[4], requests=4) == 1
    assert wanted(backlogs=[8], images=[4], requests=16) == math.ceil(8 * 4 / 10)


def test_before_anything_was_measured_the_replicas_stay():
    """Requests in front of replicas that have not reported: neither more nor fewer."""
    assert wanted(requests=30, replicas=2) == 2
