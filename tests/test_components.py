"""Components that users replace or change take effect, or fail with a sentence; no image is silently wrong."""

import threading
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from tiny import PROMPT, cat, dog, latents_of, stock_pipeline, tiny_pipeline

from realcustom import MethodConfig, RealCustomConfig, RealCustomPipeline, Request

REQUEST = Request(prompt=PROMPT, subjects=(dog(), cat()), seed=5, num_inference_steps=3)
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "image_encoder", "image_encoder_2", "adapter")


def rebuilt(pipeline: RealCustomPipeline) -> RealCustomPipeline:
    """A new pipeline of the same components, with nothing cached."""
    fresh = RealCustomPipeline(
        **pipeline.components,
        realcustom_config=pipeline.realcustom_config,
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
    )
    fresh.set_progress_bar_config(disable=True)
    return fresh


@pytest.mark.parametrize("how", ["assignment", "register_modules"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_replaced_component_takes_effect(name, how):
    """After replacing a component, the image equals that of a pipeline built with it."""
    pipeline, other = tiny_pipeline(0), tiny_pipeline(1)
    before = latents_of(pipeline, REQUEST)
    if how == "assignment":
        setattr(pipeline, name, getattr(other, name))
    else:
        pipeline.register_modules(**{name: getattr(other, name)})
    after = latents_of(pipeline, REQUEST)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, latents_of(rebuilt(pipeline), REQUEST), atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_from_pipe_gives_the_image_of_the_stock_pipeline(family):
    """A pipeline made from a stock one of either family encodes an empty negative prompt as it does."""
    stock = stock_pipeline(family)
    pipeline = RealCustomPipeline.from_pipe(stock)
    images = []
    for pipe in (stock, pipeline):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        options = dict(num_inference_steps=3, guidance_scale=7.5, height=64, width=64, output_type="latent")
        images.append(pipe("a dog", generator=generator, **options).images)
    assert torch.allclose(*images, atol=1e-4)
    assert pipeline.sampling == RealCustomConfig.preset("paper", family).sampling


def test_unet_with_guidance_embedding_is_rejected():
    """A LCM-distilled UNet is rejected when it is assigned and at construction; the message names the LCM-LoRA."""
    pipeline = tiny_pipeline()
    config = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    unet = type(pipeline.unet)(**{**config, "time_cond_proj_dim": 8})
    with pytest.raises(ValueError, match=r"time_cond_proj_dim is 8.*LCM-LoRA"):
        pipeline.unet = unet
    with pytest.raises(ValueError, match=r"time_cond_proj_dim is 8.*LCM-LoRA"):
        RealCustomPipeline(**{**pipeline.components, "unet": unet})


def test_realcustom_config_is_fixed():
    """Assigning a configuration names `from_pipe`, which applies it."""
    pipeline = tiny_pipeline()
    release = replace(pipeline.realcustom_config, method=MethodConfig.preset("release"))
    with pytest.raises(AttributeError, match="from_pipe"):
        pipeline.realcustom_config = release
    converted = RealCustomPipeline.from_pipe(pipeline, realcustom_config=release)
    assert torch.allclose(
        latents_of(converted, REQUEST), latents_of(tiny_pipeline(preset="release"), REQUEST), atol=1e-4
    )


def test_vae_of_another_scale_factor_keeps_the_image_size():
    """The latents follow the scale factor of the current VAE."""
    pipeline = tiny_pipeline()
    pipeline.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    assert pipeline(PROMPT, num_inference_steps=1, height=64, width=96).images[0].size == (96, 64)


def test_texts_and_references_encoded_under_autocast_fit_later_calls():
    """A call under autocast caches what a call without it would cache."""
    pipeline = tiny_pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        assert latents_of(pipeline, REQUEST).isfinite().all()
    assert torch.equal(latents_of(pipeline, REQUEST), latents_of(tiny_pipeline(), REQUEST))


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_component_in_another_type(name):
    """Casting a single component after a call gives the image of a new pipeline of the same components."""
    pipeline = tiny_pipeline()
    before = latents_of(pipeline, REQUEST)
    getattr(pipeline, name).to(torch.bfloat16)
    after = latents_of(pipeline, REQUEST)
    assert torch.equal(after, latents_of(rebuilt(pipeline), REQUEST))
    assert 0 < (after - before).abs().mean() < before.abs().mean()


def add_inversion(tokenizer, encoder, num_vectors: int, token: str = "<sks>") -> None:
    """Add a word with several vectors, stored as diffusers' `load_textual_inversion` stores it."""
    names = [token, *(f"{token}_{i}" for i in range(1, num_vectors))]
    tokenizer.add_tokens(names)
    encoder.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(names)] = torch.randn(num_vectors, 16) * 3


def test_textual_inversion_with_several_vectors_equals_stock():
    """All vectors of a word are encoded, as in the stock pipeline, and all of its tokens are target tokens."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    add_inversion(pipeline.tokenizer, pipeline.text_encoder, 3)
    add_inversion(pipeline.tokenizer_2, pipeline.text_encoder_2, 3)
    stock = StableDiffusionXLPipeline.from_pipe(pipeline, force_zeros_for_empty_prompt=False)
    prompt = "a <sks> on <sks>, x"
    expected = stock.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0][0]
    assert torch.allclose(pipeline.text_encoders.encode(prompt).embeds, expected, atol=1e-5)
    (marks,) = pipeline.text_encoders.target_tokens(prompt, ["<sks>"])
    ids = pipeline.tokenizer("a <sks> <sks>_1 <sks>_2 on <sks> <sks>_1 <sks>_2, x").input_ids
    assert marks.nonzero().flatten().tolist() == [i for i, token in enumerate(ids) if token >= 514]
    (marks,) = pipeline.text_encoders.target_tokens(prompt, ["x"])
    assert marks.nonzero().flatten().tolist() == [len(ids) - 2]
    assert pipeline.text_encoders.prompt_length(prompt).num_tokens == len(ids)


def test_textual_inversion_in_one_text_encoder_is_rejected():
    pipeline = tiny_pipeline()
    add_inversion(pipeline.tokenizer, pipeline.text_encoder, 1)
    with pytest.raises(ValueError, match=r"'dog' has other token positions.*load it into both"):
        pipeline.prepare(replace(REQUEST, prompt="a <sks> dog and cat"))


def test_tokens_added_to_a_tokenizer_take_effect():
    """A text that was encoded before a tokenizer changed in place is encoded again."""
    pipeline = tiny_pipeline()
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.resize_token_embeddings(520)
    request = Request(prompt="a sks dog", seed=1, num_inference_steps=1)
    before = latents_of(pipeline, request)
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokenizer.add_tokens(["sks"])
    after = latents_of(pipeline, request)
    assert (after - before).abs().max() > 1e-3
    pipeline.clear_caches()
    assert torch.equal(after, latents_of(pipeline, request))


def add_lora(unet) -> None:
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "style")


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: None,
        lambda unet: unet.disable_lora(),
        lambda unet: unet.set_adapters(["style"], 0.2),
        lambda unet: unet.delete_adapters("style"),
    ],
    ids=["add_adapter", "disable_lora", "set_adapters", "delete_adapters"],
)
def test_lora_on_the_unet_itself_takes_effect(change):
    """Methods of the UNet that change LoRA layers apply to texts that were encoded before."""
    pipeline = tiny_pipeline()
    latents_of(pipeline, REQUEST)
    add_lora(pipeline.unet)
    change(pipeline.unet)
    after = latents_of(pipeline, REQUEST)
    pipeline.clear_caches()
    assert torch.allclose(after, latents_of(pipeline, REQUEST), atol=1e-5)


def test_weights_changed_in_place_take_effect():
    pipeline = tiny_pipeline()
    before = latents_of(pipeline, REQUEST)
    with torch.no_grad():
        for parameter in pipeline.adapter.parameters():
            parameter.mul_(1.5)
    after = latents_of(pipeline, REQUEST)
    assert (after - before).abs().max() > 1e-3
    pipeline.clear_caches()
    assert torch.equal(after, latents_of(pipeline, REQUEST))


def test_unchanged_components_keep_the_caches():
    """Preparing a request twice encodes its texts and references once."""
    pipeline = tiny_pipeline()
    pipeline.prepare(REQUEST)
    misses = pipeline.text_cache.misses, pipeline.reference_cache.misses
    pipeline.prepare(REQUEST)
    assert (pipeline.text_cache.misses, pipeline.reference_cache.misses) == misses


def test_compiled_unet_is_called():
    """`pipeline.unet = torch.compile(pipeline.unet)` runs compiled graphs and gives the same image."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    pipeline = tiny_pipeline()
    expected = latents_of(pipeline, REQUEST)
    pipeline.unet = torch.compile(pipeline.unet, backend=backend)
    assert torch.allclose(latents_of(pipeline, REQUEST), expected, atol=1e-4)
    assert graphs
    torch._dynamo.reset()


def test_two_pipelines_share_components():
    """A second pipeline on the same components does not affect the first."""
    pipeline = tiny_pipeline()
    expected = latents_of(pipeline, REQUEST)
    second = rebuilt(pipeline)
    for _ in range(2):
        assert torch.equal(latents_of(pipeline, REQUEST), expected)
        assert torch.equal(latents_of(second, REQUEST), expected)


def test_two_pipelines_share_a_unet_in_two_threads():
    """Pipelines on one UNet that run at the same time give the images that each gives alone."""
    pipeline = tiny_pipeline()
    jobs = [(pipeline, REQUEST), (rebuilt(pipeline), Request(prompt="a cat", seed=1, num_inference_steps=3))]
    expected = [latents_of(*job) for job in jobs]
    results = [[], []]

    def repeat(index: int) -> None:
        results[index] += [latents_of(*jobs[index]) for _ in range(8)]

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for latents, alone in zip(results, expected, strict=True):
        assert len(latents) == 8  # no thread failed
        assert all(torch.equal(one, alone) for one in latents)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.enable_attention_slicing(),
        lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
        lambda p: p.unet.fuse_qkv_projections(),
    ],
    ids=["slicing", "AttnProcessor2_0", "fuse_qkv_projections"],
)
@pytest.mark.parametrize("masks", [None, torch.ones(2, 8, 8)], ids=["guidance", "given"])
def test_other_attention_processors_are_replaced(change, masks):
    """diffusers' variants of plain attention do not remove the subjects from the image."""
    pipeline = tiny_pipeline()
    expected = latents_of(pipeline, REQUEST, masks=masks)
    change(pipeline)
    assert torch.allclose(latents_of(pipeline, REQUEST, masks=masks), expected, atol=1e-5)


class ScalingProcessor(AttnProcessor2_0):
    """Attention that computes something else."""


def test_unknown_attention_processors_are_rejected_at_construction():
    pipeline = tiny_pipeline()
    pipeline.unet.set_attn_processor(ScalingProcessor())
    with pytest.raises(ValueError, match=r"ScalingProcessor.*set_attn_processor"):
        rebuilt(pipeline)


def test_unknown_attention_processors_are_rejected():
    pipeline = tiny_pipeline()
    pipeline.unet.set_attn_processor(ScalingProcessor())
    with pytest.raises(ValueError, match=r"ScalingProcessor.*set_attn_processor"):
        latents_of(pipeline, REQUEST)
