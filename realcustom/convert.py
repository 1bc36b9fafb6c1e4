"""Converts weight names: from the authors' checkpoint to this project, and from timm to transformers."""

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

OFFICIAL_HEAD_DIM = 64
OFFICIAL_PROJECTOR = "encoder_hidden_states_vision_projection."
# Modules of the authors' projector -> this project's. Their `min_attention` is cross-scale attention (Eq. 7).
_PROJECTOR_MODULES = {
    "projector_base": "projector.deep_mlp",
    "min_attention": "projector.cross_scale_attention",
    "projector": "projector.high_mlp",
    "min_attention2": "projector.cross_layer_attention",
    "projector2": "projector.shallow_mlp",
}
_ATTENTION_PARTS = {"norm1": "norm_query", "norm2": "norm_context"}


def convert_official(state: StateDict) -> tuple[StateDict, StateDict]:
    """Convert the authors' names; return the adapter's weights and the plain UNet weights of the same file.

    The authors' shallow projector computes the cross-scale term and then overwrites it, so these weights have no effect
    in their code. They are omitted here and counted in the log. Names of unknown projectors are kept.
    """
    shallow = any(name.startswith(OFFICIAL_PROJECTOR + "projector2.") for name in state)
    adapter: StateDict = {}
    plain: StateDict = {}
    unused: list[str] = []
    for name, tensor in state.items():
        if name.startswith(OFFICIAL_PROJECTOR):
            module, _, rest = name.removeprefix(OFFICIAL_PROJECTOR).partition(".")
            if module not in _PROJECTOR_MODULES:
                adapter[name] = tensor  # an unknown projector, which `weights.check_state` rejects
                continue
            if shallow and module in ("min_attention", "projector"):
                unused.append(name)
                continue
            part, _, leaf = rest.partition(".")
            adapter[f"{_PROJECTOR_MODULES[module]}.{_ATTENTION_PARTS.get(part, part)}{'.' if leaf else ''}{leaf}"] = (
                tensor
            )
        elif name.endswith((".to_k_vision.weight", ".to_v_vision.weight")):
            layer, kind, _ = name.rsplit(".", 2)
            adapter[f"{kind}.{layer.replace('.', '-')}.weight"] = tensor
        else:
            plain[name] = tensor
    if unused:
        logger.info("omitted %d weights that the authors' shallow projector does not use", len(unused))
    return adapter, plain


def convert_timm_vit(state: StateDict, family: str) -> StateDict:
    """Convert timm's vision transformer names to transformers' `family`, "siglip" or "dinov2_with_registers".

    Raises:
        ValueError: a name that is not a weight of the family.
    """
    out: StateDict = {}
    for name, tensor in state.items():
        if name.startswith("attn_pool."):
            continue  # the pooling head is not used
        for new_name, part in _timm_entry(name, tensor, family):
            out[new_name] = part
    if family == "dinov2_with_registers":
        # In timm the class token has no position embedding; transformers adds the first one to it.
        positions = out["embeddings.position_embeddings"]
        out["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        out["embeddings.mask_token"] = torch.zeros(1, positions.shape[-1])
    return out


_TIMM_TOP = {
    "siglip": {
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
    },
    "dinov2_with_registers": {
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
}
_TIMM_BLOCK = {
    "siglip": {
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.out_proj",),
        "norm1": ("layer_norm1",),
        "norm2": ("layer_norm2",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
    "dinov2_with_registers": {
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
        "ls1.gamma": ("layer_scale1.lambda1",),
        "ls2.gamma": ("layer_scale2.lambda1",),
    },
}
_TIMM_BLOCKS = {"siglip": "encoder.layers", "dinov2_with_registers": "encoder.layer"}


def _timm_entry(name: str, tensor: Tensor, family: str) -> list[tuple[str, Tensor]]:
    if name in _TIMM_TOP[family]:
        target = _TIMM_TOP[family][name]
        return [(target, tensor[0] if target.endswith("position_embedding.weight") else tensor)]
    module, _, leaf = name.rpartition(".")
    if module in _TIMM_TOP[family]:
        return [(f"{_TIMM_TOP[family][module]}.{leaf}", tensor)]
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        parts = _TIMM_BLOCK[family]
        prefix = f"{_TIMM_BLOCKS[family]}.{index}"
        if rest in parts:
            return [(f"{prefix}.{parts[rest][0]}", tensor)]
        module, _, leaf = rest.rpartition(".")
        if module in parts:
            targets = parts[module]
            return [
                (f"{prefix}.{target}.{leaf}", part)
                for target, part in zip(targets, tensor.chunk(len(targets)), strict=True)
            ]
    raise ValueError(f"{name} is not a weight of a timm vision transformer of family {family!r}.")
