"""The training stages of the embedded model at toy size: the intended parameters are trained and losses decrease."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from realcustom.assets import MINI_MODEL
from realcustom.attention import AttentionLayers
from realcustom.recorder import AttentionRecorder
from train.data.sprite_world.renderer import cpu_renderer
from train.data.sprite_world.world import TRAINED_CATEGORIES
from train.mini.__main__ import STAGES
from train.mini.captions import CaptionCache
from train.mini.diffusion import diffusion_loss, sample_timesteps, size_condition
from train.mini.grounding import grounding_loss, subject_maps, subject_token_masks
from train.mini.networks import build_scheduler, build_vae
from train.mini.text_to_image import FULL_SIZE_EVERY, PREVIEW_PROMPTS, TextToImage, resolution_of_step
from train.mini.vae import vae_loss
from train.mini.views import GROUP, ViewMixture, render_view_batch
from train.mini.vision_encoders import (
    MINI_VISION,
    VisionPretrainer,
    change_of_features,
    token_losses,
    vision_loss,
)
from train.precision import differentiable_attention

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped one; test_train_mini_stages.py trains it again."""
    return CLIPTokenizer.from_pretrained(MINI_MODEL / "tokenizer")


def test_help_is_printed_without_heavy_imports():
    """`--help` lists the stages and imports neither torch nor diffusers."""
    script = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('train.mini', run_name='__main__')"
    script += "\nfinally: print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert all(stage in done.stdout for stage in STAGES)


def test_words_of_the_sprite_world_are_single_tokens(tokenizer):
    """Every word of the preview prompts is one token, so that a target word has one column of attention."""
    for prompt in PREVIEW_PROMPTS:
        assert len(tokenizer.tokenize(prompt)) == len(prompt.split())


def test_any_text_can_be_tokenized(tokenizer):
    """No text contains the unknown token, and the first end token follows the text, where the encoder pools."""
    for text in ("", "zebra", "日本 ünïcode 🐶", "x" * 500):
        ids = tokenizer(text, padding="max_length", max_length=32, truncation=True).input_ids
        assert len(ids) == 32 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def test_time_ids_are_height_first():
    assert size_condition(2, torch.zeros(2, 4, 16, 32)).tolist() == [[64, 128, 0, 0, 64, 128]] * 2


def test_timesteps_cover_the_range():
    timesteps = sample_timesteps(64, torch.Generator().manual_seed(0))
    assert timesteps.min() < 60 and timesteps.max() > 980


def test_caption_cache_encodes_each_caption_once(tokenizer):
    """Cached text conditions equal those of the encoders and have no gradient; no caption is encoded twice."""
    torch.manual_seed(0)
    model, encoded = TextToImage(tokenizer), []

    def encode(captions):
        encoded.extend(captions)
        return model.encode_text(captions)

    cache = CaptionCache(encode)
    cache(["a dog", "", "a dog"])
    captions = ["an owl in the snow", "a dog", "", "a dog"]
    for cached, expected in zip(cache(captions), model.encode_text(captions), strict=True):
        assert not cached.requires_grad and torch.allclose(cached, expected, atol=1e-5)
    assert sorted(encoded) == sorted(set(captions))


def test_base_stage_overfits_one_batch(tokenizer):
    """The UNet and both text encoders receive gradients, and a few steps on one batch lower the loss."""
    torch.manual_seed(0)
    model, scheduler = TextToImage(tokenizer), build_scheduler()
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    timesteps, captions = torch.tensor([300, 800]), ["a dog", "an owl in the snow"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        loss = diffusion_loss(model.unet, scheduler, clean, noise, timesteps, *model.encode_text(captions)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for part in (model.unet, model.text_encoder, model.text_encoder_2):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def test_vae_loss_has_gradients_for_all_parameters():
    vae = build_vae()
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    assert vae.encode(pixels).latent.shape == (2, 4, 8, 12)
    loss, numbers = vae_loss(vae, pixels, torch.Generator().manual_seed(0))
    loss.backward()
    assert numbers.keys() == {"psnr", "white"} and all(p.grad is not None for p in vae.parameters())


def views_of(count: int):
    return render_view_batch(ViewMixture(count).samples(0, range(count)), cpu_renderer())


def test_vision_loss_trains_the_layers_that_the_projector_reads():
    """The deep layers of the encoders receive gradients, and the features have the shapes the projector expects."""
    torch.manual_seed(0)
    model, views = VisionPretrainer(), views_of(4)
    loss, _ = vision_loss(model, views, torch.Generator().manual_seed(0))
    loss.backward()
    assert model.siglip.encoder.layers[MINI_VISION.siglip_deep].mlp.fc1.weight.grad.abs().max() > 0
    features = model.encoders().encode_pixels(views.images[:4])
    assert [tuple(v.shape) for v in (features.shallow, features.deep, features.local)] == [
        (4, 192, 192),
        (4, 64, 192),
        (4, 256, 192),
    ]


def test_tokens_are_trained_on_what_they_show():
    """The loss is zero for tokens that predict the category and the position of the only subject they show. Tokens of
    the background and of two subjects are ignored."""
    left, right = [[2.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[2.0, 0, -0.75], [0, 1, 0], [0, 0, 1]]
    where, categories = torch.tensor([[left, right]]), torch.tensor([[3, 5]])
    x = (torch.arange(64) % 8 + 0.5) / 8
    first, second = x < 0.375, (x > 0.5) & (x < 0.875)  # in between, both overlap
    predicted = torch.full((1, 64, len(TRAINED_CATEGORIES) + 2), torch.nan)
    predicted[..., :-2] = 0
    predicted[0, first, 3] = predicted[0, second, 5] = 100
    predicted[0, :, -2] = torch.where(first, 2 * x, 2 * x - 0.75)
    predicted[0, :, -1] = (torch.arange(64) // 8 + 0.5) / 8
    predicted[0, ~(first | second), :] = torch.nan
    assert [value.item() for value in token_losses(predicted, where, categories)] == pytest.approx([0, 0], abs=1e-5)
    category, position = token_losses(predicted.roll(8, dims=1), where, categories.flip(1))
    assert category > 10 and position > 0.01


def test_views_show_the_instance_of_their_group():
    """All views contain the group's category, half of them with another one. A portrait is a large view of the instance
    alone, without noise: the same for each view, and different for each instance."""
    views = views_of(2 * GROUP)
    assert views.category.view(2, GROUP).unique(dim=1).shape == (2, 1) and views.category[0] != views.category[-1]
    assert (views.categories == views.category.repeat(2)[:, None]).any(1).all()
    empty = views.categories < 0
    assert not empty[:, 0].any() and 0.2 < empty[:, 1].float().mean() < 0.8
    assert torch.equal(empty, (views.homographies == 0).flatten(2).all(-1))
    assert torch.allclose(views.portraits[:, :, 0, 0], torch.tensor(128 / 255))
    assert len(views.portraits.flatten(1).unique(dim=0)) == 2 * GROUP


def test_views_of_a_position_do_not_depend_on_the_part_of_the_batch():
    whole = ViewMixture(24).samples(3, range(24))
    part = render_view_batch(ViewMixture(24).samples(3, range(8, 12)), cpu_renderer())
    both = render_view_batch(whole, cpu_renderer()).images.view(2, 24, 3, 128, 128)
    assert torch.equal(part.images.view(2, 4, 3, 128, 128), both[:, 8:12])


def test_change_of_features_is_relative_to_their_variance():
    before = [torch.randn(8, 64, 12) * 5 + 2, torch.randn(8, 64, 12)]
    assert change_of_features(before, before) == 0
    changed = [tokens + 0.1 * tokens.std((0, 1)) for tokens in before]
    assert change_of_features(changed, before).item() == pytest.approx(0.01, rel=1e-3)


def test_views_mark_the_tokens_of_one_instance():
    """With two subjects in a view, the marked tokens are on one side; with one, they are around the middle."""
    sides = set()
    for inside in views_of(40).inside.unflatten(1, (8, 8)).numpy():
        columns = np.flatnonzero(inside.any(0))
        sides.add("left" if columns.max() < 4 else "right" if columns.min() > 3 else "middle")
    assert sides == {"left", "right", "middle"}


def test_portrait_depends_on_the_tokens_of_the_instance_only():
    """Changing other tokens does not change the portrait; changing the instance's tokens does."""
    torch.manual_seed(0)
    model, deep = VisionPretrainer(), torch.randn(1, 64, 192)
    inside = torch.arange(64)[None] < 20
    portrait = model.portrait(deep, inside)
    assert torch.allclose(portrait, model.portrait(deep + ~inside[..., None] * torch.randn(192), inside), atol=1e-6)
    assert not torch.allclose(portrait, model.portrait(deep + inside[..., None] * torch.randn(192), inside), atol=1e-2)


@pytest.mark.parametrize("full_size_from", [None, 17, 20])
def test_steps_of_each_resolution_are_numbered_without_gaps(full_size_from):
    """The pool of a resolution advances by one at each step of that resolution."""
    numbers = {64: [], 128: []}
    for step in range(40):
        size, pool_step = resolution_of_step(step, full_size_from)
        numbers[size].append(pool_step)
    assert all(steps == list(range(len(steps))) for steps in numbers.values())
    mixed = 40 if full_size_from is None else full_size_from
    assert len(numbers[128]) == mixed // FULL_SIZE_EVERY + 40 - mixed


def test_subject_tokens_are_marked_in_order(tokenizer):
    """Each subject has the tokens of its own word, in the order of the caption. A dropped caption has none."""
    masks = subject_token_masks(tokenizer, ["an owl and a dog in the snow", "a photo of a dog", ""])
    assert masks.sum((1, 2)).tolist() == [2, 1, 0]
    tokens = tokenizer(["an owl and a dog in the snow"]).input_ids[0]
    words = [tokenizer.decode(tokens[int(mask.argmax())]).strip() for mask in masks[0]]
    assert words == ["owl", "dog"]


def test_grounding_loss_is_minimal_for_uniform_attention_inside_the_subject():
    """It is zero for attention that is uniform inside the subject's area at any level, and grows with the distance
    from that. Subjects without a word or without an area do not count."""
    subjects = subject_maps(torch.tensor([[[1, 1, 2, 2]] * 4], dtype=torch.uint8))
    right, wrong = subjects.flatten(2), subjects.flip(1).flatten(2)
    half = right * (torch.arange(16) < 8)  # the upper half of each area
    assert grounding_loss([(0, 0.3 * right)], subjects) == 0  # only the distribution counts, not the total
    uniform = grounding_loss([(0, torch.ones_like(right))], subjects)
    assert uniform == pytest.approx(math.log(2), rel=1e-4)  # twice the size of the area
    assert uniform < grounding_loss([(0, half)], subjects) < grounding_loss([(0, wrong)], subjects)
    coarse = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]])
    assert grounding_loss([(1, coarse)], subjects) == 0
    unnamed = torch.stack([right[:, 0], torch.zeros_like(right[:, 0])], dim=1)
    assert grounding_loss([(0, unnamed)], subjects) == 0
    assert grounding_loss([(0, wrong)], torch.zeros_like(subjects)) == 0


def test_grounding_loss_trains_the_cross_attention(tokenizer):
    """Its gradients reach the UNet's queries and keys through `AttentionRecorder`, and a few steps lower it."""
    torch.manual_seed(0)
    model, scheduler = TextToImage(tokenizer), build_scheduler()
    attention = AttentionLayers(model.unet)
    captions = ["a dog and a cat in the snow", "a dog"]
    subject_bits = torch.zeros(2, 16, 16, dtype=torch.uint8)
    subject_bits[:, :, :8], subject_bits[0, :, 8:] = 1, 2
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(8):
        recorder = AttentionRecorder(attention.levels, "all_cross", subject_token_masks(tokenizer, captions))
        with differentiable_attention("cpu"), attention.attention_context(recordings=recorder.layers):
            text = model.encode_text(captions)
            diffusion_loss(model.unet, scheduler, clean, noise, torch.tensor([300, 800]), *text)
        loss = grounding_loss(recorder.cross_maps.values(), subject_maps(subject_bits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
