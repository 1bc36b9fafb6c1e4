"""Order and plan: permutations in constant memory, and the plan of a step as a pure function of (seed, step)."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.order import derive_key, permute, record_of_draw, uniforms
from train.data.plan import BLOCK, Plan
from train.data.transforms import aspect_buckets, crop_reference, fit, nearest_bucket, reference_box, resize_and_crop

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 300), KEYS)
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(st.integers(10, 10**12), KEYS, st.data())
@settings(max_examples=60, deadline=None)
def test_permutation_of_a_large_set_has_no_collisions(size, key, data):
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=2, max_size=20))
    images = {permute(index, size, key) for index in indices}
    assert len(images) == len(indices) and all(0 <= image < size for image in images)


@given(st.integers(8, 500), KEYS)
@settings(max_examples=40, deadline=None)
def test_epochs_have_different_orders(size, seed):
    """Each epoch has all records; two epochs have them in different orders."""
    orders = [[record_of_draw(epoch * size + i, size, seed) for i in range(size)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(size)) and orders[0] != orders[1]


def test_permutations_look_random():
    """Over 2000 keys, each number of 10 comes to each place about equally often, and neighbors are uncorrelated."""
    images = np.array([[permute(index, 10, derive_key(key)) for index in range(10)] for key in range(2000)])
    counts = np.stack([np.bincount(images[:, place], minlength=10) for place in range(10)])
    assert counts.min() > 140 and counts.max() < 260
    large = np.array([permute(index, 10_000, 5) for index in range(10_000)])
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.03


def test_order_is_the_same_on_every_machine():
    """Recorded values: a change here changes the data of every run that is resumed."""
    assert [permute(index, 1000, derive_key(0, "a")) for index in range(5)] == PERMUTED
    assert (uniforms(7, np.arange(3)) * 2**32).astype(int).tolist() == UNIFORM


PERMUTED, UNIFORM = [887, 955, 709, 562, 557], [313405475, 1674306020, 72105175]


def plan(weights=(1.0,), shares=((1.0,),), sources=(0,), batch_size=8, seed=3) -> Plan:
    return Plan(
        lambda steps: np.tile(weights, (len(steps), 1)), np.array(shares), sources, batch_size=batch_size, seed=seed
    )


def test_step_does_not_depend_on_the_steps_before():
    """A plan that is asked for step 5000 first equals one that was asked for all steps up to it."""
    options = dict(weights=(0.3, 0.7), shares=((0.5, 0.5), (0.2, 0.8)), sources=(0, 1))
    asked = plan(**options)
    sequence = [(asked.bucket(step), asked.draws(step)) for step in range(5001)]
    fresh = plan(**options)
    for step in (5000, BLOCK, BLOCK - 1, 0, 4321):
        assert (fresh.bucket(step), fresh.draws(step)) == sequence[step]


def test_each_source_counts_its_draws_per_bucket():
    """Streams of one source share its numbers: over the steps of a bucket, they are 0, 1, 2, ... without a gap."""
    made = plan(weights=(0.2, 0.3, 0.5), shares=((0.5, 0.5), (0.5, 0.5), (0.1, 0.9)), sources=(0, 0, 1))
    numbers = {}
    for step in range(2 * BLOCK + 100):
        draws = made.draws(step)
        assert len(draws) == 8
        for draw in draws:
            numbers.setdefault((draw.stream // 2, made.bucket(step)), []).append(draw.number)
    assert len(numbers) == 4
    for drawn in numbers.values():
        assert sorted(drawn) == list(range(len(drawn)))


def test_shares_of_streams_and_buckets_are_exact_on_average():
    """Stream 1 has 60% of the draws, 90% of them in bucket 1; stream 0 is evenly divided."""
    made = plan(weights=(0.4, 0.6), shares=((0.5, 0.5), (0.1, 0.9)), sources=(0, 1))
    counts = np.zeros((2, 2))
    for step in range(4000):
        for draw in made.draws(step):
            counts[draw.stream, made.bucket(step)] += 1
    assert np.abs(counts / counts.sum() - [[0.2, 0.2], [0.06, 0.54]]).max() < 0.015


def test_positions_of_streams_are_mixed():
    """Every position of the batch, and thus every rank, draws from both streams."""
    made = plan(weights=(0.5, 0.5), shares=((1.0,), (1.0,)), sources=(0, 1))
    streams = np.array([[draw.stream for draw in made.draws(step)] for step in range(200)])
    assert streams.mean(0).min() > 0.3 and streams.mean(0).max() < 0.7


def test_plan_of_a_late_step_is_fast():
    """Resuming at step 100,000 needs the sums of 98 blocks, which takes less than a second."""
    start = time.perf_counter()
    plan(weights=(0.4, 0.6), shares=((0.5, 0.5), (0.1, 0.9)), sources=(0, 1)).draws(100_000)
    assert time.perf_counter() - start < 3


# --- transforms


def test_aspect_buckets_have_the_area_of_the_resolution():
    buckets = aspect_buckets(1024)
    assert (1024, 1024) in buckets and (1152, 896) in buckets and (1344, 768) in buckets
    for height, width in buckets:
        assert height % 64 == width % 64 == 0 and 0.85 < height * width / 1024**2 <= 1
        assert max(height, width) / min(height, width) <= 2
    assert {size[::-1] for size in buckets} == set(buckets)
    with pytest.raises(ValueError, match=r"resolution is 500.*for example 512"):
        aspect_buckets(500)


@given(st.integers(16, 500), st.integers(16, 500))
@settings(max_examples=60, deadline=None)
def test_nearest_bucket_crops_least(height, width):
    """No other bucket keeps a larger part of the image."""
    buckets = aspect_buckets(512)

    def kept(bucket):
        scale = max(bucket[0] / height, bucket[1] / width)
        return bucket[0] * bucket[1] / (height * width * scale**2)

    (number,) = nearest_bucket(np.array([[height, width]]), buckets)
    assert kept(buckets[number]) >= max(map(kept, buckets)) - 1e-9


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from([(16, 16), (8, 24), (24, 8)]),
    st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    st.sampled_from(["center", "random"]),
)
@settings(max_examples=80, deadline=None)
def test_crop_lies_inside_the_resized_image(size, bucket, draws, mode):
    """The image covers the bucket and one side fits exactly; the result has the bucket's size."""
    resized, crop = fit(size, bucket, mode, draws)
    free = [side - limit for side, limit in zip(resized, bucket)]
    assert min(free) == 0 and all(0 <= start <= room for start, room in zip(crop, free))
    image = Image.fromarray(np.zeros((*size, 3), np.uint8))
    assert resize_and_crop(image, bucket, resized, crop).shape == (*bucket, 3)


def test_crop_shows_the_right_part():
    """Without resizing, the crop is a slice of the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    resized, (top, left) = fit((16, 40), (16, 16), "random", (0.5, 0.5))
    assert (resized, top, left) == ((16, 40), 0, 12)
    assert (resize_and_crop(Image.fromarray(pixels), (16, 16), resized, (top, left)) == pixels[:, 12:28]).all()


@given(st.floats(1, 10**0.5), st.floats(0, 0.999), st.floats(0, 0.999))
@settings(max_examples=80, deadline=None)
def test_reference_crop_has_the_area_of_the_resize_ratio(ratio, down, right):
    """The crop after resizing by r shows 1 / r^2 of the area, at least 10% with r_max = sqrt(10) (Eq. 12-13)."""
    left, top, box_right, bottom = reference_box(ratio, down, right)
    assert 0 <= left < box_right <= 1 and 0 <= top < bottom <= 1
    assert (box_right - left) * (bottom - top) == pytest.approx(1 / ratio**2) and 1 / ratio**2 > 0.0999


def test_reference_crop_equals_resizing_and_cropping():
    """A crop of s px after resizing to (s * r)^2 px, as the paper describes it, up to the rounding of the resize."""
    y, x = np.mgrid[:120, :120] / 12
    image = Image.fromarray(np.uint8(127 + 120 * np.sin(y)[..., None] * np.cos(x)[..., None] * [1, 0.5, -1]))
    resized = np.asarray(image.resize((192, 192), Image.Resampling.BICUBIC))[24:120, 48:144]
    ours = crop_reference(image, reference_box(2.0, 24 / 96, 48 / 96), 96)
    assert np.abs(ours.astype(int) - resized).mean() < 1
