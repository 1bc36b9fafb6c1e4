"""How many replicas the queued work asks for. Ray Serve's controller calls this and adds bounds and delays."""

import math
from typing import Any


class BacklogPolicy:
    """A Ray Serve autoscaling policy on seconds of queued work instead of the number of requests.

    Replicas report `backlog_s`, the time their remaining steps will take at their measured speed, and `images`
    (see `Replica.record_autoscaling_stats`). Requests that no replica has taken yet count as average images.

    Args:
        target_backlog_s: seconds of work that each replica should have ahead.
    """

    def __init__(self, target_backlog_s: float) -> None:
        self._target_s = target_backlog_s

    def __call__(self, context) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        backlog_s = sum(reported.get("backlog_s", {}).values())
        images = sum(reported.get("images", {}).values())
        unplaced = max(0.0, context.total_num_requests - images)
        if images >= 1:
            backlog_s += unplaced * backlog_s / images
        elif unplaced >= 1:  # nothing is known about them but that they are there
            return max(1, context.current_num_replicas), {}
        wanted = math.ceil(backlog_s / self._target_s)
        busy = context.total_num_requests > 0
        return max(wanted, int(busy)), {}
