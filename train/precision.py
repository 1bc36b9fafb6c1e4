"""Numerical precision and attention kernel of training, chosen by device."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@cache
def prefers_bfloat16(device_type: str) -> bool:
    """Whether training is faster in bfloat16 than in float32.

    On a CPU this requires AMX on x86 or the bf16 instructions of Arm. A CPU without bfloat16 instructions emulates
    them, which is many times slower. With AVX-512 alone, conversions cost more than they save: training steps of the
    UNet take a third longer.
    """
    if device_type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))


def frozen_dtype(precision: Literal["auto", "bf16", "fp32"], device_type: str) -> torch.dtype:
    """Type of the frozen models; see `TrainConfig.precision`."""
    bfloat16 = prefers_bfloat16(device_type) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bfloat16 else torch.float32


def autocast(device: str) -> torch.autocast:
    """Context of the forward passes of pretraining. Weights stay in float32."""
    device_type = device.split(":")[0]
    return torch.autocast(device_type, torch.bfloat16, enabled=prefers_bfloat16(device_type))


def differentiable_attention(device: str) -> AbstractContextManager:
    """Context that selects the attention kernel. On a CPU, the backward pass of the fused kernel takes twice as long as
    that of the math kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
