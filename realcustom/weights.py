"""Loads and saves adapters: this project's safetensors files and the authors' checkpoint.

Loading is strict: every key is checked before anything changes, and the error names a key that does not match.
"""

import json
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import RealCustomAdapter, cross_attention_layers
from .convert import OFFICIAL_HEAD_DIM, OFFICIAL_PROJECTOR, StateDict, convert_official


def save_adapter(adapter: RealCustomAdapter, path: str | PathLike) -> None:
    """Save an adapter as one safetensors file, with its configuration in the file's metadata.

    Raises:
        OSError: the file cannot be written; a file that existed before is unchanged.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in adapter.state_dict().items()}
    new = Path(f"{path}.new")
    try:
        save_file(state, new, metadata={"realcustom_adapter": json.dumps(_own_config(adapter))})
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def load_adapter(
    path: str | PathLike, unet, *, vision_dim: int, replace_unet: bool = False
) -> tuple[RealCustomAdapter, StateDict]:
    """Load an adapter from this project's format or the authors' checkpoint and check it against the UNet.

    Args:
        path: .safetensors, or .pth / .bin / .pt read with `weights_only=True`.
        unet: the UNet that the adapter must match; it is not changed.
        vision_dim: channels of the vision features that the adapter must accept.
        replace_unet: accept plain UNet weights in the same file, as in full checkpoints.
    Returns:
        The adapter, and the plain UNet weights to load into the UNet (empty if the file has none).
    Raises:
        ValueError: an unreadable file, an unknown or missing key, a wrong shape, another model family. The message
            names the file, the key and the expected value.
    """
    state, config = read_state(path)
    plain: StateDict = {}
    if config is None and any(name.startswith(OFFICIAL_PROJECTOR) for name in state):
        state, plain = convert_official(state)
        check_state(plain, unet.state_dict(), path, partial=True)
        if plain and not replace_unet:
            raise ValueError(
                f"{path} also contains {len(plain)} plain UNet weights (such as {min(plain)}); pass "
                "replace_unet=True to replace those of the base model, as the authors' demo does."
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


def is_official(path: str | PathLike) -> bool:
    """Whether a weight file uses the authors' names, according to the header of a safetensors file.

    Pickle files are not read: they are assumed to be the authors', who publish .pth.
    """
    if Path(path).suffix == ".safetensors" and Path(path).is_file():
        try:
            with safe_open(path, "pt") as file:
                return any(name.startswith(OFFICIAL_PROJECTOR) for name in file.keys())
        except SafetensorError:
            return False  # `load_adapter` reports the file
    return Path(path).suffix != ".safetensors"  # the authors publish .pth


def _head_dim(config: dict | None, path: str | PathLike, **widths: int) -> int:
    """Head width of the projector. Raises ValueError if the file is for a model of other widths."""
    if config is None:
        config = {"head_dim": OFFICIAL_HEAD_DIM, **widths}
    for name, width in widths.items():
        if config.get(name) != width:
            raise ValueError(
                f"{path} is an adapter for {name} {config.get(name)}, but this model has {width}; "
                "the file is for another model."
            )
    head_dim = config.get("head_dim")
    if not isinstance(head_dim, int) or head_dim < 1 or widths["vision_dim"] % head_dim:
        raise ValueError(
            f"{path}: head_dim {head_dim!r} does not divide vision_dim {widths['vision_dim']}; "
            "the file is for other vision encoders."
        )
    return head_dim


def read_state(path: str | PathLike) -> tuple[StateDict, dict | None]:
    """Read the tensors and the adapter configuration (None if there is none) of a weight file.

    Pickled code is never executed.

    Raises:
        ValueError: no such file, or an unreadable one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of an adapter (.safetensors, or the authors' .pth).")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file ({error}); download or save it again."
            ) from error
        return state, _parse_metadata(metadata, path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here: pickle, zip, EOF and runtime errors
        raise ValueError(f"{path} could not be read as plain weights ({type(error).__name__}: {error}).") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not contain a dictionary of tensors.")
    return state, None


def _parse_metadata(metadata: dict[str, str], path: Path) -> dict | None:
    if "realcustom_adapter" not in metadata:
        return None
    try:
        config = json.loads(metadata["realcustom_adapter"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: realcustom_adapter in its metadata is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: realcustom_adapter in its metadata is {config!r}; it must be a JSON object.")
    return config


def check_state(state: StateDict, expected: StateDict, path: str | PathLike, partial: bool = False) -> None:
    """Raise ValueError if keys are missing (unless `partial`) or unknown, or have a wrong shape or a non-float type."""
    missing = set() if partial else expected.keys() - state.keys()
    unknown = state.keys() - expected.keys()
    wrong = []
    if missing:
        wrong.append(f"lacks {len(missing)} of the {len(expected)} weights this model needs, such as {min(missing)}")
    if unknown:
        wrong.append(f"has {len(unknown)} unknown weights, such as {min(unknown)}")
    if wrong:
        raise ValueError(f"{path} {' and '.join(wrong)}; the file is for another model.")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, but this model needs {list(expected[name].shape)}; "
                "the file is for another model."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has type {tensor.dtype}; weights must be floating-point numbers.")


def _own_config(adapter: RealCustomAdapter) -> dict:
    names = ("vision_dim", "condition_dim", "head_dim", "cross_layer", "cross_scale")
    return {name: adapter.config[name] for name in names}
