"""Adapter files: our safetensors, the authors' checkpoint, and the tables that translate between names.

Loading is strict: every key is accounted for before anything is changed, and a key that is left out is named.
"""

import json
import logging
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import RealCustomAdapter, cross_attention_layers

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

OFFICIAL_HEAD_DIM = 64
_OFFICIAL_PROJECTOR = "encoder_hidden_states_vision_projection."
# Module of the authors' projector -> ours. Their `min_attention` is the cross-scale one (Eq. 7).
_PROJECTOR_MODULES = {
    "projector_base": "projector.deep_mlp",
    "min_attention": "projector.cross_scale_attention",
    "projector": "projector.high_mlp",
    "min_attention2": "projector.cross_layer_attention",
    "projector2": "projector.shallow_mlp",
}
_ATTENTION_PARTS = {"norm1": "norm_query", "norm2": "norm_context"}


def save_adapter(adapter: RealCustomAdapter, path: str | PathLike) -> None:
    """Write an adapter as one safetensors file; its configuration travels in the file's header."""
    state = {name: tensor.contiguous().cpu() for name, tensor in adapter.state_dict().items()}
    save_file(state, path, metadata={"realcustom_adapter": json.dumps(_own_config(adapter))})


def load_adapter(
    path: str | PathLike, unet, *, vision_dim: int, replace_unet: bool = False
) -> tuple[RealCustomAdapter, StateDict]:
    """An adapter from a file of ours or from the authors' checkpoint, checked against the UNet it is for.

    Args:
        path: .safetensors, or .pth / .bin / .pt read with `weights_only=True`.
        unet: the UNet it must fit; it is not changed.
        vision_dim: channels of the vision features it must accept.
        replace_unet: accept plain UNet weights beside the adapter's, as full checkpoints have them.
    Returns:
        The adapter, and the plain UNet weights to put into the UNet (empty if the file has none).
    Raises:
        ValueError: unreadable file, unknown or missing key, wrong shape, wrong family; names file, key, expectation.
    """
    state, config = read_state(path)
    plain: StateDict = {}
    if config is None and any(name.startswith(_OFFICIAL_PROJECTOR) for name in state):
        state, plain = convert_official(state)
        check_state(plain, unet.state_dict(), path, partial=True)
        if plain and not replace_unet:
            raise ValueError(
                f"{path} also holds {len(plain)} plain UNet weights (such as {sorted(plain)[0]}); pass "
                "replace_unet=True to let them replace those of the base model, as the authors' demo does."
            )
    head_dim = _head_dim(config, path, vision_dim=vision_dim, condition_dim=unet.config.cross_attention_dim)
    options = {
        "vision_dim": vision_dim,
        "head_dim": head_dim,
        "condition_dim": unet.config.cross_attention_dim,
        "cross_layer": any(name.startswith("projector.shallow_mlp.") for name in state),
        "cross_scale": any(name.startswith("projector.high_mlp.") for name in state),
    }
    with torch.device("meta"):
        adapter = RealCustomAdapter(layers=cross_attention_layers(unet), **options)
    check_state(state, adapter.state_dict(), path)
    adapter.load_state_dict(state, assign=True)
    return adapter.requires_grad_(False).eval(), plain


def _head_dim(config: dict | None, path: str | PathLike, **widths: int) -> int:
    """Width of the projector's heads, if the file is for a model of these widths; ValueError otherwise."""
    if config is None:
        config = {"head_dim": OFFICIAL_HEAD_DIM, **widths}
    for name, width in widths.items():
        if config.get(name) != width:
            raise ValueError(
                f"{path} is an adapter for {name} {config.get(name)}, this model has {width}; "
                "it is a file for another model."
            )
    head_dim = config.get("head_dim")
    if not isinstance(head_dim, int) or head_dim < 1 or widths["vision_dim"] % head_dim:
        raise ValueError(
            f"{path}: heads of width {head_dim!r} do not divide the {widths['vision_dim']} channels of the "
            "vision features; it is a file for other vision encoders."
        )
    return head_dim


def read_state(path: str | PathLike) -> tuple[StateDict, dict | None]:
    """Tensors of a weight file, and our adapter configuration if the file has one. No pickled code is ever run."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of an adapter (.safetensors, or the authors' .pth).")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download or save it again.") from error
        return state, _header(metadata, path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: pickle, zip, EOF and runtime errors
        raise ValueError(f"{path} could not be read as plain weights ({type(error).__name__}: {error}).") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors.")
    return state, None


def _header(metadata: dict[str, str], path: Path) -> dict | None:
    if "realcustom_adapter" not in metadata:
        return None
    try:
        config = json.loads(metadata["realcustom_adapter"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its header's realcustom_adapter is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its header's realcustom_adapter is {config!r}; it must be a JSON object.")
    return config


def check_state(state: StateDict, expected: StateDict, path: str | PathLike, partial: bool = False) -> None:
    """ValueError naming missing (unless `partial`), unknown, misshapen or non-floating keys of `state`."""
    missing = set() if partial else expected.keys() - state.keys()
    unknown = state.keys() - expected.keys()
    wrong = []
    if missing:
        wrong.append(f"lacks {len(missing)} of the {len(expected)} weights this model needs, such as {min(missing)}")
    if unknown:
        wrong.append(f"has {len(unknown)} unknown to this model, such as {min(unknown)}")
    if wrong:
        raise ValueError(f"{path} {' and '.join(wrong)}; it is a file for another model.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, this model needs {list(expected[name].shape)}; "
                "it is a file for another model."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} holds {tensor.dtype}; weights are floating-point numbers.")


def convert_official(state: StateDict) -> tuple[StateDict, StateDict]:
    """The authors' names -> ours; returns the adapter's weights and the plain UNet weights found beside them.

    The authors' shallow projector computes the cross-scale term and then overwrites it, so those weights have no
    effect in their code; they are left out here, with a log line. Names of no known projector stay as they are.
    """
    shallow = any(name.startswith(_OFFICIAL_PROJECTOR + "projector2.") for name in state)
    adapter: StateDict = {}
    plain: StateDict = {}
    without_effect: list[str] = []
    for name, tensor in state.items():
        if name.startswith(_OFFICIAL_PROJECTOR):
            module, _, rest = name.removeprefix(_OFFICIAL_PROJECTOR).partition(".")
            if module not in _PROJECTOR_MODULES:
                adapter[name] = tensor  # of another projector: left as it is, for `check_state` to refuse
                continue
            if shallow and module in ("min_attention", "projector"):
                without_effect.append(name)
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
    if without_effect:
        logger.info("%d weights have no effect in the authors' shallow projector and are left out", len(without_effect))
    return adapter, plain


def convert_timm_vit(state: StateDict, family: str) -> StateDict:
    """timm's vision transformer names -> those of transformers' `family`, "siglip" or "dinov2_with_registers"."""
    out: StateDict = {}
    for name, tensor in state.items():
        if name.startswith("attn_pool."):
            continue  # the pooling head is not used
        for new_name, part in _timm_entry(name, tensor, family):
            out[new_name] = part
    if family == "dinov2_with_registers":
        # timm gives the class token no position, transformers adds the first one.
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
    raise ValueError(f"{name} is not a weight of a timm vision transformer of the family {family!r}.")


def _own_config(adapter: RealCustomAdapter) -> dict:
    names = ("vision_dim", "condition_dim", "head_dim", "cross_layer", "cross_scale")
    return {name: adapter.config[name] for name in names}
