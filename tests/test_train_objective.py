"""The objective against the paper's formulas, and the frozen models against the inference pipeline."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import PROMPT, subject_image, tiny_pipeline
from toy_training import write_base

from realcustom import RealCustomAdapter, Request, Subject
from realcustom.attention import AttentionLayers
from train.config import ModelConfig, ObjectiveConfig
from train.data.sample import Sample
from train.frozen import FrozenModels, load_pipeline, start_adapter
from train.objective import Objective, draw, inside_of_latents, min_snr_weight, noisy_and_target, position_weight
from train.overrides import override
from train.recipes import RECIPES

CPU = torch.device("cpu")


def scheduler(prediction_type="epsilon", **options):
    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False, **options)


def draws(config=None, positions=range(4), seed=0, step=3, batch_size=4, num_timesteps=1000):
    return draw(
        config or ObjectiveConfig(), (4, 8, 8), positions, seed=seed, step=step, batch_size=batch_size,
        num_timesteps=num_timesteps,
    )  # fmt: skip


def sample(**changes) -> Sample:
    values = {
        "image": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
        "caption": PROMPT,
        "target_phrase": "dog",
        "reference": np.asarray(subject_image(size=(32, 32))),
        "original_size": (80, 100),
        "crop": (2, 6),
        "key": "toy:0",
        **changes,
    }
    return Sample(**values)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def frozen(pipeline):
    return FrozenModels(tiny_pipeline(), CPU)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_follow_the_paper(prediction_type):
    """z_t = sqrt(a) z_0 + sqrt(1 - a) e (Eq. 2). The target is e (Eq. 1), or v as diffusers defines it."""
    schedule, generator = scheduler(prediction_type), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    steps = torch.tensor([0, 500, 999])
    noisy, target = noisy_and_target(schedule, clean, noise, steps)
    a = schedule.alphas_cumprod[500]
    assert torch.allclose(noisy[1], a.sqrt() * clean[1] + (1 - a).sqrt() * noise[1])
    assert torch.allclose(noisy, schedule.add_noise(clean, noise, steps), atol=1e-6)
    expected = noise if prediction_type == "epsilon" else schedule.get_velocity(clean, noise, steps)
    assert torch.allclose(target, expected, atol=1e-6)


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        noisy_and_target(scheduler("sample"), *torch.randn(2, 1, 4, 8, 8), torch.tensor([1]))


def test_min_snr_weights():
    """For epsilon min(SNR, γ) / SNR; for v, the same weight relative to the noise and the clean image: 1 at pure noise
    and small at clean timesteps."""
    steps = torch.arange(1000)
    alphas = scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    assert torch.allclose(min_snr_weight(scheduler(), steps, 5.0), snr.clamp_max(5) / snr)
    weight = min_snr_weight(scheduler("v_prediction", rescale_betas_zero_snr=True), steps, 5.0)
    assert weight[-1] == 1 and weight[0] < 0.01 and (weight.diff() >= -1e-6).all()


def test_draws_depend_on_seed_step_and_position_only():
    """A process that draws a part of the batch gets the same numbers as one that draws all of it."""
    whole, part = draws(), draws(positions=range(2, 4))
    for name in ("noise", "timesteps", "keep_text", "keep_vision"):
        assert torch.equal(getattr(whole, name)[2:], getattr(part, name))
    assert not torch.equal(whole.noise, draws(step=4).noise) and not torch.equal(whole.noise, draws(seed=1).noise)
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_timesteps_of_a_batch_are_stratified():
    """Each of B equal intervals contains one timestep, and the interval of a position changes from step to step."""
    timesteps = torch.stack([draws(positions=range(10), batch_size=10, step=step).timesteps for step in range(40)])
    assert all((row.sort().values // 100).tolist() == list(range(10)) for row in timesteps)
    assert 350 < timesteps[:, 0].float().mean() < 650  # position 0 is not always in the first interval
    noisy = draws(ObjectiveConfig(timestep_exponent=0.5), range(256), batch_size=256).timesteps.float()
    assert noisy.mean() == pytest.approx(2 / 3 * 1000, abs=10)


def test_conditions_are_dropped_with_their_probabilities():
    config = ObjectiveConfig(drop_text=0.1, drop_vision=0.2, drop_both=0.3)
    kept = draws(config, range(4000), batch_size=4000)
    text, vision = kept.keep_text, kept.keep_vision
    shares = [(~text & vision), (text & ~vision), (~text & ~vision), (text & vision)]
    assert [float(share.float().mean()) for share in shares] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_positions_outside_the_subjects_have_a_lower_weight():
    inside = torch.zeros(1, 8, 8)
    inside[0, :4, :4] = 1
    maps = inside_of_latents(inside, (4, 4))
    assert maps.shape == (1, 1, 4, 4) and maps.sum() == 4
    weight = position_weight(maps, 0.3)
    assert weight[0, 0, 0, 0] == 1 and float(weight[0, 0, 3, 3]) == pytest.approx(0.3)


def test_encoding_equals_the_pipeline(pipeline, frozen):
    """Text, vision features and latents are those that the inference pipeline computes."""
    encoded = frozen.encode([sample(), sample(caption="a cat")])
    text = pipeline.text_encoders.encode(PROMPT)
    assert torch.allclose(encoded.embeds[0], text.embeds, atol=1e-5)
    assert encoded.pooled is not None and torch.allclose(encoded.pooled[0], text.pooled, atol=1e-5)
    features = pipeline.vision_encoders.encode([sample().reference])
    for name in ("shallow", "deep", "local"):
        assert torch.allclose(getattr(encoded.features, name)[:1], getattr(features, name), atol=1e-5)
    pixels = torch.from_numpy(sample().image).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.allclose(encoded.latents[:1], latents, atol=1e-5)
    assert torch.allclose(pipeline.decoder.unscaled(encoded.latents[:1]), pipeline.decoder.unscaled(latents), atol=1e-4)


def test_size_condition_is_original_size_crop_and_target_size(frozen):
    """In SDXL's order, height first."""
    assert frozen.encode([sample()]).time_ids.tolist() == [[80, 100, 2, 6, 64, 64]]


def test_precomputed_features_are_used(frozen):
    """Samples with features are not encoded again; others in the same batch are."""
    found = {"latents": torch.full((4, 16, 16), 7.0), "deep": torch.zeros(1)}  # "deep" alone is incomplete
    lookup = lambda item: found if item.key == "found" else None
    encoded = FrozenModels(frozen.pipeline, CPU, lookup).encode([sample(key="found"), sample()])
    expected = frozen.encode([sample(), sample()])
    assert (encoded.latents[0] == 7).all() and torch.allclose(encoded.latents[1], expected.latents[1], atol=1e-5)
    assert torch.allclose(encoded.features.deep, expected.features.deep, atol=1e-5)


def test_dropped_caption_is_the_pipelines_empty_prompt(frozen):
    """Zeros if the base encodes an empty negative prompt so, otherwise the encoded empty text."""
    embeds, pooled = frozen.empty_text()
    assert torch.equal(embeds, frozen.pipeline.text_encoders.encode("").embeds) and pooled is not None
    zeros = tiny_pipeline()
    zeros.register_to_config(force_zeros_for_empty_prompt=True)
    embeds, pooled = FrozenModels(zeros, CPU).empty_text()
    assert not embeds.any() and pooled is not None and not pooled.any()


def _objective(frozen, **options):
    unet = frozen.pipeline.unet
    return Objective(unet, frozen.pipeline.scheduler, frozen.empty_text(), ObjectiveConfig(**options), CPU)


def _loss(frozen, objective, adapter, encoded, kept):
    with objective.attending(adapter(encoded.features), kept.keep_vision):
        return objective.losses(encoded, kept)


def test_losses_equal_a_direct_computation(frozen):
    """Row by row, the loss is the mean squared error of the UNet with visual attention added in every cross-attention
    layer (Eq. 4); a row without a reference equals the UNet alone, and one without a caption has the empty text."""
    torch.manual_seed(0)
    adapter = RealCustomAdapter.for_unet(frozen.pipeline.unet, vision_dim=64, head_dim=32)
    unet, schedule = frozen.pipeline.unet, frozen.pipeline.scheduler
    encoded = frozen.encode([sample(), sample(caption="a cat"), sample()])
    numbers = draw(
        ObjectiveConfig(), (4, 16, 16), range(3), seed=0, step=0, batch_size=3, num_timesteps=1000
    )  # fmt: skip
    kept = dataclasses.replace(
        numbers, keep_text=torch.tensor([True, True, False]), keep_vision=torch.tensor([True, False, False])
    )
    with torch.no_grad():
        losses = _loss(frozen, _objective(frozen), adapter, encoded, kept)
    noisy, target = noisy_and_target(schedule, encoded.latents, numbers.noise, numbers.timesteps)
    empty, empty_pooled = frozen.empty_text()
    layers = AttentionLayers(unet)
    for row in range(3):
        embeds, pooled = (encoded.embeds[row], encoded.pooled[row]) if row < 2 else (empty, empty_pooled)
        added = {"text_embeds": pooled[None], "time_ids": encoded.time_ids[row : row + 1]}
        features = dataclasses.replace(
            encoded.features,
            **{name: value[row : row + 1] for name, value in vars(encoded.features).items()},
        )
        calls = []

        def attend(module, inputs, output, name, features=features, calls=calls):
            """Add softmax(Q K_i) V_i before the output projection, as Eq. 4 says; the projection is linear."""
            key, value = adapter(features)[name]
            query = module.to_q(inputs[0])
            heads = [x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (query, key, value)]
            scores = heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5
            visual = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
            calls.append(name)
            return output + torch.nn.functional.linear(visual, module.to_out[0].weight)

        hooks = []
        if row == 0:
            for name in adapter.config.layers:
                hook = lambda module, inputs, output, name=name: attend(module, inputs, output, name)
                hooks.append(unet.get_submodule(name).register_forward_hook(hook))
        with torch.no_grad(), layers.attention_context():
            predicted = unet(
                noisy[row : row + 1], numbers.timesteps[row : row + 1], embeds[None], added_cond_kwargs=added
            ).sample
        for hook in hooks:
            hook.remove()
        assert len(calls) == (len(adapter.config.layers) if row == 0 else 0)
        assert float(losses[row]) == pytest.approx(float((predicted - target[row]).pow(2).mean()), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_adapter_only(checkpointing):
    """Every parameter of the adapter has a gradient, no frozen one has; gradient checkpointing does not change them."""
    frozen = FrozenModels(tiny_pipeline(), CPU)
    if checkpointing:
        frozen.pipeline.unet.enable_gradient_checkpointing()
    adapter = RealCustomAdapter.for_unet(frozen.pipeline.unet, vision_dim=64, head_dim=32)
    encoded = frozen.encode([sample(), sample()])
    numbers = draw(ObjectiveConfig(drop_text=0, drop_vision=0, drop_both=0), (4, 16, 16), range(2), seed=0, step=0,
                   batch_size=2, num_timesteps=1000)  # fmt: skip
    objective = _objective(frozen)
    with objective.attending(adapter(encoded.features), numbers.keep_vision):
        objective.losses(encoded, numbers).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    modules = [m for m in frozen.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert all(p.grad is None for module in modules for p in module.parameters())


def test_starting_weights(tmp_path, frozen):
    """A new adapter depends on the seed only and starts from the UNet's text projections; "base" continues that of the
    folder; another path is loaded; a base without an adapter cannot be continued."""
    model = ModelConfig(**dict(a.removeprefix("model.").split("=") for a in write_base(tmp_path, "mini")))
    one, again, other = (start_adapter(model, load_pipeline(model, torch.float32), seed) for seed in (0, 0, 1))
    weight = lambda adapter: adapter.projector.deep_mlp.weight
    assert torch.equal(weight(one), weight(again)) and not torch.equal(weight(one), weight(other))
    name = next(iter(one.config.layers))
    text = load_pipeline(model, torch.float32).unet.get_submodule(name).to_k.weight
    assert torch.equal(one.to_k_vision[name.replace(".", "-")].weight, text)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in one.parameters())
    pipeline = load_pipeline(model, torch.float32)
    pipeline.save_realcustom(tmp_path / "adapter.safetensors")
    for choice in ("base", str(tmp_path / "adapter.safetensors")):
        continued = start_adapter(dataclasses.replace(model, adapter=choice), pipeline, 0)
        assert torch.equal(weight(continued), weight(pipeline.adapter))
    pipeline.register_modules(adapter=None)
    with pytest.raises(ValueError, match="has no adapter to continue"):
        start_adapter(dataclasses.replace(model, adapter="base"), pipeline, 0)


def test_sd15_takes_no_pooled_text(tmp_path):
    """Its UNet has no size condition either."""
    settings = write_base(tmp_path, "sd15")
    model = override(RECIPES["sd15_512"](), settings).model
    frozen = FrozenModels(load_pipeline(model, torch.float32), CPU)
    encoded = frozen.encode([sample(reference=np.zeros((32, 32, 3), np.uint8))])
    assert encoded.pooled is None and frozen.empty_text()[1] is None
    adapter = start_adapter(model, frozen.pipeline, 0)
    numbers = draw(ObjectiveConfig(), encoded.latents.shape[1:], range(1), seed=0, step=0, batch_size=1,
                   num_timesteps=1000)  # fmt: skip
    assert _loss(frozen, _objective(frozen), adapter, encoded, numbers).isfinite().all()


def test_previews_use_the_given_weights(tmp_path, pipeline):
    """The preview is the image that the pipeline generates with these weights."""
    from PIL import Image

    from train.config import PreviewConfig, PreviewSubject
    from train.preview import adapter_with, render_previews

    subject_image().save(tmp_path / "dog.png")
    subject = PreviewSubject(image=tmp_path / "dog.png", prompt=PROMPT, target_phrase="dog")
    other = tiny_pipeline(seed=1).adapter
    adapter = adapter_with(other.state_dict(), pipeline.adapter, torch.float32)
    bare = tiny_pipeline()
    bare.register_modules(adapter=None)
    config = PreviewConfig(subjects=(subject,))
    assert not render_previews(bare, adapter, config, 64, tmp_path / "no.png", lambda: True)
    assert not (tmp_path / "no.png").exists()
    assert render_previews(bare, adapter, config, 64, tmp_path / "grid.png")
    expected = tiny_pipeline()
    expected.register_modules(adapter=other)
    request = Request(prompt=PROMPT, subjects=(Subject(image=subject_image(), target_phrase="dog"),), seed=0)
    generation = expected.prepare(request)
    expected.run([generation])
    with Image.open(tmp_path / "grid.png") as grid:
        assert np.array_equal(np.asarray(grid)[64:], np.asarray(expected.decode([generation])[0]))
    assert bare.adapter is None


def test_training_on_one_batch_lowers_its_loss(frozen):
    """A few optimizer steps of the adapter alone fit the batch better than the frozen UNet."""
    torch.manual_seed(0)
    adapter = RealCustomAdapter.for_unet(frozen.pipeline.unet, vision_dim=64, head_dim=32)
    encoded = frozen.encode([sample(), sample(caption="a cat")])
    config = ObjectiveConfig(drop_text=0, drop_vision=0, drop_both=0)
    numbers = draw(config, (4, 16, 16), range(2), seed=0, step=0, batch_size=2, num_timesteps=1000)
    objective, optimizer = _objective(frozen), torch.optim.AdamW(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        with objective.attending(adapter(encoded.features), numbers.keep_vision):
            loss = objective.losses(encoded, numbers).mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
