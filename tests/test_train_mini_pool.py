"""The sample pool of the embedded model's pretraining renders missing samples only, and ends when it should.

Worker processes import this file, so it does not import torch.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from train.mini.pool import SamplePool

ROOT = Path(__file__).parents[1]
# What a stage does at its start, without the networks.
SCRIPT = """
import sys
from pathlib import Path
from train.mini.pool import SamplePool
from train.mini.render import RenderImages
from train.stop import StopSignal

fields = {"pixels": ((3, 128, 128), "uint8")}
pool = SamplePool(Path(sys.argv[1]), fields, RenderImages(), start=1500, capacity=1500, per_step=2)
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


def test_reopened_pool_renders_missing_samples_only(tmp_path):
    """A resumed run reads the samples on disk and renders the new samples of its step."""
    options = dict(start=6, capacity=8, per_step=2)
    SamplePool(tmp_path, {"a": ((), "int64")}, partial(_ones, names="a"), **options).refresh(3)
    rendered = []

    def render(indices):
        rendered.extend(indices)
        return _ones(indices, "a")

    reopened = SamplePool(tmp_path, {"a": ((), "int64")}, render, **options)
    reopened.refresh(3)
    assert rendered == []
    reopened.refresh(4)
    assert rendered == [12, 13]


def test_pool_with_a_new_field_is_rendered_again(tmp_path):
    """Entries that were written before a field existed are replaced; the new field has no zeros left."""
    fields = {"a": ((), "int64")}
    SamplePool(tmp_path, fields, partial(_ones, names="a"), start=4, capacity=8, per_step=1).refresh(0)
    fields["b"] = ((), "int64")
    pool = SamplePool(tmp_path, fields, partial(_ones, names="ab"), start=4, capacity=8, per_step=1)
    pool.refresh(0)
    assert (pool.batch(0, np.arange(4) / 4)["b"] == 1).all()


@pytest.mark.parametrize("name", ["a", "index"])
def test_damaged_file_is_rendered_again(tmp_path, name):
    """A power failure may leave an empty file."""
    fields, render = {"a": ((), "int64")}, partial(_ones, names="a")
    SamplePool(tmp_path, fields, render, start=4, capacity=8, per_step=1).refresh(0)
    (tmp_path / f"{name}.npy").write_bytes(b"")
    pool = SamplePool(tmp_path, fields, render, start=4, capacity=8, per_step=1)
    pool.refresh(0)
    assert (pool.batch(0, np.arange(4) / 4)["a"] == 1).all()


def test_empty_pool_is_filled_in_the_middle_of_a_run(tmp_path):
    """If a run starts at step 100 without files, worker processes render everything that a batch can contain."""
    pool = SamplePool(tmp_path, {"a": ((), "int64")}, partial(_ones, names="a"), start=4, capacity=150, per_step=1)
    pool.refresh(100)
    assert len(drawn := pool.batch(100, np.arange(104) / 104)["a"]) == 104 and (drawn == 1).all()


def test_disk_space_is_reserved(tmp_path):
    """The blocks of all files are allocated before a sample is written, also if earlier versions left them sparse."""
    options = dict(start=4, capacity=10_000, per_step=1)
    for _ in range(2):
        SamplePool(tmp_path, {"a": ((100,), "uint8")}, partial(_ones, names="a"), **options)
        statuses = [path.stat() for path in tmp_path.iterdir()]
        assert len(statuses) == 2 and all(512 * status.st_blocks >= status.st_size for status in statuses)
        np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype="uint8", shape=(10_000, 100))


@pytest.mark.parametrize("limit", ["disk", "quota"])
def test_full_disk_is_an_error(tmp_path, monkeypatch, limit):
    """Writing to a mapped file would end the process with SIGBUS."""
    if limit == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    else:
        monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    with pytest.raises(ValueError, match=rf"another 8 MB in {re.escape(str(tmp_path))}, but \d+ MB are free; free"):
        SamplePool(tmp_path, {}, partial(_ones, names=""), start=4, capacity=1_000_000, per_step=1)


def _ones(indices, names):
    return {name: np.ones(len(indices), np.int64) for name in names}
