"""RayMetrics: exports the engine's numbers as Ray Serve metrics, named `ray_realcustom_...` in Prometheus.

`configs/grafana.json` is a Grafana dashboard of these metrics.
"""

from .engine.observer import Observer, Outcome

SECONDS_BUCKETS: list[float] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250]
IMAGE_BUCKETS: list[float] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


class RayMetrics(Observer):
    """Exports through `ray.serve.metrics`, which adds deployment, replica and application as tags."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        self._queue = Gauge("realcustom_queue_length", description="Images that wait in the queue of the replica.")
        self._active = Gauge(
            "realcustom_active_images", description="Images that are being prepared or active in the replica."
        )
        self._backlog = Gauge("realcustom_backlog_seconds", description="Predicted seconds until all images are done.")
        self._rejected = Counter("realcustom_rejected", description="Requests rejected because the queue was full.")
        self._steps = Counter("realcustom_steps", description="Steps of the engine; each advances one or more images.")
        self._rows = Counter("realcustom_rows", description="Rows of UNet calls; their rate is the throughput.")
        self._mask_rows = Counter(
            "realcustom_mask_rows", description="Rows of the guidance branch (steps before T_stop)."
        )
        self._batch = Histogram("realcustom_batch_size", description="Images per step.", boundaries=IMAGE_BUCKETS)
        self._step_s = Histogram(
            "realcustom_step_seconds", description="Seconds of a step.", boundaries=SECONDS_BUCKETS
        )
        self._preview_s = Histogram(
            "realcustom_first_preview_seconds",
            description="Seconds from arrival to the first preview.",
            boundaries=SECONDS_BUCKETS,
        )
        self._images = Counter(
            "realcustom_images", description="Images that left the engine, by outcome.", tag_keys=("outcome",)
        )
        self._image_s = Histogram(
            "realcustom_image_seconds", description="Seconds from arrival to the outcome.", boundaries=SECONDS_BUCKETS,
            tag_keys=("outcome",),
        )  # fmt: skip
        self._hits = Counter("realcustom_reference_hits", description="References found in the cache.")
        self._misses = Counter("realcustom_reference_misses", description="References that were encoded.")

    def queue(self, *, waiting: int, active: int, backlog_s: float) -> None:
        self._queue.set(waiting)
        self._active.set(active)
        self._backlog.set(backlog_s)

    def rejected(self) -> None:
        self._rejected.inc()

    def step(self, *, images: int, rows: int, mask_rows: int, seconds: float) -> None:
        self._steps.inc()
        self._rows.inc(rows)
        if mask_rows:
            self._mask_rows.inc(mask_rows)
        self._batch.observe(images)
        self._step_s.observe(max(seconds, 1e-9))

    def first_preview(self, seconds: float) -> None:
        self._preview_s.observe(max(seconds, 1e-9))

    def image(self, outcome: Outcome, *, seconds: float) -> None:
        self._images.inc(tags={"outcome": outcome})
        self._image_s.observe(max(seconds, 1e-9), tags={"outcome": outcome})

    def references(self, *, hits: int, misses: int) -> None:
        if hits:
            self._hits.inc(hits)
        if misses:
            self._misses.inc(misses)
