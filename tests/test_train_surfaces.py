"""Correspondences between views of the sprite world."""

import numpy as np
import pytest
import torch

from train.data.sprite_world.renderer import cpu_renderer
from train.data.sprite_world.sprites import CATEGORIES, load_sprite
from train.data.sprite_world.surfaces import crop_homography, homographies, positions_on_subjects
from train.mini.views import ViewMixture, render_view_batch


@pytest.fixture(scope="module")
def batch():
    return ViewMixture(32).samples(1, range(32))


def test_corresponding_positions_have_the_same_color(batch):
    """In another pose, the pixel at the same position on the subject has the same color: at least four times as close
    as that of another position on the subject."""
    views = render_view_batch(batch, cpu_renderer())
    positions, shown = positions_on_subjects(views.homographies, 128)
    categories = batch.views.category.reshape(2, 32, 2)
    generator = np.random.default_rng(0)
    differences = []
    for row in np.flatnonzero((categories[:, :, 1] < 0).all(0)):  # the instance alone in both views
        other = row + 32
        alpha = torch.from_numpy(load_sprite(list(CATEGORIES)[categories[0, row, 0]]).alpha[..., 0])
        x, y = (positions[row, 0].clamp(0, 0.999) * torch.tensor(alpha.shape[::-1])).long().T
        here = (shown[row, 0] & (alpha[y, x] == 1)).nonzero()[::7, 0]
        there = shown[other, 0].nonzero()[:, 0]
        distance = torch.cdist(positions[row, 0, here], positions[other, 0, there])
        near = distance.amin(1) < 0.02
        matches = there[distance.argmin(1)[near]]
        colors = views.images[row].flatten(1)[:, here[near]]
        for found in (matches, torch.from_numpy(generator.permutation(matches.numpy()))):
            differences.append((views.images[other].flatten(1)[:, found] - colors).abs().mean().item())
    same, different = np.array(differences).reshape(-1, 2).mean(0)
    assert len(differences) >= 8 and 4 * same < different


def test_subjects_lie_in_their_boxes(batch):
    """The cells that show a subject fill its box without leaving it; an empty slot is shown nowhere."""
    shown = positions_on_subjects(homographies(batch.views, "cpu"), 128)[1]
    for row, slot in zip(*np.nonzero(batch.views.category >= 0)):
        y, x = shown[row, slot].view(128, 128).nonzero().T
        left, top, right, bottom = batch.views.boxes[row, slot].tolist()
        found = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
        assert left <= found[0] and top <= found[1] and found[2] <= right and found[3] <= bottom
        assert found == pytest.approx([left, top, right, bottom], abs=3)
    assert not shown[torch.from_numpy(batch.views.category < 0)].any()


def test_positions_in_a_crop_are_those_of_the_image(batch):
    """The left half of an image has the same positions on the subjects as the image itself."""
    whole = homographies(batch.views, "cpu")
    half = whole @ crop_homography(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    positions, shown = positions_on_subjects(whole, 16)
    narrow, narrow_shown = positions_on_subjects(half @ torch.diag(torch.tensor([2.0, 1, 1])), 16)
    assert torch.equal(shown, narrow_shown) and torch.allclose(positions[shown], narrow[shown], atol=1e-4)
