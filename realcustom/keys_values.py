"""Keys and values of texts and references in every cross-attention layer, packed into one tensor.

They do not depend on the timestep, so they are computed once per text or reference. One tensor for all layers makes a
copy into the static buffers of a CUDA graph one operation instead of 140.

Legend: B batch, N tokens, C channels of a layer.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = Mapping[str, tuple[Tensor, Tensor]]  # layer name -> keys and values, each [B, N, C]

ALIGNMENT = 256  # bytes; kernels that load vectors, and those of `torch.compile`, expect aligned tensors
_serials = itertools.count(1)


@dataclass(frozen=True)
class Layout:
    """Where the keys and values of each layer begin in a flat tensor.

    Attributes:
        channels: layer name -> C, in the order of the layers.
        num_tokens: N.
        dtype: of the tensor.
    """

    channels: tuple[tuple[str, int], ...]
    num_tokens: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Elements of the flat tensor."""
        return sum(2 * self._stride(width) for _, width in self.channels)

    def _stride(self, width: int) -> int:
        unit = ALIGNMENT // self.dtype.itemsize
        return math.ceil(self.num_tokens * width / unit) * unit

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views [B, N, C] of the keys and values of each layer in a tensor [B, size]."""
        views, start = {}, 0
        for name, width in self.channels:
            pair = []
            for _ in range(2):
                part = flat[:, start : start + self.num_tokens * width]
                pair.append(part.unflatten(1, (self.num_tokens, width)))
                start += self._stride(width)
            views[name] = (pair[0], pair[1])
        return views


class PackedKeysValues(Mapping[str, tuple[Tensor, Tensor]]):
    """Keys and values of one text or reference in every layer, each [1, N, C]. They are not changed after packing.

    Attributes:
        flat: all of them, [1, layout.size].
        serial: unique number that stands for the content.
    """

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        self.flat, self.layout = flat, layout
        self.serial = next(_serials)
        self._views = layout.views(flat)

    @classmethod
    def pack(
        cls, layers: Iterable[tuple[str, Tensor, Tensor]], channels: Mapping[str, int], like: Tensor
    ) -> "PackedKeysValues":
        """Copy each layer's keys and values [1, N, C] as it is computed, so that at most one layer exists twice.

        Args:
            layers: name, keys and values, in the order of `channels`.
            channels: layer name -> C.
            like: [..., N, any], gives the number of tokens, the type and the device.
        """
        layout = Layout(tuple(channels.items()), like.shape[-2], like.dtype)
        packed = cls(torch.zeros(1, layout.size, dtype=like.dtype, device=like.device), layout)
        for name, keys, values in layers:
            for view, computed in zip(packed[name], (keys, values), strict=True):
                view.copy_(computed)
        return packed

    def to(self, device: str | torch.device) -> "PackedKeysValues":
        """A copy on another device."""
        return PackedKeysValues(self.flat.to(device), self.layout)

    def cast(self, dtype: torch.dtype) -> "PackedKeysValues":
        """The keys and values in another type; itself if it has the type already."""
        if dtype == self.layout.dtype:
            return self
        layers = ((name, keys, values) for name, (keys, values) in self._views.items())
        like = self.flat.new_empty(self.layout.num_tokens, 0, dtype=dtype)
        return PackedKeysValues.pack(layers, dict(self.layout.channels), like)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        return self._views[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def stack_keys_values(keys_values: Sequence[KeysValues], layer: str) -> tuple[Tensor, Tensor]:
    """Concatenate keys and values of one layer along the batch; a single entry is not copied."""
    keys, values = zip(*(kv[layer] for kv in keys_values), strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


def stack_all(keys_values: Sequence[KeysValues]) -> KeysValues:
    """Concatenate keys and values of all layers along the batch."""
    return {layer: stack_keys_values(keys_values, layer) for layer in keys_values[0]}
