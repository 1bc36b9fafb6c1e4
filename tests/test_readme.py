"""README's Python snippets run as they stand, against the shipped model."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LOCAL = [block for block in BLOCKS if "from_pretrained" in block]


@pytest.mark.skipif(not (ROOT / "assets/mini/model_index.json").exists(), reason="the shipped model is not there")
@pytest.mark.parametrize("block", LOCAL)
def test_the_pipeline_snippet_makes_its_picture(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    exec(compile(block, "README.md", "exec"), {})
    assert list(tmp_path.glob("*.png"))
