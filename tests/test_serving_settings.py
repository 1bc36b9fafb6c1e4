"""Settings: what a command line gives as text, and what a configuration file gives."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.settings import PROJECT_ROOT, Settings, resolve_path


def test_text_of_the_command_line_is_understood():
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
def test_typos_and_contradictions_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)


def test_the_device_decides_about_gpus():
    assert Settings(device="cpu").resolved().num_gpus == 0
    assert Settings(device="cuda").resolved().num_gpus == 1
    assert Settings(device="cuda", num_gpus=0.5).resolved().num_gpus == 0.5


def test_models_are_found_from_any_folder(tmp_path, monkeypatch):
    """The project's own model is found relative to the project, others relative to the current folder."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Settings(model="mine", device="cpu").resolved().model == str(tmp_path / "mine")
    assert Settings(model="serving", device="cpu").resolved().model == "serving"
    assert Path(resolve_path("serving")) == PROJECT_ROOT / "serving" and os.getcwd() == str(tmp_path)
    assert resolve_path("owner/name") == "owner/name"
