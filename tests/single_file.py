"""Writes a diffusers pipeline as a single file with the tensor names of the original Stable Diffusion checkpoints.

The inverse of what diffusers does in `from_single_file`, for tests of loading such files.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

# diffusers' module names -> those of the original checkpoints.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
       "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
       "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(base: StableDiffusionXLPipeline | StableDiffusionPipeline, path: Path) -> None:
    """Write UNet, VAE and text encoders of `base` to one safetensors file."""
    state = {f"model.diffusion_model.{_unet(n, base.unet)}": t for n, t in base.unet.state_dict().items()}
    state |= {f"first_stage_model.{_vae(n, base.vae)}": _vae_tensor(n, t) for n, t in base.vae.state_dict().items()}
    first_text = {
        f"transformer.text_model.{n.removeprefix('text_model.')}": t for n, t in base.text_encoder.state_dict().items()
    }
    if getattr(base, "text_encoder_2", None) is None:
        state |= {f"cond_stage_model.{n}": t for n, t in first_text.items()}
    else:
        state |= {f"conditioner.embedders.0.{n}": t for n, t in first_text.items()}
        state |= {
            f"conditioner.embedders.1.model.{n}": t for n, t in _open_clip(base.text_encoder_2.state_dict()).items()
        }
    save_file({n: t.contiguous() for n, t in state.items()}, path)


def _unet(name: str, unet: UNet2DConditionModel) -> str:
    """Name of a UNet tensor in the original layout, which numbers the blocks of each half consecutively."""
    module, leaf = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    per_block = unet.config.layers_per_block + 1
    block_type, rest = name.split(".", 1)
    if block_type == "mid_block":
        part, index, rest = rest.split(".", 2)
        prefix = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
    else:
        block, part, index, rest = rest.split(".", 3)
        block, index = int(block), int(index)
        if part == "downsamplers":
            return f"input_blocks.{1 + block * per_block + per_block - 1}.0.op.{leaf}"
        if part == "upsamplers":
            has_attention = hasattr(unet.up_blocks[block], "attentions")
            return f"output_blocks.{block * per_block + per_block - 1}.{2 if has_attention else 1}.conv.{leaf}"
        first = "input_blocks" if block_type == "down_blocks" else "output_blocks"
        number = block * per_block + index + (block_type == "down_blocks")
        prefix = f"{first}.{number}.{0 if part == 'resnets' else 1}"
    if part == "resnets":
        module = rest.rsplit(".", 1)[0]
        return f"{prefix}.{RESNET[module]}.{leaf}"
    return f"{prefix}.{rest}"


def _vae(name: str, vae: AutoencoderKL) -> str:
    """Name of a VAE tensor in the original layout, which counts decoder levels from the highest resolution."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    parts = name.split(".")
    if len(parts) < 3 or not parts[1].endswith(("_blocks", "_block")):
        return name
    side, group = parts[:2]
    if group == "mid_block":
        kind, index, rest = parts[2], int(parts[3]), ".".join(parts[4:])
        if kind == "resnets":
            return f"{side}.mid.block_{index + 1}.{rest}"
        module, leaf = rest.rsplit(".", 1)
        return f"{side}.mid.attn_1.{VAE_ATTENTION[module]}.{leaf}"
    block, kind, index, rest = int(parts[2]), parts[3], parts[4], ".".join(parts[5:])
    if group == "up_blocks":
        block = len(vae.config.up_block_types) - 1 - block
    direction = group.removesuffix("_blocks")
    return (
        f"{side}.{direction}.{block}.{direction}sample.{rest}"
        if kind.endswith("samplers")
        else f"{side}.{direction}.{block}.block.{index}.{rest}"
    )


def _vae_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Attention projections are 1 x 1 convolutions in the original layout, linear layers in diffusers."""
    return tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SDXL's second text encoder with OpenCLIP's names; q, k and v are one tensor there."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for name, tensor in state.items():
        if not name.startswith("encoder.layers."):
            continue
        layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
        module, leaf = rest.rsplit(".", 1)
        prefix = f"transformer.resblocks.{layer}"
        if module in OPEN_CLIP:
            out[f"{prefix}.{OPEN_CLIP[module]}.{leaf}"] = tensor
        elif module == "self_attn.q_proj":
            keys_and_values = [state[name.replace("q_proj", f"{which}_proj")] for which in "kv"]
            out[f"{prefix}.attn.in_proj_{leaf}"] = torch.cat([tensor, *keys_and_values])
    return out
