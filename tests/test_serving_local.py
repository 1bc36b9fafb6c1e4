"""Starting a local Ray is repeated if its node dies during startup, and after no other error."""

import pytest
import ray

from serving.clients.local import start_ray


def failing(monkeypatch, *errors) -> list:
    """`ray.init` raises these errors in turn, then succeeds; returns the options of its calls."""
    left, calls = list(errors), []

    def init(**options):
        calls.append(options)
        if left:
            raise left.pop(0)

    monkeypatch.setattr(ray, "init", init)
    return calls


DEAD = Exception("The current node timed out during startup. This could happen because ...")


def test_startup_is_repeated_once(monkeypatch, caplog):
    calls = failing(monkeypatch, DEAD)
    start_ray()
    assert len(calls) == 2 and calls[0] == calls[1]
    assert "trying again" in caplog.text


@pytest.mark.parametrize("errors", [(DEAD, DEAD), (RuntimeError("no disk"),)])
def test_other_errors_and_the_last_one_are_raised(monkeypatch, errors):
    calls = failing(monkeypatch, *errors)
    with pytest.raises(type(errors[-1]), match=str(errors[-1])[:20]):
        start_ray()
    assert len(calls) == len(errors)
