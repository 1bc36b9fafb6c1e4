"""The private APIs of Ray that serving/ray_private.py uses exist and behave as expected.

`deploy` and `logs_folder` need a running cluster: tests/test_serving_faults.py and tests/test_serving_ray.py use them.
"""

import os
import subprocess
import sys

import pytest
import ray
from ray.serve.context import _get_global_client  # noqa: F401
from ray.serve.schema import ServeDeploySchema

from serving.ray_private import current_request_id, local_clusters, logs_folder
from serving.settings import PROJECT_ROOT


def test_current_request_id_is_empty_outside_a_request():
    assert current_request_id() == ""


def test_local_clusters_are_addresses():
    """Each address has the form host:port, and the list is sorted."""
    clusters = local_clusters()
    assert clusters == sorted(clusters) and all(address.rpartition(":")[2].isdigit() for address in clusters)


def test_logs_folder_needs_ray():
    if ray.is_initialized():
        pytest.skip("this process is connected to Ray")
    with pytest.raises(AssertionError, match="Ray is not running"):
        logs_folder()


def test_deploy_accepts_the_schema_of_ray_serve():
    assert ServeDeploySchema.model_validate({"applications": []}).applications == []


@pytest.mark.parametrize("mode,expected", [(None, "token"), ("disabled", "disabled")])
def test_enable_token_auth(tmp_path, mode, expected):
    """The token of the machine is used unless RAY_AUTH_MODE is set to another mode."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_AUTH_MODE", None)
    if mode is not None:
        environment["RAY_AUTH_MODE"] = mode
    code = (
        "import os, ray; from serving.ray_private import enable_token_auth; enable_token_auth(); "
        "print(os.environ.get('RAY_AUTH_MODE'))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == [expected], result.stderr
