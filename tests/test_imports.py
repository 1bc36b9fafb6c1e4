"""Imports go one way, and light doors stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "realcustom": {"ray", "gradio", "serving", "demo", "train", "fastapi"},
    "serving": {"gradio", "demo", "train"},
    "demo": {"torch", "ray", "diffusers", "transformers", "realcustom", "train"},
    "train": {"gradio", "ray", "serving", "demo"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        crossed = {name for name in imported(path) if name.split(".")[0] in FORBIDDEN[package]}
        assert not crossed, f"{path.relative_to(ROOT)} imports {crossed}"


def test_the_demo_reaches_serving_through_its_client_alone():
    for path in (ROOT / "demo").rglob("*.py"):
        others = {
            n
            for n in imported(path)
            if n.startswith("serving") and n not in ("serving.clients", "serving.protocol.events")
        }
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize("statement", ["import realcustom", "import realcustom.request, realcustom.words"])
def test_building_a_request_loads_no_model_library(statement):
    heavy = "{'torch', 'diffusers', 'transformers', 'ray', 'gradio'}"
    code = f"import sys; {statement}; loaded = {heavy} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
