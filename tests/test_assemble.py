"""A pipeline from public parts: SDXL or SD1.5 in diffusers' layout, vision encoders and an adapter beside it."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from single_file import write_single_file
from tiny import (
    subject_image,
    tiny_sd15_unet,
    tiny_text_config,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    tiny_vision_encoders,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from realcustom import AlternatingDPMSolverScheduler, RealCustomAdapter, RealCustomPipeline, Request, Subject
from realcustom.from_parts import single_file_family

PROMPT = "a dog and a cat"


def base_model(family: str):
    """A whole stock pipeline with random weights."""
    torch.manual_seed(0)
    common = dict(
        vae=tiny_vae(),
        # of different widths, as the real ones are: by these diffusers tells them apart in a single file
        text_encoder=CLIPTextModel(tiny_text_config(8 if family == "sdxl" else 16)),
        tokenizer=tiny_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )
    if family == "sdxl":
        second = dict(text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(24)), tokenizer_2=tiny_tokenizer())
        return StableDiffusionXLPipeline(**common, **second, unet=tiny_unet())
    options = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**common, **options, unet=tiny_sd15_unet())


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def parts(request, tmp_path_factory):
    """Folders of a base model, both encoders (with as many blocks as the full-size ones) and an adapter file."""
    folder = tmp_path_factory.mktemp(request.param)
    base = base_model(request.param)
    base.save_pretrained(folder / "base")
    for name, encoder in zip(("siglip", "dinov2"), tiny_vision_encoders(num_layers=27)):
        encoder.save_pretrained(folder / name)
    adapter = RealCustomAdapter.for_unet(base.unet, vision_dim=64, head_dim=32)
    from realcustom.weights import save_adapter

    save_adapter(adapter, folder / "adapter.safetensors")
    return request.param, folder


@pytest.fixture(scope="module")
def assembled(parts):
    family, folder = parts
    pipeline = RealCustomPipeline.from_parts(
        folder / "base", folder / "adapter.safetensors", siglip=folder / "siglip", dinov2=folder / "dinov2"
    )
    pipeline.set_progress_bar_config(disable=True)
    return family, pipeline


def test_defaults_are_the_papers_for_the_family(assembled):
    family, pipeline = assembled
    sampling = pipeline.sampling
    ours = (sampling.num_inference_steps, sampling.early_stop_step, sampling.guidance_scale, sampling.scope_ratio)
    assert ours == ((25, 12, 7.5, 0.2) if family == "sdxl" else (50, 25, 12.5, 0.2))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.image_encoder.config.hidden_act == "gelu"


def test_without_subjects_it_is_the_stock_pipeline(parts, assembled):
    """Text to image through our loop equals diffusers' own pipeline from the same noise, pixel for pixel."""
    family, folder = parts
    stock_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    stock = stock_class.from_pretrained(folder / "base")
    stock.set_progress_bar_config(disable=True)
    settings = dict(height=64, width=96, num_inference_steps=4, guidance_scale=3.0, output_type="np")
    theirs = stock(PROMPT, generator=torch.Generator().manual_seed(7), **settings).images[0]
    ours = assembled[1](PROMPT, seed=7, **settings).images[0]
    assert np.abs(ours - theirs).max() < 1e-4


def test_subjects_of_any_size_and_number(assembled):
    family, pipeline = assembled
    subjects = [Subject(image=subject_image(c), target_phrase=w) for c, w in (("red", "dog"), ("blue", "cat"))]
    for height, width in ((64, 64), (72, 104)):
        output = pipeline(PROMPT, subjects=subjects, height=height, width=width, num_inference_steps=2, seed=1)
        high = 2 if family == "sdxl" else 1  # SDXL has no attention at the latent's own resolution
        assert output.images[0].size == (width, height)
        assert output.masks[0].shape == (2, -(-height // 4 // high), -(-width // 4 // high))
        assert not (output.masks[0].bool()[0] & output.masks[0].bool()[1]).any()


def test_saved_and_loaded_it_is_the_same_model(assembled, tmp_path):
    _, pipeline = assembled
    pipeline.save_pretrained(tmp_path / "model")
    again = RealCustomPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    request = dict(
        subjects=[Subject(image=subject_image(), target_phrase="dog")], height=64, width=64, num_inference_steps=2
    )
    one, other = (p(PROMPT, seed=2, output_type="np", **request).images for p in (pipeline, again))
    assert np.abs(one - other).max() < 1e-5


def test_a_single_file_gives_the_same_model_as_a_folder(parts, assembled, tmp_path):
    """The layout of the original checkpoints, with configurations and tokenizers from a folder."""
    _, folder = parts
    write_single_file(base_model(parts[0]), tmp_path / "model.safetensors")
    pipeline = RealCustomPipeline.from_parts(
        tmp_path / "model.safetensors",
        folder / "adapter.safetensors",
        base_config=folder / "base",
        siglip=folder / "siglip",
        dinov2=folder / "dinov2",
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(
        subjects=[Subject(image=subject_image(), target_phrase="dog")], height=64, width=64, num_inference_steps=2
    )
    one, other = (p(PROMPT, seed=2, output_type="np", **settings).images for p in (pipeline, assembled[1]))
    assert np.abs(one - other).max() < 1e-5


def test_the_release_preset_brings_its_sampler(parts):
    family, folder = parts
    load = lambda: RealCustomPipeline.from_parts(
        folder / "base", siglip=folder / "siglip", dinov2=folder / "dinov2", preset="release"
    )
    if family == "sd15":
        with pytest.raises(ValueError, match="'release' is for SDXL"):
            load()
        return
    pipeline = load()
    assert isinstance(pipeline.scheduler, AlternatingDPMSolverScheduler)
    with pytest.raises(ValueError, match="no RealCustom"):
        pipeline.prepare(Request(prompt=PROMPT, subjects=(Subject(image=subject_image(), target_phrase="dog"),)))


@pytest.mark.parametrize("sampler", [LCMScheduler, EulerDiscreteScheduler])
def test_few_steps_without_guidance(assembled, sampler, monkeypatch):
    """Distilled checkpoints: T_stop as a fraction scales with the steps, CFG 1 has no unconditional row."""
    _, pipeline = assembled
    scheduler = sampler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    rows = []
    hook = pipeline.unet.conv_in.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    settings = dict(num_inference_steps=4, guidance_scale=1.0, early_stop_step=0.5, height=64, width=64)
    try:
        pipeline(PROMPT, subjects=[Subject(image=subject_image(), target_phrase="dog")], seed=1, **settings)
    finally:
        hook.remove()
    assert rows == [1, 1, 1, 1, 1, 1]  # a guidance and a generation pass for two steps, then generation passes


def test_lora_weights_change_the_image_and_can_be_unloaded(assembled, tmp_path):
    """`load_lora_weights` reaches the attention layers under our processors."""
    _, pipeline = assembled
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    width = pipeline.unet.get_submodule(layer.removeprefix("unet.")).to_q.in_features
    text_width = pipeline.unet.config.cross_attention_dim
    torch.manual_seed(0)
    state = {}
    for part, inputs in (("to_q", width), ("to_k", text_width)):
        state[f"{layer}.{part}.lora_A.weight"] = torch.randn(4, inputs) * 3
        state[f"{layer}.{part}.lora_B.weight"] = torch.randn(width, 4) * 3
    save_file(state, tmp_path / "lora.safetensors")
    settings = dict(seed=3, num_inference_steps=2, height=64, width=64, output_type="latent")
    subjects = [Subject(image=subject_image(), target_phrase="dog")]
    before = pipeline(PROMPT, subjects=subjects, **settings).images
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    with_lora = pipeline(PROMPT, subjects=subjects, **settings).images
    pipeline.unload_lora_weights()
    after = pipeline(PROMPT, subjects=subjects, **settings).images
    assert (with_lora - before).abs().max() > 1e-3
    assert torch.allclose(before, after, atol=1e-5)


def kohya_lora(pipeline, path) -> None:
    """A LoRA of the first text encoder and of one UNet layer, under the names that training scripts give them."""
    encoder = "lora_te1" if pipeline.text_encoder_2 is not None else "lora_te"
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    attention = f"{encoder}_text_model_encoder_layers_0_self_attn"
    modules = {  # diffusers tells the kind of file by the output projection, which every such file has
        **{f"{attention}_{part}_proj": pipeline.text_encoder.config.hidden_size for part in ("q", "out")},
        f"lora_unet_{layer.replace('.', '_')}": pipeline.unet.get_submodule(layer).in_features,
    }
    torch.manual_seed(0)
    state = {}
    for name, width in modules.items():
        state[f"{name}.lora_down.weight"] = torch.randn(4, width) * 3
        state[f"{name}.lora_up.weight"] = torch.randn(width, 4) * 3
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(state, path)


def test_a_lora_of_the_text_encoder_changes_texts_that_are_remembered(assembled, tmp_path):
    """Loading, scaling, switching off and unloading each take effect on a prompt that was encoded before."""
    _, pipeline = assembled
    kohya_lora(pipeline, tmp_path / "lora.safetensors")
    embeds = lambda: pipeline.prepare(Request(prompt=PROMPT, height=64, width=64)).text.embeds
    before = embeds()
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style")
    try:
        loaded = embeds()
        pipeline.set_adapters("style", 0.5)
        half = embeds()
        pipeline.disable_lora()
        off = embeds()
    finally:
        pipeline.unload_lora_weights()
    assert (loaded - before).abs().max() > 1e-3 and (half - loaded).abs().max() > 1e-3
    assert torch.allclose(off, before, atol=1e-5) and torch.allclose(embeds(), before, atol=1e-5)


def test_latents_are_never_clipped(parts, tmp_path):
    """DDIM clips to [-1, 1] unless told otherwise, and other samplers' files have no word about it."""
    _, folder = parts
    shutil.copytree(folder / "base", tmp_path / "base")
    EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1).save_pretrained(tmp_path / "base/scheduler")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    pipeline = RealCustomPipeline.from_parts(tmp_path / "base", siglip=None, dinov2=None)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and not pipeline.scheduler.config.clip_sample


def test_other_models_and_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline"):
        RealCustomPipeline.from_parts(tmp_path / "model")
    save_file({"some.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an SDXL or SD1.5 checkpoint"):
        RealCustomPipeline.from_parts(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"nothing\.safetensors is not a file"):
        RealCustomPipeline.from_parts(tmp_path / "nothing.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="pickled checkpoints are not supported"):
        RealCustomPipeline.from_parts(tmp_path / "model.ckpt")


def test_a_model_made_for_inpainting_is_refused(tmp_path):
    base = base_model("sd15")
    base.register_modules(unet=UNet2DConditionModel.from_config(base.unet.config, in_channels=9))
    base.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="9 input channels and its VAE 4 latent channels"):
        RealCustomPipeline.from_parts(tmp_path / "model", siglip=None, dinov2=None)


def test_single_files_are_told_apart_by_their_weights(tmp_path):
    for mark, family in (("conditioner.embedders.1.model.x", "sdxl"), ("cond_stage_model.transformer.x", "sd15")):
        save_file({mark: torch.ones(1)}, tmp_path / "file.safetensors")
        assert single_file_family(tmp_path / "file.safetensors") == family


def test_dino_positions_are_resampled_as_timm_does(tmp_path):
    """A grid of positions made for a larger input, bicubic and antialiased, equals one resampled beforehand."""
    _, dino = tiny_vision_encoders()
    _, small = tiny_vision_encoders()
    small.load_state_dict(dino.state_dict())
    positions = dino.embeddings.position_embeddings.data
    torch.nn.init.normal_(positions)
    grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", antialias=True)
    small.embeddings.position_embeddings.data = torch.cat([positions[:, :1], resampled.flatten(2).mT], dim=1)
    small.config.image_size = 12
    pixels = torch.randn(1, 3, 14, 14)  # as 384 px with patches of 14: the last rows and columns are dropped
    with torch.no_grad():
        ours, expected = (
            m(pixel_values=p).last_hidden_state for m, p in ((dino, pixels), (small, pixels[..., :12, :12]))
        )
    assert torch.allclose(ours, expected, atol=1e-5)
