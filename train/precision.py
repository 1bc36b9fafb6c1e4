"""How training computes on a device: in bfloat16 where that is faster, in float32 elsewhere; attention by the kernel
that is faster forwards and backwards."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@cache
def prefers_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is faster than float32.

    A CPU without instructions for it emulates them, hundreds of times slower. AVX-512's alone lose more by converting
    than they gain: the UNet's training steps were a third slower with them. It takes AMX.
    """
    if device_type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))


def autocast(device: str) -> torch.autocast:
    """The context of every stage's forward passes; weights stay float32."""
    device_type = device.split(":")[0]
    return torch.autocast(device_type, torch.bfloat16, enabled=prefers_bfloat16(device_type))


def differentiable_attention(device: str) -> AbstractContextManager:
    """On a CPU the fused kernel runs backwards at half the speed of softmax written out."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
