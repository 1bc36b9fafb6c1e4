"""BacklogPolicy: number of replicas for the queued work. Ray Serve calls it and applies bounds and delays."""

import math
from typing import Any


class BacklogPolicy:
    """A Ray Serve autoscaling policy that follows seconds of queued work instead of the number of requests.

    Replicas report `backlog_s`, the predicted seconds until all their images are done, and `images` (see
    `Replica.record_autoscaling_stats`). A request that no replica has accepted yet is counted as an average image.

    Args:
        target_backlog_s: seconds of work per replica.
    """

    def __init__(self, target_backlog_s: float) -> None:
        self._target_s = target_backlog_s

    def __call__(self, context) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        backlog_s = sum(reported.get("backlog_s", {}).values())
        images = sum(reported.get("images", {}).values())
        unassigned = max(0.0, context.total_num_requests - images)
        if images >= 1:
            backlog_s += unassigned * backlog_s / images
        elif unassigned >= 1:  # their work is unknown: keep the replicas, at least one
            return max(1, context.current_num_replicas), {}
        wanted = math.ceil(backlog_s / self._target_s)
        busy = context.total_num_requests > 0
        return max(wanted, int(busy)), {}
