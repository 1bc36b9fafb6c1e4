"""Guidance masks: selection, normalization and Algorithm 1, each against its definition."""

import pytest
import torch
import torch.nn.functional as F

from realcustom import MethodConfig
from realcustom.mask import (
    guidance_masks,
    resize_by_height,
    resize_map,
    round_robin_top_k,
    top_k_mask,
)
from realcustom.recorder import attention_times, recorded_levels
from realcustom.visual_attention import LayerVision, SparseMask

PAPER = MethodConfig()


def relevance(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio,kept", [(0.25, 16), (0.2, 12), (1.0, 64), (0.001, 1)])
def test_scope_keeps_the_floor_of_its_share_and_the_best(ratio, kept):
    values = relevance(8, 8)
    marked = top_k_mask(values, ratio)
    assert marked.sum() == kept
    assert values[marked].min() >= values[~marked].max() if kept < 64 else True


def test_a_mask_is_soft_and_its_maximum_is_one():
    mask = guidance_masks(relevance(1, 8, 8), [0.25], PAPER)
    assert mask.max() == pytest.approx(1, abs=1e-4)
    assert 0 < mask[mask > 0].min() < 1
    assert (mask > 0).sum() == 16


def test_a_scope_of_one_cuts_nothing():
    values = relevance(1, 8, 8) + 0.1
    assert torch.allclose(guidance_masks(values, [1.0], PAPER), values / values.max(), atol=1e-5)


def algorithm_1(values, ratios):
    """The algorithm as printed: take turns, search the best free position, mark it."""
    values, count = values.flatten(1).clone(), values[0].numel()
    wanted = [int(r * count) for r in ratios]
    current = [0] * len(wanted)
    flag = torch.zeros(count, dtype=torch.bool)
    picked = torch.zeros_like(values, dtype=torch.bool)
    while any(c < w for c, w in zip(current, wanted)):
        for j in range(len(wanted)):
            if current[j] < wanted[j]:
                values[j][flag] = -torch.inf
                best = values[j].argmax()
                picked[j, best] = True
                flag[best] = True
                current[j] += 1
    return picked


@pytest.mark.parametrize("ratios", [(0.25, 0.25), (0.1, 0.5), (0.3, 0.2, 0.4)])
def test_sharing_gives_the_picks_of_algorithm_1(ratios):
    values = relevance(len(ratios), 8, 8, seed=3)
    values[1] = values[0] * 0.9 + values[1] * 0.1  # subjects that want the same places
    kept = round_robin_top_k(values, ratios)
    assert torch.equal(kept.flatten(1), algorithm_1(values, ratios))
    assert kept.sum(0).max() == 1


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_sharing_holds_however_much_subjects_compete(agreement, seed):
    """From no common wish to wanting exactly the same, with ties."""
    common, own = relevance(12, 12, seed=seed), relevance(4, 12, 12, seed=seed + 100)
    values = ((agreement * common + (1 - agreement) * own) * 50).round() / 50
    ratios = relevance(4, seed=seed + 200).mul(0.24).add(0.01).tolist()
    kept = round_robin_top_k(values, ratios)
    assert torch.equal(kept.flatten(1), algorithm_1(values, ratios))


def test_shares_beyond_the_image_end_with_the_last_position():
    kept = round_robin_top_k(relevance(2, 4, 4), (1.0, 1.0))
    assert kept.sum(dim=(1, 2)).tolist() == [8, 8]


def test_each_of_several_masks_is_normalised_by_what_it_kept():
    masks = guidance_masks(relevance(3, 8, 8, seed=5), [0.2, 0.2, 0.2], PAPER)
    assert masks.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("subjects", [1, 3, 9])
def test_attention_times_columns_equals_the_explicit_map(subjects):
    query, key = relevance(2, 3, 10, 4), relevance(2, 3, 6, 4, seed=1)
    columns = relevance(2, 6, subjects, seed=2)
    naive = torch.softmax(query @ key.transpose(-1, -2) / 2, dim=-1).mean(1) @ columns
    assert torch.allclose(attention_times(query, key, columns), naive, atol=1e-6)


def test_low_resolutions_give_words_and_the_largest_gives_self_attention():
    layers = {"a.attn1": 1, "a.attn2": 1, "b.attn1": 2, "b.attn2": 2, "c.attn1": 2, "c.attn2": 2}
    assert recorded_levels(layers, "self_times_cross") == (frozenset({2}), 1)
    assert recorded_levels(layers, "all_cross") == (frozenset({1, 2}), None)


def test_the_release_resizes_by_the_heights_factor_wherever_that_works():
    """A 240 x 336 px image: 15 x 21 positions to 8 x 11, not by 11 / 21 across; 256 x 336 px, where it fails, is."""
    masks = relevance(2, 15, 21)
    release = F.interpolate(masks[None], scale_factor=8 / 15, mode="bilinear")[0]
    assert torch.equal(resize_by_height(masks, (8, 11)), release)
    assert (resize_map(masks, (8, 11)) - release).abs().max() > 1e-3
    masks = relevance(2, 16, 21)
    assert torch.equal(resize_by_height(masks, (8, 11)), resize_map(masks, (8, 11)))
    assert torch.equal(resize_by_height(masks[..., :16], (8, 8)), resize_map(masks[..., :16], (8, 8)))


def test_visual_attention_inside_masks_equals_masked_attention_everywhere():
    """Eq. 19 written out, for rows with two overlapping subjects, one, and none, and for an all-zero mask."""
    heads, places, tokens, width = 2, 30, 7, 8
    query, out = relevance(4, heads, places, 4), relevance(4, places, width, seed=1)
    key, value = relevance(4, tokens, width, seed=2), relevance(4, tokens, width, seed=3)
    masks = relevance(4, places, seed=4) * (relevance(4, places, seed=5) > torch.tensor([[0.4], [0.8], [0.2], [2.0]]))
    rows = [0, 0, 2, 3]
    inside = SparseMask.stack(
        [SparseMask.from_dense(masks[:2]), SparseMask.from_dense(masks[2:3]), SparseMask.from_dense(masks[3:])],
        offsets=[0, 2 * places, 3 * places],
    )
    assert inside.index.shape[1] == (masks > 0).sum(1).max() < places
    expected = out.clone()
    for row, k, v, mask in zip(rows, key, value, masks, strict=True):
        split = lambda x: x.unflatten(-1, (heads, -1)).transpose(0, 1)
        attention = torch.softmax(query[row] @ split(k).transpose(-1, -2) / 2, dim=-1)  # [H, Q, N]
        expected[row] += mask[:, None] * (attention @ split(v)).transpose(0, 1).flatten(1)
    assert torch.allclose(LayerVision(key, value, inside).add_to(out, query), expected, atol=1e-5)
