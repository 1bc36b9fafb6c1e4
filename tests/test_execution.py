"""Execution of UNet calls: static buffers and graphs give the results of eager calls, and notice every change."""

import gc
import random
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from tiny import PROMPT, cat, dog, latents_of, run, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tape import TapeBackend
from realcustom import AlternatingDPMSolverScheduler, Request
from realcustom.execution import DeviceLock, EagerExecutor, GraphCaptureError, GraphExecutor, ReplayExecutor
from realcustom.unet_call import padded

REQUEST = Request(prompt=PROMPT, subjects=(dog(),), seed=1)


def graph_pipeline(**options):
    """A tiny pipeline whose UNet calls are recorded on tapes, as they would be in CUDA graphs."""
    pipeline = tiny_pipeline(**options)
    denoiser = pipeline.denoiser
    denoiser.executor = GraphExecutor(denoiser.attention, denoiser.method, TapeBackend())
    return pipeline


class CheckedReplay(ReplayExecutor):
    """Compares each replay with eager calls.

    All buffers that a call should write hold NaN before it, as do the slots that it does not use.
    """

    calls = 0

    def run(self, call):
        eager = EagerExecutor(self.attention, self.method)
        results, of_padded, of_call = super().run(call), eager.run(padded(call)), eager.run(call)
        for replayed, expected, unpadded in zip(results, of_padded, of_call, strict=True):
            assert (replayed is None) == (expected is None)
            if replayed is not None:
                assert torch.equal(replayed, expected)
                tolerance = 1e-5 if call.sample.dtype == torch.float32 else 0.05
                assert torch.allclose(replayed, unpadded, atol=tolerance)
        type(self).calls += 1
        return results

    def _fill(self, key, call):
        for buffers in self.buffers.values():
            masks = [tensor for mask in buffers.masks.values() for tensor in (mask.index, mask.weight)]
            for tensor in (buffers.sample, buffers.timestep, buffers.pooled, buffers.time_ids, buffers.columns, *masks):
                if tensor is not None:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
            buffers.forget_masks()
        inputs = super()._fill(key, call)
        for slots, used in ((self.texts, len(call.texts)), (self.references, len(call.pairs))):
            if slots is not None:
                slots.poison(used)
        return inputs


SUBJECTS = ((), (dog(),), (dog("green"), cat()), (cat(scope_ratio=0.6),), (dog("navy", scope_ratio=1.0),))


def random_request(rng: random.Random) -> Request:
    return Request(
        prompt=PROMPT,
        negative_prompt=rng.choice(["", "a cat"]),
        subjects=rng.choice(SUBJECTS),
        guidance_scale=rng.choice([1.0, 3.0]),
        mask_source=rng.choice(["guidance_branch", "generation_branch"]),
        mask_interval=rng.choice([1, 2]),
        early_stop_step=rng.choice([1, 3]),
        num_inference_steps=rng.choice([2, 4]),
        seed=rng.randrange(100),
        height=rng.choice([64, 64, 40]),
        width=64,
    )


def random_mix(pipeline, rng: random.Random, images: int) -> None:
    """Images join and leave at random until all are done."""
    waiting, active = [random_request(rng) for _ in range(images)], []
    while waiting or active:
        while waiting and (not active or rng.random() < 0.5):
            active.append(pipeline.prepare(waiting.pop()))
        size = rng.choice(active).size
        pipeline.step([g for g in active if g.size == size])
        active = [g for g in active if not g.done]


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_eager_bit_for_bit(preset, dtype):
    """In random mixes, replay on static buffers equals eager execution of the padded call in every bit, whatever the
    buffers held before, and padding does not change the result beyond rounding."""
    pipeline = tiny_pipeline(preset=preset).to(dtype)
    denoiser = pipeline.denoiser
    denoiser.executor = CheckedReplay(denoiser.attention, denoiser.method)
    before = CheckedReplay.calls
    random_mix(pipeline, random.Random(preset + str(dtype)), images=12)
    assert CheckedReplay.calls > before + 15


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_graphs_equal_eager(preset):
    """In random mixes, recorded graphs give the same latents as eager calls, and most calls are replays."""
    eager, graphs = tiny_pipeline(preset=preset), graph_pipeline(preset=preset)
    for seed in range(2):
        results = []
        for pipeline in (eager, graphs):
            rng = random.Random(seed)
            generations = [pipeline.prepare(random_request(rng)) for _ in range(4)]
            results.append(run(pipeline, generations))
        for expected, computed in zip(*results, strict=True):
            assert torch.allclose(computed, expected, atol=1e-5)
    statistics = graphs.denoiser.executor.statistics
    run(graphs, [graphs.prepare(replace(REQUEST, num_inference_steps=30)) for _ in range(2)])
    assert statistics.captures and statistics.replays > statistics.eager


def test_a_shape_is_captured_when_it_occurs_twice():
    """The first call of a shape runs eagerly; `capturing_at_once` captures it."""
    pipeline = graph_pipeline()
    executor = pipeline.denoiser.executor
    generation = pipeline.prepare(replace(REQUEST, subjects=(), num_inference_steps=8))
    pipeline.step([generation])
    assert (executor.statistics.eager, executor.num_graphs) == (1, 0)
    pipeline.step([generation])
    assert (executor.statistics.eager, executor.num_graphs) == (1, 1)
    with executor.capturing_at_once():
        pipeline.step([pipeline.prepare(replace(REQUEST, subjects=(), guidance_scale=1.0))])
    assert executor.num_graphs == 2


def test_warm_up_captures_the_configured_batch_sizes():
    """After `warm_up`, images with the default settings are replayed from their first step, with any compact mask."""
    pipeline = graph_pipeline()
    executor = pipeline.denoiser.executor
    report = pipeline.warm_up(batch_sizes=(1, 2))
    assert report.num_graphs == executor.num_graphs > 2
    captures, eager = executor.statistics.captures, executor.statistics.eager
    for count in (1, 2):
        generations = [pipeline.prepare(replace(REQUEST, seed=seed)) for seed in range(count)]
        run(pipeline, generations)
        assert all(g.latents.isfinite().all() for g in generations)
    assert (executor.statistics.captures, executor.statistics.eager) == (captures, eager)


def test_an_image_that_left_does_not_reach_its_neighbors():
    """A slot used as padding holds zeros: NaN in the references of an image that has left changes no later step."""
    requests = [replace(REQUEST, seed=s, num_inference_steps=6, early_stop_step=3) for s in range(4)]
    results = []
    for poisoned in (False, True):
        pipeline = tiny_pipeline()
        denoiser = pipeline.denoiser
        denoiser.executor = ReplayExecutor(denoiser.attention, denoiser.method)
        generations = [pipeline.prepare(r) for r in requests]
        pipeline.step(generations)
        if poisoned:
            denoiser.executor.references.poison(from_slot=3)  # the slot of the last image
        run(pipeline, generations[:3])
        results.append([g.latents for g in generations[:3]])
    for clean, after in zip(*results, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, after)


def test_keys_and_values_are_copied_only_when_images_change():
    """Steps of the same images copy no keys and values; an image that joins is copied once."""
    pipeline = tiny_pipeline()
    denoiser = pipeline.denoiser
    executor = denoiser.executor = ReplayExecutor(denoiser.attention, denoiser.method)
    long = replace(REQUEST, num_inference_steps=20, early_stop_step=20)
    first, second = pipeline.prepare(long), pipeline.prepare(replace(long, subjects=(dog("navy"),), seed=2))

    def copied() -> tuple[int, int]:
        return executor.texts.num_copied, executor.references.num_copied

    pipeline.step([first])
    before = copied()
    assert before == (2, 1)
    for _ in range(3):
        pipeline.step([first])
    assert copied() == before
    pipeline.step([first, second])
    pipeline.step([first, second])
    joined = copied()
    for _ in range(3):
        pipeline.step([first, second])
    assert copied() == joined


class UncapturedGraph:
    """Leaves the results of the capture unchanged."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class QuickBackend(TapeBackend):
    """Runs the work once and replays nothing, for tests of bookkeeping."""

    def capture(self, work):
        return UncapturedGraph(), work()


def test_nothing_grows_with_joins_and_leaves():
    """Over 300 joins and leaves, buffers and graphs stay few, and an image that has left is freed."""
    pipeline = tiny_pipeline()
    denoiser = pipeline.denoiser
    executor = denoiser.executor = GraphExecutor(denoiser.attention, denoiser.method, QuickBackend())
    rng = random.Random(0)
    sizes, references = [], []
    active: list = []
    for number in range(300):
        request = replace(REQUEST, subjects=rng.choice(SUBJECTS), seed=number, num_inference_steps=2)
        active.append(pipeline.prepare(request))
        references.append(weakref.ref(active[-1]))
        if len(active) == 3:
            pipeline.step(active)
            active.pop(rng.randrange(3))
        sizes.append((executor.num_graphs, len(executor.buffers)))
        active = [g for g in active if not g.done]
    active.clear()
    gc.collect()
    assert not any(reference() for reference in references)
    assert sizes[-1] == sizes[len(sizes) // 2] or sizes[-1][0] <= 48
    assert executor.statistics.captures <= 60


def _set_weight(unet):
    weight = unet.conv_in.weight
    unet.conv_in.weight = torch.nn.Parameter(weight * 1.5, requires_grad=False)


def _lora(unet, name="style"):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_out.0"], init_lora_weights=False), name)


CHANGES = {
    "in place": (False, lambda unet: unet.conv_in.weight.mul_(1.5)),
    "load_state_dict": (False, lambda unet: unet.load_state_dict({n: v * 1.1 for n, v in unet.state_dict().items()})),
    "assign": (
        True,
        lambda unet: unet.load_state_dict({n: v * 1.1 for n, v in unet.state_dict().items()}, assign=True),
    ),
    "new parameter": (True, _set_weight),
    "data": (True, lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight * 1.5)),
    "freeu": (True, lambda unet: unet.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)),
    "add lora": (True, _lora),
}
LORA_CHANGES = {
    "scale": lambda unet: unet.set_adapters("style", 0.2),
    "disable": lambda unet: unet.disable_lora(),
    "fuse": lambda unet: unet.fuse_lora(),
    "delete": lambda unet: unet.delete_adapters("style"),
    "unload": lambda unet: unet.unload_lora(),
}


def assert_change_is_seen(change, prepare=lambda unet: None, retires: bool = True) -> None:
    """A change between two steps has the effect that it has on an eager pipeline, and discards the graphs or not."""
    eager, graphs = tiny_pipeline(), graph_pipeline()
    latents = []
    for pipeline in (eager, graphs):
        prepare(pipeline.unet)
        generation = pipeline.prepare(replace(REQUEST, num_inference_steps=8, early_stop_step=8))
        for _ in range(4):
            pipeline.step([generation])
        before = generation.latents
        with torch.no_grad():
            change(pipeline.unet)
        for _ in range(3):
            pipeline.step([generation])
        assert (generation.latents - before).abs().max() > 1e-3
        latents.append(generation.latents)
    assert torch.allclose(*latents, atol=1e-4)
    assert graphs.denoiser.executor.statistics.retired == retires
    assert graphs.denoiser.executor.num_graphs


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_take_effect(name):
    """Weights changed in place keep the graphs; all other changes discard them. Both give the eager result."""
    retires, change = CHANGES[name]
    assert_change_is_seen(change, retires=retires)


@pytest.mark.parametrize("name", LORA_CHANGES)
def test_changes_of_a_lora_take_effect(name):
    """Scaling, disabling, fusing, deleting and unloading a LoRA discard the graphs and give the eager result."""
    assert_change_is_seen(LORA_CHANGES[name], prepare=_lora)


def test_hooks_of_a_user_run_in_every_call(caplog):
    """While a forward hook is attached, calls run eagerly, with one warning; afterwards they are replayed again."""
    pipeline = graph_pipeline()
    executor, seen = pipeline.denoiser.executor, []
    generation = pipeline.prepare(replace(REQUEST, subjects=(), num_inference_steps=12))
    for _ in range(3):
        pipeline.step([generation])
    hook = pipeline.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    replays = executor.statistics.replays
    for _ in range(3):
        pipeline.step([generation])
    assert len(seen) >= 3 and executor.statistics.replays == replays
    assert sum("eagerly" in record.message for record in caplog.records) == 1
    hook.remove()
    pipeline.step([generation])
    assert executor.statistics.replays > replays


@pytest.mark.parametrize("state", ["training", "layerwise casting", "offloaded"])
def test_states_that_graphs_cannot_record_run_eagerly(state):
    """In training mode, with layerwise casting and with offloaded layers, no graph is captured."""
    pipeline = graph_pipeline()
    executor = pipeline.denoiser.executor
    if state == "training":
        pipeline.unet.train()
    elif state == "layerwise casting":
        pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        pipeline.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    latents_of(pipeline, REQUEST)
    assert executor.num_graphs == 0 and executor.statistics.eager > 3


def test_two_pipelines_on_one_unet_replay_their_own_graphs():
    """Two pipelines on the same UNet, used in turns, give the result of each alone."""
    first = graph_pipeline()
    second = type(first)(
        **first.components, realcustom_config=first.realcustom_config, force_zeros_for_empty_prompt=False
    )
    denoiser = second.denoiser
    denoiser.executor = GraphExecutor(denoiser.attention, denoiser.method, TapeBackend())
    expected = latents_of(tiny_pipeline(), REQUEST)
    for _ in range(2):
        for pipeline in (first, second):
            assert torch.allclose(latents_of(pipeline, REQUEST), expected, atol=1e-5)


def test_unknown_attention_processors_are_rejected_after_a_capture():
    """A processor of a user raises an error; without the check, graphs would be replayed without it."""

    class ScalingProcessor(AttnProcessor2_0):
        pass

    pipeline = graph_pipeline()
    latents_of(pipeline, REQUEST)
    pipeline.unet.set_attn_processor(ScalingProcessor())
    with pytest.raises(ValueError, match="ScalingProcessor"):
        latents_of(pipeline, REQUEST)


def test_a_failed_capture_is_an_error():
    """A failed capture raises `GraphCaptureError`: the call is not tried again in another way."""
    pipeline = graph_pipeline()
    pipeline.denoiser.executor._backend.fail = True
    with pytest.raises(GraphCaptureError):
        latents_of(pipeline, REQUEST)


def test_a_shape_that_does_not_fit_into_memory_runs_eagerly():
    """If the device has too little memory for a capture, the shape runs eagerly and is not tried again."""
    pipeline = graph_pipeline()
    executor, tries = pipeline.denoiser.executor, []
    executor._backend.capture = lambda work: tries.append(1)
    request = replace(REQUEST, subjects=(), num_inference_steps=6)
    assert torch.allclose(latents_of(pipeline, request), latents_of(tiny_pipeline(), request), atol=1e-5)
    assert len(tries) == 1 and executor.num_graphs == 0


def test_graphs_are_discarded_together():
    """Discarding resets all graphs at once, and none is replayed afterwards (a tape asserts it)."""
    pipeline = graph_pipeline()
    executor = pipeline.denoiser.executor
    latents_of(pipeline, REQUEST)
    latents_of(pipeline, replace(REQUEST, subjects=()))
    tapes = executor._backend.tapes
    assert len(tapes) > 1 and not any(tape.closed for tape in tapes)
    executor.retire()
    assert all(tape.closed for tape in tapes) and not executor.buffers and executor.texts is None
    assert latents_of(pipeline, REQUEST).isfinite().all()


def test_graphs_require_a_cuda_device():
    """CUDA graphs on a CPU raise a ValueError that names the alternatives."""
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="'auto', 'eager' or 'graphs'"):
        pipeline.execution = "fast"
    pipeline.execution = "graphs"
    with pytest.raises(ValueError, match="UNet is on cpu; use 'auto' or 'eager'"):
        latents_of(pipeline, REQUEST)
    pipeline.execution = "eager"
    assert pipeline.execution == "eager"
    assert latents_of(pipeline, REQUEST).isfinite().all()


class DeviceWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU that holds the meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_device = any(t.device.type == "meta" for t in tensors)
        if on_device and func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.waits.append(str(func))
        if on_device and str((kwargs or {}).get("device", "meta")) == "cpu":
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


SCHEDULERS = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    LCMScheduler,
    AlternatingDPMSolverScheduler,
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_step_without_a_new_mask_does_not_wait_for_the_device(scheduler):
    """On meta tensors, a step that reuses its mask reads nothing from the device, with any scheduler."""
    pipeline = tiny_pipeline(scheduler=scheduler())
    generation = pipeline.prepare(replace(REQUEST, num_inference_steps=6, early_stop_step=1))
    pipeline.step([generation])
    _move_to_meta(pipeline, generation)
    with DeviceWaits() as mode:
        for _ in range(3):
            pipeline.step([generation])
    assert mode.waits == []


def _move_to_meta(pipeline, generation) -> None:
    """Replace the device tensors of a generation, and of the UNet, by meta tensors."""
    pipeline.unet.to("meta")
    denoiser = pipeline.denoiser
    denoiser.executor = EagerExecutor(denoiser.attention, denoiser.method)
    generation.latents = generation.latents.to("meta")
    generation.generator = None if generation.generator is None else torch.Generator("cpu").manual_seed(0)
    for name in ("target_tokens", "time_ids"):
        setattr(generation, name, getattr(generation, name).to("meta"))

    def text(condition):
        keys_values = condition.keys_values.to("meta")
        return replace(
            condition,
            embeds=condition.embeds.to("meta"),
            pooled=None if condition.pooled is None else condition.pooled.to("meta"),
            keys_values=keys_values,
        )

    generation.text, generation.negative_text = text(generation.text), text(generation.negative_text)
    generation.references = tuple(r.to("meta") for r in generation.references)
    for size, masks in generation.sorted_masks.items():
        generation.sorted_masks[size] = [
            replace(mask, index=mask.index.to("meta"), weight=mask.weight.to("meta")) for mask in masks
        ]
    for name, value in vars(generation.scheduler).items():
        if name in ("model_outputs", "ets") and isinstance(value, list):
            setattr(generation.scheduler, name, [v.to("meta") if isinstance(v, torch.Tensor) else v for v in value])
        elif name in ("last_sample", "sample") and isinstance(value, torch.Tensor):
            setattr(generation.scheduler, name, value.to("meta"))


def test_sorting_masks_reads_the_device_once(monkeypatch):
    """New masks of several images at several resolutions need one read from the device."""
    pipeline = tiny_pipeline()
    generations = [pipeline.prepare(replace(REQUEST, seed=s, subjects=SUBJECTS[2])) for s in range(3)]
    pipeline.denoiser.guidance_branch(generations)
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(1) or original(tensor))
    pipeline.denoiser.generation_branch(generations)
    assert len(reads) == 1


def test_a_stopped_call_leaves_nothing_connected():
    """After a guidance branch that ends early, no hook or processor state remains."""
    pipeline = graph_pipeline()
    generation = pipeline.prepare(REQUEST)
    for _ in range(2):
        pipeline.denoiser.guidance_branch([generation])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.unet.modules())
    for processor in pipeline.unet.attn_processors.values():
        assert processor.text is processor.vision is processor.recording is None


def test_captures_and_other_device_work_exclude_each_other():
    """A capture waits for work that holds the lock shared, and such work waits for a capture; shared work may nest."""
    lock, events = DeviceLock(), []
    inside, may_end = threading.Event(), threading.Event()

    def work() -> None:
        with lock.shared(), lock.shared():
            inside.set()
            may_end.wait(10)
            events.append("work")

    def capture() -> None:
        with lock.exclusive():
            events.append("capture")
            later.start()
            time.sleep(0.1)
            events.append("captured")

    later = threading.Thread(target=lambda: lock.shared().__enter__() or events.append("later"))
    threads = [threading.Thread(target=work), threading.Thread(target=capture)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    time.sleep(0.05)
    assert events == []
    may_end.set()
    for thread in threads:
        thread.join(10)
    later.join(10)
    assert events == ["work", "capture", "captured", "later"]


@pytest.mark.parametrize("change", ["none", "in place", "lora", "dtype"])
def test_fused_projections_give_the_same_latents(change):
    """One product for query, key and value gives the latents of three, also after their weights have changed."""
    expected, fused = tiny_pipeline(), tiny_pipeline()
    fused.fuse_projections()
    attention = fused.denoiser.attention
    fused.execution = "eager"
    assert fused.denoiser.attention is attention  # another way of execution keeps them
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert attention.is_fused(layer)
    for pipeline in (expected, fused):
        if change == "in place":
            with torch.no_grad():
                pipeline.unet.get_submodule(layer).to_q.weight.mul_(1.5)
        elif change == "lora":
            _lora(pipeline.unet)
        elif change == "dtype":
            pipeline.to(torch.float64)
    assert attention.is_fused(layer) == (change in ("none", "in place"))
    assert torch.allclose(latents_of(fused, REQUEST), latents_of(expected, REQUEST), atol=1e-4)
    attention.unfuse_projections()
    assert not attention.is_fused(layer)
    assert torch.allclose(latents_of(fused, REQUEST), latents_of(expected, REQUEST), atol=1e-5)
