"""Writes the results of a benchmark."""

import json
from pathlib import Path


def save(report: dict, markdown: str, out: Path) -> None:
    """Write `report` to `out`.json and `markdown` to `out`.md, and print the markdown."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
    print(markdown)
