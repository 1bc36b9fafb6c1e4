"""Training batches of the sprite world: drawn as numbers, rendered on the device, and the same for any process."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from train.curriculum import Curriculum
from train.data.loader import batches, count_other_views, count_skipped
from train.data.mixture import Mixture
from train.data.sprite_world.batches import SpriteMixture
from train.data.sprite_world.rendered import BatchRenderer
from train.data.sprite_world.source import SpriteSource
from train.data.sprite_world.views import pack_views
from train.images import to_signed
from train.mini.latent_samples import LatentStream
from train.mini.render import RenderSamples, unpack_captions

CPU = torch.device("cpu")
BATCH = 24
CURRICULUM = Curriculum(total_steps=100, r_max=1.6)


def mixture(**changes) -> SpriteMixture:
    return SpriteMixture(SpriteSource(), **{"batch_size": BATCH, "seed": 5, "curriculum": CURRICULUM, **changes})


@pytest.fixture(scope="module")
def rendered():
    """A step near the end of the curriculum, with and without pixels."""
    batch = mixture().samples(99, range(BATCH))
    return batch, BatchRenderer(128, 64, CPU)(batch)


def test_a_part_of_a_batch_is_the_same_as_in_the_whole(rendered):
    """Any process gets the same pixels for its positions, also after pickling, and as a slice of a batch."""
    whole, pixels = rendered
    part = pickle.loads(pickle.dumps(mixture().samples(99, range(5, 9))))
    for some in (part, whole[5:9]):
        own = BatchRenderer(128, 64, CPU)(some)
        assert len(some) == 4 and own.captions == pixels.captions[5:9]
        for name in ("images", "references", "inside"):
            assert torch.equal(getattr(own, name), getattr(pixels, name)[5:9]), name


def test_images_and_masks_are_those_of_the_world(rendered):
    """Images and captions are those of the pairs by number; masks are 1 in the boxes of the subjects in the reference
    pair, as in the records of the source."""
    batch, pixels = rendered
    for row, number in enumerate(batch.numbers[:8].tolist()):
        record = SpriteSource().load(number, True, np.random.default_rng(0))
        assert (pixels.images[row].mul(255).round().permute(1, 2, 0).byte().numpy() == np.asarray(record.image)).all()
        assert (pixels.inside[row].numpy() == np.asarray(record.masks["inside"])).all()
        assert pixels.captions[row] == record.caption


def test_references_follow_the_curriculum():
    """The share of other views is the curriculum's at every step; without one, the reference is the image itself."""
    for step in (0, 30, 60, 99):
        share = np.mean([count_other_views(mixture(seed=seed).samples(step, range(BATCH))) for seed in range(8)])
        assert share / BATCH == pytest.approx(CURRICULUM.other_view_probability(step), abs=0.5 / BATCH)
    batch = mixture(curriculum=Curriculum(total_steps=100, r_max=1.0)).samples(0, range(BATCH))
    pixels = BatchRenderer(128, 128, CPU)(batch)
    same = ~torch.from_numpy(batch.other_view)
    assert same.any() and torch.allclose(pixels.images[same], pixels.references[same], atol=1e-4)
    assert count_skipped(batch).total() == 0


def test_crops_agree_with_those_of_images_on_disk():
    """For the same crops, the references agree with those of `Mixture`, which crops with Pillow's bicubic filter."""
    options = dict(batch_size=BATCH, seed=5, curriculum=CURRICULUM)
    on_disk = Mixture([SpriteSource()], buckets=((128, 128),), reference_size=128, **options)
    samples = on_disk.samples(99, range(BATCH))
    pairs = [SpriteSource().world.pair(int(sample.key.rpartition(":")[2])) for sample in samples]
    views = [p.reference_view if s.other_view else p.sample.view for p, s in zip(pairs, samples)]
    boxes = np.array([sample.reference_box for sample in samples], np.float32)
    assert ((boxes[:, 2] - boxes[:, 0]) < 0.9).any()

    batch = replace(mixture().samples(99, range(BATCH)), references=pack_views(views), reference_boxes=boxes)
    ours = BatchRenderer(128, 128, CPU)(batch).references * 255
    theirs = torch.from_numpy(np.stack([sample.reference for sample in samples])).permute(0, 3, 1, 2)
    assert (ours - theirs).abs().mean() < 1.0


def test_workers_draw_the_same_batches():
    expected = [batch for _, batch in batches(mixture(), first_step=3, last_step=6)]
    found = [batch for _, batch in batches(mixture(), first_step=3, last_step=6, workers=2)]
    for one, other in zip(expected, found, strict=True):
        assert one.captions == other.captions and (one.images.coefficients == other.images.coefficients).all()


class Pixels:
    """Stands in for the autoencoder: latents are every fourth pixel."""

    device = "cpu"

    def encode(self, pixels):
        return pixels[..., ::4, ::4]


@pytest.mark.parametrize("size", [128, 64])
def test_stream_gives_the_samples_of_the_pool(size):
    """A step of the stream has the images, captions and subject maps that `RenderSamples` gives for its numbers."""
    stream = LatentStream(Pixels(), batch_size=6, workers=0)  # type: ignore[arg-type]
    batch = stream.batch(4, size, 4, torch.Generator())
    stream.close()
    expected = RenderSamples(size=size)(range(24, 30))
    assert batch.captions == unpack_captions(expected["caption"])
    bits = torch.from_numpy(expected["subject_bits"])
    assert torch.equal(batch.subjects, torch.stack([bits & 1, bits >> 1], 1).float())
    assert torch.allclose(batch.latents, to_signed(expected["pixels"])[..., ::4, ::4], atol=2 / 127.5)
