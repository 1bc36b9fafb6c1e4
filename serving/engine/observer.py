"""What the engine tells about itself; the base class listens to nothing, `metrics.RayMetrics` exports it."""

from typing import Literal

Outcome = Literal["finished", "cancelled", "timed_out", "invalid", "failed"]


class Observer:
    """Called from the engine's threads and under its lock: return at once."""

    def queue(self, *, waiting: int, active: int, backlog_s: float) -> None:
        """Images waiting and under way, and the seconds that all their steps will take."""

    def rejected(self) -> None:
        """A request found no place."""

    def step(self, *, images: int, rows: int, mask_rows: int, seconds: float) -> None:
        """One call for several images; `rows` of the UNet in all, `mask_rows` of them for guidance masks."""

    def first_preview(self, seconds: float) -> None:
        """From an image's arrival to its first preview."""

    def image(self, outcome: Outcome, *, seconds: float) -> None:
        """An image has left, `seconds` after it came."""

    def references(self, *, hits: int, misses: int) -> None:
        """References found in the cache, and those that had to be encoded."""
