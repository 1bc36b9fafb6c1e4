"""Fingerprints of components: they change whenever a component is replaced or its weights or LoRA state change.

The private attribute `Tensor._version`, which counts in-place changes, is used in this file only.
"""

from collections.abc import Hashable

from torch import nn
from transformers import PreTrainedTokenizerBase


def fingerprint(component: object) -> Hashable:
    """Return a value that changes if the output of a component may have changed.

    Of a tokenizer, it covers the identity, the number of tokens and the length limit. Of a module, it covers the
    identity of the component, the identity, version and type of each parameter and buffer, and the state
    of each LoRA layer (active adapters, scales, enabled or not). It does not change when offloading moves weights
    between devices. Writes through `tensor.data` are not detected; call `clear_caches` after them.
    """
    if isinstance(component, PreTrainedTokenizerBase):
        return id(component), len(component), component.model_max_length
    if not isinstance(component, nn.Module):
        return id(component)
    tensors = tuple(
        (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.dtype)
        for tensor in (*component.parameters(), *component.buffers())
    )
    lora = tuple(
        (str(module.active_adapters), str(module.scaling), bool(module.disable_adapters), str(module.merged_adapters))
        for module in component.modules()
        if hasattr(module, "merged_adapters") and hasattr(module, "scaling")
    )
    return id(component), hash(tensors), hash(lora)
