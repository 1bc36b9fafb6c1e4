"""Memory tiers: the same image, with fewer weights on the device."""

import pytest
import torch
from tiny import subject_image, tiny_pipeline

from realcustom import Subject, apply_memory_tier
from realcustom.memory import ENCODERS, weight_bytes


def make(pipeline):
    subjects = [Subject(image=subject_image(), target_phrase="dog")]
    return pipeline("a dog", subjects=subjects, seed=1, output_type="latent").images[0]


@pytest.mark.parametrize("tier", ["medium", "low"])
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_a_lower_tier_makes_the_same_image(tier, preset):
    """The hooks bring every part over when it is needed, also where the release reads an encoder's inside."""
    high, lower = tiny_pipeline(preset=preset), tiny_pipeline(preset=preset)
    apply_memory_tier(high, "cpu")
    apply_memory_tier(lower, "cpu", tier)
    assert torch.allclose(make(high), make(lower), atol=1e-5)
    assert set(lower.offload_hooks) == set(ENCODERS)


@pytest.mark.parametrize("tier", ["high", "medium", "low"])
def test_an_adapter_loaded_after_placing_goes_where_the_work_is(tier, monkeypatch, tmp_path):
    """Where the UNet's weights wait in main memory, its own device is not the one that computes."""
    pipeline = tiny_pipeline()
    pipeline.save_realcustom(tmp_path / "adapter.safetensors")
    apply_memory_tier(pipeline, "cpu", tier)
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("meta"))
    pipeline.load_realcustom(tmp_path / "adapter.safetensors")
    assert pipeline.adapter.device.type == "meta"


def test_encoders_leave_the_device_after_use(monkeypatch):
    """Each new prompt and reference sends its encoders away again."""
    pipeline = tiny_pipeline()
    apply_memory_tier(pipeline, "cpu", "medium")
    sent_away = []
    for name, hook in pipeline.offload_hooks.items():
        monkeypatch.setattr(hook, "offload", lambda name=name: sent_away.append(name))
    make(pipeline)
    assert set(sent_away) == set(ENCODERS)
    sent_away.clear()
    make(pipeline)  # everything is remembered by now
    assert not sent_away


def test_lower_tiers_hold_fewer_bytes():
    pipeline = tiny_pipeline()
    sizes = [weight_bytes(pipeline, tier) for tier in ("high", "medium", "low")]
    assert sizes[0]["resident"] > sizes[1]["resident"] > sizes[2]["resident"]
    assert all(s["peak"] >= s["resident"] for s in sizes) and sizes[1]["peak"] < sizes[0]["peak"]
    stored = sum(v.nbytes for m in modules(pipeline) for v in m.state_dict().values())
    assert stored <= sizes[0]["resident"] < 1.01 * stored  # positions that are not stored come on top


def modules(pipeline):
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def test_large_images_are_decoded_in_tiles():
    """The largest tensor of decoding stays the same however large the image is."""
    pipeline = tiny_pipeline()
    apply_memory_tier(pipeline, "cpu", "medium")
    sizes = []
    for side in (24, 48):
        seen = []
        hook = pipeline.vae.decoder.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.numel()))
        assert pipeline.decoder.decode(torch.zeros(4, side, side)).size == (4 * side, 4 * side)
        hook.remove()
        sizes.append(max(seen))
    assert sizes[0] == sizes[1]


def test_another_tier_is_refused():
    with pytest.raises(ValueError, match="memory is 'tiny'"):
        apply_memory_tier(tiny_pipeline(), "cpu", "tiny")
