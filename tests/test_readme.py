"""The snippets of README and the scripts of `examples/` run as they are, with the embedded model and a local server."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from serving.clients.local import LocalServer, start
from serving.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
LOCAL_EXAMPLES = ["one2one", "one2many", "many2many"]


def block(language: str, containing: str) -> str:
    """The only code block of this language that contains a string."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def run(code: str) -> dict:
    """Run Python code and return its variables."""
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(elsewhere) -> Path:
    """A current folder with the project's assets, so that files written by a snippet stay out of the project."""
    (elsewhere / "assets").symlink_to(ROOT / "assets")
    return elsewhere


@pytest.fixture(scope="module")
def server():
    server = start(Settings(cpu_threads=1))
    yield server
    server.shutdown()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_readme_is_short():
    """Details belong in docs/."""
    assert len(README.splitlines()) <= 150


def test_links_of_the_documentation_exist():
    """Relative links and images of README and docs/ point to files."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target and not target.startswith("#"):
                assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


def test_python_snippet_runs_from_any_folder(elsewhere):
    run(block("python", "from_pretrained"))
    assert size_of(elsewhere / "dog.png") == (128, 128)


def test_http_client_snippet(server: LocalServer, copy):
    names = run(block("python", "HttpClient(").replace(ADDRESS, server.url))
    assert size_of(copy / "dog.png") == (128, 128)
    assert names["result"].seed == 7


def test_ray_snippet_gives_the_same_image_as_http(server: LocalServer, copy):
    over_ray = run(block("python", "join("))["result"]
    over_http = run(block("python", "HttpClient(").replace(ADDRESS, server.url))["result"]
    assert over_ray.image.tobytes() == over_http.image.tobytes()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_snippet_writes_the_same_image_as_the_client(server: LocalServer, copy):
    command = block("bash", "curl").replace(ADDRESS, server.url).replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], check=True, timeout=120)
    with Image.open(copy / "dog.png") as image:
        over_curl = image.convert("RGB").tobytes()
    run(block("python", "HttpClient(").replace(ADDRESS, server.url))
    with Image.open(copy / "dog.png") as image:
        assert image.convert("RGB").tobytes() == over_curl


@pytest.mark.parametrize("name", LOCAL_EXAMPLES)
def test_example(name, elsewhere, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    width, height = size_of(elsewhere / f"{name}.png")
    assert (width, height) == (128, 128)


def test_http_example(server: LocalServer, elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["http_client", server.url, "out.png"])
    runpy.run_path(str(ROOT / "examples" / "http_client.py"), run_name="__main__")
    assert size_of(elsewhere / "out.png") == (128, 128)
    assert "step 1 of" in capsys.readouterr().out


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*LOCAL_EXAMPLES, "http_client"}
