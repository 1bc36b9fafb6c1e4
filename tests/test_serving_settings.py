"""Settings from the command line, where all values are text, and from configuration files."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

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
