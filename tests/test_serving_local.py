"""Starting a Ray of one's own: a node that dies at birth gets another try, any other failure does not."""

import pytest
import ray

from serving.clients.local import _start_ray


def failing(monkeypatch, *errors) -> list:
    """`ray.init` raises these errors in turn, then succeeds; returns the calls it got."""
    left, calls = list(errors), []

    def init(**options):
        calls.append(options)
        if left:
            raise left.pop(0)

    monkeypatch.setattr(ray, "init", init)
    return calls


DEAD = Exception("The current node timed out during startup. This could happen because ...")


def test_a_node_that_dies_at_birth_gets_another_try(monkeypatch, caplog):
    calls = failing(monkeypatch, DEAD)
    _start_ray()
    assert len(calls) == 2 and calls[0] == calls[1]
    assert "trying again" in caplog.text


@pytest.mark.parametrize("errors", [(DEAD, DEAD), (RuntimeError("no disk"),)])
def test_other_failures_and_the_last_one_are_raised(monkeypatch, errors):
    calls = failing(monkeypatch, *errors)
    with pytest.raises(type(errors[-1]), match=str(errors[-1])[:20]):
        _start_ray()
    assert len(calls) == len(errors)
