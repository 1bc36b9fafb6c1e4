"""Checkpoints, EMA, schedule, curriculum and metrics: the parts of the trainer that are pure or hold its state."""

import json
import logging
import math

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from train.checkpoint import (
    has_checkpoint,
    load_optimizer,
    load_trained,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    trained_tensors,
)
from train.curriculum import Curriculum, other_view_probability, resize_ratio_bounds
from train.ema import EMA
from train.metrics import MetricWindow, append_json, remove_later_steps
from train.schedule import learning_rate


def _save(folder, step, keep=3):
    return save_checkpoint(folder, {"adapter": {"a": torch.full((4,), float(step))}}, {"step": step}, keep=keep)


def test_newest_checkpoint_is_found_and_the_last_are_kept(tmp_path):
    """Of five checkpoints with keep=3, the last three remain, and the newest is opened with its tensors."""
    assert newest_checkpoint(tmp_path) is None and not has_checkpoint(tmp_path)
    for step in range(5):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in (2, 3, 4)]
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 4 and found.tensors("adapter")["a"].tolist() == [4.0] * 4


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter.safetensors", _flip_a_bit),
        ("adapter.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-3])),
        ("adapter.safetensors", lambda path: path.unlink()),
        ("state.json", lambda path: path.write_text('{"step": 9}')),
        ("manifest.json", lambda path: path.write_text("{")),
        ("manifest.json", lambda path: path.write_text("[]")),
        ("manifest.json", lambda path: path.unlink()),
    ],
)
def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, caplog, file, damage):
    """It is renamed, so that it neither counts as one of the last checkpoints nor is found again."""
    for step in (1, 2):
        _save(tmp_path, step)
    damage(tmp_path / "step_00000002" / file)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    assert "step_00000002 is damaged" in caplog.text
    assert (tmp_path / "damaged_step_00000002").is_dir() and not (tmp_path / "step_00000002").exists()


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    """Folders that a killed process has left are removed."""
    _save(tmp_path, 1)
    (tmp_path / "unfinished_step_00000002").mkdir()
    (tmp_path / "replaced_step_00000001").mkdir()
    save_checkpoint(tmp_path, {"adapter": {"a": torch.zeros(1)}}, {"step": 1}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.tensors("adapter")["a"].tolist() == [0.0]


def test_optimizer_continues_exactly(tmp_path):
    """An optimizer whose state passed through a checkpoint makes the same steps as one that did not."""

    def steps(module, optimizer, count):
        for number in range(count):
            module(torch.arange(3.0) + number).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def new():
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    one, optimizer = new()
    steps(one, optimizer, 4)
    tensors = {"model": trained_tensors(one), "optimizer": optimizer_tensors(optimizer, one)}
    save_checkpoint(tmp_path, tensors, {"step": 4}, keep=1)
    other, resumed = new()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    load_trained(other, found.tensors("model"))
    load_optimizer(resumed, other, found.tensors("optimizer"))
    steps(one, optimizer, 3)
    steps(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_optimizer_state_belongs_to_the_names_of_the_parameters():
    """Also if a network has the same parameters in another order."""
    one = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3)})
    other = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 2)})
    optimizer, loaded = (torch.optim.AdamW(module.parameters()) for module in (one, other))
    one["b"](one["a"](torch.ones(3))).sum().backward()
    optimizer.step()
    saved = optimizer_tensors(optimizer, one)
    load_optimizer(loaded, other, saved)
    restored = optimizer_tensors(loaded, other)
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], saved[name]) for name in saved)
    with pytest.raises(ValueError, match="another network: it has no parameter a"):
        load_optimizer(torch.optim.AdamW(other["b"].parameters()), other["b"], saved)


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """The error says where there is no space, and the part that was written is removed."""
    save_checkpoint(tmp_path, {"model": {"x": torch.ones(2)}}, {"step": 1}, keep=2)

    def save_file(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("train.checkpoint.save_file", save_file)
    with pytest.raises(ValueError, match=f"step 2 cannot be written to {tmp_path}: No space left"):
        save_checkpoint(tmp_path, {"model": {"x": torch.ones(2)}}, {"step": 2}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_checkpoint_of_another_format_is_not_taken_for_damaged(tmp_path):
    path = save_checkpoint(tmp_path, {}, {"step": 1}, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(ValueError, match="has format 1, but this version of the trainer reads 2"):
        newest_checkpoint(tmp_path)
    assert path.is_dir()


def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"weight has the shape \(3, 2\), not \(2, 2\)"):
        load_trained(nn.Linear(2, 2, bias=False), {"weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="another network"):
        load_trained(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="another network"):
        EMA(nn.Linear(2, 2), 0.9).load({"weight": torch.zeros(2, 2)})


def test_ema_weights_apply_inside_the_context_only():
    module = nn.Linear(3, 3)
    ema = EMA(module, 0.9)
    module.weight.data += 1
    before = module.weight.clone()
    with ema.applied_to(module):
        assert torch.allclose(module.weight, before - 1, atol=1e-6)
    assert torch.equal(module.weight, before)


def test_ema_follows_faster_in_early_steps():
    """One update moves the average by 1 - min(decay, (1 + step) / (10 + step))."""
    module = nn.Linear(3, 3)
    for step, moved in ((0, 0.9), (1_000_000, 0.1)):
        ema = EMA(module, 0.9)
        module.weight.data += 1
        ema.update(module, step)
        assert torch.allclose(ema.values["weight"], module.weight - 1 + moved, atol=1e-6)


def test_learning_rate_warms_up_stays_constant_and_decays():
    def rate(step, **options):
        return learning_rate(step, **{"peak": 1.0, "warmup_steps": 10, "steps": 100, "decay_fraction": 0.3, **options})

    rates = [rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[10:70] == [1.0] * 60
    assert rates[70:] == sorted(rates[70:], reverse=True) and 0 < rates[-1] < 0.1
    assert rate(99, decay_fraction=0.0) == rate(99, steps=None) == 1.0
    assert rate(50, warmup_start_step=50) == 0.1


def test_curriculum_follows_the_paper():
    """Eq. 10: P = S_cur / S_total. Eq. 12: r_cur = r_min + (r_max - r_min) S_cur / S_total with r_min = 1 and
    r_max = sqrt(10), so that the smallest crop has 10% of the area."""
    assert [other_view_probability(step, 200) for step in (0, 20, 100, 200, 400)] == [0, 0.1, 0.5, 1, 1]
    assert resize_ratio_bounds(0, 200) == (1, 1)
    assert resize_ratio_bounds(100, 200) == (1, pytest.approx(1 + (math.sqrt(10) - 1) / 2))
    assert 1 / resize_ratio_bounds(200, 200)[1] ** 2 == pytest.approx(0.1)
    second = Curriculum(total_steps=160, first_step=60)
    assert second.other_view_probability(20) == 0.5 and second.resize_ratio_bounds(100)[1] == pytest.approx(10**0.5)


def test_metric_window_continues_after_a_restart():
    """A window that is saved in the middle gives the means of the complete one; values that are not finite are left
    out, and skipped steps are counted."""
    complete, first = MetricWindow(), MetricWindow()
    for value in (1.0, math.nan, 3.0):
        complete.add({"loss": value})
    first.add({"loss": 1.0})
    first.skipped_steps += 1
    second = MetricWindow.restored(json.loads(json.dumps(first.state())))
    for value in (math.nan, 3.0):
        second.add({"loss": value})
    assert second.summary() == {**complete.summary(), "skipped_steps": 1} == {"loss": 2.0, "skipped_steps": 1}


def test_lines_after_the_checkpoint_are_removed_from_the_log(tmp_path):
    """Also a line that a killed process has left incomplete."""
    path = tmp_path / "log.jsonl"
    for step in range(1, 5):
        append_json(path, {"step": step, "loss": math.inf})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    remove_later_steps(path, 2)
    assert path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'


def test_damaged_lines_of_the_log_do_not_prevent_resuming(tmp_path):
    """They are removed, as are lines after the step and a last line that was not completed."""
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\nx{broken\n\xff\n{"a": 1}\n[]\n{"step": 2}\n{"step": 3}\n{"step": 2')
    remove_later_steps(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
