"""`python -m train.data check`, and the search for evaluation images in the training data."""

import gzip
import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data.__main__ import main
from train.data.check import check, open_folder
from train.data.decode import Limits
from train.data.overlap import EvaluationImages, warn_if_overlapping
from train.data.sample import REASONS

LIMITS = Limits(min_side=16, max_pixels=100_000)
OPTIONS = ["--min-side", "16", "--max-pixels", "100000", "--workers", "0"]


def photo(number, size=(64, 48)) -> Image.Image:
    """A smooth random image; `size` is width and height."""
    small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def jpeg(image, quality=95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_shard(path, files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def mixed(tmp_path):
    """A shard with three good records and one of each kind that can be broken."""
    good = [
        (f"{i}.{kind}", content) for i in range(3) for kind, content in (("jpg", jpeg(photo(i))), ("txt", b"a fox"))
    ]
    broken = {
        "captionless": {"jpg": jpeg(photo(9))},
        "bad": {"jpg": jpeg(photo(9)), "json": b"{"},
        "noise": {"jpg": b"noise", "txt": b"a dog"},
        "short": {"jpg": jpeg(photo(9))[:-200], "txt": b"a dog"},
        "tiny": {"jpg": jpeg(photo(9, (15, 40))), "txt": b"a dog"},
        "huge": {"jpg": jpeg(photo(9, (500, 400))), "txt": b"a dog"},
        "gray": {"jpg": jpeg(Image.new("RGB", (64, 48), "gray")), "txt": b"a dog"},
        "lost": {"txt": b"a dog"},
        "../up": {"jpg": jpeg(photo(9))},
    }
    files = [(f"{key}.{kind}", content) for key, record in broken.items() for kind, content in record.items()]
    write_shard(tmp_path / "mixed" / "0.tar", good + files + [("0.jpg", b"again")])
    (tmp_path / "mixed" / "link.tar").symlink_to(tmp_path / "mixed" / "0.tar")
    (tmp_path / "mixed" / "bad.tar").write_bytes(b"bad" * 1000)
    return tmp_path / "mixed"


FOUND = {
    "captionless": "0/captionless", "bad caption": "0/bad", "broken image": "0/noise", "truncated": "0/short",
    "tiny": "0/tiny", "huge": "0/huge", "gray": "0/gray", "no image": "0/lost", "unsafe name": "0/../up",
    "duplicate key": "0/0", "link": "link.tar", "bad shard": "bad",
}  # fmt: skip


def test_every_kind_of_broken_record_is_counted_and_named(mixed, capsys):
    """The report has the number, the reason and the name of each; the exit status is 0, because three can be used."""
    assert main(["check", str(mixed), *OPTIONS]) == 0
    output = capsys.readouterr().out
    assert "3 usable records in 2 shards" in output and "broken: 12" in output
    for reason, name in FOUND.items():
        (line,) = [
            number for number, line in enumerate(output.splitlines()) if f"1 {reason}: {REASONS[reason]}" in line
        ]
        assert name in output.splitlines()[line + 1], reason
    assert "fox 3" in output


def test_workers_find_the_same(mixed):
    alone, parallel = (check(open_folder(mixed, LIMITS), workers=workers).contents for workers in (0, 2))
    assert alone == parallel and alone.usable == 3


@pytest.mark.parametrize("option, limit", [("--min-side", 1), ("--max-pixels", 1), ("--examples", 0), ("--workers", 0)])
def test_wrong_argument_is_an_error_message(tmp_path, monkeypatch, capsys, option, limit):
    """It names the option, its value and the limit, before the source is opened."""
    monkeypatch.setattr("train.data.check.open_folder", lambda *_: pytest.fail("the source was opened"))
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(tmp_path), option, str(limit - 1)])
    expected = f"{option}: the value is {limit - 1}; it must be an integer of at least {limit}"
    assert expected in capsys.readouterr().err


# `check` of a source whose records take long.
SLOW = """
import signal, sys, time
import numpy as np
from train.data import __main__, check
from train.data.index import Findings
from train.data.sample import BrokenRecord

class Slow:
    findings, sizes = Findings(), np.ones((6400, 2), int)

    def load(self, number, *_):
        print("ignored:", signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)  # in the worker
        time.sleep(0.01)
        raise BrokenRecord("tiny", str(number))

if __name__ == "__main__":
    check.open_folder = lambda *_: Slow()
    sys.exit(__main__.main(["check", "slow", "--workers", "1"]))
"""


def test_ctrl_c_ends_the_check(tmp_path):
    """All processes receive it and end soon; the main process prints one word, and its workers ignore it."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, tmp_path / "slow.py"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        ignored = process.stdout is not None and process.stdout.readline() == "ignored: True\n"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert ignored and (process.returncode, errors) == (130, "Stopped.\n")


def test_invalid_resolution_is_an_error_message(mixed, capsys):
    assert main(["check", str(mixed), *OPTIONS, "--resolution", "500"]) == 1
    output = capsys.readouterr()
    assert "resolution is 500; it must be a multiple of 64" in output.err and not output.out


def test_folder_of_links_is_an_error_message(mixed, tmp_path, capsys):
    """As the Hugging Face cache has; links are not followed, and the message says so."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").symlink_to(mixed)
    assert main(["check", str(tmp_path / "links"), *OPTIONS]) == 1
    assert "contains only links (1), which are not followed" in capsys.readouterr().err


def test_source_of_broken_records_only_has_exit_status_1(tmp_path, capsys):
    """Whether the index or the decoder notices it; the message names the path."""
    write_shard(tmp_path / "a.tar", [("0.jpg", jpeg(photo(0)))])
    assert main(["check", str(tmp_path / "a.tar"), *OPTIONS]) == 1
    output = capsys.readouterr()
    assert "1 captionless" in output.out and "a/0" in output.out and "a.tar has no usable record" in output.err
    write_shard(tmp_path / "b.tar", [("0.jpg", jpeg(photo(0))[:-200]), ("0.txt", b"a dog")])
    assert main(["check", str(tmp_path / "b.tar"), *OPTIONS]) == 1
    output = capsys.readouterr()
    assert "1 truncated" in output.out and "b.tar has no usable record" in output.err


def test_compressed_shard_names_the_remedy(tmp_path, capsys):
    write_shard(tmp_path / "a.tar", [("0.jpg", jpeg(photo(0))), ("0.txt", b"a dog")])
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert main(["check", str(tmp_path), *OPTIONS]) == 1
    assert "it is compressed; decompress it" in capsys.readouterr().out


@pytest.mark.parametrize("exists", [True, False])
def test_path_without_data_is_an_error_message(tmp_path, capsys, exists):
    path = tmp_path / "nothing"
    if exists:
        path.mkdir()
    assert main(["check", str(path)]) == 1
    assert ("has no .tar file" if exists else "does not exist") in capsys.readouterr().err


def test_views_are_recognized(tmp_path, capsys):
    for number in range(3):
        path = tmp_path / "mv" / "mug" / "a" / "images" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(photo(number)))
    assert main(["check", str(tmp_path / "mv"), *OPTIONS]) == 0
    output = capsys.readouterr().out
    assert "3 usable views of 1 instances" in output and "mug 3" in output and "median 64x48" in output


def test_command_line_runs_as_a_module(mixed):
    """`python -m train.data check` works from the root of the project, without loading torch."""
    root = Path(__file__).parent.parent
    code = "import runpy, sys; sys.argv[1:] = ['check', sys.argv[1], '--workers', '0', '--min-side', '16']\n"
    code += "try: runpy.run_module('train.data', run_name='__main__')\n"
    code += "except SystemExit as done: sys.exit('torch' if 'torch' in sys.modules else done.code)"
    done = subprocess.run([sys.executable, "-c", code, mixed], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "usable records" in done.stdout


# --- evaluation images


def test_identical_files_are_found_in_the_index(mixed, tmp_path, caplog, monkeypatch):
    """The warning states their number and names; no image of the source is decoded."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(jpeg(photo(1)))
    (folder / "dog.jpg").write_bytes(jpeg(photo(77)))
    source = open_folder(mixed, LIMITS)
    monkeypatch.setattr(type(source), "load", lambda *_: pytest.fail("a record was loaded"))
    assert warn_if_overlapping([source], [folder]) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 records are images of the evaluation sets" in record.message
    assert "mixed:0/1 is evaluation/cat.jpg" in record.message


def test_check_finds_copies(mixed, tmp_path, capsys):
    """Also one that was resized and compressed again."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(jpeg(photo(1).resize((90, 70)), quality=60))
    (folder / "fox.jpg").write_bytes(jpeg(photo(2)))
    main(["check", str(mixed), "--evaluation", str(folder), *OPTIONS])
    output = capsys.readouterr().out
    assert "evaluation images in the training data: 2" in output
    assert "mixed:0/1 is evaluation/cat.jpg" in output and "mixed:0/2 is evaluation/fox.jpg" in output


def test_other_images_are_not_taken_for_copies(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(photo(0)))
    images = EvaluationImages([path])
    assert images.similar(photo(0)) == "a.jpg"
    assert all(images.similar(photo(number)) is None for number in range(1, 50))
    mirrored = photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert images.similar(mirrored) is None


def test_empty_evaluation_set_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="contains no image"):
        EvaluationImages([tmp_path])


def test_broken_evaluation_image_does_not_end_the_check(tmp_path, caplog):
    """It is named in a warning; the other images are compared."""
    (tmp_path / "good.jpg").write_bytes(jpeg(photo(1)))
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    evaluation = EvaluationImages([tmp_path])
    assert evaluation.similar(photo(1)) == f"{tmp_path.name}/good.jpg" and len(evaluation.by_hash) == 2
    assert "broken.jpg cannot be read" in caplog.text
