"""What the engine tells about itself; the base class listens to nothing, `metrics.RayMetrics` exports it."""

from typing import Literal

Outcome = Literal["finished", "cancelled", "timed_out", "invalid", "failed"]


class Observer:
    """Called from the engine's threads and under its lock: return at once."""

    def queue(self, *, waiting: int, active: int, backlog_s: float) -> None:
        """Pictures waiting and under way, and the seconds that all their steps will take."""

    def rejected(self) -> None:
        """A request found no place."""

    def step(self, *, pictures: int, rows: int, mask_rows: int, seconds: float) -> None:
        """One call for several pictures; `rows` of the UNet in all, `mask_rows` of them for guidance masks."""

    def first_preview(self, seconds: float) -> None:
        """From a picture's arrival to its first preview."""

    def picture(self, outcome: Outcome, *, seconds: float) -> None:
        """A picture has left, `seconds` after it came."""

    def references(self, *, hits: int, misses: int) -> None:
        """References found in the cache, and those that had to be encoded."""
