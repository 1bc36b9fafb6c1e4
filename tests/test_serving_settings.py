"""Settings from the command line, where all values are text, and from configuration files."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny import tiny_pipeline

import serving.replica
from serving.settings import PROJECT_ROOT, Settings, resolve_path


def test_text_values_are_converted():
    """`serve run serving:app key=value` gives strings."""
    settings = Settings.model_validate({"max_batch_size": "4", "stall_timeout_s": "9.5", "num_replicas": "2"})
    assert (settings.max_batch_size, settings.stall_timeout_s) == (4, 9.5)
    assert settings.min_replicas == settings.max_replicas == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batchsize": "4"},
        {"device": "tpu"},
        {"max_batch_size": "0"},
        {"min_replicas": "3", "max_replicas": "2"},
        {"num_replicas": "2", "max_replicas": "2"},
    ],
)
def test_typos_and_contradictions_are_rejected(wrong):
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)


def test_num_gpus_follows_the_device():
    assert Settings(device="cpu").resolved().num_gpus == 0
    assert Settings(device="cuda").resolved().num_gpus == 1
    assert Settings(device="cuda", num_gpus=0.5).resolved().num_gpus == 0.5


def test_paths_are_resolved_in_any_folder(tmp_path, monkeypatch):
    """Paths of the project are relative to it, other paths to the current folder."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Settings(model="mine", device="cpu").resolved().model == str(tmp_path / "mine")
    assert Settings(model="serving", device="cpu").resolved().model == "serving"
    assert Path(resolve_path("serving")) == PROJECT_ROOT / "serving" and os.getcwd() == str(tmp_path)
    assert resolve_path("owner/name") == "owner/name"


def test_an_empty_api_key_is_refused(monkeypatch):
    """An empty key, from an argument or the environment, does not leave the server open."""
    for key in ("", "  "):
        with pytest.raises(ValidationError, match=r"api_key .* is empty"):
            Settings(api_key=key)
        monkeypatch.setenv("REALCUSTOM_API_KEY", key)
        with pytest.raises(ValidationError, match="REALCUSTOM_API_KEY"):
            Settings()


def test_the_api_key_comes_from_the_environment_and_is_never_in_clear(monkeypatch):
    """The key is in no representation of the settings and in no error of other settings."""
    monkeypatch.setenv("REALCUSTOM_API_KEY", "s3cret-key")
    settings = Settings(device="cpu")
    assert settings.api_key is not None and settings.api_key.get_secret_value() == "s3cret-key"
    assert "s3cret-key" not in f"{settings!r}{settings.model_dump()}{settings.model_dump_json()}"
    for wrong in ({"device": "tpu"}, {"min_replicas": 3, "max_replicas": 2}, {"maxsteps": 1}):
        with pytest.raises(ValidationError) as error:
            Settings.model_validate({"api_key": "s3cret-key", **wrong})
        assert "s3cret-key" not in str(error.value)


@pytest.mark.parametrize(
    "options,shares",
    [
        ({}, (8 - 1.25, 0.25, 1)),
        ({"text_cache_gb": 1, "reference_cache_gb": 2}, (5, 1, 2)),
        ({"text_cache_gb": 0, "reference_cache_gb": 0}, (8, 0, 0)),
        ({"text_cache_gb": 2, "reference_cache_gb": 6}, (4, 1, 3)),  # at most half
        ({"memory_gb": 3, "reference_cache_gb": 6}, (3, 0.25, 6)),
    ],
)
def test_the_caches_are_part_of_the_available_memory(monkeypatch, options, shares):
    """Images get what the caches leave of 8 GiB, at least half; an explicit `memory_gb` is for images only."""
    monkeypatch.setattr(serving.replica, "available", lambda device: 8 * 2**30)
    result = serving.replica.MemoryShares.of(Settings(**options))
    assert (result.images, result.text_cache, result.reference_cache) == tuple(2**30 * share for share in shares)


def test_a_replica_applies_the_sizes_of_its_caches(monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(serving.replica, "load_pipeline", lambda settings: pipeline)
    settings = Settings(device="cpu", cpu_threads=1, memory_gb=1, text_cache_gb=0.5, reference_cache_gb=0.125)
    serving.replica.Replica(settings).close()
    assert (pipeline.text_cache.max_bytes, pipeline.reference_cache.max_bytes) == (2**29, 2**27)
