"""Guidance masks: selection, normalization and Algorithm 1, each compared with its definition."""

import pytest
import torch
import torch.nn.functional as F

from realcustom import MethodConfig
from realcustom.mask import (
    guidance_masks,
    resize_by_height,
    resize_map,
    round_robin_top_k,
    scope_size,
    top_k_mask,
)
from realcustom.recorder import SelfRecording, attention_times, recorded_levels, self_attention_times
from realcustom.visual_attention import LayerVision, SparseMask, sort_masks

PAPER = MethodConfig()


def relevance(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio,kept", [(0.25, 16), (0.2, 12), (1.0, 64), (0.001, 1)])
def test_top_k_mask_keeps_the_most_relevant_positions(ratio, kept):
    """A scope keeps floor(ratio * positions) positions, at least 1, and these are the most relevant ones."""
    values = relevance(8, 8)
    selected = top_k_mask(values, ratio)
    assert selected.sum() == kept
    assert values[selected].min() >= values[~selected].max() if kept < 64 else True


@pytest.mark.parametrize(
    "ratio,positions,kept", [(0.7, 45 * 60, 1890), (0.29, 100, 29), (0.57, 100, 57), (1 / 3, 9, 2)]
)
def test_scope_size_is_the_exact_floor(ratio, positions, kept):
    """floor(ratio * positions) of the decimal ratio, where floating-point products are slightly too small."""
    assert scope_size(ratio, positions) == kept


def test_ties_are_resolved_by_position():
    """Of equally relevant positions, the first ones are kept, as in Algorithm 1."""
    values = torch.zeros(40, 40)
    values[3, 5] = 1.0
    selected = top_k_mask(values, 0.25).flatten()
    assert selected.sum() == 400 and selected[:399].all() and selected[3 * 40 + 5]


def test_small_masks_do_not_vanish_when_downsampled():
    """A disc of radius 2 in a 64 x 64 mask stays nonzero at 8 x 8, wherever it is (the coarsest level of SD1.5)."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for center in range(4, 60, 3):
        disc = ((y - center) ** 2 + (x - 63 + center) ** 2 <= 4).float()
        shrunk = resize_map(disc[None], (8, 8))
        assert shrunk.sum() * 64 == pytest.approx(disc.sum().item())
    smooth = relevance(1, 64, 64)
    halved = F.interpolate(smooth[None], size=(32, 32), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(resize_map(smooth, (32, 32)), halved, atol=1e-6)


def test_half_precision_keeps_the_ranking_of_small_relevance():
    """M_self times relevance around 1e-6 ranks positions in fp16 as it does in fp32."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 64, 8, generator=generator)
    columns = relevance(1, 64, 1) * 1e-6
    products = []
    for dtype in (torch.float32, torch.float16):
        recording = SelfRecording()
        recording.record(query.to(dtype), key.to(dtype))
        products.append(self_attention_times([recording], columns.view(1, 1, 8, 8)).flatten())
    exact, half = products
    assert (half - exact).abs().max() <= 0.01 * exact.max()
    assert torch.corrcoef(torch.stack([exact, half]))[0, 1] > 0.999


def test_masks_are_soft_with_maximum_one():
    """Inside the scope, mask values lie between 0 and 1 and their maximum is 1."""
    mask = guidance_masks(relevance(1, 8, 8), [0.25], PAPER)
    assert mask.max() == pytest.approx(1, abs=1e-4)
    assert 0 < mask[mask > 0].min() < 1
    assert (mask > 0).sum() == 16


def test_scope_of_one_keeps_every_position():
    """With scope 1, the mask is the normalized relevance at every position."""
    values = relevance(1, 8, 8) + 0.1
    assert torch.allclose(guidance_masks(values, [1.0], PAPER), values / values.max(), atol=1e-5)


def algorithm_1(values, ratios):
    """Algorithm 1 as printed in the paper: in each round, each subject marks its best free position."""
    values, count = values.flatten(1).clone(), values[0].numel()
    targets = [int(r * count) for r in ratios]
    current = [0] * len(targets)
    flag = torch.zeros(count, dtype=torch.bool)
    selected = torch.zeros_like(values, dtype=torch.bool)
    while any(c < t for c, t in zip(current, targets)):
        for j in range(len(targets)):
            if current[j] < targets[j]:
                values[j][flag] = -torch.inf
                best = values[j].argmax()
                selected[j, best] = True
                flag[best] = True
                current[j] += 1
    return selected


@pytest.mark.parametrize("ratios", [(0.25, 0.25), (0.1, 0.5), (0.3, 0.2, 0.4)])
def test_round_robin_top_k_equals_algorithm_1(ratios):
    """For subjects with similar relevance, the selection equals that of Algorithm 1 and does not overlap."""
    values = relevance(len(ratios), 8, 8, seed=3)
    values[1] = values[0] * 0.9 + values[1] * 0.1  # two subjects compete for the same positions
    kept = round_robin_top_k(values, ratios)
    assert torch.equal(kept.flatten(1), algorithm_1(values, ratios))
    assert kept.sum(0).max() == 1


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_round_robin_top_k_equals_algorithm_1_for_any_competition(agreement, seed):
    """The selection equals that of Algorithm 1 from independent to identical relevance, including ties."""
    common, own = relevance(12, 12, seed=seed), relevance(4, 12, 12, seed=seed + 100)
    values = ((agreement * common + (1 - agreement) * own) * 50).round() / 50
    ratios = relevance(4, seed=seed + 200).mul(0.24).add(0.01).tolist()
    kept = round_robin_top_k(values, ratios)
    assert torch.equal(kept.flatten(1), algorithm_1(values, ratios))


def test_scopes_that_sum_to_more_than_one_fill_the_image():
    """If the scopes exceed the image, selection ends when no position is free."""
    kept = round_robin_top_k(relevance(2, 4, 4), (1.0, 1.0))
    assert kept.sum(dim=(1, 2)).tolist() == [8, 8]


def test_each_mask_is_normalized_by_its_kept_values():
    """With several subjects, each mask has maximum 1 (Eq. 18)."""
    masks = guidance_masks(relevance(3, 8, 8, seed=5), [0.2, 0.2, 0.2], PAPER)
    assert masks.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("subjects", [1, 3, 9])
def test_attention_times_equals_the_explicit_product(subjects):
    """`attention_times` equals the materialized attention map, averaged over heads, times the columns."""
    query, key = relevance(2, 3, 10, 4), relevance(2, 3, 6, 4, seed=1)
    columns = relevance(2, 6, subjects, seed=2)
    expected = torch.softmax(query @ key.transpose(-1, -2) / 2, dim=-1).mean(1) @ columns
    assert torch.allclose(attention_times(query, key, columns), expected, atol=1e-6)


def test_recorded_levels():
    """Eq. 14 uses cross-attention of the lower resolutions and self-attention of the highest one."""
    layers = {"a.attn1": 1, "a.attn2": 1, "b.attn1": 2, "b.attn2": 2, "c.attn1": 2, "c.attn2": 2}
    assert recorded_levels(layers, "self_times_cross") == (frozenset({2}), 1)
    assert recorded_levels(layers, "all_cross") == (frozenset({1, 2}), None)


def test_resize_by_height_uses_one_scale_factor_if_possible():
    """For a 240 x 336 px image, 15 x 21 positions are resized to 8 x 11 with the factor 8 / 15 on both axes.

    For 256 x 336 px that factor yields another width, so each axis has its own factor.
    """
    masks = relevance(2, 15, 21)
    release = F.interpolate(masks[None], scale_factor=8 / 15, mode="bilinear")[0]
    assert torch.equal(resize_by_height(masks, (8, 11)), release)
    assert (resize_map(masks, (8, 11)) - release).abs().max() > 1e-3
    masks = relevance(2, 16, 21)
    assert torch.equal(resize_by_height(masks, (8, 11)), resize_map(masks, (8, 11)))
    assert torch.equal(resize_by_height(masks[..., :16], (8, 8)), resize_map(masks[..., :16], (8, 8)))


def test_sparse_visual_attention_equals_dense_masked_attention():
    """Attention at the masked positions only equals Eq. 19 computed at all positions.

    The rows have two overlapping subjects, no subject, one subject, and one subject with an all-zero mask.
    """
    heads, positions, tokens, width = 2, 30, 7, 8
    query, out = relevance(4, heads, positions, 4), relevance(4, positions, width, seed=1)
    key, value = relevance(4, tokens, width, seed=2), relevance(4, tokens, width, seed=3)
    thresholds = torch.tensor([[0.4], [0.8], [0.2], [2.0]])
    masks = relevance(4, positions, seed=4) * (relevance(4, positions, seed=5) > thresholds)
    rows = [0, 0, 2, 3]
    in_order = [mask for group in sort_masks([masks[:2], masks[2:3], masks[3:]], masks.dtype) for mask in group]
    count = max(mask.count for mask in in_order)
    assert count == (masks > 0).sum(1).max() < positions
    sparse = SparseMask(
        torch.stack([mask.index[:count] + row * positions for mask, row in zip(in_order, rows, strict=True)]),
        torch.stack([mask.weight[:count] for mask in in_order]),
    )
    expected = out.clone()
    for row, k, v, mask in zip(rows, key, value, masks, strict=True):
        split = lambda x: x.unflatten(-1, (heads, -1)).transpose(0, 1)
        attention = torch.softmax(query[row] @ split(k).transpose(-1, -2) / 2, dim=-1)  # [H, Q, N]
        expected[row] += mask[:, None] * (attention @ split(v)).transpose(0, 1).flatten(1)
    assert torch.allclose(LayerVision(key, value, sparse).add_to(out, query), expected, atol=1e-5)
