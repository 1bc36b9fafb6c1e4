"""The sprite world: samples are determined by their index, and training never uses held-out instances."""

import numpy as np
import pytest

from train.data.sprite_world.renderer import draw_instances
from train.data.sprite_world.scenes import SCENES, draw_scene
from train.data.sprite_world.sprites import CATEGORIES, HELD_OUT, TRAINED, Instance
from train.data.sprite_world.world import SpriteWorld, make_reference, render_views
from train.mini.pool import SamplePool
from train.mini.render import RenderSamples, pack_caption, unpack_captions


def test_index_determines_the_sample():
    """Another world object gives the same image and caption for an index; another index gives another image."""
    one, again, other = SpriteWorld().sample(7), SpriteWorld().sample(7), SpriteWorld().sample(8)
    assert one.caption == again.caption and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()


# Index, caption, subjects, boxes and target phrases of pairs. Trained models depend on them: do not change them.
PAIRS = {
    ("train", 0, 1): ("a car on a wooden floor", [("car", 2885)], [(0, 30, 128, 128)], ("car",)),
    ("train", 0, 7): (
        "a photo of a rabbit and a car in the city",
        [("rabbit", 8784), ("car", 12888)],
        [(0, 44, 71, 118), (60, 49, 123, 91)],
        ("rabbit", "car"),
    ),
    ("held_out", 2, 2): (
        "a boot and a penguin at night under stars",
        [("boot", 1007505), ("penguin", 1015528)],
        [(0, 46, 74, 120), (61, 49, 128, 113)],
        ("boot",),
    ),
    ("held_out", 2, 7): (
        "a bear next to a dog in the city",
        [("bear", 1006711), ("dog", 1010419)],
        [(3, 39, 64, 99), (59, 41, 128, 110)],
        ("bear", "dog"),
    ),
}


@pytest.mark.parametrize("key", PAIRS)
def test_pairs_are_those_of_earlier_versions(key):
    """The random numbers of an index have not changed."""
    split, seed, index = key
    pair = SpriteWorld(seed, split).pair(index)
    subjects = [(s.category, s.number) for s in pair.sample.subjects]
    assert (pair.sample.caption, subjects, list(pair.sample.boxes), pair.target_phrases) == PAIRS[key]


def test_batch_contains_the_pairs_of_its_indices():
    """Images, references, captions, boxes and the subjects of the reference are those of the single pairs."""
    indices = [0, 1, 2, 7, 40]
    world, categories = SpriteWorld(), list(CATEGORIES)
    batch = world.plan_pairs(indices)
    images, references = render_views(batch.images), render_views(batch.references)
    for row, index in enumerate(indices):
        pair = world.pair(index)
        count = len(pair.sample.subjects)
        named = [categories[i] for i in batch.images.category[row, batch.in_reference[row]]]
        assert batch.captions[row] == pair.sample.caption
        assert batch.target_phrases[row] == pair.target_phrases and set(named) == set(pair.target_phrases)
        assert batch.images.number[row, :count].tolist() == [s.number for s in pair.sample.subjects]
        assert tuple(map(tuple, batch.images.boxes[row, :count].tolist())) == pair.sample.boxes
        assert images[row].tobytes() == pair.sample.image.tobytes()
        assert references[row].tobytes() == pair.reference.tobytes()
    samples = world.plan_samples(indices)
    assert samples.captions == [world.sample(i).caption for i in indices]
    assert (np.asarray(render_views(samples.images)[2]) == np.asarray(world.sample(2).image)).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_instances_differ_in_color_only(category):
    """Two instances of a category have the same outline and different colors."""
    one, other = map(np.asarray, draw_instances([Instance(category, number) for number in (1, 2)]))
    assert (one[..., 3] == other[..., 3]).all()
    assert np.abs(one[..., :3].astype(int) - other[..., :3])[one[..., 3] > 0].mean() > 5


def test_training_split_contains_no_held_out_instances():
    """The training split has no held-out instance or category; the held-out split has held-out numbers only."""
    for index in range(60):
        trained = SpriteWorld().sample(index).subjects
        assert all(not s.held_out and s.category in TRAINED for s in trained)
        assert all(s.number >= HELD_OUT for s in SpriteWorld(split="held_out").sample(index).subjects)


def test_caption_names_subjects_and_scene():
    """The caption names the subjects from left to right, and the scene unless `without_scene` applies."""
    counts = {1: 0, 2: 0}
    for index in range(200):
        sample = SpriteWorld().sample(index, without_scene=0.0)
        counts[len(sample.subjects)] += 1
        words = [sample.caption.split().index(s.category) for s in sample.subjects]
        assert words == sorted(words) and sample.scene in sample.caption
        assert [box[0] for box in sample.boxes] == sorted(box[0] for box in sample.boxes)
        assert all(0 <= left < right <= 128 and 0 <= top < bottom <= 128 for left, top, right, bottom in sample.boxes)
    assert 0.15 < counts[2] / 200 < 0.4


def test_article_before_a_vowel_is_an():
    captions = [SpriteWorld().sample(i, two_subjects=0.0, categories=("owl",)).caption for i in range(30)]
    assert any("an owl" in caption for caption in captions) and not any("a owl" in caption for caption in captions)


def test_pair_shows_another_view():
    """The reference differs from the sample's image, and the caption contains the target phrases."""
    for index in range(20):
        pair = SpriteWorld().pair(index)
        assert pair.reference.tobytes() != pair.sample.image.tobytes()
        assert all(phrase in pair.sample.caption.split() for phrase in pair.target_phrases)


def test_references_of_two_subjects_have_random_order():
    """The half of the reference that matches the colors of the sample's left subject is on either side."""
    left = []
    for index in range(80):
        pair = SpriteWorld().pair(index, two_subjects=1.0)
        if len(pair.target_phrases) == 2:
            reference = np.asarray(pair.reference, float)
            halves = [half.mean((0, 1)) for half in (reference[:, :64], reference[:, 64:])]
            own = [_mean_color(subject, plain=reference[0, 0]) for subject in pair.sample.subjects]
            left.append(np.abs(np.subtract(halves, own)).sum() < np.abs(np.subtract(halves, own[::-1])).sum())
    assert len(left) > 20 and 0.2 < np.mean(left) < 0.8


def _mean_color(subject: Instance, plain: np.ndarray) -> np.ndarray:
    sprite = np.asarray(draw_instances([subject])[0], float)
    alpha = sprite[..., 3:] / 255
    return (sprite[..., :3] * alpha + plain * (1 - alpha)).mean((0, 1))


@pytest.mark.parametrize("scene", SCENES)
def test_scene_variants_differ(scene):
    assert draw_scene(scene, 0).size == (128, 128)
    assert draw_scene(scene, 0).tobytes() != draw_scene(scene, 1).tobytes()


def test_reference_has_the_size_of_a_sample():
    rng = np.random.default_rng(0)
    (image,) = render_views([make_reference(rng, (Instance("house", 3),))])
    assert image.size == (128, 128)


def test_unpacking_restores_the_caption():
    assert unpack_captions(pack_caption("an owl and a café")[None]) == ["an owl and a café"]


def test_pool_contents_depend_on_the_step_only(tmp_path):
    """A pool that starts at a step equals one that has run up to it, whose ring buffer has wrapped around."""
    options = dict(start=6, capacity=8, per_step=2)
    fields = {"pixels": ((3, 32, 32), "uint8"), "caption": ((96,), "uint8"), "subject_bits": ((8, 8), "uint8")}
    render, draws = RenderSamples(size=32), np.array([0.0, 0.3, 0.99])
    running = SamplePool(tmp_path / "a", fields, render, **options)
    for step in range(4):
        running.refresh(step)
    started = SamplePool(tmp_path / "b", fields, render, **options)
    started.refresh(3)
    for name in fields:
        assert (running.batch(3, draws)[name] == started.batch(3, draws)[name]).all()
        assert (running.groups(3, draws, 2)[name] == started.groups(3, draws, 2)[name]).all()
