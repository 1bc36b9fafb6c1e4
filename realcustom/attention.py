"""Attention processors for a stock UNet, and the order and resolution levels of its attention layers (Eq. 4, 16, 19).

The processors own no weights. `AttentionLayers.attention_context` sets what each layer uses during one UNet call: keys
and values of the texts, references with their masks (`LayerVision`), and what the layer records for the guidance masks
(`LayerRecording`). Outside a context, every layer computes exactly what the stock processor computes. Layer-specific
data is passed as tensors, never as names, so that `torch.compile` can share one program among all blocks of the same
shape.

Legend: R rows of the UNet call, P (row, subject) pairs, B batch, H heads, Q = h * w positions, T text tokens, N vision
tokens, C channels of a layer, d = C / H.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .keys_values import KeysValues, PackedKeysValues, stack_keys_values
from .visual_attention import LayerVision, VisualAttention, merge_heads, split_heads

logger = logging.getLogger(__name__)

# Processors that compute plain attention, as `RealCustomAttnProcessor` does without a context.
EQUIVALENT_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "RealCustomAttnProcessor",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}


_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_locks_lock = threading.Lock()


def unet_lock(unet: nn.Module) -> "threading.RLock":
    """The lock of a UNet, held during each call.

    Processors and hooks hold the state of one call, and pipelines in several threads may share the UNet.
    """
    with _locks_lock:
        return _locks.setdefault(getattr(unet, "_orig_mod", unet), threading.RLock())  # behind torch.compile


class LayerRecording(Protocol):
    """Receives the queries and keys of one attention layer; see `recorder.py`."""

    def record(self, query: Tensor, key: Tensor) -> None:
        """Keep what the guidance masks need of queries [R, H, Q, d] and keys [R, H, T, d]."""


class RealCustomAttnProcessor:
    """Attention of one layer of a stock diffusers UNet, either self-attention or cross-attention (Eq. 4, 16, 19).

    Attributes:
        text: keys and values of the texts, each [R, T, C], projected before the call; None projects them here.
        vision: references and masks of the layer, or None.
        recording: receives queries and keys for the guidance masks, or None.
        projections: weights of the query, key and value projections of a self-attention layer in one tensor [3C, C],
            or None; see `AttentionLayers.fuse_projections`.
    """

    def __init__(self) -> None:
        self.projections: Tensor | None = None
        self.text: tuple[Tensor, Tensor] | None = None
        self.vision: LayerVision | None = None
        self.recording: LayerRecording | None = None

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if self.projections is not None and encoder_hidden_states is None:
            query, key, value = F.linear(hidden_states, self.projections).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            if self.text is None:
                text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
                key, value = attn.to_k(text), attn.to_v(text)
            else:
                key, value = self.text
        query = query.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [R, H, Q, d]
        key, value = split_heads(key, query), split_heads(value, query)
        if attention_mask is not None:
            mask: Tensor = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])
        out = merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        if self.recording is not None:
            self.recording.record(query, key)
        if self.vision is not None:
            out = self.vision.add_to(out, query)
        out = attn.to_out[1](attn.to_out[0](out))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class StopForward(Exception):
    """Ends a UNet call after the last layer that records; the rest of the forward pass would be discarded."""


class AttentionLayers:
    """Installs a `RealCustomAttnProcessor` in every attention layer of a stock UNet.

    Attributes:
        unet: the UNet.
        levels: name of each attention layer -> its resolution level, 0 being the latent's own; in the order of the
            UNet's forward pass. Names end in "attn1" (self-attention) or "attn2" (text cross-attention).
        head_widths: channels of an attention head of each layer.

    Raises:
        ValueError: see `check_processors`.
    """

    def __init__(self, unet) -> None:
        self.unet = unet
        self._lock = unet_lock(unet)
        self._original_processors = dict(unet.attn_processors)
        names = sorted((name.removesuffix(".processor") for name in self._original_processors), key=_forward_order)
        num_levels = len(unet.config.down_block_types)
        self.levels = {name: attention_level(name, num_levels) for name in names}
        self._attentions: dict[str, Any] = {name: unet.get_submodule(name) for name in names}
        self.head_widths = {name: attn.inner_dim // attn.heads for name, attn in self._attentions.items()}
        self._processors = {name: RealCustomAttnProcessor() for name in names}
        with self._lock:
            self.check_processors()
            self._install()
        self._text_layers: dict[str, list[str]] = {}  # transformer -> names of its text cross-attention layers
        for name in names:
            if name.endswith("attn2"):
                self._text_layers.setdefault(_transformer(name), []).append(name)
        self._projections: dict[str, Tensor] = {}  # self-attention layer -> its fused weights

    def _install(self) -> None:
        self.unet.set_attn_processor({f"{name}.processor": p for name, p in self._processors.items()})

    def remove(self) -> None:
        """Restore the processors that were installed before."""
        self.unet.set_attn_processor(dict(self._original_processors))

    def check_processors(self) -> None:
        """Check that the installed processors compute plain attention.

        Raises:
            ValueError: a processor that computes something else, such as an IP-Adapter's.
        """
        if unknown := sorted(self._installed_types() - EQUIVALENT_PROCESSORS):
            raise ValueError(
                f"the UNet has the attention processors {', '.join(unknown)}, which RealCustom++ cannot combine with "
                "its own; remove them, for example with unload_ip_adapter() or "
                "unet.set_attn_processor(AttnProcessor2_0())."
            )

    def _installed_types(self) -> set[str]:
        return {type(attention.processor).__name__ for attention in self._attentions.values()}

    def ensure_installed(self) -> None:
        """Reinstall the processors if other code has replaced them.

        Other pipelines on the same UNet and diffusers' own variants of attention (sliced, fused projections, xFormers)
        replace processors. These compute the same attention, so replacing them changes no result.

        Raises:
            ValueError: see `check_processors`.
        """
        if all(self._attentions[name].processor is processor for name, processor in self._processors.items()):
            return
        self.check_processors()
        names = self._installed_types()
        if names != {RealCustomAttnProcessor.__name__}:
            logger.warning("RealCustom++ replaces the attention processors %s with its own", ", ".join(sorted(names)))
        self._install()

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Store the weights of the query, key and value projections of each self-attention layer in one tensor.

        The three projections are then one matrix multiplication. They remain separate layers whose weights are views of
        that tensor, so in-place changes take effect. A layer whose weights are replaced, for example by a LoRA or by
        moving the UNet to another device, uses three matrix multiplications again.
        """
        for name, attn in self._attentions.items():
            layers = (attn.to_q, attn.to_k, attn.to_v)
            if name.endswith("attn1") and all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
                self._projections[name] = torch.cat([layer.weight for layer in layers])
                for layer, part in zip(layers, self._projections[name].chunk(3), strict=True):
                    layer.weight.data = part

    def unfuse_projections(self) -> None:
        """Give each projection weights of its own again."""
        for name in self._projections:
            for layer in (self._attentions[name].to_q, self._attentions[name].to_k, self._attentions[name].to_v):
                if type(layer) is nn.Linear:
                    layer.weight.data = layer.weight.data.clone()
        self._projections.clear()

    def is_fused(self, name: str) -> bool:
        """Whether a layer computes its query, key and value in one matrix multiplication."""
        return self._fused(name) is not None

    def _fused(self, name: str) -> Tensor | None:
        """The fused weights of a layer, if its projections are still views of them."""
        weights = self._projections.get(name)
        if weights is None:
            return None
        attn = self._attentions[name]
        for layer, part in zip((attn.to_q, attn.to_k, attn.to_v), weights.chunk(3), strict=True):
            if type(layer) is not nn.Linear or layer.weight.data_ptr() != part.data_ptr():
                return None
        return weights

    def text_keys_values(self, embeds: Tensor) -> PackedKeysValues:
        """Keys and values of a text [1, T, C] in every cross-attention layer. They do not depend on the timestep."""
        attentions = {n: a for n, a in self._attentions.items() if n.endswith("attn2")}
        layers = ((name, attn.to_k(embeds), attn.to_v(embeds)) for name, attn in attentions.items())
        return PackedKeysValues.pack(
            layers, {name: attn.inner_kv_dim for name, attn in attentions.items()}, like=embeds
        )

    @contextmanager
    def attention_context(
        self,
        *,
        text: Sequence[KeysValues] = (),
        vision: VisualAttention | None = None,
        recordings: Mapping[str, LayerRecording] | None = None,
        stop_after_recording: bool = False,
    ) -> Iterator[None]:
        """Set the texts, references and recordings of the UNet calls inside the context.

        Args:
            text: keys and values of each row's text, each [1, T, C] in every layer, or those of all rows in one entry;
                if empty, each layer projects the `encoder_hidden_states` of the call.
            vision: references for the text cross-attention layers.
            recordings: layer name -> its recording.
            stop_after_recording: raise `StopForward` after the transformer of the last recording layer.
        Raises:
            ValueError: see `ensure_installed`.
        """
        recordings = recordings or {}
        with self._lock:
            self.ensure_installed()
            hooks: list[RemovableHandle] = []
            try:
                for name, processor in self._processors.items():
                    processor.recording = recordings.get(name)
                    processor.projections = self._fused(name)
                needs_stacking = max(len(text), 0 if vision is None else len(vision.keys_values)) > 1
                for transformer, layers in self._text_layers.items():
                    if needs_stacking:
                        hooks += self._set_during_forward(transformer, text, vision)
                    else:
                        self._set(layers, text, vision)
                if stop_after_recording:
                    hooks.append(self._stop_after(max(recordings, key=list(self.levels).index)))
                yield
            finally:
                for processor in self._processors.values():
                    processor.text = processor.vision = processor.recording = processor.projections = None
                for hook in hooks:
                    hook.remove()

    def _set(self, layers: list[str], text: Sequence[KeysValues], vision: VisualAttention | None) -> None:
        for name in layers:
            self._processors[name].text = stack_keys_values(text, name) if text else None
            self._processors[name].vision = vision.at(name, self.levels[name]) if vision is not None else None

    def _set_during_forward(
        self, transformer: str, text: Sequence[KeysValues], vision: VisualAttention | None
    ) -> list[RemovableHandle]:
        """Set the layers of a transformer during its forward pass only.

        Several texts or references are concatenated into one tensor per layer. Doing so for all layers at once would
        double the memory of the keys and values.
        """
        module, layers = self.unet.get_submodule(transformer), self._text_layers[transformer]

        def set_layers(*_) -> None:
            self._set(layers, text, vision)

        def clear_layers(*_) -> None:
            self._set(layers, (), None)

        return [module.register_forward_pre_hook(set_layers), module.register_forward_hook(clear_layers)]

    def _stop_after(self, layer: str) -> RemovableHandle:
        def stop(*_) -> NoReturn:
            raise StopForward

        return self.unet.get_submodule(_transformer(layer)).register_forward_hook(stop)


def _transformer(layer: str) -> str:
    """The transformer that contains a layer. Hooks are registered there because the blocks inside may be compiled."""
    return layer.split(".transformer_blocks.")[0]


def _forward_order(layer: str) -> int:
    """Sort key that turns the order of the module tree (down, up, mid) into that of the forward pass."""
    return ("down_blocks", "mid_block", "up_blocks").index(layer.split(".")[0])


def attention_level(layer: str, num_levels: int) -> int:
    """Resolution level of an attention layer, from its name: the number of downsamplings before it."""
    block, index = layer.split(".")[:2]
    if block == "down_blocks":
        return int(index)
    if block == "up_blocks":
        return num_levels - 1 - int(index)
    assert block == "mid_block", layer
    return num_levels - 1


def level_sizes(height: int, width: int, num_levels: int) -> list[tuple[int, int]]:
    """(h, w) of every level for a latent of height x width; each downsampling rounds up, as the UNet's stride does."""
    sizes = [(height, width)]
    for _ in range(num_levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes
