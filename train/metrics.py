"""Metrics of a run: averages over a logging window, and the file `log.jsonl`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricWindow:
    """Means of the metrics of one logging window.

    Values that are not finite are excluded from the mean, so that one such step does not hide the others. A step whose
    gradient is not finite is counted in `skipped_steps`.
    """

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def summary(self) -> dict[str, float]:
        """Mean of each metric over the steps that reported a finite value, and `skipped_steps` if there are any."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        return {**means, "skipped_steps": self.skipped_steps} if self.skipped_steps else means

    def state(self) -> dict[str, Any]:
        """JSON values from which `restored` makes the same window."""
        return {"skipped_steps": self.skipped_steps, "sums": dict(self._sums), "counts": dict(self._counts)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "MetricWindow":
        """The window whose `state` was saved in a checkpoint."""
        window = cls()
        window.skipped_steps, window._sums, window._counts = state["skipped_steps"], state["sums"], state["counts"]
        return window


def remove_later_steps(path: Path, step: int) -> None:
    """Remove the lines of `log.jsonl` after a step, which a resumed run will write again, and damaged lines."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if kept != lines:
            new = path.with_name(path.name + ".new")
            new.write_text("".join(kept))
            new.replace(path)


def _step_of(line: str) -> float:
    """The step of a line of the log; infinite if a kill or another program has damaged it."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if line.endswith("\n") and isinstance(step, int) else math.inf


def append_json(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line to a JSON lines file. Numbers that JSON cannot represent become null."""
    with path.open("a") as file:
        file.write(json.dumps(json_value(dict(values)), allow_nan=False) + "\n")


def json_value(value: Any) -> Any:
    """`value` with null in place of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with floats rounded to five decimal places, for the console."""
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
