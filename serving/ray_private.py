"""The private APIs of Ray that this project uses. `tests/test_ray_private.py` fails if Ray changes one of them."""

import asyncio
from pathlib import Path
from typing import Any


def current_request_id() -> str:
    """Id of the Ray Serve request that this task handles, as in the header X-Request-ID; "" outside a request."""
    from ray.serve.context import _get_serve_request_context

    return _get_serve_request_context().request_id


def running_replicas(handle: Any) -> dict[str, Any]:
    """The running replicas that a handle may call, by id; empty before its first call."""
    router = getattr(handle._router, "_asyncio_router", None)
    if router is None or router.request_router is None:
        return {}
    return {replica_id.unique_id: replica for replica_id, replica in router.request_router.curr_replicas.items()}


async def hung_replicas(handle: Any, timeout_s: float) -> set[str]:
    """Ids of the running replicas whose process does not answer within `timeout_s` seconds.

    A process that has died is not among them: Ray reports an error to its callers.
    """
    probes = {
        name: asyncio.ensure_future(replica.get_queue_len(deadline_s=timeout_s))
        for name, replica in running_replicas(handle).items()
    }
    if not probes:
        return set()
    _, pending = await asyncio.wait(probes.values(), timeout=timeout_s)
    for probe in probes.values():
        probe.cancel()
    await asyncio.gather(*probes.values(), return_exceptions=True)
    return {name for name, probe in probes.items() if probe in pending}


def forget_queue_lengths(handle: Any) -> None:
    """Let the router of a handle ask the replicas for their queue lengths before it sends the next request.

    It remembers a length for 10 s and would send requests to a replica that no longer responds. One that does not
    answer the question gets none.
    """
    for replica in running_replicas(handle).values():
        handle._router._asyncio_router.request_router.on_replica_actor_unavailable(replica.replica_id)


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
