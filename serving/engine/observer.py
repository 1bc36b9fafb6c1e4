"""Observer: receives the engine's numbers. The base class ignores them; `metrics.RayMetrics` exports them."""

from typing import Literal

Outcome = Literal["finished", "cancelled", "timed_out", "invalid", "failed"]


class Observer:
    """Receives the engine's numbers. Methods are called from its threads and under its lock, so they must not block."""

    def queue(self, *, waiting: int, active: int, backlog_s: float) -> None:
        """Images that wait, images that are being prepared or active, and predicted seconds until all are done."""

    def rejected(self) -> None:
        """A request was rejected because the queue is full."""

    def step(self, *, images: int, rows: int, mask_rows: int, seconds: float) -> None:
        """A step of `images` images with `rows` UNet rows in total, `mask_rows` of them in the guidance branch."""

    def first_preview(self, seconds: float) -> None:
        """The first preview of an image was sent `seconds` after its arrival."""

    def image(self, outcome: Outcome, *, seconds: float) -> None:
        """An image left the engine `seconds` after its arrival."""

    def references(self, *, hits: int, misses: int) -> None:
        """References found in the cache, and references that were encoded."""
