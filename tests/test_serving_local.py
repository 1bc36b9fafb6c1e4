"""Starting a local Ray and joining a cluster: what is retried, and which errors become one sentence."""

import pytest
import ray
from ray.exceptions import AuthenticationError

from serving.clients import ServerError
from serving.clients.local import join, start_ray


def failing(monkeypatch, *errors) -> list:
    """Let `ray.init` raise these errors one after another and then succeed; return the options of its calls."""
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


@pytest.fixture
def clusters(monkeypatch) -> list[str]:
    """Ray clusters of this machine; the test may add some. This process is connected to none of them."""
    clusters: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("serving.clients.local.local_clusters", lambda: clusters)
    monkeypatch.setattr("serving.clients.local.enable_token_auth", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return clusters


def test_join_auto_without_a_cluster(clusters):
    with pytest.raises(ServerError, match="no Ray cluster runs on this machine"):
        join()


def test_join_auto_with_several_clusters_names_them(clusters, monkeypatch):
    """With several clusters, `join("auto")` connects to none of them unless RAY_ADDRESS selects one."""
    clusters += ["10.0.0.1:6379", "10.0.0.1:6380"]
    calls = failing(monkeypatch, ConnectionError("no"))
    with pytest.raises(ServerError, match=r"2 Ray clusters .*10\.0\.0\.1:6379, 10\.0\.0\.1:6380.*RAY_ADDRESS"):
        join()
    assert not calls
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6380")
    with pytest.raises(ServerError, match="cannot be reached"):
        join()
    assert calls[0]["address"] == "10.0.0.1:6380"


@pytest.mark.parametrize(
    "error,message",
    [
        (AuthenticationError("Token is invalid"), "requires its token"),
        (ConnectionError("refused"), "cannot be reached"),
    ],
)
def test_join_fails_with_one_sentence(clusters, monkeypatch, error, message):
    failing(monkeypatch, error)
    with pytest.raises(ServerError, match=message) as caught:
        join("10.0.0.1:6379")
    assert "\n" not in str(caught.value) and "10.0.0.1:6379" in str(caught.value)
