"""Adapter files: round trip, strict checks, and errors that leave the pipeline unchanged."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import SDXL_UNET, subject_image, tiny_pipeline, tiny_sd15_unet

from realcustom import RealCustomAdapter, Request, Subject
from realcustom.attention import AttentionLayers
from realcustom.convert import convert_official
from realcustom.weights import check_state, load_adapter

GOLDEN = Path(__file__).parent / "golden"
PROJECTOR = "encoder_hidden_states_vision_projection"


@pytest.fixture
def saved(tmp_path):
    pipeline = tiny_pipeline()
    path = tmp_path / "adapter.safetensors"
    pipeline.save_realcustom(path)
    return pipeline, path


def test_failed_save_keeps_the_file_from_before(saved, monkeypatch):
    pipeline, path = saved
    before = path.read_bytes()

    def save_file(_, path, **__):
        Path(path).write_bytes(b"a part")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("realcustom.weights.save_file", save_file)
    with pytest.raises(OSError, match=f"{path} cannot be written: No space left"):
        pipeline.save_realcustom(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def latents_after_one_step(pipeline):
    request = Request(prompt="a dog", subjects=(Subject(image=subject_image(), target_phrase="dog"),), seed=0)
    generation = pipeline.prepare(request)
    pipeline.step([generation])
    return generation.latents


def test_adapter_file_round_trip(saved):
    """An adapter file holds the complete adapter: loading it into another pipeline gives the same latents."""
    pipeline, path = saved
    other = tiny_pipeline()
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.normal_()
    other.clear_caches()
    assert not torch.allclose(latents_after_one_step(other), latents_after_one_step(pipeline), atol=1e-3)
    other.load_realcustom(path)
    assert torch.allclose(latents_after_one_step(other), latents_after_one_step(pipeline), atol=1e-5)


def modify_state(path: Path, change) -> None:
    """Apply `change` to the tensors of a safetensors file and keep its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s.pop("projector.deep_mlp.bias"), "lacks 1 .*projector.deep_mlp.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unknown .*extra"),
        (lambda s: s.update({"projector.deep_mlp.bias": torch.ones(3)}), r"projector.deep_mlp.bias has shape \[3\]"),
        (lambda s: s.update({"projector.deep_mlp.bias": torch.ones(32).int()}), "deep_mlp.bias has type torch.int32"),
    ],
)
def test_wrong_keys_shapes_and_types_raise(saved, change, message):
    """A missing, unknown or mismatched tensor raises a ValueError that names it; the adapter stays in place."""
    pipeline, path = saved
    modify_state(path, change)
    before = pipeline.adapter
    with pytest.raises(ValueError, match=message):
        pipeline.load_realcustom(path)
    assert pipeline.adapter is before


@pytest.mark.parametrize(
    "header,message",
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        (
            json.dumps({"condition_dim": 768, "vision_dim": 64, "head_dim": 32}),
            "condition_dim 768, but this model has 32",
        ),
        (
            json.dumps({"condition_dim": 32, "vision_dim": 2176, "head_dim": 32}),
            "vision_dim 2176, but this model has 64",
        ),
        (json.dumps({"condition_dim": 32, "vision_dim": 64, "head_dim": 0}), "head_dim 0 does not divide"),
        (json.dumps({"condition_dim": 32, "vision_dim": 64}), "head_dim None does not divide"),
    ],
)
def test_wrong_metadata_raises(saved, header, message):
    """Unreadable metadata and widths of another model raise a ValueError that names the file; the adapter stays."""
    pipeline, path = saved
    before = pipeline.adapter
    save_file(load_file(path), path, metadata={"realcustom_adapter": header})
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        pipeline.load_realcustom(path)
    assert pipeline.adapter is before


def test_truncated_and_missing_files_raise(saved):
    """A truncated .safetensors or .pth file and a missing file raise a ValueError with the reason."""
    pipeline, path = saved
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        pipeline.load_realcustom(path)
    official_checkpoint(pipeline, path.with_suffix(".pth"), {})
    path.with_suffix(".pth").write_bytes(path.with_suffix(".pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"adapter\.pth could not be read as plain weights"):
        pipeline.load_realcustom(path.with_suffix(".pth"))
    with pytest.raises(ValueError, match="not a file"):
        pipeline.load_realcustom(path.with_name("nothing.safetensors"))


class Payload:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_pickled_code_is_not_executed(saved, capsys):
    """A .pth file with a pickled call raises a ValueError, and the call does not run."""
    pipeline, path = saved
    malicious = path.with_suffix(".pth")
    torch.save({"x": Payload()}, malicious)
    with pytest.raises(ValueError, match="could not be read as plain weights"):
        pipeline.load_realcustom(malicious)
    assert "code from a pickle ran" not in capsys.readouterr().out


def official_checkpoint(pipeline, path: Path, unet_weights: dict) -> None:
    """Save the pipeline's adapter under the authors' names, together with plain UNet weights."""
    projector = {"deep_mlp": "projector_base", "cross_scale_attention": "min_attention", "high_mlp": "projector",
                 "cross_layer_attention": "min_attention2", "shallow_mlp": "projector2"}  # fmt: skip
    state = dict(unet_weights)
    for name, tensor in pipeline.adapter.state_dict().items():
        kind, part, rest = name.split(".", 2)
        if kind == "projector":
            rest = rest.replace("norm_query", "norm1").replace("norm_context", "norm2")
            state[f"{PROJECTOR}.{projector[part]}.{rest}"] = tensor
        else:
            state[f"{part.replace('-', '.')}.{kind}.weight"] = tensor
    torch.save(state, path)


def test_plain_unet_weights_need_replace_unet(tmp_path):
    """UNet weights in an adapter file raise an error by default and replace the UNet's with `replace_unet=True`.

    In both cases unknown names raise an error.
    """
    path = tmp_path / "RealCustom.pth"
    pipeline = tiny_pipeline()
    name = "conv_in.weight"
    official_checkpoint(pipeline, path, {name: torch.full_like(pipeline.unet.conv_in.weight, 0.5)})
    with pytest.raises(ValueError, match=r"1 plain UNet weights \(such as conv_in.weight\)"):
        pipeline.load_realcustom(path)
    assert not (pipeline.unet.conv_in.weight == 0.5).all()
    pipeline.load_realcustom(path, replace_unet=True)
    assert (pipeline.unet.conv_in.weight == 0.5).all() and not pipeline.adapter.config.cross_scale
    for name in ("conv_on.weight", f"{PROJECTOR}.projector3.0.weight", f"{PROJECTOR}.whole"):
        official_checkpoint(tiny_pipeline(), path, {name: torch.ones(1)})
        with pytest.raises(ValueError, match=rf"RealCustom\.pth has 1 unknown .*{re.escape(name)}"):
            pipeline.load_realcustom(path)
    official_checkpoint(tiny_pipeline(), path, {"conv_on.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unknown .*conv_on\.weight"):
        pipeline.load_realcustom(path, replace_unet=True)


@pytest.mark.parametrize("layout", ["highres", "shallow"])
def test_all_keys_of_the_official_checkpoints_are_converted(layout):
    """The names and shapes of the authors' SDXL checkpoints match an adapter for the SDXL UNet exactly.

    The only tensors left out are those that the authors' code does not use.
    """
    listed = json.loads((GOLDEN / f"official_{layout}_keys.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL_UNET)
        state = {name: torch.empty(shape) for name, shape in listed["keys"].items()}
        own, plain = convert_official(state)
        adapter = RealCustomAdapter.for_unet(
            unet, vision_dim=1152 + 1024, cross_layer=layout == "shallow", cross_scale=layout == "highres"
        )
    check_state(own, adapter.state_dict(), layout)
    # The authors' shallow projector overwrites the result of these modules.
    overwritten = ("min_attention.", "projector.") if layout == "shallow" else ()
    unused = [n for n in state if n.startswith(tuple(f"{PROJECTOR}.{module}" for module in overwritten))]
    assert not plain and len(own) == len(state) - len(unused)
    assert sum(t.numel() for t in state.values()) == listed["counts"]["n_new_params"]
    assert len(unet.state_dict()) == listed["counts"]["n_plain_sdxl_tensors"]
    forward_order = [name for name in AttentionLayers(unet).levels if name.endswith("attn2")]
    assert forward_order == listed["attn2_blocks_in_forward_order"]


def test_adapter_of_another_model_family_raises(saved):
    """An adapter for an SDXL UNet cannot be loaded for an SD1.5 UNet."""
    with pytest.raises(ValueError, match="for another model"):
        load_adapter(saved[1], tiny_sd15_unet(), vision_dim=64)
