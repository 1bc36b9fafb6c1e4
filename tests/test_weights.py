"""Adapter files: round trip, strictness, and errors before anything is changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_pipeline

from realcustom import Request, Subject


@pytest.fixture
def saved(tmp_path):
    pipeline = tiny_pipeline()
    path = tmp_path / "adapter.safetensors"
    pipeline.save_realcustom(path)
    return pipeline, path


def latents(pipeline):
    request = Request(prompt="a dog", subjects=(Subject(image=picture(), target_phrase="dog"),), seed=0)
    generation = pipeline.prepare(request)
    pipeline.step([generation])
    return generation.latents


def test_an_adapter_file_carries_the_whole_adapter(saved):
    pipeline, path = saved
    other = tiny_pipeline()
    with torch.no_grad():
        for parameter in other.adapter.parameters():
            parameter.normal_()
    other.clear_caches()
    assert not torch.allclose(latents(other), latents(pipeline), atol=1e-3)
    other.load_realcustom(path)
    assert torch.allclose(latents(other), latents(pipeline), atol=1e-5)


def broken(path: Path, change) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata)


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda s: s.pop("projector.deep_mlp.bias"), "lacks 1 .*projector.deep_mlp.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown 1 .*extra"),
        (lambda s: s.update({"projector.deep_mlp.bias": torch.ones(3)}), r"projector.deep_mlp.bias has shape \[3\]"),
    ],
)
def test_wrong_keys_and_shapes_are_named_and_nothing_changes(saved, change, says):
    pipeline, path = saved
    broken(path, change)
    before = pipeline.adapter
    with pytest.raises(ValueError, match=says):
        pipeline.load_realcustom(path)
    assert pipeline.adapter is before


def test_a_truncated_file_and_a_missing_one_are_refused(saved):
    pipeline, path = saved
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        pipeline.load_realcustom(path)
    with pytest.raises(ValueError, match="not a file"):
        pipeline.load_realcustom(path.with_name("nothing.safetensors"))


class Payload:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def test_a_pickle_with_code_is_refused_without_running_it(saved, capsys):
    pipeline, path = saved
    evil = path.with_suffix(".pth")
    torch.save({"x": Payload()}, evil)
    with pytest.raises(ValueError, match="could not be read as plain weights"):
        pipeline.load_realcustom(evil)
    assert "code from a pickle ran" not in capsys.readouterr().out


def test_plain_unet_weights_beside_the_authors_keys_are_refused_by_name(tmp_path):
    folder = Path(__file__).parent / "golden"
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="plain UNet weights"):
        pipeline.load_realcustom(folder / "unet_weights.safetensors")
    assert json.loads((folder / "meta.json").read_text())["prompt"]
