"""torch.compile of the UNet's repeated blocks and of the whole UNet: the same image, no recompilation once warm."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_pipeline import PROMPT, cat, dog, latents, run
from tiny import tiny_pipeline
from torch._dynamo.backends.common import aot_autograd

from realcustom import Request, apply_memory_tier


@pytest.fixture(scope="module", params=[False, True], ids=["blocks", "whole"])
def compiled(request):
    torch._dynamo.reset()
    pipeline = tiny_pipeline()
    # The backend captures graphs like the default one, without generating code.
    pipeline.compile(whole=request.param, backend="aot_eager")
    yield pipeline
    torch._dynamo.reset()


def requests():
    return [
        Request(prompt=PROMPT, subjects=(dog(),), seed=1),
        Request(prompt=PROMPT, subjects=(dog("green"), cat()), seed=2, early_stop_step=1),
        Request(prompt=PROMPT, seed=3),
        Request(prompt="the cat", subjects=(cat(scope_ratio=0.02),), seed=4, guidance_scale=1.0, num_inference_steps=3),
        Request(prompt=PROMPT, subjects=(dog("navy", scope_ratio=1.0),), seed=5),
    ]


def fast(request: Request) -> Request:
    return replace(request, mask_source="generation_branch")


def test_a_compiled_pipeline_makes_the_same_image(compiled):
    plain = tiny_pipeline()
    for request in (*requests()[:2], fast(requests()[0])):
        assert torch.allclose(latents(compiled, request), latents(plain, request), atol=1e-4)


def test_a_compiled_pipeline_shows_each_image_its_own_text(compiled):
    """Texts that were put together for one group of images are not those of the next group of that size."""
    plain = tiny_pipeline()
    for prompt in (PROMPT, "the dog", PROMPT):
        request = Request(prompt=prompt, subjects=(dog(),), seed=1)
        assert torch.allclose(latents(compiled, request), latents(plain, request), atol=1e-4)


def test_a_warm_pipeline_never_recompiles(compiled):
    """After warming up, any mix of batch sizes, subjects, scopes, guidance and sources of masks runs on the programs
    there are."""
    compiled.warm_up()
    exact, approximate = requests(), [fast(request) for request in requests()]
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 6):
            for mix in (exact[:count], exact[-count:], approximate[:count], approximate[count:] + exact[:count]):
                run(compiled, [compiled.prepare(request) for request in mix])


def test_programs_are_of_one_unet_as_it_was_when_compiled():
    """Few guards are left on the modules of a UNet compiled whole; no program serves another UNet for that, whose
    tensors have the same shapes, nor the same UNet when it is compiled again."""
    torch._dynamo.reset()
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=1)
    first, second, plain = (tiny_pipeline() for _ in range(3))
    for pipeline in (first, second):
        pipeline.compile(whole=True, backend="aot_eager")
    before = latents(first, request)
    for changed in (second, plain):
        _halve_an_attention(changed)
    expected = latents(plain, request)
    assert (expected - before).abs().max() > 1e-2
    assert torch.allclose(latents(second, request), expected, atol=1e-4)
    _halve_an_attention(first)
    first.compile(whole=True, backend="aot_eager")
    assert torch.allclose(latents(first, request), expected, atol=1e-4)


def _halve_an_attention(pipeline) -> None:
    """A change that no tensor of the UNet tells of."""
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.rescale_output_factor = 2.0


def test_a_lora_takes_effect_after_compiling(compiled, tmp_path):
    """Loaded, scaled, switched off and unloaded: each shows in the next image, as if nothing were compiled."""
    plain = tiny_pipeline()
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    width = plain.unet.get_submodule(layer.removeprefix("unet.")).in_features
    torch.manual_seed(0)
    state = {f"{layer}.lora_A.weight": torch.randn(4, width) * 3, f"{layer}.lora_B.weight": torch.randn(width, 4) * 3}
    save_file(state, tmp_path / "lora.safetensors")
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=1)
    changes = (
        lambda p: None,
        lambda p: p.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style"),
        lambda p: p.set_adapters("style", 0.3),
        lambda p: p.disable_lora(),
        lambda p: p.unload_lora_weights(),
    )
    images = []
    for change in changes:
        for pipeline in (plain, compiled):
            change(pipeline)
        images.append(latents(plain, request))
        assert torch.allclose(latents(compiled, request), images[-1], atol=1e-4)
    before, loaded, scaled, off, unloaded = images
    assert (loaded - before).abs().max() > 1e-2 and (scaled - loaded).abs().max() > 1e-2
    assert torch.allclose(off, before, atol=1e-5) and torch.allclose(unloaded, before, atol=1e-5)


@pytest.mark.parametrize("options", [{"mode": "default"}, {"options": {"max_autotune": False}}])
def test_options_of_torch_compile_go_with_compiling_whole(options):
    torch._dynamo.reset()
    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    pipeline.compile(whole=True, **options)
    request = Request(prompt=PROMPT, seed=1, guidance_scale=1.0, num_inference_steps=1)
    assert torch.allclose(latents(pipeline, request), latents(plain, request), atol=1e-4)


def test_a_guidance_branch_compiled_whole_computes_nothing_behind_the_last_recorded_layer():
    """Its output is not asked for; the eager one leaves early instead."""
    torch._dynamo.reset()
    convolutions = []

    def count(graph, _):
        convolutions.append(sum(node.target is torch.ops.aten.convolution.default for node in graph.graph.nodes))
        return graph

    pipeline = tiny_pipeline()
    pipeline.compile(whole=True, backend=aot_autograd(fw_compiler=count))
    request = Request(prompt=PROMPT, subjects=(dog(),), seed=1)
    pipeline.denoiser.guidance_branch([pipeline.prepare(request)])
    eager, called = tiny_pipeline(), []
    modules = [module for module in eager.unet.modules() if isinstance(module, torch.nn.Conv2d)]
    for module in modules:
        module.register_forward_hook(lambda *_: called.append(1))
    eager.denoiser.guidance_branch([eager.prepare(request)])
    assert convolutions[0] <= len(called) < len(modules)


def test_a_unet_that_is_brought_over_layer_by_layer_is_not_compiled_whole():
    low = tiny_pipeline()
    apply_memory_tier(low, "cpu", "low")
    with pytest.raises(ValueError, match=r"'low'.*'medium'"):
        low.compile(whole=True)
    whole = tiny_pipeline()
    whole.compile(whole=True, backend="eager")
    with pytest.raises(ValueError, match=r"compiled whole.*'medium'"):
        apply_memory_tier(whole, "cpu", "low")


def test_a_cold_start_finds_its_programs_in_the_cache(tmp_path, monkeypatch):
    """A new process's compilation, with TORCHINDUCTOR_CACHE_DIR of an earlier one, generates no code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters
    images, found = [], []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        pipeline = tiny_pipeline()
        pipeline.compile()
        request = Request(prompt=PROMPT, seed=1, guidance_scale=1.0, num_inference_steps=1)
        images.append(latents(pipeline, request))
        found.append([counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")])
    (hits, misses), (hits_again, misses_again) = found
    assert misses > 0 and misses_again == 0
    assert hits_again == hits + misses
    assert torch.equal(*images)
