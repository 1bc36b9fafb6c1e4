"""What every benchmark leaves behind."""

import json
from pathlib import Path


def save(report: dict, markdown: str, out: Path) -> None:
    """Write `out`.json and `out`.md, and print the latter."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown)
    print(markdown)
