"""Pipelines assembled from a base model (SDXL or SD1.5), two vision encoders and an adapter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny import (
    PROMPT,
    cat,
    dog,
    stock_pipeline,
    tiny_vision_encoders,
)

from realcustom import AlternatingDPMSolverScheduler, RealCustomAdapter, RealCustomPipeline, Request
from realcustom.from_parts import single_file_family
from realcustom.weights import save_adapter

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def parts(request, tmp_path_factory):
    """Folders of a base model and both vision encoders (with 27 blocks, as SigLIP has), and an adapter file."""
    folder = tmp_path_factory.mktemp(request.param)
    base = stock_pipeline(request.param)
    base.save_pretrained(folder / "base")
    for name, encoder in zip(("siglip", "dinov2"), tiny_vision_encoders(num_layers=27)):
        encoder.save_pretrained(folder / name)
    adapter = RealCustomAdapter.for_unet(base.unet, vision_dim=64, head_dim=32)
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


def test_defaults_are_those_of_the_paper(assembled):
    """Sampling defaults are the paper's for each family, with DDIM and SigLIP's exact GELU."""
    family, pipeline = assembled
    sampling = pipeline.sampling
    defaults = (sampling.num_inference_steps, sampling.early_stop_step, sampling.guidance_scale, sampling.scope_ratio)
    assert defaults == ((25, 12, 7.5, 0.2) if family == "sdxl" else (50, 25, 12.5, 0.2))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.image_encoder.config.hidden_act == "gelu"


def test_text_to_image_equals_the_stock_pipeline(parts, assembled):
    """Without subjects, the image equals that of the stock diffusers pipeline from the same noise."""
    family, folder = parts
    stock_class = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    stock = stock_class.from_pretrained(folder / "base")
    stock.set_progress_bar_config(disable=True)
    settings = dict(height=64, width=96, num_inference_steps=4, guidance_scale=3.0, output_type="np")
    expected = stock(PROMPT, generator=torch.Generator().manual_seed(7), **settings).images[0]
    computed = assembled[1](PROMPT, seed=7, **settings).images[0]
    assert np.abs(computed - expected).max() < 1e-4


def test_two_subjects_at_several_sizes(assembled):
    """Masks have the size of the largest attention resolution, and the masks of two subjects do not overlap."""
    family, pipeline = assembled
    for height, width in ((64, 64), (72, 104)):
        output = pipeline(PROMPT, subjects=[dog(), cat()], height=height, width=width, num_inference_steps=2, seed=1)
        high = 2 if family == "sdxl" else 1  # SDXL has no attention at the resolution of the latents
        assert output.images[0].size == (width, height)
        assert output.masks[0].shape == (2, -(-height // 4 // high), -(-width // 4 // high))
        assert not (output.masks[0].bool()[0] & output.masks[0].bool()[1]).any()


def images_of(*pipelines: RealCustomPipeline) -> list[np.ndarray]:
    """The image of one fixed request from each pipeline."""
    settings = dict(subjects=[dog()], seed=2, height=64, width=64, num_inference_steps=2, output_type="np")
    return [pipeline(PROMPT, **settings).images for pipeline in pipelines]


def test_save_and_load_round_trip(assembled, tmp_path):
    """A saved and reloaded pipeline generates the same image."""
    _, pipeline = assembled
    pipeline.save_pretrained(tmp_path / "model")
    loaded = RealCustomPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    before, after = images_of(pipeline, loaded)
    assert np.abs(before - after).max() < 1e-5


def test_single_file_equals_the_folder(parts, assembled, tmp_path):
    """A single file in the layout of the original checkpoints loads the same model as the diffusers folder."""
    _, folder = parts
    write_single_file(stock_pipeline(parts[0]), tmp_path / "model.safetensors")
    pipeline = RealCustomPipeline.from_parts(
        tmp_path / "model.safetensors",
        folder / "adapter.safetensors",
        base_config=folder / "base",
        siglip=folder / "siglip",
        dinov2=folder / "dinov2",
    )
    pipeline.set_progress_bar_config(disable=True)
    from_file, from_folder = images_of(pipeline, assembled[1])
    assert np.abs(from_file - from_folder).max() < 1e-5


def test_release_preset_uses_its_own_sampler(parts):
    """Preset "release" loads the authors' sampler for SDXL and raises for SD1.5; without an adapter, subjects raise."""
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
        pipeline.prepare(Request(prompt=PROMPT, subjects=(dog(),)))


@pytest.mark.parametrize("sampler", [LCMScheduler, EulerDiscreteScheduler])
def test_few_steps_without_guidance(assembled, sampler, monkeypatch):
    """Settings of distilled checkpoints: a fractional T_stop scales with the steps, CFG 1 has no unconditional row."""
    _, pipeline = assembled
    scheduler = sampler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    rows = []
    hook = pipeline.unet.conv_in.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    settings = dict(num_inference_steps=4, guidance_scale=1.0, early_stop_step=0.5, height=64, width=64)
    try:
        pipeline(PROMPT, subjects=[dog()], seed=1, **settings)
    finally:
        hook.remove()
    assert rows == [1, 1, 1, 1, 1, 1]  # a guidance and a generation pass for two steps, then generation passes


def test_lora_weights_can_be_loaded_and_unloaded(assembled, tmp_path):
    """`load_lora_weights` changes the result through the custom attention processors; unloading restores it."""
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
    subjects = [dog()]
    before = pipeline(PROMPT, subjects=subjects, **settings).images
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    with_lora = pipeline(PROMPT, subjects=subjects, **settings).images
    pipeline.unload_lora_weights()
    after = pipeline(PROMPT, subjects=subjects, **settings).images
    assert (with_lora - before).abs().max() > 1e-3
    assert torch.allclose(before, after, atol=1e-5)


def kohya_lora(pipeline, path) -> None:
    """Save a LoRA of the first text encoder and of one UNet layer under the names of the kohya training scripts."""
    encoder = "lora_te1" if pipeline.text_encoder_2 is not None else "lora_te"
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    attention = f"{encoder}_text_model_encoder_layers_0_self_attn"
    modules = {  # diffusers identifies the format by the output projection
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


def test_text_encoder_lora_affects_cached_prompts(assembled, tmp_path):
    """Loading, scaling, disabling and unloading a LoRA of the text encoder take effect on a cached prompt."""
    _, pipeline = assembled
    kohya_lora(pipeline, tmp_path / "lora.safetensors")
    encode = lambda: pipeline.prepare(Request(prompt=PROMPT, height=64, width=64)).text.embeds
    before = encode()
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style")
    try:
        loaded = encode()
        pipeline.set_adapters("style", 0.5)
        half = encode()
        pipeline.disable_lora()
        disabled = encode()
    finally:
        pipeline.unload_lora_weights()
    assert (loaded - before).abs().max() > 1e-3 and (half - loaded).abs().max() > 1e-3
    assert torch.allclose(disabled, before, atol=1e-5) and torch.allclose(encode(), before, atol=1e-5)


def test_latents_are_never_clipped(parts, tmp_path):
    """DDIM does not clip the latents, even if the base model's scheduler configuration has no `clip_sample`."""
    _, folder = parts
    shutil.copytree(folder / "base", tmp_path / "base")
    EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1).save_pretrained(tmp_path / "base/scheduler")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    pipeline = RealCustomPipeline.from_parts(tmp_path / "base", siglip=None, dinov2=None)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and not pipeline.scheduler.config.clip_sample


def test_other_models_and_files_raise(tmp_path):
    """A model of another family, a file of another kind and a missing file raise a ValueError with the reason."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is a FluxPipeline"):
        RealCustomPipeline.from_parts(tmp_path / "model")
    save_file({"some.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not an SDXL or SD1\.5 checkpoint"):
        RealCustomPipeline.from_parts(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"nothing\.safetensors is not a file"):
        RealCustomPipeline.from_parts(tmp_path / "nothing.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="pickled checkpoints are not supported"):
        RealCustomPipeline.from_parts(tmp_path / "model.ckpt")


def test_inpainting_models_raise(tmp_path):
    """A UNet with more input channels than the VAE has latent channels raises a ValueError."""
    base = stock_pipeline("sd15")
    base.register_modules(unet=UNet2DConditionModel.from_config(base.unet.config, in_channels=9))
    base.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="9 input channels and its VAE 4 latent channels"):
        RealCustomPipeline.from_parts(tmp_path / "model", siglip=None, dinov2=None)


def test_single_file_family_is_identified_by_weight_names(tmp_path):
    """`single_file_family` identifies SDXL and SD1.5 by the names of the weights."""
    for name, family in (("conditioner.embedders.1.model.x", "sdxl"), ("cond_stage_model.transformer.x", "sd15")):
        save_file({name: torch.ones(1)}, tmp_path / "file.safetensors")
        assert single_file_family(tmp_path / "file.safetensors") == family


def test_dino_position_embeddings_are_resampled_as_in_timm():
    """Position embeddings for a larger input are resampled bicubically with antialiasing, as timm does.

    The output equals that of an encoder whose embeddings were resampled in advance.
    """
    _, dino = tiny_vision_encoders()
    _, small = tiny_vision_encoders()
    small.load_state_dict(dino.state_dict())
    positions = dino.embeddings.position_embeddings.data
    torch.nn.init.normal_(positions)
    grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(grid, (3, 3), mode="bicubic", antialias=True)
    small.embeddings.position_embeddings.data = torch.cat([positions[:, :1], resampled.flatten(2).mT], dim=1)
    small.config.image_size = 12
    pixels = torch.randn(1, 3, 14, 14)  # not a multiple of the patch size: the last rows and columns are dropped
    with torch.no_grad():
        computed, expected = (
            m(pixel_values=p).last_hidden_state for m, p in ((dino, pixels), (small, pixels[..., :12, :12]))
        )
    assert torch.allclose(computed, expected, atol=1e-5)


def test_help_imports_no_model_library():
    """`python -m realcustom.assemble --help` prints its usage without importing torch, diffusers or transformers."""
    script = """
import runpy, sys
sys.argv = ["assemble", "--help"]
try:
    runpy.run_module("realcustom.assemble", run_name="__main__")
finally:
    print("imported:", sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m realcustom.assemble" in result.stdout
    assert result.stdout.endswith("imported: []\n")


def _with_scheduler(parts, tmp_path, scheduler):
    """A copy of the base folder with another scheduler."""
    _, folder = parts
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.rmtree(tmp_path / "base/scheduler")
    scheduler.save_pretrained(tmp_path / "base/scheduler")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    return tmp_path / "base"


def test_scheduler_of_another_parameterization_is_kept(parts, tmp_path):
    """A base with an EDM sampler keeps it; DDIM cannot express its noise schedule."""
    base = _with_scheduler(parts, tmp_path, EDMEulerScheduler(sigma_data=0.5))
    pipeline = RealCustomPipeline.from_parts(base, siglip=None, dinov2=None)
    assert isinstance(pipeline.scheduler, EDMEulerScheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(PROMPT, height=64, width=64, num_inference_steps=4, seed=0, output_type="latent").images
    assert latents.abs().max() < 20


def test_flow_matching_models_are_rejected(parts, tmp_path):
    base = _with_scheduler(parts, tmp_path, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*flow-matching"):
        RealCustomPipeline.from_parts(base, siglip=None, dinov2=None)


def test_v_prediction_settings_of_the_base_are_kept_or_rejected(parts, tmp_path):
    """Preset `paper` keeps v-prediction and zero terminal SNR; `release` raises, because its sampler lacks support."""
    family, _ = parts
    settings = dict(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    base = _with_scheduler(parts, tmp_path, EulerDiscreteScheduler(**settings))
    config = RealCustomPipeline.from_parts(base, siglip=None, dinov2=None).scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    if family == "sdxl":
        with pytest.raises(ValueError, match=r"zero terminal SNR.*'paper'"):
            RealCustomPipeline.from_parts(base, siglip=None, dinov2=None, preset="release")


def test_markers_of_single_files_are_applied(parts, tmp_path):
    """A single file with the tensors `v_pred` and `ztsnr` is sampled with v-prediction and zero terminal SNR."""
    family, folder = parts
    if family != "sdxl":
        pytest.skip("the markers are used by fine-tunes of SDXL")
    write_single_file(stock_pipeline(family), tmp_path / "model.safetensors")
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file({**load_file(tmp_path / "model.safetensors"), **markers}, tmp_path / "v.safetensors")
    config = RealCustomPipeline.from_parts(
        tmp_path / "v.safetensors", siglip=None, dinov2=None, base_config=folder / "base"
    ).scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
