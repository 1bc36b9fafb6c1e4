"""Starts a server on this machine, or connects to one on a Ray cluster: for `app.py`, notebooks and tests."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from ..protocol.errors import ServerError
from ..ray_private import enable_token_auth, local_clusters
from ..settings import REPLICA, Settings
from .handle import HandleClient

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RAY_STOP_TIMEOUT_S = 5.0  # after which the processes of a local Ray instance are killed
NAME = "realcustom"  # of the Ray Serve application


class LocalServer(HandleClient):
    """Client of the server that `start` started. `url` is its HTTP address."""

    def __init__(self, handle, url: str, *, owns_ray: bool, settings: Settings) -> None:
        super().__init__(handle, max_retries=settings.max_retries, timeout_s=settings.max_timeout_s)
        self.url = url
        self._owns_ray = owns_ray

    async def stats(self) -> dict[str, float]:
        """Statistics of the replica, see `Engine.stats`."""
        return await self._handle.stats.remote()

    def shutdown(self) -> None:
        """Stop the server, and Ray if `start` started it."""
        self.close()
        _stop(owns_ray=self._owns_ray)


def start(
    settings: Settings | None = None, *, host: str = "127.0.0.1", port: int | None = None, route_prefix: str = "/"
) -> LocalServer:
    """Start Ray Serve and wait until the model is loaded. If this process is connected to a Ray cluster, it is used.

    Args:
        settings: None serves the embedded model.
        host, port: of the HTTP interface; None selects a free port.
        route_prefix: path of the HTTP interface.
    Raises:
        FileNotFoundError: the model does not exist.
        ServerError: Ray or the server does not start, for example because the model cannot be loaded. All processes
            that were started are stopped, as after any other error or Ctrl-C.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")  # a proxy that died is replaced
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")  # a hung replica cannot finish its images
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from ..build import app
    from ..replica import model_path

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = settings or Settings()
    model_path(settings)  # raises here instead of in each attempt of the replica to start
    port = port or free_port(host)
    owns_ray = not ray.is_initialized()
    try:
        if owns_ray:
            try:
                with _interrupt_deferred():
                    start_ray()
            except Exception as error:  # Ray has no type for this error
                raise ServerError(f"Ray did not start: {error}") from error
        try:
            serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        except RayError as error:
            raise ServerError(f"Ray Serve did not start: {str(error).splitlines()[0]}") from error
        try:
            serve.run(app(settings), name=NAME, route_prefix=route_prefix)
        except RuntimeError as error:
            raise ServerError(f"the server did not start: {_failure() or error}") from error
        handle = serve.get_deployment_handle(REPLICA, app_name=NAME)
    except BaseException:
        _stop(owns_ray=owns_ray)
        raise
    url = f"http://{host}:{port}{route_prefix.rstrip('/')}"
    return LocalServer(handle, url, owns_ray=owns_ray, settings=settings)


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Deliver a Ctrl-C during the context at its end. Ray leaves processes behind if its start is interrupted."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


def _failure() -> str | None:
    """The error that prevented a deployment from starting: the last line of the traceback in its status."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    for deployment in application.deployments.values() if application else ():
        if deployment.status == "DEPLOY_FAILED" and deployment.message.strip():
            return deployment.message.strip().splitlines()[-1]
    return None


def _stop(*, owns_ray: bool) -> None:
    import ray
    from ray import serve

    if not owns_ray:
        serve.delete(NAME)
        return
    # If start-up fails, Ray's agents outlive its node by a minute or more.
    processes = [p for p in psutil.Process().children(recursive=True) if _is_ray_process(p)]
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=RAY_STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_ray_process(process: psutil.Process) -> bool:
    try:
        return process.name().startswith(("ray", "gcs_server"))
    except psutil.NoSuchProcess:
        return False


def start_ray(num_attempts: int = 2) -> None:
    """Start a local Ray instance that this process owns.

    Occasionally, its node dies before it writes a log, and `ray.init` times out after 30 s. A second attempt works. The
    processes of the first attempt do not interfere and end with this process.
    """
    import ray

    for attempt in range(num_attempts):
        try:
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),  # so that a replica and the proxy fit on one core
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                object_store_memory=512 * 2**20,
            )
            return
        except Exception as error:  # Ray has no type for this error
            if "timed out during startup" not in str(error) or attempt == num_attempts - 1:
                raise
            log.warning("Ray did not start; trying again: %s", error)


def join(address: str = "auto") -> HandleClient:
    """Connect to a server that runs on a Ray cluster and return a client of it.

    Args:
        address: host:port of the cluster, ray://host:port, or "auto": the one of the environment variable RAY_ADDRESS,
            or else the only cluster of this machine. Has no effect if this process is connected to a cluster already.
    Raises:
        ServerError: the cluster does not exist, is ambiguous or rejects the connection, or has no RealCustom++ server.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        if address == "auto":
            address = _only_cluster()
        _connect(address)
    for name, application in serve.status().applications.items():
        if REPLICA in application.deployments:
            return HandleClient(serve.get_deployment_handle(REPLICA, app_name=name))
    raise ServerError(f"no RealCustom++ server runs at {address!r}; start one with `serve run serving:app`.")


def _only_cluster() -> str:
    """RAY_ADDRESS, or the address of the only Ray cluster on this machine. Ray itself would accept several clusters."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    clusters = local_clusters()
    if not clusters:
        raise ServerError(
            "no Ray cluster runs on this machine; start one with `ray start --head`, or give its address."
        )
    if len(clusters) > 1:
        raise ServerError(
            f"{len(clusters)} Ray clusters run on this machine ({', '.join(clusters)}); give the address of one, "
            "or set RAY_ADDRESS."
        )
    return clusters[0]


def _connect(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    enable_token_auth()
    try:
        if "://" not in address:  # `ray.init` would wait for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except AuthenticationError as error:
        raise ServerError(
            f"Ray at {address!r} requires its token: copy ~/.ray/auth_token from there to this machine, or set "
            "RAY_AUTH_TOKEN."
        ) from error
    except (OSError, ValueError) as error:
        raise ServerError(f"Ray cannot be reached at {address!r}: {str(error).splitlines()[0]}") from error


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
