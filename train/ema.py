"""Exponential moving average (EMA) of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Exponential moving average of the trainable parameters of a module, in float32.

    Attributes:
        values: name of each parameter -> its average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average toward the current parameters.

        In early steps the decay is smaller, so that the initial values lose their influence quickly.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        named = dict(module.named_parameters())
        current = [named[name].detach() for name in self.values]
        get_ema_multi_avg_fn(decay)(list(self.values.values()), current, step)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Replace the averages by saved ones.

        Raises:
            ValueError: they have other names.
        """
        if values.keys() != self.values.keys():
            different = sorted(values.keys() ^ self.values.keys())
            raise ValueError(f"the saved EMA belongs to another network: {different[0]} is in only one of the two.")
        for name, value in values.items():
            self.values[name].copy_(value)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Give the module the averaged weights inside the context."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.values:
                current = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(current)
