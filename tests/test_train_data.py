"""Mixture and loader: samples depend on (seed, step, position) only, for any number of workers and ranks."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.curriculum import Curriculum
from train.data.loader import batches
from train.data.mixture import Mixture
from train.data.sample import BrokenRecord, Record
from train.data.sprite_world.source import SpriteSource

ROOT = Path(__file__).parent.parent


def sprites(batch_size=4, seed=1, total=8, buckets=((32, 32),), **options) -> Mixture:
    curriculum = Curriculum(total_steps=total, r_max=1.6)
    return Mixture(
        [SpriteSource()], buckets=buckets, batch_size=batch_size, seed=seed, curriculum=curriculum, reference_size=32,
        **options,
    )  # fmt: skip


class Tiles:
    """A source of small random images, the number of views of which is unlimited; every `broken`-th one is broken."""

    shows_views = shows_originals = True

    def __init__(self, count, *, sizes=None, name="tiles", broken=0) -> None:
        self.name, self.broken, self.fingerprint = name, broken, str(count)
        self.sizes = np.full((count, 2), 16) if sizes is None else sizes

    def load(self, number, other_view, rng) -> Record:
        key = f"{self.name}:{number}"
        if self.broken and number % self.broken == 0:
            raise BrokenRecord("truncated", key)
        pixels = np.random.default_rng(number).integers(0, 256, (*self.sizes[number], 3), np.uint8)
        image = Image.fromarray(pixels)
        return Record(image=image, reference=image.rotate(180) if other_view else image, caption="a tile",
                      target_phrase="tile", key=key)  # fmt: skip


def tiles(count, *, total=10, buckets=((16, 16),), batch_size=4, seed=1, **options) -> Mixture:
    sources = options.pop("sources", [Tiles(count)])
    curriculum = Curriculum(total_steps=total)
    return Mixture(
        sources, buckets=buckets, batch_size=batch_size, seed=seed, curriculum=curriculum, reference_size=8, **options
    )


def content(samples) -> list:
    return [
        (s.key, s.caption, s.target_phrase, s.crop, s.other_view, s.reference_box, s.image.tobytes(),
         s.reference.tobytes(), s.extras["inside"].tobytes())
        for s in samples
    ]  # fmt: skip


def run(mixture, first=0, last=4, **options) -> dict:
    return {step: content(samples) for step, samples in batches(mixture, first_step=first, last_step=last, **options)}


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(workers):
    assert run(sprites(), workers=workers) == run(sprites())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(world_size):
    """At each step, the ranks' samples in order are the global batch, also if it cannot be divided evenly."""
    parts = [run(sprites(), rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, whole in run(sprites()).items():
        assert [sample for part in parts for sample in part[step]] == whole


def test_resumed_iterator_equals_the_tail():
    """An iterator that starts at step 2000 gives what a mixture gives that has planned all steps before."""
    used = sprites(total=4000)
    used.sample(3, 0)
    assert run(used, 1999, 2002, workers=2) == run(sprites(total=4000), 1999, 2002)


def test_another_seed_gives_other_samples():
    assert run(sprites(seed=1), 0, 1) != run(sprites(seed=2), 0, 1)


def test_no_pair_is_drawn_twice():
    mixture = sprites()
    keys = [mixture.sample(step, position).key for step in range(10) for position in range(4)]
    assert len(set(keys)) == 40


def test_share_of_other_views_follows_the_curriculum():
    """The share of samples with another view is S_cur / S_total (Eq. 10), and 1 from S_total on."""
    mixture = tiles(1000, batch_size=10, total=1000)
    for first in (0, 90, 490, 890, 1500):
        drawn = [s.other_view for step in range(first, first + 40) for s in mixture.samples(step, range(10))]
        assert abs(np.mean(drawn) - min(1.0, (first + 19.5) / 1000)) < 0.03
        per_step = np.reshape(drawn, (40, 10)).sum(1)
        assert np.ptp(per_step) <= 2, "the number of views per step is rounded, not random"


def test_every_epoch_has_every_record_once():
    """30 records in batches of 4: each window of 30 draws from the start holds all records, in changing order."""
    mixture = tiles(30, batch_size=4)
    keys = [s.key for step in range(30) for s in mixture.samples(step, range(4))]
    counts = [{key: keys[: 4 * step].count(key) for key in set(keys)} for step in (15, 30)]
    assert set(counts[0].values()) == {2} and set(counts[1].values()) == {4}
    assert keys[:30] != keys[30:60]


def test_weights_set_the_share_of_each_source():
    sources = [Tiles(20, name="a"), Tiles(20, name="b")]
    mixture = tiles(0, sources=sources, weights=[3, 1], batch_size=8)
    drawn = [s.key[0] for step in range(20) for s in mixture.samples(step, range(8))]
    assert 116 <= drawn.count("a") <= 124


def test_buckets_are_shared_by_the_samples_of_a_step_and_follow_the_records():
    """With 60 wide and 30 square records, two thirds of the steps are wide, and every record is used equally often."""
    sizes = np.array([[16, 32]] * 60 + [[20, 20]] * 30)
    mixture = tiles(0, sources=[Tiles(90, sizes=sizes)], buckets=((16, 16), (8, 16)), batch_size=5)
    keys, wide = [], 0
    for step in range(900):
        samples = mixture.samples(step, range(5))
        assert {s.image.shape[:2] for s in samples} == {mixture.bucket(step)}
        wide += mixture.bucket(step) == (8, 16)
        keys += [s.key for s in samples]
        assert all((int(s.key.split(":")[1]) < 60) == (mixture.bucket(step) == (8, 16)) for s in samples)
    assert 560 < wide < 640
    counts = [keys.count(key) for key in set(keys)]
    assert len(counts) == 90 and 44 < min(counts) <= max(counts) < 56


def test_rare_bucket_joins_the_nearest_one():
    """One tall image cannot fill a batch: it is cropped to the square bucket instead of repeated within a step."""
    sizes = np.array([[20, 20]] * 10 + [[40, 10]])
    mixture = tiles(0, sources=[Tiles(11, sizes=sizes)], buckets=((16, 16), (32, 8)), batch_size=4)
    keys = [s.key for step in range(11) for s in mixture.samples(step, range(4))]
    assert {mixture.bucket(step) for step in range(50)} == {(16, 16)} and keys.count("tiles:10") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"sources": [Tiles(3), Tiles(3)]}, "its own name"),
        ({"sources": [Tiles(0)]}, "no usable record"),
        ({"weights": [0]}, "positive"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_mixture_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiles(3, **options)


def test_fingerprint_tells_whether_a_run_can_be_resumed_exactly():
    """It is equal for equal arguments, and changes with the records, the weights, the seed and the batch size."""
    sources = [Tiles(30), Tiles(20, name="b")]
    same = [tiles(0, sources=sources, weights=[1, 2]) for _ in range(2)]
    others = [
        tiles(0, sources=[Tiles(31), sources[1]], weights=[1, 2]),
        tiles(0, sources=sources, weights=[1, 3]),
        tiles(0, sources=sources, weights=[1, 2], seed=2),
        tiles(0, sources=sources, weights=[1, 2], batch_size=5),
    ]
    assert same[0].fingerprint == same[1].fingerprint
    assert len({mixture.fingerprint for mixture in (same[0], *others)}) == 5


def test_rank_beyond_the_batch_is_refused():
    with pytest.raises(ValueError, match="world_size 5"):
        batches(sprites(), first_step=0, last_step=1, rank=0, world_size=5)


def test_reference_of_the_first_step_is_the_whole_target_image():
    """At S_cur = 0, references are the target images themselves with r = 1."""
    for sample in sprites().samples(0, range(4)):
        assert not sample.other_view and sample.reference_box == (0, 0, 1, 1)
        assert (sample.image == sample.reference).all()


def test_crops_become_smaller_with_the_curriculum():
    """The resize ratio is below r_cur at each step (Eq. 12-13), and close to it in some samples."""
    mixture = sprites(batch_size=40, total=10)
    for step, limit in ((0, 1.0), (5, 1.3), (10, 1.6), (30, 1.6)):
        sides = [s.reference_box[2] - s.reference_box[0] for s in mixture.samples(step, range(40))]
        assert limit * 0.85 < max(1 / side for side in sides) <= limit + 1e-9


def test_mask_moves_with_the_image():
    """The subjects lie inside the mask in bucket-sized crops: where the mask is 0, only the scene is visible."""
    for sample in sprites(buckets=((64, 96),)).samples(0, range(4)):
        assert sample.image.shape == (64, 96, 3) and sample.extras["inside"].shape == (64, 96)
        assert set(np.unique(sample.extras["inside"])) <= {0, 1}
        assert sample.crop[1] == 0 and 0 <= sample.crop[0] <= 32 and sample.original_size == (128, 128)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_record_is_skipped_counted_and_logged(caplog, workers):
    """The next record takes the place of a broken one, the same on every call; the log names both key and reason."""
    mixture = tiles(0, sources=[Tiles(20, broken=5)])
    taken = [s for _, samples in batches(mixture, first_step=0, last_step=5, workers=workers) for s in samples]
    assert {key for s in taken for key, _ in s.skipped} == {f"tiles:{number}" for number in (0, 5, 10, 15)}
    assert not {s.key for s in taken} & {"tiles:0", "tiles:5", "tiles:10", "tiles:15"}
    assert caplog.text.count("tiles:15 (truncated)") == 1 and "{'truncated': 4}" in caplog.text
    assert [s.key for s in mixture.samples(3, range(4))] == [s.key for s in taken[12:16]]


@pytest.mark.parametrize("workers", [0, 1])
def test_source_of_broken_records_only_is_an_error(workers):
    iterator = batches(tiles(0, sources=[Tiles(20, broken=1)]), first_step=0, last_step=1, workers=workers)
    with pytest.raises(ValueError, match="'tiles': 1000 records in a row are broken, the last one is tiles:"):
        next(iterator)


def test_killed_worker_is_an_error():
    """If a worker is killed, the next batch raises an error that names the signal, within seconds."""
    iterator = batches(sprites(), first_step=0, last_step=100, workers=1)
    next(iterator)
    (worker,) = children(os.getpid())
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="exit code -9"):
        for _ in iterator:
            pass


def test_closing_the_iterator_ends_the_workers():
    iterator = batches(sprites(), first_step=0, last_step=100, workers=2)
    next(iterator)
    assert len(children(os.getpid())) == 2
    iterator.close()
    assert not children(os.getpid())


SCRIPT = """
    import os, sys, time
    from test_train_data import children, sprites
    from train.data.loader import batches

    if __name__ == "__main__":
        iterator = batches(sprites(), first_step=0, last_step=10_000, workers=2)
        next(iterator)
        print(*children(os.getpid()), flush=True)
        {body}
"""


def start(tmp_path, body) -> tuple[subprocess.Popen, list[int]]:
    """A process that runs `body` after its two workers have started, and the workers' process numbers."""
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT).format(body=body))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, [int(number) for number in process.stdout.readline().split()]


def test_workers_end_with_their_parent(tmp_path):
    """After SIGKILL of the parent, no worker is left."""
    process, workers = start(tmp_path, "time.sleep(60)")
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert all_end(workers)


def test_workers_ignore_signals_of_the_process_group(tmp_path):
    """Ctrl-C and SIGTERM reach every process of a terminal's group; the parent can still take all its batches."""
    body = "[os.kill(w, s) for w in children(os.getpid()) for s in (2, 15)]; [next(iterator) for _ in range(9)]"
    process, workers = start(tmp_path, body)
    assert process.wait(30) == 0 and all_end(workers)


def test_interpreter_exit_does_not_wait_for_workers(tmp_path):
    """A program that ends without closing the iterator ends at once, with its workers."""
    process, workers = start(tmp_path, "sys.exit(3)")
    assert process.wait(10) == 3 and all_end(workers)


def children(parent: int) -> list[int]:
    """Process numbers of a process's data workers."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if entry.name.isdigit() and int(status[1]) == parent and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def all_end(processes: list[int]) -> bool:
    for _ in range(100):
        if not any(Path(f"/proc/{number}").exists() for number in processes):
            return True
        time.sleep(0.1)
    return False
