"""Memory tiers: equal results with fewer weights on the device."""

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import subject_image, tiny_pipeline

from realcustom import Subject, apply_memory_tier
from realcustom.memory import ENCODERS, weight_bytes


def generate(pipeline):
    subjects = [Subject(image=subject_image(), target_phrase="dog")]
    return pipeline("a dog", subjects=subjects, seed=1, output_type="latent").images[0]


@pytest.mark.parametrize("tier", ["medium", "low"])
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_lower_tiers_generate_the_same_latents(tier, preset):
    """All tiers generate the same latents, also for the release preset, which calls a submodule of a text encoder."""
    high, lower = tiny_pipeline(preset=preset), tiny_pipeline(preset=preset)
    apply_memory_tier(high, "cpu")
    apply_memory_tier(lower, "cpu", tier)
    assert torch.allclose(generate(high), generate(lower), atol=1e-5)
    assert set(lower.offload_hooks) == set(ENCODERS)


@pytest.mark.parametrize("tier", ["high", "medium", "low"])
def test_adapter_is_loaded_onto_the_execution_device(tier, monkeypatch, tmp_path):
    """An adapter loaded after `apply_memory_tier` is on the execution device, even if the UNet is offloaded."""
    pipeline = tiny_pipeline()
    pipeline.save_realcustom(tmp_path / "adapter.safetensors")
    apply_memory_tier(pipeline, "cpu", tier)
    monkeypatch.setattr(type(pipeline), "execution_device", torch.device("meta"))
    pipeline.load_realcustom(tmp_path / "adapter.safetensors")
    assert pipeline.adapter.device.type == "meta"


def test_encoders_are_offloaded_after_use(monkeypatch):
    """Each encoder is offloaded after it has encoded a new prompt or reference; cached ones do not load it."""
    pipeline = tiny_pipeline()
    apply_memory_tier(pipeline, "cpu", "medium")
    offloaded = []
    for name, hook in pipeline.offload_hooks.items():
        monkeypatch.setattr(hook, "offload", lambda name=name: offloaded.append(name))
    generate(pipeline)
    assert set(offloaded) == set(ENCODERS)
    offloaded.clear()
    generate(pipeline)  # prompt and reference are cached
    assert not offloaded


def test_lower_tiers_keep_fewer_bytes_on_the_device():
    """Resident bytes decrease with each tier, peaks are no smaller, and "high" counts all stored weights."""
    pipeline = tiny_pipeline()
    sizes = [weight_bytes(pipeline, tier) for tier in ("high", "medium", "low")]
    assert sizes[0]["resident"] > sizes[1]["resident"] > sizes[2]["resident"]
    assert all(s["peak"] >= s["resident"] for s in sizes) and sizes[1]["peak"] < sizes[0]["peak"]
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    stored = sum(v.nbytes for m in modules for v in m.state_dict().values())
    assert stored <= sizes[0]["resident"] < 1.01 * stored  # non-persistent buffers are not stored


def test_large_images_are_decoded_in_tiles():
    """In tier "medium", the largest output of the VAE decoder does not grow with the image size."""
    pipeline = tiny_pipeline()
    apply_memory_tier(pipeline, "cpu", "medium")
    sizes = []
    for side in (24, 48):
        numels = []
        hook = pipeline.vae.decoder.register_forward_hook(lambda module, args, out, n=numels: n.append(out.numel()))
        assert pipeline.decoder.decode(torch.zeros(4, side, side)).size == (4 * side, 4 * side)
        hook.remove()
        sizes.append(max(numels))
    assert sizes[0] == sizes[1]


def test_unknown_tier_raises():
    """An unknown tier raises a ValueError that names it."""
    with pytest.raises(ValueError, match="the memory tier is 'tiny'"):
        apply_memory_tier(tiny_pipeline(), "cpu", "tiny")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    """A LoRA file of the tiny UNet."""
    folder = tmp_path_factory.mktemp("lora")
    unet = tiny_pipeline().unet
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "default")
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


@pytest.mark.parametrize("tier_first", [True, False])
@pytest.mark.parametrize("tier", ["medium", "low"])
def test_lora_works_in_every_memory_tier(tier, tier_first, lora_folder):
    """A LoRA loaded before or after choosing a tier has the same effect, and the encoders stay offloaded."""
    expected, pipeline = tiny_pipeline(), tiny_pipeline()
    expected.load_lora_weights(lora_folder)
    if tier_first:
        apply_memory_tier(pipeline, "cpu", tier)
    pipeline.load_lora_weights(lora_folder)
    if not tier_first:
        apply_memory_tier(pipeline, "cpu", tier)
    assert set(pipeline.offload_hooks) == set(ENCODERS)
    assert all(hasattr(getattr(pipeline, name), "_hf_hook") for name in ENCODERS)
    assert torch.allclose(generate(pipeline), generate(expected), atol=1e-5)


def test_model_cpu_offload_moves_the_unet_before_its_layers_run():
    """With an offloading hook on the UNet, no layer of it runs before the hook has moved it to the device."""
    pipeline, order = tiny_pipeline(), []

    class Hook(CpuOffload):
        def pre_forward(self, module, *args, **options):
            order.append("moved")
            return args, options

    add_hook_to_module(pipeline.unet, Hook("cpu"))
    layer = next(m for name, m in pipeline.unet.named_modules() if name.endswith("attn2.to_k"))
    layer.register_forward_pre_hook(lambda *_: order.append("layer"))
    expected = generate(tiny_pipeline())
    assert torch.allclose(generate(pipeline), expected, atol=1e-5)
    assert order[0] == "moved" and "layer" in order
