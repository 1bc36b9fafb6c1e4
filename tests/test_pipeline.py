"""Properties of the whole pipeline at toy size."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from tiny import subject_image, tiny_pipeline, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from realcustom import RealCustomPipeline, Request, Subject
from realcustom.attention import AttentionLayers
from realcustom.denoiser import Denoiser
from realcustom.scheduler import AlternatingDPMSolverScheduler

PROMPT = "a dog and a cat"


@pytest.fixture(scope="module")
def pipeline() -> RealCustomPipeline:
    return tiny_pipeline()


def dog(color="red", **settings) -> Subject:
    return Subject(image=subject_image(color), target_phrase="dog", **settings)


def cat(color="blue", **settings) -> Subject:
    return Subject(image=subject_image(color), target_phrase="cat", **settings)


def run(pipeline, generations) -> list[torch.Tensor]:
    """All generations to their end, those still under way stepping together."""
    while active := [g for g in generations if not g.done]:
        pipeline.step(active)
    return [g.latents for g in generations]


def latents(pipeline, request, **options) -> torch.Tensor:
    return run(pipeline, [pipeline.prepare(request, **options)])[0]


def test_without_subjects_it_is_plain_diffusers(pipeline):
    """The UNet with our processors equals the same UNet with diffusers' own."""
    request = Request(prompt=PROMPT, seed=3)
    ours = latents(pipeline, request)
    from diffusers.models.attention_processor import AttnProcessor2_0

    before = dict(pipeline.unet.attn_processors)
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    try:
        theirs = latents(pipeline, request)
    finally:
        pipeline.unet.set_attn_processor(before)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_zero_mask_is_exactly_the_text_alone(pipeline):
    subject = Request(prompt=PROMPT, subjects=(dog(),), seed=3)
    alone = Request(prompt=PROMPT, seed=3)
    assert torch.equal(latents(pipeline, subject, masks=torch.zeros(1, 8, 8)), latents(pipeline, alone))


def test_the_reference_matters_and_more_inside_its_mask(pipeline):
    mask = torch.zeros(1, 8, 8)
    mask[:, :4, :4] = 1
    first, second = (
        latents(pipeline, Request(prompt=PROMPT, subjects=(dog(c),), seed=3), masks=mask) for c in ("red", "green")
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
def test_a_mixed_batch_gives_each_the_image_it_gets_alone(preset):
    """Different steps, subjects, scopes, T_stop, CFG, schedulers and seeds advance in one call."""
    pipeline = tiny_pipeline(preset=preset)
    schedulers = [
        None,
        EulerDiscreteScheduler.from_config(pipeline.scheduler.config),
        DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config),
        EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config),
        None,
        AlternatingDPMSolverScheduler(prediction_type="v_prediction"),
    ]
    alone = [latents(pipeline, r, scheduler=s) for r, s in zip(mixed_requests(), schedulers, strict=True)]
    made = [pipeline.prepare(r, scheduler=s) for r, s in zip(mixed_requests(), schedulers, strict=True)]
    pipeline.step(made[:1])  # joins must work in mid-flight too
    pipeline.step(made[:3])
    for ours, expected in zip(run(pipeline, made), alone, strict=True):
        assert (ours - expected).abs().max() <= 1e-4


def test_the_same_seed_is_the_same_image_and_another_is_not(pipeline):
    one, two, other = (np.asarray(pipeline(PROMPT, subjects=[dog()], seed=s).images[0]).astype(int) for s in (5, 5, 6))
    assert np.array_equal(one, two)
    assert np.abs(one - other).max() > 3


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({}, [1, 1, 1]),
        ({"mask_interval": 2}, [1, 0, 1]),
        ({"mask_source": "generation_branch"}, [1, 0, 0]),
    ],
)
def test_the_guidance_branch_runs_when_it_must(pipeline, monkeypatch, settings, expected):
    """Up to T_stop at every step, or every k-th, or only at the first; without subjects never."""
    calls = []
    original = Denoiser.guidance_branch
    monkeypatch.setattr(Denoiser, "guidance_branch", lambda s, g: (calls.append(1), original(s, g)))
    generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), early_stop_step=3, **settings))
    for number in [*expected, 0]:
        calls.clear()
        pipeline.step([generation])
        assert len(calls) == number
    latents(pipeline, Request(prompt=PROMPT))
    assert not calls


def test_masks_of_the_generation_branch_follow_it(pipeline):
    """Without a row of their own masks still change until T_stop, and not after; no UNet call is added."""
    request = Request(
        prompt=PROMPT,
        subjects=(dog(),),
        seed=3,
        num_inference_steps=5,
        early_stop_step=3,
        mask_source="generation_branch",
    )
    generation, masks = pipeline.prepare(request), []
    while not generation.done:
        pipeline.step([generation])
        masks.append(generation.guidance_masks)
    # a step records the mask of the next one
    assert not torch.equal(masks[0], masks[1]) and masks[1] is masks[2] is masks[3] is masks[4]


def test_with_a_zero_mask_both_branches_attend_alike(pipeline):
    """The approximation is exact where the reference has no effect: both rows then see the same text and image."""
    generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=3, mask_source="generation_branch"))
    pipeline.denoiser.guidance_branch([generation])
    exact = generation.guidance_masks
    generation.set_masks(torch.zeros_like(exact))
    pipeline.denoiser.generation_branch([generation])
    assert torch.allclose(generation.guidance_masks, exact, atol=1e-5)


def test_after_early_stop_the_last_mask_stays(pipeline):
    generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), early_stop_step=2))
    masks = []
    while not generation.done:
        pipeline.step([generation])
        masks.append(generation.guidance_masks)
    assert not torch.equal(masks[0], masks[1])
    assert masks[1] is masks[2] is masks[3]


def test_guidance_scale_one_runs_no_unconditional_row(pipeline, monkeypatch):
    rows = []
    original = Denoiser.predict
    monkeypatch.setattr(Denoiser, "predict", lambda s, r, *a, **k: (rows.append(len(r)), original(s, r, *a, **k))[1])
    latents(pipeline, Request(prompt=PROMPT, guidance_scale=1.0, num_inference_steps=2))
    assert rows == [1, 1]


def test_a_reference_is_encoded_once(pipeline, monkeypatch):
    pipeline.clear_caches()
    calls = []
    forward = pipeline.adapter.forward
    monkeypatch.setattr(pipeline.adapter, "forward", lambda f: (calls.append(1), forward(f))[1])
    latents(pipeline, Request(prompt=PROMPT, subjects=(dog("navy"), cat("navy"))))
    latents(pipeline, Request(prompt="a dog", subjects=(dog("navy"),), seed=9))
    assert len(calls) == 1


def test_texts_are_projected_once_and_not_in_every_step(pipeline, monkeypatch):
    """No step asks a text cross-attention layer for keys or values; a known prompt is not projected again either."""
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


def test_texts_projected_before_are_those_projected_in_the_layers(pipeline):
    request = Request(prompt=PROMPT, negative_prompt="a cat", subjects=(dog(), cat()), seed=3)
    before = latents(pipeline, request)
    pipeline.clear_caches()
    pipeline.denoiser.allow_early_exit = False
    try:
        in_layers = latents(pipeline, request)
    finally:
        pipeline.denoiser.allow_early_exit = True
        pipeline.clear_caches()
    assert torch.allclose(before, in_layers, atol=1e-5)


def test_a_pipeline_that_changes_its_type_forgets_what_it_knew():
    """Keys and values of the former type would not fit the weights of the new one."""
    pipeline = tiny_pipeline()
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=0, num_inference_steps=1)
    latents(pipeline, request)
    pipeline.to(torch.bfloat16)
    assert latents(pipeline, request).isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel, self.operation = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.numel() > self.numel and not made._is_view():
                self.numel, self.operation = made.numel(), str(func)
        return out


def test_no_step_makes_an_attention_map(pipeline):
    """The largest tensor of a step, guidance branch and two subjects included, is no larger than plain text-to-image's.

    A single head's self-attention map of one row alone would be four times as large.
    """
    sizes = {}
    for name, subjects in (("plain", ()), ("two subjects", (dog(), cat()))):
        generation = pipeline.prepare(Request(prompt=PROMPT, subjects=subjects, seed=0, height=256, width=256))
        with LargestTensor() as largest:
            pipeline.step([generation])
        sizes[name] = largest.numel
    positions = (256 // 4 // 2) ** 2
    assert sizes["two subjects"] == sizes["plain"] < positions**2 / 4


class Queries(TorchDispatchMode):
    """Counts the positions that ask fused attention with `num_keys` keys."""

    def __init__(self, num_keys):
        super().__init__()
        self.num_keys, self.count = num_keys, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and args[1].shape[-2] == self.num_keys:
            self.count += args[0].shape[0] * args[0].shape[-2]
        return func(*args, **(kwargs or {}))


def test_visual_attention_costs_what_its_masks_cover(pipeline):
    """One tenth of the largest level's positions ask for one tenth of its attention; nobody asks for the rest."""
    counts = []
    for scope in (1.0, 0.1):
        request = Request(prompt=PROMPT, subjects=(dog(scope_ratio=scope),), seed=0, height=256, width=256)
        generation = pipeline.prepare(request)
        pipeline.denoiser.guidance_branch([generation])
        (reference,) = generation.references
        with Queries(num_keys=next(iter(reference.values()))[0].shape[1]) as queries:
            pipeline.denoiser.generation_branch([generation])
        counts.append(queries.count)
    assert 0.1 * counts[0] < counts[1] < 0.5 * counts[0]


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("height,width", [(64, 96), (40, 72), (104, 56), (36, 44), (8, 120)])
def test_any_multiple_of_the_grid_works(preset, height, width):
    """Also where a level's size is odd and halving it rounds up; this model's grid is 4 px."""
    pipeline = tiny_pipeline(preset=preset)
    output = pipeline(PROMPT, subjects=[dog(), cat()], height=height, width=width, num_inference_steps=2)
    assert output.images[0].size == (width, height)
    assert output.masks[0].shape[0] == 2


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"height": 65}, "height is 65 px"),
        ({"output_type": "png"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images"),
    ],
)
def test_bad_calls_are_refused(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline(PROMPT, **settings)


def test_saving_and_loading_gives_the_same_image(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    again = RealCustomPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=1)
    assert torch.allclose(latents(pipeline, request), latents(again, request), atol=1e-5)
    assert again.realcustom_config == pipeline.realcustom_config


def test_the_callback_sees_and_may_replace_latents(pipeline):
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if index == 3 else {}

    output = pipeline(PROMPT, callback_on_step_end=callback, output_type="latent", num_images_per_prompt=2)
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert seen[0][1] > seen[-1][1]
    assert output.images.shape == (2, 4, 16, 16)
    assert output.images.abs().max() == 0


@pytest.mark.parametrize("output_type,shape", [("np", (2, 64, 64, 3)), ("pt", (2, 3, 64, 64))])
def test_output_types(pipeline, output_type, shape):
    output = pipeline(PROMPT, output_type=output_type, num_images_per_prompt=2, num_inference_steps=1)
    assert tuple(output.images.shape) == shape


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_half_precision_vae_that_overflows_decodes_in_single(force_upcast):
    pipeline = tiny_pipeline()
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    pipeline.vae.to(torch.float16)
    made = pipeline.decoder.decode(torch.zeros(4, 16, 16), "np")
    assert np.isfinite(made).all()
    assert pipeline.vae.dtype == (torch.float32 if force_upcast else torch.float16)


def test_processors_can_be_taken_out_again():
    unet = tiny_unet()
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    layers = AttentionLayers(unet)
    assert all(type(processor) is not before[name] for name, processor in unet.attn_processors.items())
    layers.remove()
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before


def test_guidance_leaves_the_unet_early_and_nothing_stays_connected(pipeline):
    """The guidance pass never reaches the UNet's end, and a later plain call neither records nor leaves."""
    reached = []
    hook = pipeline.unet.conv_out.register_forward_hook(lambda *_: reached.append(1))
    try:
        generation = pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),), seed=0))
        pipeline.denoiser.guidance_branch([generation])
        assert not reached
        pipeline.denoiser.generation_branch([generation])
        assert reached == [1]
    finally:
        hook.remove()
    for processor in pipeline.unet.attn_processors.values():
        assert processor.text is None and processor.vision is None and processor.recording is None


def test_references_are_copied_for_one_transformer_at_a_time(pipeline):
    """Inside each transformer its own text layers see texts and references and no others do; so copies stay few."""
    processors = {name.removesuffix(".processor"): p for name, p in pipeline.unet.attn_processors.items()}
    transformers = {name.split(".transformer_blocks.")[0] for name in processors}
    seeing = {}
    look = lambda name: lambda *_: seeing.update({name: {n for n, p in processors.items() if p.vision or p.text}})
    hooks = [
        pipeline.unet.get_submodule(f"{name}.transformer_blocks.0").register_forward_hook(look(name))
        for name in transformers
    ]
    hooks.append(pipeline.unet.conv_out.register_forward_hook(look("conv_out")))
    try:
        latents(pipeline, Request(prompt=PROMPT, subjects=(dog(), cat()), seed=0, num_inference_steps=1))
    finally:
        for hook in hooks:
            hook.remove()
    for name in transformers:
        assert seeing[name] == {n for n in processors if n.startswith(name + ".") and n.endswith("attn2")} != set()
    assert seeing["conv_out"] == set()
