"""Rounds and writes the results of a benchmark."""

import json
from pathlib import Path
from typing import Any


def save(report: dict, markdown: str, out: Path) -> None:
    """Write `report` to `out`.json and `markdown` to `out`.md, and print the markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
    print(markdown)


def rounded(values: Any) -> Any:
    """`values` with four significant digits in each float, in dicts of any depth."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    return float(f"{values:.4g}") if isinstance(values, float) else values
