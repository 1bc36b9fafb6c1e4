"""torch.compile of the UNet's repeated blocks: whole graphs, the same picture, and no recompilation once warm."""

import pytest
import torch
from test_pipeline import PROMPT, cat, dog, latents, run
from tiny import tiny_pipeline

from realcustom import Request


@pytest.fixture(scope="module")
def compiled():
    torch._dynamo.reset()
    pipeline = tiny_pipeline()
    pipeline.compile(backend="aot_eager")  # captures graphs like the default backend, without generating code
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


def test_compiled_blocks_make_the_same_picture(compiled):
    plain = tiny_pipeline()
    for request in requests()[:2]:
        assert torch.allclose(latents(compiled, request), latents(plain, request), atol=1e-4)


def test_a_warm_pipeline_never_recompiles(compiled):
    """After warming up, any mix of batch sizes, subjects, scopes and guidance runs on the programs there are."""
    compiled.warm_up()
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 6):
            run(compiled, [compiled.prepare(request) for request in requests()[:count]])
            run(compiled, [compiled.prepare(request) for request in requests()[-count:]])


def test_a_cold_start_finds_its_programs_in_the_cache(tmp_path, monkeypatch):
    """A new process's compilation, with TORCHINDUCTOR_CACHE_DIR of an earlier one, generates no code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters
    pictures, found = [], []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        pipeline = tiny_pipeline()
        pipeline.compile()
        request = Request(prompt=PROMPT, seed=1, guidance_scale=1.0, num_inference_steps=1)
        pictures.append(latents(pipeline, request))
        found.append([counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss")])
    (hits, misses), (hits_again, misses_again) = found
    assert misses > 0 and misses_again == 0
    assert hits_again == hits + misses
    assert torch.equal(*pictures)
