"""What surrounds a run: nothing on one machine, Ray Train on a cluster."""

from pathlib import Path
from typing import Any


class Monitor:
    """Receives the progress of a run. All processes call its methods in the same order.

    Attributes:
        validates_separately: whether validation runs as a separate task, for which the run does not wait.
    """

    validates_separately = False

    def wants_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint should be written after this step, for example because a machine will be preempted.
        All processes must get the same answer."""
        return False

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Called after each checkpoint with the last metrics. `checkpoint` is None except in the main process."""
