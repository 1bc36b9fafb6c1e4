"""The renderer of the sprite world agrees with Pillow, and an image does not depend on what is rendered with it."""

import colorsys
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.sprite_world.renderer import Renderer, cpu_renderer, draw_instances
from train.data.sprite_world.scenes import NUM_VARIANTS, SCENES, draw_scene
from train.data.sprite_world.sprites import CATEGORIES, Instance, load_sprite
from train.data.sprite_world.views import View, pack_views
from train.data.sprite_world.world import SpriteWorld

NUM_PAIRS = 24


@pytest.fixture(scope="module")
def views() -> list[View]:
    """Images and references of pairs: one or two subjects, in scenes and on single colors."""
    pairs = [SpriteWorld(seed=5).pair(i) for i in range(NUM_PAIRS)]
    return [p.sample.view for p in pairs] + [p.reference_view for p in pairs] + [_original(pairs[0].reference_view)]


def _original(view: View) -> View:
    return view._replace(subjects=tuple(Instance(subject.category, 0) for subject in view.subjects))


def test_images_agree_with_pillow(views):
    """Pillow draws the same images from the same random numbers, up to 3 levels at edges and 0.1 on average."""
    rendered = cpu_renderer().render(pack_views(views)).permute(0, 2, 3, 1).numpy().astype(int)
    for image, view in zip(rendered, views, strict=True):
        difference = np.abs(image - _draw_view(view))
        assert difference.max() <= 3 and difference.mean() < 0.1
        assert (difference > 1).mean() < 0.01


@pytest.mark.parametrize("number", [0, 1, 2, 3, 1_000_001])
def test_instances_agree_with_numpy(number):
    """The upright sprites have the colors and the pattern that the generator of their number draws."""
    instances = [Instance(category, number) for category in CATEGORIES]
    for instance, sprite in zip(instances, draw_instances(instances), strict=True):
        expected = _draw_instance(instance)
        assert sprite.size == expected.size
        assert np.abs(np.asarray(sprite).astype(int) - np.asarray(expected)).max() <= 1


def test_image_does_not_depend_on_the_batch(views):
    """An image is the same bit for bit alone, in a batch, in another order, and from a static renderer."""
    packed, renderer = pack_views(views), Renderer()
    images = renderer.render(packed)
    assert torch.equal(torch.cat([renderer.render(pack_views([view])) for view in views]), images)
    order = np.random.default_rng(0).permutation(len(views))
    assert torch.equal(renderer.render(packed[order]), images[torch.from_numpy(order)])
    assert torch.equal(Renderer(static=True).render(packed), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_renders_the_images_of_the_cpu(views):
    """Both differ by at most one level, in less than a thousandth of the values."""
    packed = pack_views(views)
    difference = (Renderer("cuda").render(packed).cpu().int() - Renderer().render(packed).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_no_views_give_no_images():
    assert cpu_renderer().render(pack_views([])).shape == (0, 3, 128, 128)


def test_packed_views_can_be_sent_and_sliced(views):
    """A slice equals the packed slice, pickling changes nothing, and 1,000 pairs take well below 1 MB."""
    packed = pack_views(views)
    part, sent = pack_views(views[3:9]), pickle.loads(pickle.dumps(packed))
    assert len(packed) == len(sent) == len(views) and len(packed[3:9]) == len(part) == 6
    for name in vars(packed):
        assert np.array_equal(getattr(packed[3:9], name), getattr(part, name)), name
        assert np.array_equal(getattr(sent, name), getattr(packed, name)), name
    assert len(pickle.dumps(SpriteWorld().plan_pairs(range(100)))) < 70_000


# What the renderer does for many views at once, for one view with Pillow and NumPy.


class _Draws:
    """Draws from the uniform numbers of a view in their order."""

    def __init__(self, draws: tuple[float, ...]) -> None:
        self._remaining = iter(draws)

    def random(self) -> float:
        return next(self._remaining)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()


def _draw_view(view: View) -> np.ndarray:
    """uint8 [128, 128, 3]."""
    background = view.background
    if background.variant < 0:
        image = Image.new("RGB", (128, 128), background.color)
    else:
        image = draw_scene(SCENES[background.variant // NUM_VARIANTS], background.variant % NUM_VARIANTS)
        if background.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    draws = _Draws(view.draws)
    for i, subject in enumerate(view.subjects):
        sprite = _draw_instance(subject)
        if len(view.subjects) == 1:
            height = draws.uniform(0.72, 0.92) if view.large else draws.uniform(0.5, 0.8)
            margin = 0.5 - height / 2
            x, y = 0.5 + draws.uniform(-margin, margin) * 0.9, 0.5 + margin * draws.uniform(-0.2, 0.8)
            max_width = 0.95
        else:
            height, max_width = draws.uniform(0.42, 0.56), 0.46
            x, y = (0.27, 0.73)[i] + draws.uniform(-0.03, 0.03), draws.uniform(0.5, 0.68)
        corners = _corners(draws, sprite, height * 128, max_width * 128)
        _paste(image, sprite, corners + np.array([x * 128, y * 128]))
    return np.asarray(image)


def _corners(draws: _Draws, sprite: Image.Image, height: float, max_width: float) -> np.ndarray:
    scale = height / sprite.height * np.array([draws.uniform(0.88, 1.14), 1.0])
    scale *= min(1.0, max_width / (sprite.width * scale[0]))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(sprite.size) / 2 * scale
    corners *= [[1 + draws.uniform(-0.07, 0.07) for _ in range(2)] for _ in range(4)]
    angle = draws.uniform(-0.35, 0.35)
    corners = corners @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return corners * (-1 if draws.random() < 0.5 else 1, 1)


def _paste(image: Image.Image, sprite: Image.Image, corners: np.ndarray) -> None:
    width, height = sprite.size
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (width, 0), (width, height), (0, height))):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows), np.array(values, float)).tolist()
    view = sprite.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    image.paste(view, (0, 0), view)


def _random_color(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.random(), rng.uniform(0.25, 0.95), rng.uniform(0.45, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    pattern = rng.choice(("none", "stripes", "spots"), p=(0.4, 0.35, 0.25))
    if pattern == "none":
        return np.zeros((1, 1, 1))
    y, x = np.mgrid[:height, :width]
    period, angle = rng.uniform(14, 26), rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if pattern == "stripes":
        wave = np.sin(along * (2 * np.pi / period)) - rng.uniform(-0.2, 0.4)
        return np.clip(wave * 3 + 0.5, 0, 1)[..., None]
    half = period / 2
    distance = np.hypot(along % period - half, across % period - half)
    return np.clip(period * rng.uniform(0.24, 0.36) - distance + 0.5, 0, 1)[..., None]


@cache
def _draw_instance(instance: Instance) -> Image.Image:
    """RGBA."""
    sprite = load_sprite(instance.category)

    def tint(region: int, target: np.ndarray) -> np.ndarray:
        return sprite.shade[region] * (target + (1 - target) * sprite.highlight[region])

    color = sprite.color
    if instance.number:
        rng = np.random.default_rng((list(CATEGORIES).index(instance.category), instance.number))
        painted = np.zeros(color.shape)
        for i, region in enumerate(sprite.regions):
            target, strength = _random_color(rng), rng.uniform(0.75, 0.95)
            if i and rng.random() < 0.5:
                strength = 0.0
            painted += region * (color * (1 - strength) + tint(i, target) * strength)
        amount, second = _pattern(rng, *color.shape[:2]) * sprite.regions[0] * 0.85, _random_color(rng)
        painted = painted * (1 - amount) + tint(0, second) * amount
        color = painted * (1 - sprite.keep) + color * sprite.keep
    return Image.fromarray((np.concatenate([color, sprite.alpha], axis=-1) * 255 + 0.5).astype(np.uint8))
