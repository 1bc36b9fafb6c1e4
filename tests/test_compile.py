"""Compilation of the transformer and residual blocks: equal results, no recompilation after warm-up."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import PROMPT, cat, dog, latents_of, run, tiny_pipeline

from realcustom import Request


@pytest.fixture(scope="module")
def compiled():
    torch.compiler.reset()
    pipeline = tiny_pipeline()
    # The programs and their guards are those of the default backend, but no code is generated.
    pipeline.compile(backend="eager")
    yield pipeline
    torch.compiler.reset()


def requests():
    return [
        Request(prompt=PROMPT, subjects=(dog(),), seed=1),
        Request(prompt=PROMPT, subjects=(dog("green"), cat()), seed=2, early_stop_step=1),
        Request(prompt=PROMPT, seed=3),
        Request(prompt="the cat", subjects=(cat(scope_ratio=0.02),), seed=4, guidance_scale=1.0, num_inference_steps=3),
        Request(prompt=PROMPT, subjects=(dog("navy", scope_ratio=1.0),), seed=5),
    ]


def approximate(request: Request) -> Request:
    """The same request with masks from the generation branch."""
    return replace(request, mask_source="generation_branch")


def test_compiled_pipeline_matches_eager(compiled):
    """Compiled and eager pipelines produce the same latents, with both sources of masks."""
    eager = tiny_pipeline()
    for request in (*requests()[:2], approximate(requests()[0])):
        assert torch.allclose(latents_of(compiled, request), latents_of(eager, request), atol=1e-4)


def test_compiled_blocks_read_the_current_texts(compiled):
    """Consecutive runs with different prompts match eager runs."""
    eager = tiny_pipeline()
    for prompt in (PROMPT, "the dog", PROMPT):
        request = Request(prompt=prompt, subjects=(dog(),), seed=1)
        assert torch.allclose(latents_of(compiled, request), latents_of(eager, request), atol=1e-4)


def test_no_recompilation_after_warm_up(compiled):
    """After `warm_up`, no mix of batch sizes, subjects, scopes, guidance and mask sources triggers a recompilation."""
    compiled.warm_up()
    exact, approximated = requests(), [approximate(request) for request in requests()]
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 6):
            for mix in (exact[:count], exact[-count:], approximated[:count], approximated[count:] + exact[:count]):
                run(compiled, [compiled.prepare(request) for request in mix])


def test_lora_changes_take_effect_after_compilation(compiled, tmp_path):
    """Loading, scaling, disabling and unloading a LoRA change a compiled pipeline as they change an eager one."""
    eager = tiny_pipeline()
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"
    width = eager.unet.get_submodule(layer.removeprefix("unet.")).in_features
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
    results = []
    for change in changes:
        for pipeline in (eager, compiled):
            change(pipeline)
        results.append(latents_of(eager, request))
        assert torch.allclose(latents_of(compiled, request), results[-1], atol=1e-4)
    before, loaded, scaled, disabled, unloaded = results
    assert (loaded - before).abs().max() > 1e-2 and (scaled - loaded).abs().max() > 1e-2
    assert torch.allclose(disabled, before, atol=1e-5) and torch.allclose(unloaded, before, atol=1e-5)


def test_compiled_residual_blocks_match_eager():
    """With compiled residual blocks, the latents equal those of an eager pipeline."""
    torch.compiler.reset()
    pipeline = tiny_pipeline()
    pipeline.compile(resnets=True, backend="aot_eager")
    request = Request(prompt=PROMPT, seed=1, guidance_scale=1.0, num_inference_steps=1)
    assert torch.allclose(latents_of(pipeline, request), latents_of(tiny_pipeline(), request), atol=1e-4)
    torch.compiler.reset()


def test_second_compilation_hits_the_inductor_cache(tmp_path, monkeypatch):
    """Compiling again with the same TORCHINDUCTOR_CACHE_DIR, as after a restart, finds all programs in the cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters
    results, cache_counts = [], []
    for _ in range(2):
        torch.compiler.reset()
        counters.clear()
        pipeline = tiny_pipeline()
        pipeline.compile()
        request = Request(prompt=PROMPT, seed=1, guidance_scale=1.0, num_inference_steps=1)
        results.append(latents_of(pipeline, request))
        cache_counts.append([counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")])
    (hits, misses), (hits_again, misses_again) = cache_counts
    assert misses > 0 and misses_again == 0
    assert hits_again == hits + misses
    assert torch.equal(*results)
