"""Settings of every test run, and which tests run in the same process.

Import paths are set in pyproject.toml (`pythonpath`), so tests run from any folder. Helpers of several test modules
are in `tiny.py` and `single_file.py`; a test module never imports another one.
"""

import os
import signal

import pytest

# Set before any library is imported, and inherited by the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing; a missing file fails immediately
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves replicas beside the other test process
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell script starts background jobs with SIGINT ignored, and the programs under test would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Test files that start Ray or listen on ports. They share a process, because two local clusters may find each other
# and compete for the processors. They take the longest and mostly wait, so they start first and the other process runs
# all other files meanwhile.
RAY_FILES = {
    "test_app.py",
    "test_browser.py",
    "test_ray_private.py",
    "test_readme.py",
    "test_serving_faults.py",
    "test_serving_local.py",
    "test_serving_nodes.py",
    "test_serving_ray.py",
    "test_serving_settings.py",
    "test_train_distributed.py",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, so that they share its fixtures."""
    items.sort(key=lambda item: item.path.name not in RAY_FILES)
    for item in items:
        group = "ray" if item.path.name in RAY_FILES else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        assert all("@" in item.nodeid for item in session.items), "pytest-xdist does not see the groups"


def pytest_addoption(parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the golden numbers' models (default: cpu)")
