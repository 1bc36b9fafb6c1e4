"""How a UNet call runs: eagerly, on static buffers, or as a CUDA graph. Private torch APIs for this are used only here.

On a GPU, launching the 2,700 kernels of a call from Python takes several times longer than the kernels themselves. A
CUDA graph launches them at once, but it reads fixed addresses. `ReplayExecutor` therefore copies the inputs of each
call into static buffers, and `GraphExecutor` records `compute` on these buffers once per shape of call and replays it.

Keys and values of texts and references are the largest inputs. Their buffers are shared by all shapes and change only
when an image joins or leaves. A buffer that is used as padding is set to zero, so that no image reads what another one
left behind.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from .attention import AttentionLayers, StopForward
from .config import Execution, MethodConfig
from .keys_values import KeysValues, Layout, PackedKeysValues, stack_all
from .recorder import AttentionRecorder
from .unet_call import CallKey, UNetCall, key_of, padded
from .visual_attention import SortedMask, SparseMask, VisualAttention

logger = logging.getLogger(__name__)

Result = tuple[Tensor | None, Tensor | None]  # output, fp32 [R, channels, height, width]; relevance, fp32 [B, S, h, w]
T = TypeVar("T")

MAX_GRAPHS = 48  # 8 to 25 MB of device memory each
MAX_SEEN = 1000  # shapes that have occurred once


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetInputs:
    """The tensors that `compute` reads; see `UNetCall`.

    Attributes:
        text: keys and values of each row's text, or of all rows in one entry; empty if the layers project `embeds`.
        embeds: texts, [R, T, C]; their content is not read if `text` is given.
        stop_after_recording: end the forward pass after the last layer that records.
    """

    sample: Tensor
    timestep: Tensor
    embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None
    text: Sequence[KeysValues]
    vision: VisualAttention | None
    columns: Tensor | None
    sizes: Sequence[tuple[int, int]]
    return_output: bool
    stop_after_recording: bool


def compute(attention: AttentionLayers, method: MethodConfig, inputs: UNetInputs) -> Result:
    """Run the UNet. This is the only function that does; it reads nothing from the host and waits for no device."""
    recorder = None
    if inputs.columns is not None:
        recorder = AttentionRecorder(
            attention.levels,
            method.mask_maps,
            inputs.columns,
            all_rows=len(inputs.columns) == len(inputs.sample),
            head_widths=attention.head_widths,
            dtype=inputs.sample.dtype,
        )
    added = None if inputs.pooled is None else {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
    output = None
    with attention.attention_context(
        text=inputs.text,
        vision=inputs.vision,
        recordings=recorder.layers if recorder else None,
        stop_after_recording=inputs.stop_after_recording,
    ):
        try:
            output = attention.unet(
                inputs.sample,
                inputs.timestep,
                encoder_hidden_states=inputs.embeds,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        except StopForward:
            assert not inputs.return_output
    relevance = recorder.relevance(inputs.sizes, method.mask_normalization) if recorder else None
    return (None if output is None or not inputs.return_output else output.float()), relevance


class Executor(Protocol):
    """Runs UNet calls.

    Attributes:
        method: decides what is recorded and how it is normalized.
    """

    method: MethodConfig

    def start_step(self) -> None:
        """Check the state of the UNet, which must not change between the calls of a step."""
        ...

    def run(self, call: UNetCall) -> Result:
        """The output and the relevance of a call, in tensors that later calls do not change."""
        ...

    def retire(self) -> None:
        """Discard buffers and graphs; the next calls create them again."""
        ...


class EagerExecutor:
    """Runs each call as it is."""

    def __init__(self, attention: AttentionLayers, method: MethodConfig) -> None:
        self.attention, self.method = attention, method

    def start_step(self) -> None:
        """Nothing is kept between calls."""

    def run(self, call: UNetCall) -> Result:
        return compute(self.attention, self.method, self.inputs(call))

    def retire(self) -> None:
        """There is nothing to discard."""

    def inputs(self, call: UNetCall) -> UNetInputs:
        """The call's tensors, stacked."""
        unet = self.attention.unet
        device, dtype = call.sample.device, call.sample.dtype
        packed = [text.keys_values for text in call.texts]
        text: Sequence[KeysValues] = [kv for kv in packed if kv is not None]
        if len(text) == len(packed):
            embeds = call.sample.new_zeros(len(packed), 1, 1)
        else:
            text, embeds = (), torch.stack([text.embeds for text in call.texts]).to(dtype)
        vision = _visual_attention(call)
        if is_compiled(unet):  # hooks do not run inside, so all layers receive their inputs before the call
            text = [stack_all(text)] if text else ()
            if vision is not None:
                vision = VisualAttention(keys_values=[stack_all(vision.keys_values)], masks=vision.masks)
        pooled = stack_pooled(call)
        return UNetInputs(
            sample=call.sample,
            timestep=call.timestep.to(device, non_blocking=True),
            embeds=embeds,
            pooled=pooled,
            time_ids=call.time_ids,
            text=text,
            vision=vision,
            columns=call.columns,
            sizes=call.sizes,
            return_output=call.return_output,
            stop_after_recording=not (call.return_output or is_compiled(unet) or prefetches_layers(unet)),
        )


def stack_pooled(call: UNetCall) -> Tensor | None:
    """Pooled texts of all rows [R, D], or None for models without them."""
    pooled = [text.pooled for text in call.texts if text.pooled is not None]
    return torch.stack(pooled).to(call.sample.dtype) if pooled else None


def _visual_attention(call: UNetCall) -> VisualAttention | None:
    if not call.pairs:
        return None
    masks = {}
    for level, count in call.positions.items():
        height, width = call.sizes[level]
        of_pairs = [(pair.masks[level], pair.row * height * width) for pair in call.pairs]
        masks[level] = SparseMask(
            torch.stack([mask.index[:count] + offset for mask, offset in of_pairs]),
            torch.stack([mask.weight[:count] for mask, _ in of_pairs]),
        )
        for tensor in (masks[level].index, masks[level].weight):
            torch._dynamo.mark_dynamic(tensor, 1)  # it changes with every mask and must not trigger recompilation
    real = [pair.keys_values for pair in call.pairs if pair.keys_values is not None]
    zeros: KeysValues = {}
    if len(real) < len(call.pairs):  # padding
        zeros = {name: (torch.zeros_like(keys), torch.zeros_like(values)) for name, (keys, values) in real[0].items()}
    return VisualAttention(keys_values=[pair.keys_values or zeros for pair in call.pairs], masks=masks)


# ---- static buffers ----------------------------------------------------------------------------------------------


class Slots:
    """Static buffers for the packed keys and values of several texts or references.

    Attributes:
        capacity: number of slots.
        num_copied: slots written so far.
    """

    def __init__(self, like: PackedKeysValues, capacity: int) -> None:
        self.layout: Layout = like.layout
        self.capacity, self.num_copied = capacity, 0
        self._flat = like.flat.new_zeros(capacity, self.layout.size)
        self._views = self.layout.views(self._flat)
        self._serials = [0] * capacity  # of the content of each slot; 0 for zeros

    def fill(self, wanted: Sequence[PackedKeysValues | None]) -> None:
        """Write the first slots; None stands for zeros. Slots that already have the wanted content are not written."""
        for slot, packed in enumerate(wanted):
            serial = 0 if packed is None else packed.serial
            if self._serials[slot] == serial:
                continue
            if packed is None:
                self._flat[slot].zero_()
            else:
                self._flat[slot].copy_(packed.flat[0])
            self._serials[slot] = serial
            self.num_copied += 1

    def first(self, number: int) -> KeysValues:
        """Keys and values of the first slots, each [number, N, C]."""
        return {name: (keys[:number], values[:number]) for name, (keys, values) in self._views.items()}

    def poison(self, from_slot: int) -> None:
        """Write NaN into the slots from a number on, so that a test can show that they are not read."""
        self._flat[from_slot:] = torch.nan
        self._serials[from_slot:] = [-1] * (self.capacity - from_slot)

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes


class CallBuffers:
    """Static buffers of one shape of call, except for the slots."""

    def __init__(self, call: UNetCall) -> None:
        sample, rows = call.sample, len(call.sample)
        self.sample = torch.empty_like(sample)
        self.timestep = sample.new_empty(rows, dtype=torch.float32)
        self.embeds = sample.new_zeros(rows, 1, 1)  # not read: the layers have the keys and values of the texts
        pooled = stack_pooled(call)
        self.pooled = None if pooled is None else torch.empty_like(pooled)
        self.time_ids = None if call.time_ids is None else torch.empty_like(call.time_ids)
        self.columns = None if call.columns is None else torch.empty_like(call.columns)
        self.masks = {
            level: SparseMask(
                torch.zeros(len(call.pairs), count, dtype=torch.int64, device=sample.device),
                sample.new_zeros(len(call.pairs), count, 1),
            )
            for level, count in call.positions.items()
        }
        self._masks: dict[tuple[int, int], tuple[SortedMask, int]] = {}  # (level, pair) -> mask and row in the buffer

    def fill(self, call: UNetCall) -> None:
        """Copy everything but keys and values. Masks that are already in the buffers are not written."""
        self.sample.copy_(call.sample)
        self.timestep.copy_(call.timestep, non_blocking=True)
        pooled = stack_pooled(call)
        for buffer, value in ((self.pooled, pooled), (self.time_ids, call.time_ids), (self.columns, call.columns)):
            if buffer is not None:
                assert value is not None
                buffer.copy_(value)
        for level, buffers in self.masks.items():
            height, width = call.sizes[level]
            for number, pair in enumerate(call.pairs):
                mask, count = pair.masks[level], buffers.index.shape[1]
                if self._masks.get((level, number)) != (mask, pair.row):
                    torch.add(mask.index[:count], pair.row * height * width, out=buffers.index[number])
                    buffers.weight[number].copy_(mask.weight[:count])
                    self._masks[level, number] = (mask, pair.row)

    def forget_masks(self) -> None:
        """Write all masks again in the next call."""
        self._masks.clear()


class ReplayExecutor:
    """Runs each call on static buffers, as a CUDA graph does. The result equals `EagerExecutor` on the padded call.

    Args:
        attention, method: of the UNet.

    Attributes:
        texts, references: the slots, None before the first call that needs them.
    """

    def __init__(self, attention: AttentionLayers, method: MethodConfig) -> None:
        self.attention, self.method = attention, method
        self.texts: Slots | None = None
        self.references: Slots | None = None
        self.buffers: dict[CallKey, CallBuffers] = {}

    def start_step(self) -> None:
        """Buffers do not depend on the state of the UNet."""

    def retire(self) -> None:
        self.texts = self.references = None
        self.buffers.clear()

    def run(self, call: UNetCall) -> Result:
        call = padded(call)
        return self._run_padded(key_of(call), call)

    def _run_padded(self, key: CallKey, call: UNetCall) -> Result:
        output, relevance = self._execute(key, self._fill(key, call))
        return (None if output is None else output.clone()), (None if relevance is None else relevance.clone())

    def reserve(self, texts: int, references: int, text: PackedKeysValues, reference: PackedKeysValues | None) -> None:
        """Provide at least this many slots.

        Args:
            texts, references: numbers of slots.
            text, reference: give the layout of a slot.
        """
        self.texts = self._provide(self.texts, text, max(texts, 2))  # at least prompt and negative prompt
        if reference is not None:
            self.references = self._provide(self.references, reference, references)

    def _provide(self, slots: Slots | None, like: PackedKeysValues, number: int) -> Slots:
        if slots is None:
            return Slots(like, number)
        if slots.capacity >= number and slots.layout == like.layout:
            return slots
        self._discard_graphs()
        # Twice as many as before, so that a growing number of images rarely discards the graphs.
        return Slots(like, max(number, 2 * slots.capacity))

    def _discard_graphs(self) -> None:
        """Called when slots are replaced, which changes their addresses."""

    def _fill(self, key: CallKey, call: UNetCall) -> Callable[[], UNetInputs]:
        """Copy the call into the buffers; returns a function that gives the tensors in them."""
        texts = [text.keys_values for text in call.texts]
        references: list[PackedKeysValues | None] = []
        for pair in call.pairs:
            assert pair.keys_values is None or isinstance(pair.keys_values, PackedKeysValues)
            references.append(pair.keys_values)
        assert texts[0] is not None, "layers that project their own texts run eagerly"
        self.reserve(len(texts), len(references), texts[0], references[0] if references else None)
        assert self.texts is not None
        self.texts.fill(texts)
        if self.references is not None:
            self.references.fill(references)
        buffers = self.buffers.get(key)
        if buffers is None:
            buffers = self.buffers[key] = CallBuffers(call)
        buffers.fill(call)

        def inputs() -> UNetInputs:
            assert self.texts is not None
            vision = None
            if references:
                assert self.references is not None
                vision = VisualAttention(keys_values=[self.references.first(len(references))], masks=buffers.masks)
            return UNetInputs(
                sample=buffers.sample,
                timestep=buffers.timestep,
                embeds=buffers.embeds,
                pooled=buffers.pooled,
                time_ids=buffers.time_ids,
                text=[self.texts.first(len(texts))],
                vision=vision,
                columns=buffers.columns,
                sizes=call.sizes,
                return_output=call.return_output,
                stop_after_recording=not call.return_output,
            )

        return inputs

    def _execute(self, key: CallKey, inputs: Callable[[], UNetInputs]) -> Result:
        return compute(self.attention, self.method, inputs())


# ---- CUDA graphs -------------------------------------------------------------------------------------------------


class GraphCaptureError(RuntimeError):
    """Capturing a CUDA graph failed. The process cannot use the GPU reliably afterwards and must be replaced."""


class Graph(Protocol):
    """A recorded call, such as a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class GraphBackend(Protocol):
    """Records graphs that share one memory pool."""

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T] | None:
        """Run `work` and record it. Returns the graph and the tensors that each replay writes, or None if the device
        has too little free memory.

        Raises:
            GraphCaptureError: `work` can run, but not be recorded.
        """
        ...

    def reset(self, graphs: Sequence[Graph]) -> None:
        """Release all graphs and their pool."""
        ...


class CudaGraphs:
    """`GraphBackend` on a CUDA device.

    Attributes:
        num_bytes: device memory taken by captured graphs and their pool.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0

    def capture(self, work: Callable[[], T]) -> tuple[Graph, T] | None:
        # The first run loads kernels and creates library plans, which must not happen while recording. The second run
        # measures the memory that the graph needs.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
        needed = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free + self.num_bytes < needed:
            logger.warning("no CUDA graph for this call: it needs %d MB, %d MB are free", needed >> 20, free >> 20)
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.compiler.set_stance("fail_on_recompile"),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = work()
        except Exception as error:
            raise GraphCaptureError("a UNet call could not be captured as a CUDA graph") from error
        self.num_bytes += max(0, free - torch.cuda.mem_get_info()[0])
        return graph, result

    def reset(self, graphs: Sequence[Graph]) -> None:
        torch.cuda.synchronize()
        for graph in graphs:
            graph.reset()
        self._pool = torch.cuda.graph_pool_handle()  # a pool whose last graph is gone cannot be used again
        self.num_bytes = 0


@dataclass
class GraphStatistics:
    """What a `GraphExecutor` has done.

    Attributes:
        captures: number of captured graphs.
        replays: number of replayed calls, including the call for which a graph was captured.
        eager: number of calls that ran eagerly, including the first call of each shape.
        retired: how often all graphs were discarded.
        capture_seconds: time spent on captures.
    """

    captures: int = 0
    replays: int = 0
    eager: int = 0
    retired: int = 0
    capture_seconds: float = 0.0


class GraphExecutor(ReplayExecutor):
    """Replays each call as a CUDA graph; a shape is captured when it occurs for the second time.

    `UNetState.eager_reason` lists when calls run eagerly instead. When weights are replaced, or a LoRA or FreeU
    changes, all graphs are discarded; weights changed in place keep them. Single graphs are never discarded: in current
    PyTorch, resetting one graph releases a workspace that the others still use (pytorch issue 193402).

    Args:
        attention, method: of the UNet.
        backend: default: CUDA graphs.

    Attributes:
        statistics: see `GraphStatistics`.
    """

    def __init__(self, attention: AttentionLayers, method: MethodConfig, backend: GraphBackend | None = None) -> None:
        super().__init__(attention, method)
        self.statistics = GraphStatistics()
        self._backend = backend or CudaGraphs()
        self._eager = EagerExecutor(attention, method)
        self._state = UNetState(attention.unet)
        self._graphs: dict[CallKey, tuple[Graph, Result]] = {}
        self._seen: set[CallKey] = set()
        self._too_large: set[CallKey] = set()  # shapes for which memory did not suffice
        self._captures_at_once = False
        self._eager_reason: str | None = None

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @contextmanager
    def capturing_at_once(self) -> Iterator[None]:
        """Capture each shape when it occurs for the first time, as a warm-up needs it."""
        self._captures_at_once = True
        try:
            yield
        finally:
            self._captures_at_once = False

    def retire(self) -> None:
        self._discard_graphs()
        self._seen.clear()
        super().retire()

    def _discard_graphs(self) -> None:
        if self._graphs:
            with device_lock.exclusive():
                self._backend.reset([graph for graph, _ in self._graphs.values()])
            self.statistics.retired += 1
            self._graphs.clear()
            self._too_large.clear()

    def start_step(self) -> None:
        self.attention.check_processors()  # a replayed graph does not run them
        if self._state.changed():
            self.retire()
        reason = self._state.eager_reason()
        if reason and reason != self._eager_reason:
            logger.warning("UNet calls run eagerly instead of as CUDA graphs: %s", reason)
        self._eager_reason = reason

    def run(self, call: UNetCall) -> Result:
        if self._eager_reason or call.texts[0].keys_values is None:
            return self._run_eagerly(call)
        padded_call = padded(call)
        key = key_of(padded_call)
        if key in self._too_large:
            return self._run_eagerly(call)
        if key not in self._graphs and key not in self._seen and not self._captures_at_once:
            if len(self._seen) >= MAX_SEEN:
                self._seen.clear()
            self._seen.add(key)
            return self._run_eagerly(call)
        return self._run_padded(key, padded_call)

    def _run_eagerly(self, call: UNetCall) -> Result:
        self.statistics.eager += 1
        return self._eager.run(call)

    def _execute(self, key: CallKey, inputs: Callable[[], UNetInputs]) -> Result:
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                self._discard_graphs()
            captured = self._capture(inputs)
            if captured is None:
                self._too_large.add(key)
                self.statistics.eager += 1
                return compute(self.attention, self.method, inputs())
            self._graphs[key] = captured
        graph, result = self._graphs[key]
        graph.replay()
        self.statistics.replays += 1
        return result

    def _capture(self, inputs: Callable[[], UNetInputs]) -> tuple[Graph, Result] | None:
        start = time.monotonic()
        with device_lock.exclusive():
            captured = self._backend.capture(lambda: compute(self.attention, self.method, inputs()))
        self.statistics.captures += captured is not None
        self.statistics.capture_seconds += time.monotonic() - start
        return captured


class UNetState:
    """Detects changes of a UNet that a recorded graph cannot see: it holds addresses of weights and Python numbers.

    Both methods look at every module, which takes less than a millisecond for SDXL.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._collect()

    def _collect(self) -> None:
        modules = list(self._unet.modules())
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in modules]
        self._lora = [m for m in modules if hasattr(m, "scaling") and hasattr(m, "merged_adapters")]
        self._blocks = list(getattr(self._unet, "up_blocks", ()))
        # Quantized weights and other subclasses may have no address, so their identity stands for them.
        types = {type(p) for parameters in self._parameters for p in parameters.values() if p is not None}
        self._have_addresses = types <= {Tensor, nn.Parameter}
        self._current = self._read()

    def _read(self) -> tuple:
        parameters = [p for parameters in self._parameters for p in parameters.values() if p is not None]
        return (
            [p.data_ptr() for p in parameters] if self._have_addresses else list(map(id, parameters)),
            [id(child) for children in self._children for child in children.values()],
            [
                (str(m.active_adapters), str(m.scaling), bool(m.disable_adapters), str(m.merged_adapters))
                for m in self._lora
            ],
            [getattr(block, name, None) for block in self._blocks for name in ("s1", "s2", "b1", "b2")],  # FreeU
        )

    def changed(self) -> bool:
        """Whether weights, modules, LoRA state or FreeU have changed since the last time it returned True."""
        if self._read() == self._current:
            return False
        self._collect()
        return True

    def eager_reason(self) -> str | None:
        """Why calls cannot be recorded, or None: a UNet wrapped by torch.compile, training mode, autocast, offloaded
        layers, or hooks, including those of layerwise casting."""
        if is_compiled(self._unet):
            return "the UNet is wrapped by torch.compile"
        if self._unet.training:
            return "the UNet is in training mode"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is enabled"
        if offloads_layers(self._unet):
            return "the UNet's weights are offloaded"
        if any(self._hooks) or any("forward" in attributes for attributes in self._attributes):
            return "hooks are attached to the UNet"
        return None


# ---- sharing the device between threads --------------------------------------------------------------------------


class DeviceLock:
    """Keeps other work off the device while a graph is captured.

    A capture holds the lock exclusively; work that allocates device memory or copies to the host in other threads
    (encoding, decoding, emptying the allocator's cache) holds it shared. Otherwise, such work can invalidate a capture.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_shared = 0
        self._exclusive = False
        self._depth = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        depth = getattr(self._depth, "value", 0)
        if not depth:
            with self._condition:
                self._condition.wait_for(lambda: not self._exclusive)
                self._num_shared += 1
        self._depth.value = depth + 1
        try:
            yield
        finally:
            self._depth.value = depth
            if not depth:
                with self._condition:
                    self._num_shared -= 1
                    self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        assert not getattr(self._depth, "value", 0), "a thread that holds the lock shared would wait for itself"
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            self._exclusive = True  # from here on, no thread begins shared work
            self._condition.wait_for(lambda: not self._num_shared)
        try:
            yield
        finally:
            with self._condition:
                self._exclusive = False
                self._condition.notify_all()


device_lock = DeviceLock()  # one per process, as the allocator is


# ---- compilation and the state of a UNet -------------------------------------------------------------------------


def create_executor(execution: Execution, attention: AttentionLayers, method: MethodConfig) -> Executor:
    """The executor for the device that the UNet is on.

    Raises:
        ValueError: CUDA graphs on another device.
    """
    device = next(attention.unet.parameters()).device
    if execution == "graphs" and device.type != "cuda":
        raise ValueError(f"execution is 'graphs', but the UNet is on {device}; use 'auto' or 'eager'.")
    graphs = execution == "graphs" or (execution == "auto" and device.type == "cuda")
    return GraphExecutor(attention, method) if graphs else EagerExecutor(attention, method)


def compile_blocks(unet: nn.Module, *, resnets: bool, **options) -> None:
    """Compile the transformer blocks and, on request, the residual blocks of a UNet in place."""
    # Programs differ in one or several rows, with or without references, with or without recording, and in level.
    torch._dynamo.config.recompile_limit += 64
    names = {"BasicTransformerBlock"} | ({"ResnetBlock2D"} if resnets else set())
    for module in unet.modules():
        if type(module).__name__ in names:
            module.compile(fullgraph=True, **options)


def is_compiled(unet: nn.Module) -> bool:
    """Whether the UNet is wrapped by `torch.compile`, as in `pipeline.unet = torch.compile(pipeline.unet)`."""
    return isinstance(unet, torch._dynamo.OptimizedModule)


def offloads_layers(unet: nn.Module) -> bool:
    """Whether the UNet's weights are loaded onto the device during a call, by accelerate or by diffusers."""
    return hasattr(unet, "_hf_hook") or prefetches_layers(unet)


def prefetches_layers(unet: nn.Module) -> bool:
    """Whether diffusers' group offloading loads the layers in the order of complete forward passes."""
    registries = (getattr(module, "_diffusers_hook", None) for module in (unet, getattr(unet, "conv_in", None)))
    return any(registry is not None and registry.get_hook("group_offloading") is not None for registry in registries)
