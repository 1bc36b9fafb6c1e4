"""The embedded model's recipe at toy cost: each part trains, and only the parts that should."""

import math

import numpy as np
import pytest
import torch

from realcustom.adapter import RealCustomAdapter
from realcustom.attention import AttentionLayers
from realcustom.recorder import AttentionRecorder
from realcustom.vision import VisionFeatures
from train.captions import CaptionCache
from train.diffusion import diffusion_loss, min_snr_weight, size_condition, subject_weight, v_target
from train.grounding import grounding_loss, places_of, subject_marks
from train.networks import build_scheduler, build_unet, build_vae
from train.precision import differentiable_attention
from train.stages.adapter import draw_noisy, everywhere
from train.stages.base import FULL_SIZE_EVERY, PREVIEW_PROMPTS, TextToImage, draw_noise, size_and_turn
from train.stages.vae import vae_loss
from train.stages.vision import MINI_VISION, VIEWS, RenderViews, VisionTeacher, views_as_tensors, vision_loss
from train.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_world_words_are_one_token_each(tokenizer):
    """Every word of the prompts is one token, so that a target word has one column of attention."""
    for prompt in PREVIEW_PROMPTS:
        assert len(tokenizer.tokenize(prompt)) == len(prompt.split())


def test_any_text_tokenizes(tokenizer):
    """No text falls back to the unknown token, and every text ends where the text encoder looks for its end."""
    for text in ("", "zebra", "日本 ünïcode 🐶", "x" * 500):
        ids = tokenizer(text, padding="max_length", max_length=32, truncation=True).input_ids
        assert len(ids) == 32 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def test_velocity_equals_schedulers():
    """Noisy latents and target are those of the diffusers scheduler, for every step but the noiseless rounding."""
    scheduler, generator = build_scheduler(), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    steps = torch.tensor([0, 500, 999])
    noisy, target = v_target(scheduler, clean, noise, steps)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, steps), atol=1e-6)
    assert torch.allclose(target, scheduler.get_velocity(clean, noise, steps), atol=1e-6)
    assert torch.equal(noisy[2], noise[2])  # zero terminal SNR: sampling starts from what training has seen


def test_weight_keeps_pure_noise_and_caps_clean_steps():
    weight = min_snr_weight(build_scheduler(), torch.arange(1000))
    assert weight[-1] == 1 and weight[0] < 0.01 and (weight.diff() >= -1e-6).all()


def test_time_ids_are_height_first():
    assert size_condition(2, torch.zeros(2, 4, 16, 32)).tolist() == [[64, 128, 0, 0, 64, 128]] * 2


@pytest.mark.parametrize("draw", [draw_noise, draw_noisy])
def test_time_steps_cover_the_range(draw):
    steps = draw(torch.zeros(64, 1, 1, 1), torch.Generator().manual_seed(0))[1]
    assert steps.min() < 60 and steps.max() > 980


def test_frozen_text_is_encoded_once(tokenizer):
    """The cache gives each caption what the encoders give it, encodes none twice, and lets no gradient through."""
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


def test_base_learns_one_batch(tokenizer):
    """UNet and both text encoders get gradients; a few steps on one batch lower the loss."""
    torch.manual_seed(0)
    model, scheduler = TextToImage(tokenizer), build_scheduler()
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    steps, captions = torch.tensor([300, 800]), ["a dog", "an owl in the snow"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        loss = diffusion_loss(model.unet, scheduler, clean, noise, steps, *model.encode_text(captions)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for part in (model.unet, model.text_encoder, model.text_encoder_2):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def test_vae_keeps_sizes_and_loss_has_gradients():
    vae = build_vae()
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    assert vae.encode(pixels).latent.shape == (2, 4, 8, 12)
    loss, numbers = vae_loss(vae, pixels, torch.Generator().manual_seed(0))
    loss.backward()
    assert numbers.keys() == {"psnr", "white"} and all(p.grad is not None for p in vae.parameters())


def test_vision_teacher_trains_what_the_projector_reads():
    """The deep layer of both encoders gets gradients, and features have the shapes the projector expects."""
    torch.manual_seed(0)
    model, entry = VisionTeacher(), views_as_tensors(RenderViews()(range(4)), "cpu")
    loss, _ = vision_loss(model, entry, torch.Generator().manual_seed(0))
    loss.backward()
    assert model.siglip.encoder.layers[MINI_VISION.siglip_deep].mlp.fc1.weight.grad.abs().max() > 0
    features = model.encoders().encode_pixels(entry["first"])
    assert [tuple(v.shape) for v in (features.shallow, features.deep, features.local)] == [
        (4, 192, 192),
        (4, 64, 192),
        (4, 256, 192),
    ]


def test_views_of_two_mark_one_of_them():
    """The marked tokens lie on one side where two subjects share a view, and about the middle where one is alone."""
    sides = set()
    for inside in np.concatenate([views[f"{view}_inside"] for views in [RenderViews()(range(40))] for view in VIEWS]):
        columns = np.flatnonzero(inside.any(0))
        sides.add("left" if columns.max() < 4 else "right" if columns.min() > 3 else "middle")
    assert sides == {"left", "right", "middle"}


def test_portrait_asks_the_individuals_tokens_alone():
    """What other tokens say makes no difference to it, what its own say does."""
    torch.manual_seed(0)
    model, deep = VisionTeacher(), torch.randn(1, 64, 192)
    inside = torch.arange(64)[None] < 20
    portrait = model.portrait(deep, inside)
    assert torch.allclose(portrait, model.portrait(deep + ~inside[..., None] * torch.randn(192), inside), atol=1e-6)
    assert not torch.allclose(portrait, model.portrait(deep + inside[..., None] * torch.randn(192), inside), atol=1e-2)


def test_a_unet_compiled_whole_sees_one_reference_without_recompiling():
    """As the stage trains with --compile: connected anew for every batch, compiled once."""
    torch._dynamo.reset()
    unet = build_unet()
    attention = AttentionLayers(unet)
    adapter = RealCustomAdapter.for_unet(unet, vision_dim=192)
    compiled = torch.compile(unet, backend="eager", fullgraph=True, dynamic=False)
    added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.randn(2, 6)}
    for stance in ("default", "fail_on_recompile"):
        keys_values = {name: tuple(torch.randn(2, 2, 9, width)) for name, width in adapter.config.layers.items()}
        with (
            torch.compiler.set_stance(stance),
            attention.attention_context(vision=everywhere(keys_values)),
            torch.no_grad(),
        ):
            compiled(torch.randn(2, 4, 16, 16), 500, torch.randn(2, 8, 128), added_cond_kwargs=added)


def test_adapter_alone_learns():
    """With a frozen UNet every weight of the adapter gets a gradient, and the UNet none."""
    torch.manual_seed(0)
    unet = build_unet().requires_grad_(False)
    attention = AttentionLayers(unet)
    adapter = RealCustomAdapter.for_unet(unet, vision_dim=192)
    tokens = {"shallow": 192, "deep": 64, "local": 256}
    features = VisionFeatures(**{name: torch.randn(2, count, 192) for name, count in tokens.items()})
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    text = torch.randn(2, 8, 128), torch.randn(2, 64)
    with attention.attention_context(vision=everywhere(adapter(features))):
        loss = diffusion_loss(unet, build_scheduler(), clean, noise, torch.tensor([500, 900]), *text).mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in unet.parameters())


@pytest.mark.parametrize("details_from", [None, 17, 20])
def test_base_steps_of_each_size_count_up(details_from):
    """Each size numbers its own steps without gaps, so that a pool moves on by one at each of its steps."""
    seen = {64: [], 128: []}
    for step in range(40):
        size, turn = size_and_turn(step, details_from)
        seen[size].append(turn)
    assert all(turns == list(range(len(turns))) for turns in seen.values())
    mixed = 40 if details_from is None else details_from
    assert len(seen[128]) == mixed // FULL_SIZE_EVERY + 40 - mixed


def test_place_weights_count_subjects_more():
    """An error outside of every subject costs less than the same error inside one."""
    inside = torch.zeros(1, 4, 4)
    inside[0, :2, :2] = 1
    weight = subject_weight(inside)
    assert weight.shape == (1, 1, 4, 4) and weight[0, 0, 0, 0] == 1 and 0 < weight[0, 0, 3, 3] < 1


def test_subject_words_are_marked_in_order(tokenizer):
    """Each subject's own word, in the order of the caption; a dropped caption has none."""
    marks = subject_marks(tokenizer, ["an owl and a dog in the snow", "a photo of a dog", ""])
    assert marks.sum((1, 2)).tolist() == [2, 1, 0]
    tokens = tokenizer(["an owl and a dog in the snow"]).input_ids[0]
    spelled = [tokenizer.decode(tokens[int(mark.argmax())]).strip() for mark in marks[0]]
    assert spelled == ["owl", "dog"]


def test_grounding_loss_is_least_where_words_look_evenly_at_their_subjects():
    where = torch.tensor([[[1, 1, 2, 2]] * 4], dtype=torch.uint8)
    places = places_of(where)
    right, wrong = places.flatten(2), places.flip(1).flatten(2)
    half = right * (torch.arange(16) < 8)  # the upper half of each place
    assert grounding_loss([(0, 0.3 * right)], places) == 0  # how much there is of it does not matter
    everywhere = grounding_loss([(0, torch.ones_like(right))], places)
    assert everywhere == pytest.approx(math.log(2), rel=1e-4)  # twice as large as the place
    assert everywhere < grounding_loss([(0, half)], places) < grounding_loss([(0, wrong)], places)
    coarse = torch.tensor([[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]])
    assert grounding_loss([(1, coarse)], places) == 0
    unnamed = torch.stack([right[:, 0], torch.zeros_like(right[:, 0])], dim=1)
    assert grounding_loss([(0, unnamed)], places) == 0
    assert grounding_loss([(0, wrong)], torch.zeros_like(places)) == 0


def test_words_learn_where_to_look(tokenizer):
    """The loss reaches queries and keys of the UNet through our recorder, and a few steps lower it."""
    torch.manual_seed(0)
    model, scheduler = TextToImage(tokenizer), build_scheduler()
    attention = AttentionLayers(model.unet)
    captions = ["a dog and a cat in the snow", "a dog"]
    where = torch.zeros(2, 16, 16, dtype=torch.uint8)
    where[:, :, :8], where[0, :, 8:] = 1, 2
    clean, noise = torch.randn(2, 2, 4, 16, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(8):
        recorder = AttentionRecorder(attention.levels, "all_cross", subject_marks(tokenizer, captions))
        with differentiable_attention("cpu"), attention.attention_context(recordings=recorder.layers):
            text = model.encode_text(captions)
            diffusion_loss(model.unet, scheduler, clean, noise, torch.tensor([300, 800]), *text)
        loss = grounding_loss(recorder.cross_maps.values(), places_of(where))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
