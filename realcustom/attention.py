"""The attention processors, and the only knowledge of the UNet's insides: which layer works at which resolution.

The processors own no weights. For one UNet call they are connected to what each layer needs in it: the references it
sees (`LayerVision`) and what it records for the guidance masks (`LayerRecording`). Unconnected, every layer computes
exactly what the stock processor computes. What differs between layers reaches them as tensors, never as names, so that
`torch.compile` can share one program among all blocks of a shape.

Legend: R rows of the UNet call, P (row, subject) pairs, H heads, Q = h * w positions, K of them inside a mask, T text
tokens, N vision tokens, C channels of a layer, d = C / H.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import SparseMask

KeysValues = dict[str, tuple[Tensor, Tensor]]  # layer name -> keys and values, each [B, N, channels]


@dataclass(frozen=True)
class LayerVision:
    """What one layer sees: keys, values [P, N, C] and where; see `VisualAttention`."""

    key: Tensor
    value: Tensor
    inside: SparseMask | None

    def add_to(self, out: Tensor, query: Tensor) -> Tensor:
        """`out` [R, Q, C] plus the masked visual attention of every pair in its row; query [R, H, Q, d]."""
        key, value = _split_heads(self.key, query), _split_heads(self.value, query)
        if self.inside is None:
            return out + _merge_heads(F.scaled_dot_product_attention(query, key, value))
        index = self.inside.index.flatten()
        asked = _merge_heads(query).flatten(0, 1).index_select(0, index).unflatten(0, self.inside.index.shape)
        seen = _merge_heads(F.scaled_dot_product_attention(_split_heads(asked, query), key, value))
        seen = seen * self.inside.weight.to(seen.dtype)
        return out.flatten(0, 1).index_add(0, index, seen.flatten(0, 1)).view_as(out)


@dataclass(frozen=True, kw_only=True)
class VisualAttention:
    """Who sees which reference where: the second summand of Eq. 16 and 19.

    Attributes:
        keys_values: per pair the keys and values of its reference, each [1, N, C] in every layer.
        inside: the masked positions at each attention level; None if pair p is row p, for every row, and sees
            everywhere.
    """

    keys_values: Sequence[KeysValues]
    inside: Mapping[int, SparseMask] | None

    def at(self, layer: str, level: int) -> LayerVision:
        key, value = _stack(self.keys_values, layer)
        return LayerVision(key, value, None if self.inside is None else self.inside[level])


class LayerRecording(Protocol):
    def record(self, query: Tensor, key: Tensor) -> None:
        """Keep what is needed of queries [R, H, Q, d] and keys [R, H, T, d]."""


def _stack(keys_values: Sequence[KeysValues], layer: str) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, those of all together; a single one is not copied."""
    keys, values = zip(*(kv[layer] for kv in keys_values), strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


def _split_heads(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, tokens, C] -> [B, H, tokens, d] with the heads of `like`."""
    return tokens.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class RealCustomAttnProcessor:
    """Eq. 4, 16 and 19 in one layer of a stock diffusers UNet; self-attention and cross-attention alike.

    Attributes:
        text, vision, recording: what the layer is connected to during a UNet call (see `AttentionLayers.connected`);
            `text` are keys and values [R, T, C] made before, in place of projecting the text in every step.
    """

    def __init__(self) -> None:
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
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        if self.text is None:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key, value = attn.to_k(text), attn.to_v(text)
        else:
            key, value = self.text
        key, value = _split_heads(key, query), _split_heads(value, query)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
        out = _merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask))
        if self.recording is not None:
            self.recording.record(query, key)
        if self.vision is not None:
            out = self.vision.add_to(out, query)
        out = attn.to_out[1](attn.to_out[0](out))
        return out / attn.rescale_output_factor


class StopForward(Exception):
    """Leaves the UNet behind the last layer that records; the rest of the pass would be thrown away."""


class AttentionLayers:
    """Our processors in every attention layer of a stock UNet.

    Attributes:
        levels: name of each attention layer -> its resolution level, 0 for the latent's own; in the order of the UNet's
            forward pass. Names end in "attn1" (self-attention) or "attn2" (text cross-attention).
        compiled_whole: the UNet is one program, into which no hook reaches: every layer is shown its copies before the
            call, and no call is left early (what a program does not return it does not compute).
    """

    def __init__(self, unet) -> None:
        self._unet = unet
        self._before = dict(unet.attn_processors)
        names = sorted((name.removesuffix(".processor") for name in self._before), key=_forward_order)
        num_levels = len(unet.config.down_block_types)
        self.levels = {name: attention_level(name, num_levels) for name in names}
        self._processors = {name: RealCustomAttnProcessor() for name in names}
        unet.set_attn_processor({f"{name}.processor": p for name, p in self._processors.items()})
        self._text_layers: dict[str, list[str]] = {}  # transformer -> names of its text cross-attention layers
        for name in names:
            if name.endswith("attn2"):
                self._text_layers.setdefault(_transformer(name), []).append(name)
        self.compiled_whole = False
        self._text_together: tuple[tuple[KeysValues, ...], KeysValues] = ((), {})
        self._lock = threading.RLock()  # a connection is to one call at a time

    def remove(self) -> None:
        """Put the processors from before back."""
        self._unet.set_attn_processor(dict(self._before))

    def text_keys_values(self, embeds: Tensor) -> KeysValues:
        """Keys and values of texts [B, T, C] in every cross-attention layer; they are the same in every step."""
        names = [name for layers in self._text_layers.values() for name in layers]
        attns = {name: self._unet.get_submodule(name) for name in names}
        return {name: (attn.to_k(embeds), attn.to_v(embeds)) for name, attn in attns.items()}

    @contextmanager
    def attention_context(
        self,
        *,
        text: Sequence[KeysValues] = (),
        vision: VisualAttention | None = None,
        recordings: Mapping[str, LayerRecording] | None = None,
        stop_after_recording: bool = False,
    ) -> Iterator[None]:
        """For the UNet calls inside: who sees which reference, and which layers record.

        Args:
            text: keys and values of each row's text, each [1, T, C] in every layer; without, each layer projects the
                text that the UNet is given.
            vision: references of the text cross-attention layers.
            recordings: layer name -> its recording.
            leave_early: end the call behind the last recording layer's transformer by raising `LeftEarly`.
        """
        with self._lock:
            hooks = []
            try:
                for name, processor in self._processors.items():
                    processor.recording = (recordings or {}).get(name)
                if self.compiled_whole and len(text) > 1:
                    text = [self._together(tuple(text))]
                copies = max(len(text), 0 if vision is None else len(vision.keys_values)) > 1
                for transformer, layers in self._text_layers.items():
                    if copies and not self.compiled_whole:
                        hooks += self._show_inside(transformer, text, vision)
                    else:
                        self._show(layers, text, vision)
                if stop_after_recording and not self.compiled_whole:
                    hooks.append(self._leave_behind(max(recordings, key=list(self.levels).index)))
                yield
            finally:
                for processor in self._processors.values():
                    processor.text = processor.vision = processor.recording = None
                for hook in hooks:
                    hook.remove()

    def _together(self, texts: tuple[KeysValues, ...]) -> KeysValues:
        """Several texts as one batch, copied once for all the steps that the same images make together."""
        before, together = self._text_together
        if list(map(id, texts)) != list(map(id, before)):
            together = {name: _stack(texts, name) for name in texts[0]}
            self._text_together = (texts, together)
        return together

    def _show(self, layers: list[str], text: Sequence[KeysValues], vision: VisualAttention | None) -> None:
        for name in layers:
            self._processors[name].text = _stack(text, name) if text else None
            self._processors[name].vision = vision.at(name, self.levels[name]) if vision is not None else None

    def _show_inside(self, transformer: str, text: Sequence[KeysValues], vision: VisualAttention | None) -> list:
        """Connects a transformer's layers to what they see for as long as it runs.

        Several texts or references are copied into one tensor per layer. Copies for all layers at once would take as
        much memory as they do themselves.
        """
        module, layers = self._unet.get_submodule(transformer), self._text_layers[transformer]

        def connect(*_) -> None:
            self._show(layers, text, vision)

        def disconnect(*_) -> None:
            self._show(layers, (), None)

        return [module.register_forward_pre_hook(connect), module.register_forward_hook(disconnect)]

    def _leave_behind(self, layer: str):
        def leave(*_) -> None:
            raise StopForward

        return self._unet.get_submodule(_transformer(layer)).register_forward_hook(leave)


def _transformer(layer: str) -> str:
    """The transformer around a layer's block. What hooks do happens there, as the blocks themselves may be compiled."""
    return layer.split(".transformer_blocks.")[0]


def _forward_order(layer: str) -> int:
    """Sorts layers of the module tree (down, up, mid) into the order of the forward pass."""
    return ("down_blocks", "mid_block", "up_blocks").index(layer.split(".")[0])


def attention_level(layer: str, num_levels: int) -> int:
    """Resolution level of an attention module by its name: how often the latent was halved before it."""
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
