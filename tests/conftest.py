"""Settings of every test run. Import paths are set in pyproject.toml (`pythonpath`), so tests run from any folder.

Helpers used by several test modules are in `tiny.py` and `single_file.py`; a test module never imports another one.
"""

import os

# Set before any library is imported, and inherited by the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing; a missing file fails immediately
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def pytest_addoption(parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the golden numbers' models (default: cpu)")
