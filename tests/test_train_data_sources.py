"""Sources of training data: tar shards and folders of views, their index, and what they do with broken records."""

import io
import json
import os
import signal
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from train.curriculum import Curriculum
from train.data import decode
from train.data.caption import guess_target_phrase
from train.data.decode import Limits
from train.data.index import content_hash
from train.data.loader import batches
from train.data.mixture import Mixture
from train.data.multiview import MultiviewSource
from train.data.sample import BrokenRecord
from train.data.text_image import TextImageSource

LIMITS = Limits(min_side=16, max_pixels=10_000)


def encoded(number, size=(24, 32), format="JPEG", mode="RGB", **options) -> bytes:
    """An image file with random content; `size` is height and width."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_shard(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            add(archive, name, content)
    return path


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def good(first=0, count=6) -> dict[str, bytes]:
    files = {}
    for number in range(first, first + count):
        files[f"{number:03}.jpg"] = encoded(number)
        files[f"{number:03}.txt"] = f"a photo of a dog, number {number}".encode()
    return files


def load(source, number=0, other_view=False, seed=0):
    return source.load(number, other_view, np.random.default_rng(seed))


def mixture(*sources, batch_size=2, total=8, buckets=((24, 32),)) -> Mixture:
    curriculum = Curriculum(total_steps=total)
    return Mixture(sources, buckets=buckets, batch_size=batch_size, seed=0, curriculum=curriculum, reference_size=16)


@pytest.fixture
def shards(tmp_path):
    """Two shards of six records each."""
    write_shard(tmp_path / "data" / "0.tar", good())
    write_shard(tmp_path / "data" / "more" / "1.tar", good(6))
    return tmp_path / "data"


# --- tar shards


def test_record_has_image_caption_and_key(shards):
    """A record is the file of its key in the archive; image and reference are the same."""
    source = TextImageSource(shards, limits=LIMITS)
    assert len(source.sizes) == 12 and (source.sizes == (24, 32)).all()
    record = load(source, 7)
    assert (record.key, record.caption) == ("data:more/1/007", "a photo of a dog, number 7")
    assert record.target_phrase == "dog"
    assert record.image is record.reference
    assert np.array_equal(record.image, Image.open(io.BytesIO(encoded(7))))


def test_json_caption_has_precedence(tmp_path):
    """caption and target_phrase of the .json file are used; either file may be missing."""
    record = {"caption": "my  red\nteapot", "target_phrase": "red teapot"}
    path = write_shard(
        tmp_path / "a.tar",
        {
            "0.png": encoded(0, format="PNG"), "0.txt": b"another text", "0.json": json.dumps(record).encode(),
            "1.webp": encoded(1, format="WEBP"), "1.json": b'{"caption": "two owls"}',
            "2.jpeg": encoded(2), "2.txt": "un café".encode(), "2.json": b'{"target_phrase": "caf\\u00e9"}',
        },
    )  # fmt: skip
    source = TextImageSource(path, limits=LIMITS)
    captions = [(record.caption, record.target_phrase) for record in map(lambda i: load(source, i), range(3))]
    assert captions == [("my red teapot", "red teapot"), ("two owls", "owls"), ("un café", "café")]


@pytest.mark.parametrize(
    "options", [{"mode": "RGBA"}, {"mode": "L"}, {"mode": "P"}, {"mode": "CMYK", "format": "JPEG"}]
)
def test_all_modes_become_rgb(tmp_path, options):
    path = write_shard(tmp_path / "a.tar", {"0.png": encoded(0, **{"format": "PNG", **options}), "0.txt": b"a dog"})
    assert load(TextImageSource(path, limits=LIMITS)).image.mode == "RGB"


def test_index_does_not_decode(tmp_path, monkeypatch):
    """Sizes come from the headers, which makes the index as fast as reading the shard."""
    files = {f"{kind}.{kind}": encoded(0, format=kind) for kind in ("jpeg", "png")}
    path = write_shard(tmp_path / "a.tar", {**files, "jpeg.txt": b"a dog", "png.txt": b"a dog"})
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail(f"{image.format} was decoded"))
    assert len(TextImageSource(path, limits=LIMITS).sizes) == 2


def test_rotated_image_is_indexed_upright(tmp_path):
    """EXIF orientation 6 exchanges height and width, in the index and in the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_shard(tmp_path / "a.tar", {"0.jpg": encoded(0, (20, 40), exif=exif), "0.txt": b"a dog"})
    source = TextImageSource(path, limits=LIMITS)
    assert source.sizes.tolist() == [[40, 20]] and load(source).image.size == (20, 40)


BROKEN = {
    "captionless": {"x.jpg": encoded(90)},
    "captionless ": {"x.jpg": encoded(90), "x.txt": b" \n"},
    "bad caption": {"x.jpg": encoded(90), "x.txt": b"\xff\xfe\xfd"},
    "bad caption ": {"x.jpg": encoded(90), "x.json": b"[1, 2]"},
    "bad caption  ": {"x.jpg": encoded(90), "x.json": b'{"caption": "a dog", "target_phrase": "cat"}'},
    "bad caption   ": {"x.jpg": encoded(90), "x.json": b"[" * 60_000},
    "bad caption    ": {"x.jpg": encoded(90), "x.txt": b"dog " * 20_000},
    "bad caption     ": {"x.jpg": encoded(90), "x.json": rb'{"caption": "a dog \ud83d on grass"}'},
    "bad caption      ": {"x.jpg": encoded(90), "x.json": rb'{"caption": "a dog", "target_phrase": "dog\ud83d"}'},
    "broken image": {"x.jpg": b"not an image", "x.txt": b"a dog"},
    "broken image ": {"x.jpg": b"", "x.txt": b"a dog"},
    "broken image  ": {"x.jpg": b"GIF89a" + bytes(50), "x.txt": b"a dog"},
    "broken image   ": {"x.webp": encoded(90, format="WEBP")[:-60], "x.txt": b"a dog"},
    "tiny": {"x.jpg": encoded(90, (15, 40)), "x.txt": b"a dog"},
    "huge": {"x.jpg": encoded(90, (101, 101)), "x.txt": b"a dog"},
    "no image": {"x.txt": b"a dog"},
    "unsafe name": {"../x.jpg": encoded(90), "../x.txt": b"a dog"},
    "unsafe name ": {"/x.jpg": encoded(90), "/x.txt": b"a dog"},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_record_is_counted_at_index_time(tmp_path, reason):
    """The index counts it with its name; the other records are used."""
    source = TextImageSource(write_shard(tmp_path / "a.tar", {**BROKEN[reason], **good()}), limits=LIMITS)
    assert set(source.findings.counts) == {reason.strip()}
    assert "x" in source.findings.examples[reason.strip()][0]
    assert sorted(load(source, i).key for i in range(len(source.sizes))) == [f"a:a/{i:03}" for i in range(6)]


def single_color() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 130, 140)).save(buffer, "JPEG")
    return buffer.getvalue()


PNG = encoded(91, (64, 64), "PNG")
DAMAGED = {
    "truncated": encoded(91, (64, 64))[:-300],
    "truncated ": PNG[:-700],
    "broken image": PNG[:2000] + bytes(1000) + PNG[3000:],
    "gray": single_color(),
}


@pytest.mark.parametrize("reason", DAMAGED)
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_skipped_in_training(tmp_path, caplog, reason, workers):
    """An image with a good header and broken content is replaced by the next record, and logged with its key."""
    path = write_shard(tmp_path / "a.tar", {"x.png": DAMAGED[reason], "x.txt": b"a dog", **good(count=5)})
    taken = list(batches(mixture(TextImageSource(path, limits=LIMITS)), first_step=0, last_step=3, workers=workers))
    keys = [sample.key for _, samples in taken for sample in samples]
    assert len(keys) == 6 and set(keys) == {f"a:a/{i:03}" for i in range(5)}
    assert f"a:a/x ({reason.strip()})" in caplog.text


def test_links_are_counted_and_not_followed(tmp_path):
    """Symbolic and hard links inside an archive, and linked shards in a folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.tar").write_bytes(write_shard(tmp_path / "b.tar", good(20)).read_bytes())
    with tarfile.open(folder / "a.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "x.jpg"), (tarfile.LNKTYPE, "y.jpg"), (tarfile.CHRTYPE, "z.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name, content in good().items():
            add(archive, name, content)
    (folder / "linked.tar").symlink_to(tmp_path / "secret.tar")
    source = TextImageSource(folder, limits=LIMITS)
    assert source.findings.counts == {"link": 4} and len(source.sizes) == 6


def test_second_record_of_a_key_is_counted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [*good(count=2).items(), ("000.jpg", encoded(50))]:
            add(archive, name, content)
    source = TextImageSource(path, limits=LIMITS)
    assert source.findings.counts == {"duplicate key": 1}
    assert np.array_equal(load(source).image, Image.open(io.BytesIO(encoded(0))))


def test_records_before_the_end_of_a_truncated_shard_are_used(tmp_path):
    path = write_shard(tmp_path / "a.tar", good())
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"004.jpg") + 700])
    source = TextImageSource(path, limits=LIMITS)
    assert len(source.sizes) == 4 and source.findings.counts["bad shard"] == 1


DAMAGED_ARCHIVES = {
    "corrupt header at byte": lambda whole, header: whole[:header] + b"\xff" * 20 + whole[header + 20 :],
    "no end-of-archive mark": lambda whole, header: whole[:header],
    "corrupt header": lambda whole, header: whole[: header + 100],
}


@pytest.mark.parametrize("problem", DAMAGED_ARCHIVES)
def test_damaged_archive_is_counted(tmp_path, problem):
    """`tarfile` ends quietly there; the finding states what is wrong, and the records before it are used."""
    path = write_shard(tmp_path / "a.tar", good())
    content = path.read_bytes()
    path.write_bytes(DAMAGED_ARCHIVES[problem](content, content.index(b"004.jpg")))
    source = TextImageSource(path, limits=LIMITS)
    assert len(source.sizes) == 4 and source.findings.counts == {"bad shard": 1}
    assert problem in source.findings.examples["bad shard"][0]


def test_joined_archives_are_counted(tmp_path):
    """Readers of tar archives end at the first end-of-archive mark, so that the second archive would be lost."""
    parts = [write_shard(tmp_path / f"{first}.part", good(first)).read_bytes() for first in (0, 6)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    source = TextImageSource(tmp_path / "a.tar", limits=LIMITS)
    assert len(source.sizes) == 6 and source.findings.counts == {"bad shard": 1}
    assert "data after the end of the archive" in source.findings.examples["bad shard"][0]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w|"])
@pytest.mark.parametrize("padding", [0, 1024, 20_480, 2**20 + 512])
def test_correct_archive_is_not_reported(tmp_path, format, mode, padding):
    """With long names in both ways to store them, written to a file or a pipe, and with any number of zeros behind."""
    folder = f"{'a' * 90}/{'ö' * (30 if format == tarfile.USTAR_FORMAT else 200)}/"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:
        for name, content in good(count=2).items():
            add(archive, folder + name, content)
    whole = buffer.getvalue()
    if padding:
        with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
            archive.getmembers()
            whole = whole[: archive.offset] + bytes(padding)
    (tmp_path / "a.tar").write_bytes(whole)
    source = TextImageSource(tmp_path / "a.tar", limits=LIMITS)
    assert len(source.sizes) == 2 and not source.findings.counts


@pytest.mark.parametrize("size", ["-20480", str(2**62), "1" * 5000])
def test_archive_with_an_impossible_size_ends_there(tmp_path, size):
    """A negative size would lead back to the start of the archive, a huge one to an allocation."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in good(count=3).items():
            add(archive, name, content)
        member = tarfile.TarInfo("x.jpg")
        member.pax_headers = {"size": size}
        archive.addfile(member)
    source = TextImageSource(tmp_path / "a.tar", limits=LIMITS)
    assert len(source.sizes) == 3 and source.findings.counts.keys() <= {"bad shard", "huge", "captionless"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ({}, "contains no .tar file"),
        ({"a.tar": b"not a tar archive" * 100}, r"no usable record in 1 shards \(1 bad shard\). Run `python -m train"),
        ({"a.tar": b""}, "1 bad shard"),
    ],
)
def test_source_without_usable_records_is_an_error(tmp_path, files, message):
    """The error names the path and the remedy."""
    if files is not None:
        (tmp_path / "data").mkdir()
    for name, content in (files or {}).items():
        (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data.*{message}"):
        TextImageSource(tmp_path / "data")


# --- index


def test_index_is_built_once(shards, monkeypatch):
    """The second source reads the sidecar files; a changed shard is indexed again."""
    first = TextImageSource(shards, limits=LIMITS)
    monkeypatch.setattr("train.data.index._scan", lambda path, *_: pytest.fail(f"{path} was read again"))
    again = TextImageSource(shards, limits=LIMITS)
    assert again.fingerprint == first.fingerprint and load(again, 3).key == load(first, 3).key
    monkeypatch.undo()
    write_shard(shards / "0.tar", good(50, 3))
    changed = TextImageSource(shards, limits=LIMITS)
    assert len(changed.sizes) == 9 and changed.fingerprint != first.fingerprint
    assert load(changed).caption == "a photo of a dog, number 50"


def test_ctrl_c_ends_the_index_of_a_large_shard(tmp_path, monkeypatch):
    """The rest of the shard is not read, and no sidecar of a part is left behind."""
    path, read = write_shard(tmp_path / "0.tar", good(count=500)), []

    def read_size(image, key):
        read.append(key)
        if len(read) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)
        return decode.read_size(image, key)

    monkeypatch.setattr("train.data.index.read_size", read_size)
    with pytest.raises(KeyboardInterrupt):
        TextImageSource(path, limits=LIMITS)
    assert 3 <= len(read) < 500
    assert list(tmp_path.iterdir()) == [path]


def test_changed_captions_change_the_fingerprint(shards):
    """Also those of equal length, so that a resumed run warns."""
    first = TextImageSource(shards, limits=LIMITS)
    content = (shards / "0.tar").read_bytes()
    (shards / "0.tar").write_bytes(content.replace(b"a photo of a dog, number 3", b"a photo of a cat, number 3"))
    changed = TextImageSource(shards, limits=LIMITS)
    assert load(changed, 3).caption == "a photo of a cat, number 3"
    assert changed.fingerprint != first.fingerprint


def test_what_cannot_be_read_is_counted(shards, views, monkeypatch):
    """A shard, a folder of shards, and a folder of views without permission; the others are used."""
    write_shard(shards / "secret.tar", good(20))
    write_shard(shards / "secret" / "2.tar", good(30))
    hidden = views / "teapot" / "c"
    hidden.mkdir()
    access, scandir = os.access, os.scandir

    def refuse(path="."):
        if str(path) in (str(shards / "secret"), str(hidden)):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("secret.tar") and access(path, mode))
    text_image, multiview = TextImageSource(shards, limits=LIMITS), MultiviewSource(views, limits=LIMITS)
    assert len(text_image.sizes) == 12 and text_image.findings.counts == {"unreadable": 2}
    assert len(multiview.sizes) == 8 and multiview.findings.counts == {"unreadable": 1}


def test_pipe_is_not_a_shard(shards):
    os.mkfifo(shards / "2.tar")
    source = TextImageSource(shards, limits=LIMITS)
    assert len(source.sizes) == 12 and source.findings.counts == {"link": 1}


def test_record_of_a_removed_shard_is_skipped(shards):
    """Also by a worker that has not used the shard before."""
    used, unused = TextImageSource(shards, limits=LIMITS), TextImageSource(shards, limits=LIMITS)
    load(used, 0)
    (shards / "0.tar").unlink()
    for source in (used, unused):
        with pytest.raises(BrokenRecord, match="changed"):
            load(source, 1)


def test_damaged_sidecar_is_built_again(shards, caplog):
    fingerprint = TextImageSource(shards, limits=LIMITS).fingerprint
    sidecar = shards / "0.tar.index"
    sidecar.write_bytes(sidecar.read_bytes()[:-40])
    assert TextImageSource(shards, limits=LIMITS).fingerprint == fingerprint
    assert "0.tar.index is damaged" in caplog.text


def test_read_only_source_keeps_its_index_in_the_cache_folder(shards, tmp_path, monkeypatch):
    """If the folder of the source cannot be written, the sidecar goes to the cache folder and is found there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shards / "0.tar.index").mkdir()  # root may write anywhere: a folder of this name stands for a read-only one
    (shards / "0.tar.index" / "file").touch()
    TextImageSource(shards, limits=LIMITS)
    assert len(list((tmp_path / "cache").rglob("0.tar-*.index"))) == 1
    monkeypatch.setattr("train.data.index._scan", lambda path, *_: pytest.fail(f"{path} was read again"))
    assert len(TextImageSource(shards, limits=LIMITS).sizes) == 12


def test_shard_that_changes_during_the_run_is_noticed(shards):
    """A record whose content is not the indexed one is broken, not silently another image."""
    used, unused = TextImageSource(shards, limits=LIMITS), TextImageSource(shards, limits=LIMITS)
    load(used, 0)
    data = (shards / "0.tar").read_bytes()
    (shards / "0.tar").write_bytes(data.replace(encoded(2), encoded(2)[:-30] + bytes(30)))
    with pytest.raises(BrokenRecord, match="002 changed"):
        load(used, 2)
    with pytest.raises(BrokenRecord, match="0 changed"):
        load(unused, 2)
    (shards / "0.tar").unlink()
    (shards / "0.tar").mkdir()
    with pytest.raises(BrokenRecord, match="000 changed"):
        load(used, 0)


def test_user_without_a_home_directory_keeps_the_index_beside_the_data(shards, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", home)
    assert len(TextImageSource(shards, limits=LIMITS).sizes) == 12
    assert (shards / "0.tar.index").exists()


def test_file_without_records_has_no_sidecar(tmp_path):
    (tmp_path / "script.py").write_text("print()")
    with pytest.raises(ValueError, match="no usable record"):
        TextImageSource(tmp_path / "script.py", limits=LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("a photo of a brown dog sitting on a bench", "dog"),
        ("dog", "dog"),
        ("The old red teapot, in a kitchen", "teapot"),
        ("two cats and a fox", "cats"),
        ("in the snow, a fox is running", "snow"),
        ("wedding dress with lace", "dress"),
        ("a close-up portrait of an owl eating a mouse", "owl"),
        ("the", "the"),
        ("A picture of", "of"),
    ],
)
def test_target_phrase_is_the_head_of_the_first_noun_phrase(caption, phrase):
    assert guess_target_phrase(caption) == phrase


# --- folders of views


@pytest.fixture
def views(tmp_path):
    """Two instances of four views each, and a category without a word."""
    for category, instance in (("teapot", "a"), ("7", "b")):
        for view in range(4):
            path = tmp_path / "mv" / category / instance / "images" / f"{view}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(hash_of(instance, view)))
    (tmp_path / "mv" / "categories.json").write_text('{"7": "toy car"}')
    return tmp_path / "mv"


def hash_of(instance, view) -> int:
    return ord(instance) * 10 + view


def test_reference_is_another_view_of_the_same_instance(views):
    """All other views of the instance occur, never the view itself nor another instance."""
    source = MultiviewSource(views, limits=LIMITS)
    assert len(source.sizes) == 8
    hashes = {content_hash(encoded(hash_of(i, v))).hex(): (i, v) for i in "ab" for v in range(4)}
    for number in range(8):
        drawn = [load(source, number, True, seed).content for seed in range(40)]
        (instance, view), *_ = {hashes[image] for image, _ in drawn}
        assert {hashes[reference] for _, reference in drawn} == {(instance, v) for v in range(4) if v != view}
        record = load(source, number)
        assert record.image is record.reference


def test_captions_of_views(views):
    """The category is the caption's subject; an instance's or a view's caption file has precedence."""
    source = MultiviewSource(views, limits=LIMITS)
    captions = {load(source, i).key: (load(source, i).caption, load(source, i).target_phrase) for i in range(8)}
    assert captions["mv:teapot/a/images/0.jpg"] == ("a photo of a teapot", "teapot")
    assert captions["mv:7/b/images/0.jpg"] == ("a photo of a toy car", "toy car")
    (views / "7" / "b" / "caption.txt").write_text("a red toy car on a table")
    (views / "7" / "b" / "images" / "2.json").write_text('{"caption": "wheels", "target_phrase": "wheels"}')
    captions = {load(source, i).key: (load(source, i).caption, load(source, i).target_phrase) for i in range(8)}
    assert captions["mv:7/b/images/1.jpg"] == ("a red toy car on a table", "toy car")
    assert captions["mv:7/b/images/2.jpg"] == ("wheels", "wheels")


@pytest.mark.parametrize("category", ["...", "\ud800"])
def test_category_that_is_not_a_word_is_counted(views, category):
    """Its views are broken when they are indexed, unless a caption file describes them."""
    (views / "categories.json").write_text(json.dumps({"7": category}))
    source = MultiviewSource(views, limits=LIMITS)
    assert len(source.sizes) == 4 and source.findings.counts["bad caption"] == 4
    (views / "7" / "b" / "caption.txt").write_text("a red toy car on a table")
    assert len(MultiviewSource(views, limits=LIMITS).sizes) == 8


def test_deeply_nested_categories_are_refused(views):
    (views / "categories.json").write_text(100_000 * "[")
    with pytest.raises(ValueError, match=r"categories\.json is not valid JSON"):
        MultiviewSource(views, limits=LIMITS)


def test_broken_views_are_counted(views, caplog):
    """At index time if the header is broken, otherwise when they are drawn, also as another view."""
    images = views / "teapot" / "a" / "images"
    (images / "0.jpg").write_bytes(b"nothing")
    (images / "1.jpg").write_bytes(encoded(hash_of("a", 1), (64, 64))[:-200])
    (images / "9.jpg").symlink_to(images / "2.jpg")
    (images / "5.jpg").write_bytes(single_color())
    lonely = views / "teapot" / "c" / "images"
    lonely.mkdir(parents=True)
    (lonely / "0.jpg").write_bytes(encoded(5))
    source = MultiviewSource(views, limits=LIMITS)
    assert source.findings.counts == {"broken image": 1, "link": 1, "no other view": 1}
    assert len(source.sizes) == 8
    list(batches(mixture(source, total=1), first_step=1, last_step=9))
    assert caplog.text.count("mv:teapot/a/images/1.jpg (truncated)") == 1
    assert caplog.text.count("mv:teapot/a/images/5.jpg (gray)") == 1
    assert "'truncated': 1, 'gray': 1" in caplog.text or "'gray': 1, 'truncated': 1" in caplog.text


def test_view_that_disappears_during_the_run_is_skipped(views):
    """Also one that is replaced by a link, which is not followed."""
    source = MultiviewSource(views, limits=LIMITS)
    numbers = {load(source, i).key.split("/", 1)[1]: i for i in range(8)}
    images = views / "teapot" / "a" / "images"
    (images / "0.jpg").unlink()
    (images / "1.jpg").unlink()
    (images / "1.jpg").symlink_to(images / "2.jpg")
    for name in ("a/images/0.jpg", "a/images/1.jpg"):
        with pytest.raises(BrokenRecord, match="changed"):
            load(source, numbers[name])
    record = load(source, numbers["a/images/2.jpg"], other_view=True)
    assert record.content[1] == content_hash(encoded(hash_of("a", 3))).hex()


def test_captions_of_views_are_checked_and_change_the_fingerprint(views):
    """Also one of equal length, or one that is added. A broken caption is found by the index, as in a shard."""
    seen = [MultiviewSource(views, limits=LIMITS).fingerprint]
    caption = views / "teapot" / "a" / "images" / "0.txt"
    for text in ("a red teapot", "a tan teapot"):
        caption.write_text(text)
        seen.append(MultiviewSource(views, limits=LIMITS).fingerprint)
    assert len(set(seen)) == 3
    caption.write_bytes(b"\xff\xfe")
    (views / "teapot" / "d" / "images").mkdir(parents=True)
    source = MultiviewSource(views, limits=LIMITS)
    assert len(source.sizes) == 7 and source.findings.counts == {"bad caption": 1, "no other view": 1}


def test_categories_that_are_numbers_are_warned_about(views, caplog):
    MultiviewSource(views, limits=LIMITS)
    assert "categories are numbers" not in caplog.text
    (views / "categories.json").unlink()
    MultiviewSource(views, limits=LIMITS)
    assert "1 categories are numbers, such as 7" in caplog.text


def test_names_of_instances_change_the_fingerprint(views):
    """Views of other instances, or of another category, are other records even if their images are the same."""
    first = MultiviewSource(views, limits=LIMITS).fingerprint
    (views / "teapot").rename(views / "kettle")
    assert MultiviewSource(views, limits=LIMITS).fingerprint != first


def test_views_are_indexed_again_after_a_change(views, monkeypatch):
    first = MultiviewSource(views, limits=LIMITS)
    with monkeypatch.context() as patch:
        patch.setattr("train.data.multiview.read_size", lambda _, name: pytest.fail(f"{name} was read again"))
        assert MultiviewSource(views, limits=LIMITS).fingerprint == first.fingerprint
    (views / "7" / "b" / "images" / "4.jpg").write_bytes(encoded(77))
    changed = MultiviewSource(views, limits=LIMITS)
    assert len(changed.sizes) == 9 and changed.fingerprint != first.fingerprint


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_views_is_an_error(tmp_path, exists):
    if exists:
        (tmp_path / "mv").mkdir()
    with pytest.raises(ValueError, match=r"mv .*CATEGORY/INSTANCE/images"):
        MultiviewSource(tmp_path / "mv")


# --- both


def test_curriculum_moves_from_shards_to_views(shards, views):
    """At S_cur = 0 all samples are of the text-image source, at S_total all are other views (Eq. 10-11)."""
    mixed = mixture(TextImageSource(shards, limits=LIMITS), MultiviewSource(views, limits=LIMITS), batch_size=4)
    names = {step: {(s.key.split(":")[0], s.other_view) for s in mixed.samples(step, range(4))} for step in (0, 4, 8)}
    assert names == {0: {("data", False)}, 4: {("data", False), ("mv", True)}, 8: {("mv", True)}}


def test_half_of_the_samples_are_mirrored_where_it_is_allowed(tmp_path):
    """Image and reference together; the crop is that of the mirrored image. A caption that names a side forbids it."""
    pixels = np.zeros((24, 40, 3), np.uint8) + np.arange(40, dtype=np.uint8)[:, None] * 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    files = {f"{i}.png": buffer.getvalue() for i in range(2)}
    path = write_shard(tmp_path / "a.tar", {**files, "0.txt": b"a dog", "1.txt": b"a dog on the left"})
    source = TextImageSource(path, limits=LIMITS, may_flip=True)
    mixed = mixture(source, batch_size=40, buckets=((24, 24),), total=1000)
    taken = mixed.samples(0, range(40))
    sides = [s for s in taken if s.key.endswith("1")]
    assert len(sides) == 20 and not any(s.flipped for s in sides)
    assert 4 < sum(s.flipped for s in taken) < 16
    for sample in taken:
        shown = pixels[:, ::-1] if sample.flipped else pixels
        top, left = sample.crop
        assert (sample.image == shown[top : top + 24, left : left + 24]).all()
        assert (sample.reference[0, 0, 0] > sample.reference[0, -1, 0]) == sample.flipped


@pytest.mark.parametrize("workers", [1, 2])
def test_sources_give_the_same_samples_in_workers(shards, views, workers):
    mixed = mixture(TextImageSource(shards, limits=LIMITS), MultiviewSource(views, limits=LIMITS), batch_size=3)

    def run(workers):
        taken = batches(mixed, first_step=2, last_step=7, workers=workers)
        return [(step, [(s.key, s.image.tobytes(), s.reference.tobytes()) for s in samples]) for step, samples in taken]

    assert run(workers) == run(0)
