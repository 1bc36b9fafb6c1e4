"""app.py as a subprocess, started outside the project folder: Ctrl-C, and errors at start-up."""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from serving.clients.local import free_port

APP = Path(__file__).resolve().parent.parent / "app.py"
START_TIMEOUT_S, STOP_TIMEOUT_S = 240, 60


@pytest.fixture
def start_app(tmp_path):
    """Starts app.py with arguments in an empty folder; kills processes that a failed test leaves behind."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen([sys.executable, str(APP), *arguments], cwd=tmp_path, stderr=stderr)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_until(condition, process: subprocess.Popen, timeout_s: float = START_TIMEOUT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"app.py ended with exit code {process.returncode}"
        assert time.monotonic() < end, f"the condition did not become true within {timeout_s} s"
        time.sleep(0.2)


def interrupt(process: subprocess.Popen) -> None:
    """Send SIGINT once and wait. Ray's own processes must have ended, and no new ones may have started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    end = time.monotonic() + STOP_TIMEOUT_S
    while process.poll() is None:
        assert time.monotonic() < end, f"app.py did not end within {STOP_TIMEOUT_S} s after SIGINT"
        time.sleep(0.2)
        try:
            children += psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            break
    process.wait()
    names = [child.pid for child in set(children)]
    _, alive = psutil.wait_procs(set(children), timeout=STOP_TIMEOUT_S)
    assert not alive, f"{len(alive)} of {len(names)} child processes are still running"


def assert_one_line(process: subprocess.Popen, stderr: Path, *words: str) -> None:
    """Exit code 2, and the last line of stderr is the error."""
    assert process.wait(START_TIMEOUT_S) == 2
    text = stderr.read_text()
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("app.py: error: ") and all(word in last for word in words)


def test_interrupt_stops_the_page_and_the_local_server(start_app, tmp_path):
    port = free_port()
    process = start_app("--port", str(port))

    def page_answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).status == 200
        except OSError:
            return False

    wait_until(page_answers, process)
    rebound = urllib.request.Request(f"http://127.0.0.1:{port}", headers={"Host": "rebound.example.com"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(rebound, timeout=5)
    wait_until(lambda: f"Open http://127.0.0.1:{port} in a browser" in (tmp_path / "stderr").read_text(), process)
    interrupt(process)
    stderr = (tmp_path / "stderr").read_text()
    assert process.returncode == 0
    assert "Loading the model" in stderr and "Traceback" not in stderr and "share=True" not in stderr


def test_interrupt_during_start_stops_ray(start_app, tmp_path):
    process = start_app("--port", str(free_port()))
    raylet = lambda: any("raylet" in p.name() for p in psutil.Process(process.pid).children(recursive=True))
    wait_until(raylet, process)
    time.sleep(3)
    interrupt(process)
    assert process.returncode == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_missing_server_is_one_line(start_app, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    assert_one_line(start_app("--url", url), tmp_path / "stderr", url)


def test_missing_model_is_one_line(start_app, tmp_path):
    assert_one_line(start_app("--model", "no/such/model"), tmp_path / "stderr", "no/such/model")


def test_missing_ray_is_one_line(start_app, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    assert_one_line(start_app("--address", address), tmp_path / "stderr", address)


def test_wrong_api_key_is_one_line(start_app, tmp_path):
    class Locked(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            error = {"message": "the API key is missing or wrong.", "code": "invalid_api_key"}
            body = json.dumps({"error": error}).encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert_one_line(start_app("--url", url, "--api-key", "wrong"), tmp_path / "stderr", "API key")
    server.shutdown()
