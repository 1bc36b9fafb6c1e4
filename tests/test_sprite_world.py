"""The sprite world: endless, seeded, and honest about what is held out."""

from functools import partial

import numpy as np
import pytest

from train.data.pool import SamplePool
from train.data.render import RenderPairs, RenderSamples, pack_caption, unpack_captions
from train.data.scenes import SCENES, draw_scene
from train.data.sprite_world import SpriteWorld, make_reference
from train.data.sprites import CATEGORIES, HELD_OUT, TRAINED, Instance, draw_instance


def test_index_decides_sample():
    """The same index gives the same image and words in another world object; another index gives another image."""
    one, again, other = SpriteWorld().sample(7), SpriteWorld().sample(7), SpriteWorld().sample(8)
    assert one.caption == again.caption and one.picture.tobytes() == again.picture.tobytes()
    assert one.picture.tobytes() != other.picture.tobytes()


@pytest.mark.parametrize("category", CATEGORIES)
def test_instances_differ(category):
    """Two individuals of a category share their outline and differ in colors."""
    one, other = (np.asarray(draw_instance(Instance(category, number))) for number in (1, 2))
    assert (one[..., 3] == other[..., 3]).all()
    assert np.abs(one[..., :3].astype(int) - other[..., :3])[one[..., 3] > 0].mean() > 5


def test_held_out_instances_never_train():
    """The training split draws no held-out individual and no held-out category, the held-out split only such
    numbers."""
    for index in range(60):
        trained = SpriteWorld().sample(index).subjects
        assert all(not s.held_out and s.category in TRAINED for s in trained)
        assert all(s.number >= HELD_OUT for s in SpriteWorld(split="held_out").sample(index).subjects)


def test_caption_names_what_is_seen():
    """Every subject is named, in the order of their places; the scene is named unless left out on purpose."""
    counts = {1: 0, 2: 0}
    for index in range(200):
        sample = SpriteWorld().sample(index, without_scene=0.0)
        counts[len(sample.subjects)] += 1
        places = [sample.caption.split().index(s.category) for s in sample.subjects]
        assert places == sorted(places) and sample.scene in sample.caption
        assert [box[0] for box in sample.boxes] == sorted(box[0] for box in sample.boxes)
        assert all(0 <= left < right <= 128 and 0 <= top < bottom <= 128 for left, top, right, bottom in sample.boxes)
    assert 0.15 < counts[2] / 200 < 0.4


def test_article_before_a_vowel():
    captions = [SpriteWorld().sample(i, two_subjects=0.0, categories=("owl",)).caption for i in range(30)]
    assert any("an owl" in caption for caption in captions) and not any("a owl" in caption for caption in captions)


def test_pair_shows_another_view():
    """The reference is not the sample's image, and its phrases occur in the caption."""
    for index in range(20):
        pair = SpriteWorld().pair(index)
        assert pair.reference.tobytes() != pair.sample.picture.tobytes()
        assert all(phrase in pair.sample.caption.split() for phrase in pair.target_phrases)


def test_references_of_two_show_them_in_either_order():
    """Told by colors: which half of the reference is nearer to the left subject of the sample."""
    left = []
    for index in range(80):
        pair = SpriteWorld().pair(index, two_subjects=1.0)
        if len(pair.target_phrases) == 2:
            reference = np.asarray(pair.reference, float)
            halves = [half.mean((0, 1)) for half in (reference[:, :64], reference[:, 64:])]
            own = [_mean_colour(subject, plain=reference[0, 0]) for subject in pair.sample.subjects]
            left.append(np.abs(np.subtract(halves, own)).sum() < np.abs(np.subtract(halves, own[::-1])).sum())
    assert len(left) > 20 and 0.2 < np.mean(left) < 0.8


def _mean_colour(subject: Instance, plain: np.ndarray) -> np.ndarray:
    sprite = np.asarray(draw_instance(subject).convert("RGBA"), float)
    alpha = sprite[..., 3:] / 255
    return (sprite[..., :3] * alpha + plain * (1 - alpha)).mean((0, 1))


@pytest.mark.parametrize("scene", SCENES)
def test_scene_variants_differ(scene):
    assert draw_scene(scene, 0).size == (128, 128)
    assert draw_scene(scene, 0).tobytes() != draw_scene(scene, 1).tobytes()


def test_reference_fits_the_image():
    rng = np.random.default_rng(0)
    assert make_reference(rng, (Instance("house", 3),)).size == (128, 128)


def test_caption_survives_packing():
    assert unpack_captions(pack_caption("an owl and a café")[None]) == ["an owl and a café"]


def test_curriculum_begins_with_the_image_itself():
    """At progress 0 the reference is the image; past the end it is another view."""
    first = RenderPairs(curriculum=1000)([0])
    late = RenderPairs(curriculum=1)([5])
    assert (first["reference"] == first["pixels"]).all() and (late["reference"] != late["pixels"]).any()


def test_pool_is_the_same_after_a_restart(tmp_path):
    """What a pool holds at a step follows from the step: a new object fills in just what is missing."""
    options = dict(start=6, capacity=8, per_step=2)
    fields = {"pixels": ((3, 32, 32), "uint8"), "caption": ((96,), "uint8"), "where": ((8, 8), "uint8")}
    render, draws = RenderSamples(size=32), np.array([0.0, 0.3, 0.99])
    unbroken = SamplePool(tmp_path / "a", fields, render, **options)
    unbroken._store(range(6), render(range(6)))
    for step in range(4):
        unbroken.refresh(step)
    resumed = SamplePool(tmp_path / "b", fields, render, **options)
    resumed._store(range(4, 12), render(range(4, 12)))
    resumed.refresh(3)  # nothing is missing
    for name in fields:
        assert (unbroken.batch(3, draws)[name] == resumed.batch(3, draws)[name]).all()
        assert (unbroken.groups(3, draws, 2)[name] == resumed.groups(3, draws, 2)[name]).all()


def test_a_pool_with_a_new_field_begins_anew(tmp_path):
    """Entries written before a field existed are made again: none is left with zeros in it."""
    fields = {"a": ((), "int64")}
    SamplePool(tmp_path, fields, partial(_ones, names="a"), start=4, capacity=8, per_step=1).refresh(0)
    fields["b"] = ((), "int64")
    pool = SamplePool(tmp_path, fields, partial(_ones, names="ab"), start=4, capacity=8, per_step=1)
    pool.refresh(0)
    assert (pool.batch(0, np.arange(4) / 4)["b"] == 1).all()


def test_a_pool_whose_files_are_gone_is_whole_again(tmp_path):
    """In mid-run (here a warm start at step 100) nothing that a batch can draw is empty; workers make it."""
    pool = SamplePool(tmp_path, {"a": ((), "int64")}, partial(_ones, names="a"), start=4, capacity=150, per_step=1)
    pool.refresh(100)
    assert len(drawn := pool.batch(100, np.arange(104) / 104)["a"]) == 104 and (drawn == 1).all()


def _ones(indices, names):
    return {name: np.ones(len(indices), np.int64) for name in names}
