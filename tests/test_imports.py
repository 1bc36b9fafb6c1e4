"""Imports between the packages of the project go in one direction, and light modules stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a package, or a part of it, must not import.
FORBIDDEN = {
    "realcustom": {"ray", "gradio", "fastapi", "serving", "demo", "train"},
    "serving": {"gradio", "demo", "train"},
    "serving/protocol": {"torch", "diffusers", "transformers", "ray", "fastapi"},
    "serving/engine": {"ray", "fastapi", "httpx"},
    "serving/clients": {"torch", "diffusers", "transformers", "fastapi"},
    "serving/http": {"torch", "diffusers", "transformers"},
    "demo": {"torch", "diffusers", "transformers", "ray", "realcustom", "train"},
    "train": {"gradio", "serving", "demo"},
}
HEAVY = {"torch", "diffusers", "transformers", "ray", "gradio"}
LIGHT = [
    "import realcustom, realcustom.request, realcustom.words, realcustom.config, realcustom.assets",
    "import realcustom.assemble",
    "import serving",
    "import serving.protocol.errors, serving.protocol.events, serving.protocol.limits, serving.protocol.model_info",
    "import serving.clients",
    "import serving.settings",
    "from train.data.sprite_world.world import SpriteWorld; SpriteWorld().plan_pairs(range(2))",
]


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports; relative imports are resolved against the project's root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*base, *([node.module] if node.module else [])])


def importers(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            yield path.relative_to(ROOT), name


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_packages_import_in_one_direction(folder):
    crossed = [f"{path} imports {name}" for path, name in importers(folder) if name.split(".")[0] in FORBIDDEN[folder]]
    assert not crossed, crossed


def test_ray_is_imported_only_by_the_ray_recipe_of_training():
    """All other training code runs without Ray."""
    users = {path.as_posix() for path, name in importers("train") if is_within(name, "ray")}
    assert users <= {"train/ray.py"}, users


def test_protocol_does_not_import_other_parts_of_serving():
    """Both ends share the protocol; it depends on neither of them."""
    allowed = ("serving.protocol", "realcustom")
    others = [
        f"{path} imports {name}"
        for path, name in importers("serving/protocol")
        if name.split(".")[0] in ("serving", "demo", "train") and not any(is_within(name, a) for a in allowed)
    ]
    assert not others, others


def test_demo_uses_serving_through_its_clients_only():
    public = ("serving.clients", "serving.clients.merge", "serving.protocol.errors", "serving.protocol.events")
    others = [
        f"{path} imports {name}"
        for path, name in importers("demo")
        if is_within(name, "serving") and name not in public
    ]
    assert not others, others


def test_test_modules_do_not_import_each_other():
    """Shared helpers are in `tiny.py` and `single_file.py`, which contain no tests."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    crossed = [
        f"{path} imports {name}"
        for path, name in importers("tests")
        if name.removeprefix("tests.").split(".")[0] in tests or is_within(name, "tests")
    ]
    assert not crossed, crossed


@pytest.mark.parametrize("statement", LIGHT)
def test_light_modules_do_not_load_model_libraries(statement):
    """A client, a command line, a web page or a data worker starts without loading torch, Ray or Gradio."""
    code = f"import sys; {statement}; loaded = {HEAVY} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
