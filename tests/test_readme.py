"""README's snippets run as they stand, against the shipped model and a server started as it says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from serving.clients.local import start
from serving.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def python_block(containing: str) -> str:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if containing in b]
    return block


def run(block: str) -> dict:
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_a_copy_of_the_project(tmp_path, monkeypatch):
    """Paths of the snippets are found, and what they write goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")


@pytest.fixture(scope="module")
def server():
    server = start(Settings(cpu_threads=1))
    yield server
    server.shutdown()


def test_python_snippet(tmp_path):
    run(python_block("from_pretrained"))
    assert Image.open(tmp_path / "dog.png").size == (128, 128)


def test_http_client_snippet(server, tmp_path):
    names = run(python_block("HttpClient(").replace(ADDRESS, server.url))
    assert Image.open(tmp_path / "dog.png").size == (128, 128)
    assert names["result"].seed == 7


def test_ray_snippet_gives_the_same_image_as_http(server):
    over_ray = run(python_block("join(")).pop("result")
    over_http = run(python_block("HttpClient(").replace(ADDRESS, server.url)).pop("result")
    assert over_ray.image.tobytes() == over_http.image.tobytes()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_snippet(server):
    (command,) = re.findall(r"^curl .*?(?=\n```)", README, flags=re.DOTALL | re.MULTILINE)
    command = command.replace(ADDRESS, server.url)
    done = subprocess.run(["bash", "-c", command + " --silent"], capture_output=True, text=True, timeout=120)
    answer = json.loads(done.stdout)
    assert answer["data"][0]["seed"] == 7
    assert len(answer["data"][0]["masks"]) == 1
