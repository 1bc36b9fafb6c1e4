"""The private APIs of Ray that this project uses. `tests/test_ray_private.py` fails if Ray changes one of them."""

from pathlib import Path
from typing import Any


def current_request_id() -> str:
    """Id of the Ray Serve request that this task handles, as in the header X-Request-ID; "" outside a request."""
    from ray.serve.context import _get_serve_request_context

    return _get_serve_request_context().request_id


def local_clusters() -> list[str]:
    """Addresses (host:port) of the Ray clusters that have their head on this machine, sorted."""
    from ray._private.services import find_gcs_addresses

    find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]
    return sorted(find_gcs_addresses())


def enable_token_auth() -> None:
    """Authenticate with the token of this machine, if it has one and RAY_AUTH_MODE is not set.

    `ray.init` does this only for local clusters; without it, a cluster given by its address rejects the connection.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def deploy(config: dict[str, Any]) -> None:
    """Deploy a Ray Serve configuration to the connected cluster, as `serve deploy FILE` does with the dashboard."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    client = _get_global_client()
    assert client is not None, "Ray Serve is not running"
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def logs_folder() -> Path:
    """Folder of the log files of the local Ray instance that this process is connected to."""
    from ray._private.worker import global_worker

    assert global_worker.node is not None, "Ray is not running"
    return Path(global_worker.node.get_logs_dir_path())
