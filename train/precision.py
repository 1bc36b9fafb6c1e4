"""Which precision training computes in: bfloat16 where the processor multiplies it natively, float32 elsewhere."""

from functools import cache

import torch


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 is fast. A CPU without instructions for it emulates them, hundreds of times slower."""
    if device_type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def autocast(device: str) -> torch.autocast:
    """The context of every stage's forward passes; weights stay float32."""
    device_type = device.split(":")[0]
    return torch.autocast(device_type, torch.bfloat16, enabled=multiplies_bfloat16(device_type))
