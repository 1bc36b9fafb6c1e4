"""The trainer's behavior around the loop: stopping, resuming, logging, validation and publishing."""

import json
import logging
import math
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from toy_training import losses, toy_config, write_base, write_data

from train import startup, trainer
from train.__main__ import main
from train.config import EXAMPLES
from train.data.sprite_world.batches import SpriteMixture
from train.monitor import Monitor
from train.objective import Objective
from train.overrides import override
from train.trainer import run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return [*write_base(tmp_path_factory.mktemp("base"), "mini"), "data.validation=none"]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """An uninterrupted run of four steps."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(toy_config("mini", out, base)) == 4
    return out


def log_of(out):
    """Lines of the log. NaN and Infinity, which are not JSON, raise."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_result(one, other):
    assert losses(one) == losses(other)
    first, second = (load_file(out / "adapter.safetensors") for out in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_signal_ends_the_run_with_a_checkpoint(base, uninterrupted, tmp_path, monkeypatch):
    """SIGTERM during a step lets the step finish; SIGINT while the run waits for data ends the wait at once. In both
    cases the run writes a checkpoint, restores the handlers, and a resumed run equals an uninterrupted one."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    draw = trainer.draw

    def in_the_step(*args, step, **options):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "draw", in_the_step)
        assert run(toy_config("mini", tmp_path, base)) == 1

    samples = SpriteMixture.samples

    def while_waiting(self, step, positions):
        if step == 2:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            time.sleep(30)
        return samples(self, step, positions)

    with monkeypatch.context() as patch:
        patch.setattr(SpriteMixture, "samples", while_waiting)
        start = time.monotonic()
        assert run(toy_config("mini", tmp_path, base), resume=True) == 2
        assert time.monotonic() - start < 20
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert run(toy_config("mini", tmp_path, base), resume=True) == 4
    assert_same_result(tmp_path, uninterrupted)


def test_damaged_checkpoint_is_not_resumed(base, uninterrupted, tmp_path, caplog):
    """The run continues from the one before and equals an uninterrupted one."""
    config = toy_config("mini", tmp_path, [*base, "checkpoint.every_steps=1", "max_seconds=0"])
    assert run(toy_config("mini", tmp_path, [*base, "checkpoint.every_steps=1", "steps=3"])) == 3
    damaged = tmp_path / "checkpoints" / "step_00000003" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with caplog.at_level(logging.INFO):
        assert run(config, resume=True) == 2
    assert "step_00000003 is damaged" in caplog.text and "Resuming at step 2" in caplog.text
    assert run(toy_config("mini", tmp_path, base), resume=True) == 4
    assert_same_result(tmp_path, uninterrupted)


def test_run_with_only_damaged_checkpoints_is_not_started_again(base, tmp_path):
    """A resume names them and changes neither them nor the log, however often it is tried."""
    run(toy_config("mini", tmp_path, [*base, "steps=1"]))
    (tmp_path / "checkpoints/step_00000001/ema.safetensors").write_bytes(b"damaged")
    log = (tmp_path / "log.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"are damaged \(damaged_step_00000001\); restore one from a copy"):
            run(toy_config("mini", tmp_path, base), resume=True)
    assert (tmp_path / "log.jsonl").read_text() == log
    assert (tmp_path / "checkpoints/damaged_step_00000001/adapter.safetensors").is_file()


def test_resume_without_a_checkpoint_is_reported(base, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(toy_config("mini", tmp_path, [*base, "steps=1"]), resume=True)
    assert f"There is no checkpoint in {tmp_path / 'checkpoints'}; starting at step 0." in caplog.text


@pytest.mark.parametrize("where", ["load_pipeline", "open_training_data", "Validation"])
def test_signal_ends_the_loading(base, tmp_path, monkeypatch, where):
    """Before the first step there is nothing to save: neither a checkpoint nor a result is written, and the log of a
    run that was resumed stays as it is."""

    def slow(*_):
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        time.sleep(30)

    monkeypatch.setattr(startup, where, slow)
    start = time.monotonic()
    validation = ['data.validation={"kind": "sprite_world"}', "preview.every_steps=1", "preview.subjects=[]"]
    assert run(toy_config("mini", tmp_path, [*base, *validation])) == 0
    assert time.monotonic() - start < 20 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('preview.subjects=[{"image": "IMAGE", "prompt": "a dog", "target_phrase": "cat"}]', "subjects.0: .*'cat'"),
        (
            'preview.subjects=[{"image": "/nope.png", "prompt": "a dog", "target_phrase": "dog"}]',
            "preview.subjects.0.image is /nope.png, which is not a readable image",
        ),
        ("hub.repo_id=a b", "hub.repo_id is 'a b'; write it as NAMESPACE/NAME"),
        ("hub.repo_id=me/adapter", "there is no token; run `hf auth login` or set HF_TOKEN"),
    ],
)
def test_mistake_in_previews_or_upload_is_found_before_the_models_are_loaded(
    base, tmp_path, monkeypatch, settings, message
):
    monkeypatch.setattr(startup, "load_pipeline", lambda *_: pytest.fail("models are loaded"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    settings = settings.replace("IMAGE", str(EXAMPLES[0].image))
    with pytest.raises(ValueError, match=message):
        run(toy_config("mini", tmp_path / "out", [*base, "preview.every_steps=1", settings]))
    assert not (tmp_path / "out").exists()


def test_checkpoint_is_saved_before_the_previews(base, tmp_path, monkeypatch):
    """If a preview fails, the steps before it are not lost."""

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "render_previews", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(toy_config("mini", tmp_path, [*base, "preview.every_steps=2"]))
    assert (tmp_path / "checkpoints/step_00000002").is_dir()


@pytest.mark.parametrize("then", ["FILE", "base"])
def test_resumed_run_does_not_need_the_adapter_it_started_from(base, uninterrupted, tmp_path, then):
    """The checkpoint has the weights, so the file may be gone. The result is that of an uninterrupted run."""
    file = tmp_path / "start.safetensors"
    shutil.copy(uninterrupted / "adapter.safetensors", file)
    runs = [toy_config("mini", tmp_path / name, [*base, f"model.adapter={file}"]) for name in ("whole", "parts")]
    run(runs[0])
    run(override(runs[1], ["steps=2"]))
    file.unlink()
    run(override(runs[1], [] if then == "FILE" else ["model.adapter=base"]), resume=True)
    assert_same_result(tmp_path / "parts", tmp_path / "whole")


def test_checkpoint_of_another_base_is_refused(base, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    other = write_base(tmp_path, "sd15")
    with pytest.raises(ValueError, match="a base with other layers or vision encoders"):
        run(toy_config("mini", tmp_path / "run", [*other, "steps=5"]), resume=True)


@pytest.mark.parametrize("what", ["out", "out/checkpoints", "out/adapter.safetensors"])
def test_unusable_folder_is_refused_before_the_models_are_loaded(base, tmp_path, monkeypatch, what):
    monkeypatch.setattr(startup, "load_pipeline", lambda *_: pytest.fail("models are loaded"))
    if what.endswith("safetensors"):
        (tmp_path / what).mkdir(parents=True)
    else:
        (tmp_path / what).parent.mkdir(exist_ok=True)
        (tmp_path / what).write_text("")
    with pytest.raises(ValueError, match=rf"out is {tmp_path}/out, but .*; choose another folder"):
        run(toy_config("mini", tmp_path / "out", base))


def test_preview_with_more_steps_than_the_base_has_timesteps_is_refused(base, tmp_path):
    settings = ["preview.every_steps=1", "preview.num_inference_steps=5000"]
    with pytest.raises(ValueError, match=r"preview.num_inference_steps is 5000; .* at most 1000"):
        run(toy_config("mini", tmp_path, [*base, *settings]))
    assert not (tmp_path / "log.jsonl").exists()


def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.trainer.run", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["mini"])
    assert end.value.code == 130 and capsys.readouterr().err == "Stopped before the first step.\n"


def test_folder_of_another_run_is_refused(base, uninterrupted):
    with pytest.raises(ValueError, match="already contains checkpoints; add --resume"):
        run(toy_config("mini", uninterrupted, base))


def test_finished_run_is_not_trained_further(base, uninterrupted):
    before = (uninterrupted / "adapter.safetensors").read_bytes()
    assert run(toy_config("mini", uninterrupted, base), resume=True) == 4
    assert (uninterrupted / "adapter.safetensors").read_bytes() == before and len(losses(uninterrupted)) == 4


def test_changed_settings_are_named_on_resume(base, tmp_path, caplog):
    """Settings that change the results are named; others, such as the number of workers, are not."""
    run(toy_config("mini", tmp_path, [*base, "steps=1"]))
    changed = [*base, "steps=1", "seed=4", "optimizer.learning_rate=0.5", "data.workers=1", "checkpoint.keep=1"]
    with caplog.at_level(logging.WARNING):
        run(toy_config("mini", tmp_path, changed), resume=True)
    (warning,) = [r.getMessage() for r in caplog.records if "will differ from an uninterrupted one" in r.getMessage()]
    assert "seed was 0, is 4" in warning and "optimizer.learning_rate was 0.001, is 0.5" in warning
    assert "workers" not in warning and "keep" not in warning


def test_number_of_micro_batches_does_not_change_the_loss(base, uninterrupted, tmp_path):
    """Accumulated gradients equal those of one large batch, up to rounding."""
    run(toy_config("mini", tmp_path, [*base, "micro_batch_size=2"]))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-4)


def test_loss_weights_of_a_sample_do_not_depend_on_its_micro_batch(base, tmp_path):
    """The sprite world marks its subjects and tar shards do not: in a mixture of both, the losses of micro-batches of
    one sample equal those of one large micro-batch."""
    write_data(tmp_path / "data")
    sources = [{"kind": "sprite_world"}, {"kind": "text_image", "path": str(tmp_path / "data/text_image")}]
    settings = [*base, f"data.sources={json.dumps(sources)}", "data.evaluation=", "batch_size=4", "steps=2"]
    for size in (1, 4):
        run(toy_config("mini", tmp_path / str(size), [*settings, f"micro_batch_size={size}"]))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-4)


def test_step_without_finite_gradient_is_skipped_and_counted(base, tmp_path, monkeypatch):
    """The log stays valid JSON, and the weights stay finite."""
    compute = Objective.losses
    calls = []

    def failing(self, encoded, draws):
        calls.append(None)
        return compute(self, encoded, draws) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(Objective, "losses", failing)
    run(toy_config("mini", tmp_path, [*base, "log.every_steps=2"]))
    first, second = log_of(tmp_path)
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second and math.isfinite(first["loss"])
    assert all(value.isfinite().all() for value in load_file(tmp_path / "adapter.safetensors").values())


def test_log_contains_the_curriculum(uninterrupted):
    """The values of Eq. 10 and 12 at each step, and the share of other views that was drawn."""
    lines = log_of(uninterrupted)
    assert [line["other_view_probability"] for line in lines] == [0, 1 / 8, 2 / 8, 3 / 8]
    assert [line["r_cur"] for line in lines] == pytest.approx([1, 1.075, 1.15, 1.225])
    assert lines[0]["other_views"] == 0 and all(line["other_views"] in (0, 0.5, 1) for line in lines)
    assert [line["samples"] for line in lines] == [2, 4, 6, 8] and all(line["grad_norm"] > 0 for line in lines)


def test_time_limit_and_validation(base, tmp_path):
    """A run that has no time left stops before the next step, with a checkpoint and the result. Validation compares
    the loss with the reference and without; it does not change what a resumed run computes."""
    settings = [
        *base,
        'data.validation={"kind": "sprite_world"}',
        "preview.every_steps=1",
        "preview.subjects=[]",
        "micro_batch_size=64",
    ]
    assert run(toy_config("mini", tmp_path, [*settings, "max_seconds=0"])) == 0
    assert (tmp_path / "checkpoints" / "step_00000000").is_dir() and (tmp_path / "adapter.safetensors").is_file()
    assert run(toy_config("mini", tmp_path, [*settings, "steps=1"]), resume=True) == 1
    lines = [line for line in log_of(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["validation_loss"] != lines[0]["validation_loss_without_reference"]
    assert lines[0]["validation_loss"] != lines[1]["validation_loss"]
    assert lines[0]["validation_loss_without_reference"] == lines[1]["validation_loss_without_reference"]


def test_monitor_can_ask_for_a_checkpoint(base, tmp_path):
    """A machine that is about to be taken away: a checkpoint is written after that step, and the run goes on."""
    reported = []

    class Announcement(Monitor):
        def wants_checkpoint(self, step):
            return step == 1

        def report(self, metrics, checkpoint):
            reported.append((checkpoint.name, metrics["loss"]))

    run(toy_config("mini", tmp_path, [*base, "checkpoint.every_steps=100", "steps=2"]), monitor=Announcement())
    assert reported == [(f"step_0000000{step}", losses(tmp_path)[step - 1]) for step in (1, 2)]


def test_tensorboard_shows_the_metrics(base, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(toy_config("mini", tmp_path, [*base, "steps=2", "log.trackers=tensorboard"]))
    events = event_accumulator.EventAccumulator(str(tmp_path / "trackers" / "mini"))
    events.Reload()
    values = events.Scalars("loss")
    assert [value.step for value in values] == [1, 2]
    assert [value.value for value in values] == pytest.approx(losses(tmp_path), rel=1e-6)


def test_tracker_that_is_not_installed_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="'no_such_tracker', which is not installed"):
        run(toy_config("mini", tmp_path, [*base, "log.trackers=no_such_tracker"]))


def test_finished_run_is_uploaded(base, tmp_path, monkeypatch):
    """The adapter, the summary and the model card; nothing is uploaded before the last step."""
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            calls.append((repo_id, folder_path, sorted(allow_patterns)))
            assert all((folder_path / name).is_file() for name in allow_patterns)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    settings = [*base, "steps=1", "hub.repo_id=me/adapter", "hub.private=false"]
    run(toy_config("mini", tmp_path, [*settings, "max_seconds=0"]))
    assert not calls
    run(toy_config("mini", tmp_path, settings), resume=True)
    assert calls == [
        ("me/adapter", False, True),
        ("me/adapter", tmp_path, ["README.md", "adapter.safetensors", "training.json"]),
    ]
    assert "recipe `mini`: 1 steps of 2 samples" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("family", ["mini", "sd15"])
def test_code_of_the_model_card_loads_the_adapter(tmp_path, monkeypatch, family):
    """Also for a complete pipeline and for other vision encoders. A local path is not named as a model of the hub."""
    recipe = "mini" if family == "mini" else "sd15_512"
    settings = [*write_base(tmp_path / "base", family), "max_seconds=0", "data.validation=none"]
    sources = 'data.sources=[{"kind": "sprite_world"}]'
    run(toy_config(recipe, tmp_path / "out", [*settings, sources]))
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model" not in card
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    trained = load_file("adapter.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in names["pipeline"].adapter.state_dict().items())


def test_base_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.base is /nope, which cannot be loaded; give a hub id, a folder"):
        run(toy_config("mini", tmp_path, ["model.base=/nope"]))
