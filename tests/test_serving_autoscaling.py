"""BacklogPolicy: the number of replicas follows seconds of queued work, not the number of requests."""

import math
from types import SimpleNamespace

import pytest

from serving.autoscaling import BacklogPolicy


def wanted(backlogs=(), images=(), requests=0.0, replicas=1, target_s=10.0) -> int:
    """Replicas that the policy requests, given backlogs and images of each replica and the total number of requests."""
    metrics = {"backlog_s": dict(enumerate(backlogs)), "images": dict(enumerate(images))}
    context = SimpleNamespace(
        aggregated_metrics=metrics, total_num_requests=requests, current_num_replicas=replicas
    )  # fmt: skip
    number, _ = BacklogPolicy(target_s)(context)
    return number


def test_no_work_needs_no_replica():
    """With min_replicas=0 the last replica is removed; Ray Serve applies the bounds."""
    assert wanted() == wanted(backlogs=[0.0], images=[0]) == 0


def test_any_work_needs_one_replica():
    assert wanted(requests=1, replicas=0) == 1
    assert wanted(backlogs=[0.01], images=[1], requests=1) == 1


@pytest.mark.parametrize("seconds,number", [(9, 1), (11, 2), (25, 3), (95, 10)])
def test_each_replica_gets_the_target_backlog(seconds, number):
    assert wanted(backlogs=[seconds], images=[4], requests=4) == number


def test_seconds_count_and_not_requests():
    """Two long images need more replicas than twenty short ones."""
    long = wanted(backlogs=[15, 15], images=[1, 1], requests=2, replicas=2)
    short = wanted(backlogs=[4, 4], images=[10, 10], requests=20, replicas=2)
    assert long == 3 and short == 1


def test_requests_without_a_replica_count_as_average_images():
    assert wanted(backlogs=[8], images=[4], requests=4) == 1
    assert wanted(backlogs=[8], images=[4], requests=16) == math.ceil(8 * 4 / 10)


def test_the_number_of_replicas_stays_while_no_replica_has_reported():
    """Requests of unknown work neither add nor remove replicas."""
    assert wanted(requests=30, replicas=2) == 2
