"""The sample pool of the embedded model's pretraining ends when it should, also while its workers render samples."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a stage does at its start, without the networks.
SCRIPT = """
import sys
from pathlib import Path
from train.mini.pool import SamplePool
from train.mini.render import RenderImages
from train.stop import StopSignal

fields = {"pixels": ((3, 128, 128), "uint8")}
pool = SamplePool(Path(sys.argv[1]), fields, RenderImages(), start=4000, capacity=4000, per_step=2)
with StopSignal().listen() as stop:
    print("rendering", flush=True)
    result = stop.interruptible(lambda: pool.refresh(0) or "complete")
print(result, "requested" if stop.requested else "")
"""


@contextmanager
def rendering(out: Path) -> Iterator[subprocess.Popen]:
    """A process whose workers render samples, in a process group of its own. All of them must end at the end."""
    command = [sys.executable, "-c", SCRIPT, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "rendering\n"
            time.sleep(1.5)
            yield process
            deadline = time.monotonic() + 30
            while group_exists(process.pid):
                assert time.monotonic() < deadline, "worker processes are left"
                time.sleep(0.1)
        finally:
            if group_exists(process.pid):
                os.killpg(process.pid, signal.SIGKILL)


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_rendering(tmp_path, number):
    """All processes of the group receive it, as with Ctrl-C; rendering ends within 20 seconds, without an error."""
    with rendering(tmp_path) as process:
        os.killpg(process.pid, number)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and output == "None requested\n" and time.monotonic() - sent < 20


def test_workers_end_with_the_main_process(tmp_path):
    """If the main process is killed while samples are rendered, its workers end too."""
    with rendering(tmp_path) as process:
        process.kill()
        process.wait()
