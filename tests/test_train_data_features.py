"""Precomputed features: the same values as computed in the run, found by content, encoder, size and crop."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_pipeline
from toy_training import losses, toy_config, write_base, write_data

from train.data.__main__ import main
from train.data.features import FeatureStore, encoder_revisions, open_features
from train.data.precompute import precompute
from train.frozen import FrozenModels
from train.sources import open_mixture
from train.trainer import run

SHORT = [
    "steps=2", "data.resolution=64", "batch_size=2", "data.workers=0", "curriculum.total_steps=8", "precision=fp32",
    "device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings of the toy models and data."""
    folder = tmp_path_factory.mktemp("toy")
    return [*write_base(folder, "mini"), *write_data(folder / "data")]


@pytest.fixture(scope="module")
def frozen():
    return FrozenModels(tiny_pipeline(), torch.device("cpu"))


def open_store(folder, frozen) -> FeatureStore:
    return FeatureStore(folder, encoder_revisions(frozen.pipeline))


def encoders(frozen) -> dict:
    return {
        "latents": frozen.encode_images,
        "text": lambda samples: frozen.encode_texts([sample.caption for sample in samples]),
        "vision": frozen.encode_references,
    }


def test_run_with_features_has_the_same_losses(base, tmp_path):
    """Precomputed by the command line; the run then encodes nothing."""
    assignments = [item for value in [*base, *SHORT] for item in ("--set", value)]
    assert main(["precompute", "mini", *assignments, "--out", str(tmp_path / "features"), "--device", "cpu"]) == 0
    plain, fast = (toy_config("mini", tmp_path / name, [*base, *SHORT]) for name in ("plain", "fast"))
    run(plain)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode_images", "encode_references"):
            patch.setattr(FrozenModels, name, lambda *_: pytest.fail("features were computed in the run"))
        run(replace(fast, data=replace(fast.data, features=tmp_path / "features")))
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_second_call_computes_nothing(base, frozen, tmp_path):
    """It continues after the last step; a longer run computes the new steps only; other encoders compute all again."""
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    store = open_store(tmp_path / "f", frozen)
    first = precompute(mixture, store, encoders(frozen), num_steps=2)
    assert first.new["latents"] >= 2 and first.written_bytes > 0
    again = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=2)
    assert not again.new and again.written_bytes == 0
    longer = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=3)
    assert sum(longer.new.values()) > 0 and longer.new["vision"] <= 2
    other = FeatureStore(tmp_path / "f", {kind: "other" for kind in encoders(frozen)})
    assert precompute(mixture, other, encoders(frozen), num_steps=2).new == first.new


def test_features_are_those_of_the_sample(base, frozen, tmp_path):
    """For every sample, the stored tensors equal those that its encoders compute; other samples have none."""
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=2, encode_size=1)
    store = open_store(tmp_path / "f", frozen)
    for step in range(2):
        for sample in mixture.samples(step, range(2)):
            found = store(sample)
            assert found is not None
            expected = [
                *frozen.encode_images([sample])[0],
                *frozen.encode_texts([sample.caption])[0],
                *frozen.encode_references([sample])[0],
            ]
            names = ("latents", "embeds", "pooled", "shallow", "deep", "local")
            assert all(torch.equal(found[name], value) for name, value in zip(names, expected, strict=True))
            moved = replace(sample, crop=(9, 9), reference_box=(0.1, 0.1, 0.9, 0.9), caption="another one")
            assert store(moved) is None
            assert set(store(replace(sample, caption="another one")) or {}) == set(names) - {"embeds", "pooled"}
            assert set(store(replace(sample, content=None)) or {}) == {"embeds", "pooled"}


def test_selected_kinds_only(base, frozen, tmp_path):
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    text = {"text": encoders(frozen)["text"]}
    precompute(mixture, open_store(tmp_path / "f", frozen), text, num_steps=1)
    sample = mixture.sample(0, 0)
    assert set(open_store(tmp_path / "f", frozen)(sample) or {}) == {"embeds", "pooled"}


def test_ranks_share_the_work(base, frozen, tmp_path):
    """Two processes, one after the other, store what a single one stores."""
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    for rank in range(2):
        store = open_store(tmp_path / "f", frozen)
        precompute(mixture, store, encoders(frozen), num_steps=2, rank=rank, world_size=2)
    precompute(mixture, alone := open_store(tmp_path / "alone", frozen), encoders(frozen), num_steps=2)
    assert len(open_store(tmp_path / "f", frozen)) == len(alone) > 0


def test_damaged_or_missing_file_is_computed_again(base, frozen, tmp_path, caplog):
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    first = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=1)
    (path,) = (tmp_path / "f").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    again = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=1)
    assert "is damaged" in caplog.text and again.new == first.new


def test_damaged_feature_is_computed_in_the_run(base, frozen, tmp_path, caplog):
    """The header of the file is intact; the checksum of the tensor differs. This is logged once."""
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=1)
    sample = mixture.sample(0, 0)
    names = set(open_store(tmp_path / "f", frozen)(sample) or {})
    (path,) = (tmp_path / "f").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")  # the last value of one tensor
    store, damaged = open_store(tmp_path / "f", frozen), []
    for sample in (mixture.sample(0, position) for position in range(mixture.batch_size)):
        damaged += names - set(store(sample) or {})
    assert len(damaged) == 1 and caplog.text.count("is damaged; it is computed again") == 1


@pytest.mark.parametrize("content", ["", '{"next_step": 1}', "[]"])
def test_damaged_progress_file_is_ignored(base, frozen, tmp_path, caplog, content):
    """The call starts at step 0, with a warning, and finds what is stored."""
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    first = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=1)
    path = tmp_path / "f" / "progress-0-of-1.json"
    path.write_text(content)
    again = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=1)
    assert f"{path} is damaged" in caplog.text and not +again.new and again.found.total() >= first.new.total() > 0


def test_revision_follows_weights_and_settings(frozen):
    """Other weights of an encoder change its revision only; another type changes all weights."""
    revisions = encoder_revisions(frozen.pipeline)
    assert encoder_revisions(FrozenModels(tiny_pipeline(), torch.device("cpu")).pipeline) == revisions
    other = tiny_pipeline()
    with torch.no_grad():
        next(other.image_encoder_2.parameters()).add_(1)
    assert changed_kinds(revisions, encoder_revisions(other)) == {"vision"}
    half = encoder_revisions(tiny_pipeline().to(torch.bfloat16))
    assert changed_kinds(revisions, half) == {"latents", "text", "vision"}


def changed_kinds(one, other) -> set[str]:
    return {kind for kind in one if one[kind] != other[kind]}


def test_too_little_space_is_an_error(base, frozen, tmp_path, monkeypatch):
    """It is noticed after the first step, before anything is written."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)
    with pytest.raises(ValueError, match=r"100 steps need up to .* GB are free; use fewer steps"):
        precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=100)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--device foo", "--device: foo cannot be used on this machine"),
        ("--steps -3", "--steps: the value is -3; it must be an integer of at least 1"),
        ("--steps 0", "--steps: the value is 0; it must be an integer of at least 1"),
        ("--rank -1", "--rank: the value is -1; it must be an integer of at least 0"),
        ("--world-size 0", "--world-size: the value is 0; it must be an integer of at least 1"),
        ("--rank 1", "--rank is 1 and --world-size 1; the rank must be less"),
        ("--world-size 9999", "--world-size 9999; the rank must be less than the world size, which must be at most"),
        ("--out {file}", "--out is {file}, which is not a folder that can be written to"),
    ],
)
def test_wrong_argument_is_an_error_message(tmp_path, monkeypatch, capsys, arguments, message):
    """It names the option, its value and the limit, before models are loaded."""
    monkeypatch.setattr("train.frozen.load_pipeline", lambda *_: pytest.fail("models were loaded"))
    (file := tmp_path / "file").touch()
    command = ["precompute", "mini", "--out", str(tmp_path / "f"), *arguments.format(file=file).split()]
    try:
        status = main(command)
    except SystemExit as exit:
        status = exit.code
    assert status and message.format(file=file) in capsys.readouterr().err


def test_ctrl_c_ends_the_call_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.frozen.load_pipeline", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["precompute", "mini", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped."


def test_folder_without_features_is_an_error(frozen, tmp_path):
    with pytest.raises(ValueError, match="contains no precomputed features"):
        open_features(tmp_path, frozen.pipeline)
    assert open_features(None, frozen.pipeline)(None) is None


def test_interrupted_call_is_continued(base, frozen, tmp_path, monkeypatch):
    """What was written before the interruption is complete and is not computed again."""
    monkeypatch.setattr("train.data.precompute.FILE_BYTES", 1)  # a file per step
    mixture = open_mixture(toy_config("mini", tmp_path, base), frozen.reference_size)

    def interrupted(samples):
        if len(open_store(tmp_path / "f", frozen)) > 20:
            raise KeyboardInterrupt
        return frozen.encode_references(samples)

    with pytest.raises(KeyboardInterrupt):
        precompute(
            mixture, open_store(tmp_path / "f", frozen), {**encoders(frozen), "vision": interrupted}, num_steps=9
        )
    before = len(open_store(tmp_path / "f", frozen))
    rest = precompute(mixture, open_store(tmp_path / "f", frozen), encoders(frozen), num_steps=9)
    complete = precompute(mixture, open_store(tmp_path / "g", frozen), encoders(frozen), num_steps=9)
    assert before > 20 and rest.new["vision"] < complete.new["vision"]
    assert len(open_store(tmp_path / "f", frozen)) == len(open_store(tmp_path / "g", frozen))


def test_file_that_cannot_be_renamed_is_removed(frozen, tmp_path, monkeypatch):
    """A failed write leaves neither a partial file nor a temporary one."""
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        open_store(tmp_path, frozen).write({"key.latents": torch.zeros(3)})
    assert not list(tmp_path.iterdir())
