"""Properties of the complete pipeline at toy size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDXLCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny import PROMPT, cat, dog, latents_of, run, tiny_pipeline, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from realcustom import RealCustomPipeline, Request
from realcustom.attention import AttentionLayers
from realcustom.denoiser import Denoiser
from realcustom.scheduler import AlternatingDPMSolverScheduler


@pytest.fixture(scope="module")
def pipeline() -> RealCustomPipeline:
    return tiny_pipeline()


def test_unet_equals_unet_with_stock_attention(pipeline):
    """Outside of a context, a UNet with this project's attention processors equals the UNet with those of diffusers."""
    generation = pipeline.prepare(Request(prompt=PROMPT, seed=3))
    inputs = dict(
        sample=generation.latents[None],
        timestep=generation.timestep,
        encoder_hidden_states=generation.text.embeds[None],
        added_cond_kwargs={"text_embeds": generation.text.pooled[None], "time_ids": generation.time_ids[None]},
    )
    with torch.no_grad():
        computed = pipeline.unet(**inputs).sample
        processors = dict(pipeline.unet.attn_processors)
        pipeline.unet.set_attn_processor(AttnProcessor2_0())
        try:
            stock = pipeline.unet(**inputs).sample
        finally:
            pipeline.unet.set_attn_processor(processors)
    assert torch.allclose(computed, stock, atol=1e-5)
    predicted, _ = pipeline.denoiser.predict([generation], [generation.text])
    assert torch.allclose(predicted, stock, atol=1e-5)


def test_zero_mask_equals_text_only(pipeline):
    """A subject with an all-zero mask has no effect; the result is bit-identical to text-to-image."""
    with_subject = Request(prompt=PROMPT, subjects=(dog(),), seed=3)
    text_only = Request(prompt=PROMPT, seed=3)
    zeros = torch.zeros(1, 8, 8)
    assert torch.equal(latents_of(pipeline, with_subject, masks=zeros), latents_of(pipeline, text_only))


def test_reference_has_more_effect_inside_its_mask(pipeline):
    """Replacing the reference changes the latents inside the mask more than twice as much as outside."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4] = 1
    first, second = (
        latents_of(pipeline, Request(prompt=PROMPT, subjects=(dog(color),), seed=3), masks=mask)
        for color in ("red", "green")
    )
    change = (first - second).abs().mean(0)
    assert change[:8, :8].mean() > 2 * change[8:, 8:].mean()


def mixed_requests() -> list[Request]:
    return [
        Request(prompt=PROMPT, subjects=(dog(),), seed=1),
        Request(prompt="the cat", subjects=(cat(scope_ratio=0.6),), seed=2, early_stop_step=1, guidance_scale=1.0),
        Request(prompt=PROMPT, subjects=(dog("green"), cat()), seed=3, num_inference_steps=6),
        Request(prompt=PROMPT, seed=4, negative_prompt="ugly", num_inference_steps=2, guidance_scale=5.0),
        Request(prompt=PROMPT, subjects=(cat(),), seed=5, mask_source="generation_branch", early_stop_step=3),
        Request(prompt=PROMPT, subjects=(dog(), cat()), seed=6, mask_interval=2, early_stop_step=4),
    ]


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_mixed_batch_matches_single_runs(preset):
    """Generations with different steps, subjects, scopes, T_stop, CFG, schedulers and seeds share UNet calls.

    Each result equals that of a run alone, also for generations that join later than others.
    """
    pipeline = tiny_pipeline(preset=preset)
    schedulers = [
        None,
        EulerDiscreteScheduler.from_config(pipeline.scheduler.config),
        DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config),
        EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config),
        None,
        AlternatingDPMSolverScheduler(prediction_type="v_prediction"),
    ]
    single = [latents_of(pipeline, r, scheduler=s) for r, s in zip(mixed_requests(), schedulers, strict=True)]
    generations = [pipeline.prepare(r, scheduler=s) for r, s in zip(mixed_requests(), schedulers, strict=True)]
    pipeline.step(generations[:1])  # the others join at different steps of the first
    pipeline.step(generations[:3])
    for batched, expected in zip(run(pipeline, generations), single, strict=True):
        assert (batched - expected).abs().max() <= 1e-4


def test_run_matches_single_runs_for_mixed_sizes_and_steps(pipeline):
    """`run` advances generations of different sizes and numbers of steps; each result equals that of a run alone.

    Every generation takes exactly its own number of steps, and `on_step` is called once per round.
    """
    requests = [
        Request(prompt=PROMPT, subjects=(dog(),), seed=1, num_inference_steps=3),
        Request(prompt=PROMPT, subjects=(cat(),), seed=2, num_inference_steps=5, height=48, width=80),
        Request(prompt=PROMPT, seed=3, num_inference_steps=1, height=48, width=80),
        Request(prompt=PROMPT, subjects=(dog("green"), cat()), seed=4, num_inference_steps=4),
    ]
    single = [latents_of(pipeline, request) for request in requests]
    generations = [pipeline.prepare(request) for request in requests]
    step_indices = []
    pipeline.run(generations, on_step=lambda: step_indices.append([g.step_index for g in generations]))
    assert all(g.done for g in generations)
    assert step_indices == [[min(3, i), min(5, i), 1, min(4, i)] for i in range(1, 6)]
    for generation, expected in zip(generations, single, strict=True):
        assert generation.latents.shape == expected.shape
        assert (generation.latents - expected).abs().max() <= 1e-4


def test_seed_determines_the_image(pipeline):
    """Equal seeds yield identical images; another seed yields a different image."""
    first, second, other = (
        np.asarray(pipeline(PROMPT, subjects=[dog()], seed=seed).images[0]).astype(int) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, second)
    assert np.abs(first - other).max() > 3


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({}, [1, 1, 1]),
        ({"mask_interval": 2}, [1, 0, 1]),
        ({"mask_source": "generation_branch"}, [1, 0, 0]),
    ],
)
def test_guidance_branch_runs_only_when_needed(pipeline, monkeypatch, settings, expected):
    """Before T_stop, the guidance branch runs in every step, every k-th step, or only in the first one.

    After T_stop and without subjects it does not run.
    """
    calls = []
    original = Denoiser.guidance_branch
    monkeypatch.setattr(Denoiser, "guidance_branch", lambda s, g: (calls.append(1), original(s, g)))
    generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), early_stop_step=3, **settings))
    for number in [*expected, 0]:
        calls.clear()
        pipeline.step([generation])
        assert len(calls) == number
    latents_of(pipeline, Request(prompt=PROMPT))
    assert not calls


def masks_per_step(pipeline, request: Request) -> list[torch.Tensor]:
    """The guidance masks after each step."""
    generation, masks = pipeline.prepare(request), []
    pipeline.run([generation], on_step=lambda: masks.append(generation.guidance_masks))
    return masks


def test_masks_of_the_generation_branch_change_until_early_stop(pipeline):
    """With `mask_source="generation_branch"`, masks change until T_stop and then stay the same."""
    masks = masks_per_step(
        pipeline,
        Request(
            prompt=PROMPT,
            subjects=(dog(),),
            seed=3,
            num_inference_steps=5,
            early_stop_step=3,
            mask_source="generation_branch",
        ),
    )
    # A step records the mask of the next step.
    assert not torch.equal(masks[0], masks[1]) and masks[1] is masks[2] is masks[3] is masks[4]


def test_last_mask_is_reused_after_early_stop(pipeline):
    """Masks change in each step before T_stop; later steps reuse the last mask."""
    masks = masks_per_step(pipeline, Request(prompt=PROMPT, subjects=(dog(),), early_stop_step=2))
    assert not torch.equal(masks[0], masks[1])
    assert masks[1] is masks[2] is masks[3]


def test_both_mask_sources_agree_for_a_zero_mask(pipeline):
    """The mask of the generation branch is exact if the reference has no effect: both rows have equal inputs then."""
    generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=3, mask_source="generation_branch"))
    pipeline.denoiser.guidance_branch([generation])
    exact = generation.guidance_masks
    generation.set_masks(torch.zeros_like(exact))
    pipeline.denoiser.generation_branch([generation])
    assert torch.allclose(generation.guidance_masks, exact, atol=1e-5)


def test_guidance_scale_one_has_no_unconditional_row(pipeline, monkeypatch):
    """With guidance_scale 1, a step computes a single row."""
    rows = []
    original = Denoiser.predict
    monkeypatch.setattr(Denoiser, "predict", lambda s, r, *a, **k: (rows.append(len(r)), original(s, r, *a, **k))[1])
    latents_of(pipeline, Request(prompt=PROMPT, guidance_scale=1.0, num_inference_steps=2))
    assert rows == [1, 1]


def test_references_are_encoded_once(pipeline, monkeypatch):
    """Equal reference images are encoded once, within a request and across requests."""
    pipeline.clear_caches()
    calls = []
    forward = pipeline.adapter.forward
    monkeypatch.setattr(pipeline.adapter, "forward", lambda f, **options: (calls.append(1), forward(f, **options))[1])
    latents_of(pipeline, Request(prompt=PROMPT, subjects=(dog("navy"), cat("navy"))))
    latents_of(pipeline, Request(prompt="a dog", subjects=(dog("navy"),), seed=9))
    assert len(calls) == 1


def test_text_keys_and_values_are_computed_once(pipeline, monkeypatch):
    """Text keys and values are computed once per text, not in every step and not again for a cached prompt."""
    pipeline.clear_caches()
    calls = []
    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    for layer in layers:
        monkeypatch.setattr(layer, "forward", lambda x, f=layer.forward: calls.append(x.shape) or f(x))
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=0)
    generation = pipeline.prepare(request)
    assert len(calls) == 2 * len(layers)  # the prompt and the empty negative prompt
    pipeline.step([generation])
    pipeline.step([generation, pipeline.prepare(request)])
    assert len(calls) == 2 * len(layers)


def test_precomputed_text_keys_and_values_equal_those_of_the_layers(pipeline):
    """The result is the same whether text keys and values are computed in advance or in each layer call."""
    request = Request(prompt=PROMPT, negative_prompt="a cat", subjects=(dog(), cat()), seed=3)
    precomputed = latents_of(pipeline, request)
    generation = pipeline.prepare(request)
    generation.text, generation.negative_text = (
        replace(text, keys_values=None) for text in (generation.text, generation.negative_text)
    )
    (in_layers,) = run(pipeline, [generation])
    assert torch.allclose(precomputed, in_layers, atol=1e-5)


def test_changing_the_dtype_clears_the_caches():
    """After `to(dtype)`, a cached request runs in the new dtype: keys and values of the old dtype are discarded."""
    pipeline = tiny_pipeline()
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=0, num_inference_steps=1)
    latents_of(pipeline, request)
    pipeline.to(torch.bfloat16)
    assert latents_of(pipeline, request).isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation allocates."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, torch.Tensor)]
            self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return out


def test_no_attention_map_is_materialized(pipeline):
    """The largest tensor of a step with guidance branch and two subjects is no larger than that of text-to-image.

    The self-attention map of a single head and row would be four times larger.
    """
    sizes = {}
    for name, subjects in (("text_to_image", ()), ("two subjects", (dog(), cat()))):
        generation = pipeline.prepare(Request(prompt=PROMPT, subjects=subjects, seed=0, height=256, width=256))
        with LargestTensor() as largest:
            pipeline.step([generation])
        sizes[name] = largest.numel
    positions = (256 // 4 // 2) ** 2
    assert sizes["two subjects"] == sizes["text_to_image"] < positions**2 / 4


class QueryCounter(TorchDispatchMode):
    """Counts the query positions of fused attention calls with `num_keys` keys."""

    def __init__(self, num_keys):
        super().__init__()
        self.num_keys, self.count = num_keys, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and args[1].shape[-2] == self.num_keys:
            self.count += args[0].shape[0] * args[0].shape[-2]
        return func(*args, **(kwargs or {}))


def test_cost_of_visual_attention_follows_the_mask_area(pipeline):
    """Only positions inside a mask are queries of visual attention: a scope of 0.1 needs far fewer than a scope of 1.

    At smaller attention resolutions, a resized mask covers a larger fraction than 0.1.
    """
    counts = []
    for scope in (1.0, 0.1):
        request = Request(prompt=PROMPT, subjects=(dog(scope_ratio=scope),), seed=0, height=256, width=256)
        generation = pipeline.prepare(request)
        pipeline.denoiser.guidance_branch([generation])
        (reference,) = generation.references
        with QueryCounter(num_keys=next(iter(reference.values()))[0].shape[1]) as queries:
            pipeline.denoiser.generation_branch([generation])
        counts.append(queries.count)
    assert 0.1 * counts[0] < counts[1] < 0.5 * counts[0]


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("height,width", [(64, 96), (40, 72), (104, 56), (36, 44), (8, 120)])
def test_any_multiple_of_the_scale_factor_is_a_valid_size(preset, height, width):
    """Sizes that are multiples of 4 px work, including those where a level has an odd size and halving rounds up."""
    pipeline = tiny_pipeline(preset=preset)
    output = pipeline(PROMPT, subjects=[dog(), cat()], height=height, width=width, num_inference_steps=2)
    assert output.images[0].size == (width, height)
    assert output.masks[0].shape[0] == 2


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"height": 65}, "height is 65 px"),
        ({"output_type": "png"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt is None"),
        ({"subjects": 3}, "subjects is 3; give a list of Subject objects"),
    ],
)
def test_invalid_settings_raise(pipeline, settings, message):
    """An invalid setting of the call raises a ValueError that names it."""
    with pytest.raises(ValueError, match=message):
        pipeline(PROMPT, **settings)


def test_save_and_load_round_trip(pipeline, tmp_path):
    """A saved and reloaded pipeline has the same configuration and generates the same latents."""
    pipeline.save_pretrained(tmp_path / "model")
    loaded = RealCustomPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=1)
    assert torch.allclose(latents_of(pipeline, request), latents_of(loaded, request), atol=1e-5)
    assert loaded.realcustom_config == pipeline.realcustom_config


def test_callback_receives_and_can_replace_latents(pipeline):
    """`callback_on_step_end` is called after each step with the timestep; returned latents replace the current ones."""
    calls = []

    def callback(pipe, index, timestep, values):
        calls.append((index, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if index == 3 else {}

    output = pipeline(PROMPT, callback_on_step_end=callback, output_type="latent", num_images_per_prompt=2)
    assert [index for index, _ in calls] == [0, 1, 2, 3]
    assert calls[0][1] > calls[-1][1]
    assert output.images.shape == (2, 4, 16, 16)
    assert output.images.abs().max() == 0


def test_latents_of_the_last_callback_are_decoded():
    """Latents that a callback returns after the last step are the result, also with preset "release"."""
    pipeline = tiny_pipeline(preset="release")
    zeros = lambda pipe, index, timestep, values: {"latents": values["latents"] * (index < 3)}
    assert pipeline(PROMPT, seed=1, callback_on_step_end=zeros, output_type="latent").images.abs().max() == 0
    same = lambda pipe, index, timestep, values: values
    assert torch.equal(
        pipeline(PROMPT, seed=1, callback_on_step_end=same, output_type="latent").images,
        pipeline(PROMPT, seed=1, output_type="latent").images,
    )


def test_invalid_latents_of_a_callback_raise(pipeline):
    crop = lambda pipe, index, timestep, values: {"latents": values["latents"][..., :8]}
    with pytest.raises(ValueError, match=r"latents of shape \[1, 4, 16, 8\].*\[1, 4, 16, 16\]"):
        pipeline(PROMPT, callback_on_step_end=crop)


@pytest.mark.parametrize("scale", [1.5, 0.0])
def test_guidance_scale_set_by_a_callback_equals_stock(scale):
    """The steps after a callback that sets `pipe._guidance_scale` use it; 0 ends guidance."""
    pipeline = tiny_pipeline()
    stock = StableDiffusionXLPipeline.from_pipe(pipeline, force_zeros_for_empty_prompt=False)
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((pipe.guidance_scale, pipe.num_timesteps))
        if index == 1:
            pipe._guidance_scale = scale
            if scale <= 1 and pipe is stock:
                values = {name: value[-1:] for name, value in values.items()}
        return values

    images = []
    for pipe, inputs in ((stock, ["prompt_embeds", "add_text_embeds", "add_time_ids"]), (pipeline, ["latents"])):
        pipe.set_progress_bar_config(disable=True)
        options = dict(num_inference_steps=4, guidance_scale=3.0, height=64, width=64, output_type="latent")
        options |= dict(generator=torch.Generator().manual_seed(1), callback_on_step_end_tensor_inputs=inputs)
        images.append(pipe("a dog", callback_on_step_end=callback, **options).images)
    assert torch.allclose(*images, atol=1e-4)
    assert seen == [(3.0, 4), (3.0, 4), (scale, 4), (scale, 4)] * 2


def test_guidance_that_cannot_begin_raises(pipeline):
    """A callback cannot begin guidance, because the negative prompt was not encoded, nor set it to NaN."""
    for scale, message in ((3.0, "above 1"), (float("nan"), "finite")):

        def callback(pipe, index, timestep, values, scale=scale):
            pipe._guidance_scale = scale

        with pytest.raises(ValueError, match=message):
            pipeline(PROMPT, guidance_scale=1, callback_on_step_end=callback)


def test_callbacks_of_diffusers_that_need_embeddings_are_refused(pipeline):
    """The error comes before the first step and names the alternative."""
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    for callback in (cutoff, MultiPipelineCallbacks([cutoff])):
        with pytest.raises(ValueError, match=r"add_text_embeds.*pipe\._guidance_scale"):
            pipeline(PROMPT, callback_on_step_end=callback)


def test_single_subject_needs_no_list(pipeline):
    """`subjects=Subject(...)` equals a list of one."""
    images = [pipeline(PROMPT, subjects=s, seed=1, output_type="latent").images for s in (dog(), [dog()])]
    assert torch.equal(*images)


@pytest.mark.parametrize("output_type,shape", [("np", (2, 64, 64, 3)), ("pt", (2, 3, 64, 64))])
def test_output_types(pipeline, output_type, shape):
    """Array output types have the shapes of the diffusers convention."""
    output = pipeline(PROMPT, output_type=output_type, num_images_per_prompt=2, num_inference_steps=1)
    assert tuple(output.images.shape) == shape


@pytest.mark.parametrize("force_upcast", [True, False])
def test_vae_with_force_upcast_decodes_in_fp32(force_upcast):
    """A half-precision VAE is converted to fp32 exactly if its configuration has `force_upcast`."""
    pipeline = tiny_pipeline()
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    pipeline.vae.to(torch.float16)
    pixels = pipeline.decoder.decode(torch.zeros(4, 16, 16), "np")
    assert np.isfinite(pixels).all()
    assert pipeline.vae.dtype == (torch.float32 if force_upcast else torch.float16)


def test_attention_processors_can_be_removed():
    """`AttentionLayers.remove` restores the processors that were installed before."""
    unet = tiny_unet()
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    layers = AttentionLayers(unet)
    assert all(type(processor) is not before[name] for name, processor in unet.attn_processors.items())
    layers.remove()
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before


def test_guidance_branch_ends_early_and_leaves_no_state(pipeline):
    """The guidance branch does not run the last layer of the UNet. After each call all processors are empty."""
    calls = []
    hook = pipeline.unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    try:
        generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=0))
        pipeline.denoiser.guidance_branch([generation])
        assert not calls
        pipeline.denoiser.generation_branch([generation])
        assert calls == [1]
    finally:
        hook.remove()
    for processor in pipeline.unet.attn_processors.values():
        assert processor.text is None and processor.vision is None and processor.recording is None


def test_keys_and_values_are_stacked_for_one_transformer_at_a_time(pipeline):
    """While a transformer runs, exactly its own cross-attention layers hold stacked keys and values.

    This bounds the memory of the copies.
    """
    processors = {name.removesuffix(".processor"): p for name, p in pipeline.unet.attn_processors.items()}
    transformers = {name.split(".transformer_blocks.")[0] for name in processors}
    set_layers = {}

    def record_set_layers(name: str):
        return lambda *_: set_layers.update({name: {n for n, p in processors.items() if p.vision or p.text}})

    hooks = [
        pipeline.unet.get_submodule(f"{name}.transformer_blocks.0").register_forward_hook(record_set_layers(name))
        for name in transformers
    ]
    hooks.append(pipeline.unet.conv_out.register_forward_hook(record_set_layers("conv_out")))
    try:
        latents_of(pipeline, Request(prompt=PROMPT, subjects=(dog(), cat()), seed=0, num_inference_steps=1))
    finally:
        for hook in hooks:
            hook.remove()
    for name in transformers:
        assert set_layers[name] == {n for n in processors if n.startswith(name + ".") and n.endswith("attn2")} != set()
    assert set_layers["conv_out"] == set()


@pytest.mark.parametrize("sampler", [DDIMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_early_stop_counts_steps_and_not_unet_calls(pipeline, sampler):
    """With T_stop at half of the steps, the last mask is computed near the middle of the schedule for any sampler."""
    scheduler = sampler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    request = Request(prompt=PROMPT, subjects=(dog(),), num_inference_steps=10, early_stop_step=0.5, seed=1)
    generation = pipeline.prepare(request, scheduler=scheduler)
    last = max(call for call in range(generation.num_steps) if generation.mask_due(call))
    assert 440 <= float(generation.scheduler.timesteps[last]) <= 650


@pytest.mark.parametrize(
    "masks,message",
    [
        (torch.ones(8, 8), r"shape \[8, 8\].*\[1, h, w\]"),
        (torch.ones(2, 8, 8), r"shape \[2, 8, 8\]"),
        (torch.full((1, 8, 8), 255, dtype=torch.uint8), r"torch\.uint8.*/ 255"),
        (torch.full((1, 8, 8), float("nan")), "finite"),
        (torch.full((1, 8, 8), 1.5), r"\[0, 1\]"),
    ],
)
def test_invalid_masks_raise(pipeline, masks, message):
    """Masks of a wrong shape, type or range raise an error instead of giving an image without its subject."""
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=0), masks=masks)


def test_the_seed_determines_the_noise_of_dpm_sde():
    """DPM++ SDE, which draws noise from its own seed, gives one image per seed, alone and in a batch."""
    pytest.importorskip("torchsde")
    pipeline = tiny_pipeline(scheduler=DPMSolverSDEScheduler(beta_schedule="scaled_linear"))
    first, again, other = (
        latents_of(pipeline, Request(prompt=PROMPT, subjects=(dog(),), seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and (first - other).abs().max() > 1
    together = run(pipeline, [pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=s)) for s in (1, 2)])
    for batched, alone in zip(together, (first, other)):
        assert torch.allclose(batched, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", [DPMSolverSDEScheduler, CosineDPMSolverMultistepScheduler])
def test_images_that_share_a_generator_have_their_own_sde_noise(sampler):
    """Two images of a call from equal latents differ, and the first equals the one of a call for one image."""
    pytest.importorskip("torchsde")
    pipeline = tiny_pipeline(scheduler=sampler())
    call = lambda n: (
        pipeline(
            PROMPT,
            latents=torch.zeros(n, 4, 16, 16),
            generator=torch.Generator().manual_seed(3),
            num_images_per_prompt=n,
            output_type="latent",
        ).images
    )
    first, second = call(2)
    assert (first - second).abs().max() > 1e-2
    assert torch.allclose(first, call(1)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", [DDIMScheduler, TCDScheduler])
@pytest.mark.parametrize("eta", [None, 0.3])
def test_eta_equals_stock(sampler, eta):
    """`eta` is passed to schedulers that have it; the default is 0, as in the stock pipeline."""
    pipeline = tiny_pipeline(scheduler=sampler())
    stock = StableDiffusionXLPipeline.from_pipe(pipeline, force_zeros_for_empty_prompt=False)
    images = []
    for pipe in (stock, pipeline):
        pipe.set_progress_bar_config(disable=True)
        options = dict(num_inference_steps=3, guidance_scale=3.0, height=64, width=64, output_type="latent")
        options |= {} if eta is None else {"eta": eta}
        images.append(pipe("a dog", generator=torch.Generator().manual_seed(1), **options).images)
    assert torch.allclose(*images, atol=1e-3)


def test_eta_without_effect_is_refused():
    pipeline = tiny_pipeline(scheduler=EulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler has no such argument; use DDIMScheduler"):
        pipeline(PROMPT, eta=0.3)
    with pytest.raises(ValueError, match=r"eta is 2; it must be in \[0, 1\]"):
        pipeline(PROMPT, eta=2)


def test_fp8_storage_equals_rounded_weights():
    """`enable_layerwise_casting` stores weights in fp8 and computes in bf16, as if the weights had been rounded."""
    pipeline, rounded = (tiny_pipeline().to(torch.bfloat16) for _ in range(2))
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stored = dict(pipeline.unet.named_parameters())
    assert sum(weight.dtype == torch.float8_e4m3fn for weight in stored.values()) > 50
    with torch.no_grad():
        for name, weight in rounded.unet.named_parameters():
            weight.copy_(weight.to(stored[name].dtype))
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=0, num_inference_steps=2)
    assert torch.allclose(latents_of(pipeline, request), latents_of(rounded, request), atol=1e-2)


@pytest.mark.parametrize("guidance_scale", [0, 0.0, 1])
def test_guidance_scale_zero_disables_guidance(pipeline, guidance_scale):
    """0 means no guidance, as the model cards of distilled checkpoints assume."""
    generation = pipeline.prepare(Request(prompt=PROMPT, guidance_scale=guidance_scale, seed=0))
    assert generation.negative_text is None


def test_numbers_of_numpy_are_accepted(pipeline):
    """NumPy integers and floats in a request become plain numbers."""
    request = Request(prompt=PROMPT, seed=np.int64(3), height=np.int32(64), guidance_scale=np.float32(2.0))
    assert (type(request.seed), type(request.height), type(request.guidance_scale)) == (int, int, float)


@pytest.mark.parametrize("name", ["clip_skip", "prompt_embeds", "cross_attention_kwargs", "original_size"])
def test_unsupported_arguments_of_diffusers_are_refused_by_name(pipeline, name):
    """The error names the argument and an alternative; None is accepted, as in diffusers."""
    with pytest.raises(ValueError, match=f"{name} is not supported; use"):
        pipeline(PROMPT, **{name: 1})
    pipeline(PROMPT, num_inference_steps=1, output_type="latent", **{name: None})
    with pytest.raises(TypeError, match="scheduelr"):
        pipeline(PROMPT, scheduelr=1)


def test_given_latents_replace_the_noise(pipeline):
    """`latents` equal to the noise of a seed give the image of that seed."""
    expected = pipeline(PROMPT, seed=3, output_type="latent").images
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pipeline(PROMPT, latents=noise, output_type="latent").images, expected)
    with pytest.raises(ValueError, match=r"shape \[4, 8, 8\].*\[4, 16, 16\]"):
        pipeline(PROMPT, latents=noise[..., :8, :8])


def test_interrupt_ends_the_loop(pipeline):
    """`pipe._interrupt = True` in the callback ends the loop after the current step."""
    steps = []

    def interrupt(pipe, index, timestep, values):
        steps.append(index)
        pipe._interrupt = index == 1
        return values

    pipeline(
        PROMPT, negative_prompt=None, callback_on_step_end=interrupt, callback_on_step_end_tensor_inputs=["latents"]
    )
    assert steps == [0, 1]
    assert pipeline(PROMPT, num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_custom_timesteps_set_the_number_of_steps():
    """A scheduler that supports custom timesteps uses them; one that does not raises an error."""
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    pipeline = tiny_pipeline(scheduler=scheduler)
    seen = []
    record = lambda pipe, index, timestep, values: seen.append(int(timestep)) or values
    pipeline(PROMPT, timesteps=[999, 500, 100], callback_on_step_end=record)
    assert seen == [999, 500, 100]
    with pytest.raises(ValueError, match="timestep"):
        tiny_pipeline()(PROMPT, timesteps=[999, 500])


def test_truncated_prompts_are_reported(pipeline, caplog):
    """A warning names the part of the prompt that the text encoder does not read."""
    pipeline.prepare(Request(prompt="a dog on a mat and a very red kite", seed=0))
    assert "the text encoder reads 24" in caplog.text and "'ite'" in caplog.text
    caplog.clear()
    pipeline.prepare(Request(prompt="a dog", seed=0))
    assert not caplog.text


@pytest.mark.parametrize("source", [RealCustomPipeline, StableDiffusionXLPipeline])
def test_from_pipe(source):
    """`from_pipe` shares the components of a RealCustom++ or SDXL pipeline."""
    pipeline = tiny_pipeline()
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    stock = StableDiffusionXLPipeline(**{name: getattr(pipeline, name) for name in names})
    converted = RealCustomPipeline.from_pipe(pipeline if source is RealCustomPipeline else stock)
    assert converted.unet is pipeline.unet and converted.vae is pipeline.vae
    assert (converted.adapter is pipeline.adapter) == (source is RealCustomPipeline)
    assert isinstance(StableDiffusionXLPipeline.from_pipe(pipeline), StableDiffusionXLPipeline)
