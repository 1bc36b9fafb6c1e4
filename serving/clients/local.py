"""A Ray Serve of one's own on this machine, or one that runs already: for `app.py`, notebooks and tests."""

import logging
import os
import socket

from ..protocol.errors import ServerError
from ..settings import Settings
from .handle import HandleClient

log = logging.getLogger(__name__)

NAME = "realcustom"  # of the Serve application


class LocalServer(HandleClient):
    """A client of the server that `start` started. `url` is its HTTP address."""

    def __init__(self, handle, url: str, *, owns_ray: bool, settings: Settings) -> None:
        super().__init__(handle, max_retries=settings.max_retries, timeout_s=settings.max_timeout_s)
        self.url = url
        self._owns_ray = owns_ray

    def shutdown(self) -> None:
        """Stop the server, and Ray if `start` started it."""
        import ray
        from ray import serve

        self._handle.shutdown()  # its reports to the server would otherwise go on, and start another Ray
        if self._owns_ray:
            ray.shutdown()
        else:
            serve.delete(NAME)


def start(
    settings: Settings | None = None, *, host: str = "127.0.0.1", port: int | None = None, route_prefix: str = "/"
) -> LocalServer:
    """Start Ray Serve, or join the Ray that this process is connected to, and wait until the model is loaded.

    Args:
        settings: default: the shipped model.
        host, port: of the HTTP interface; None takes a free port.
        route_prefix: path under which the interface is found.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")  # one that died is replaced after this time
    import ray
    from ray import serve

    from ..build import REPLICA, app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = port or free_port(host)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        _start_ray()
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    settings = settings or Settings()
    serve.run(app(settings), name=NAME, route_prefix=route_prefix)
    handle = serve.get_deployment_handle(REPLICA, app_name=NAME)
    url = f"http://{host}:{port}{route_prefix.rstrip('/')}"
    return LocalServer(handle, url, owns_ray=owns_ray, settings=settings)


def _start_ray(tries: int = 2) -> None:
    """A Ray on this machine alone.

    Its node sometimes dies at birth, before it writes a log; Ray gives it 30 s. What it had started ends with this
    process, and does not stand in the way of another try.
    """
    import ray

    for left in reversed(range(tries)):
        try:
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 1),  # bookkeeping: a replica must find its place on one core, too
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                object_store_memory=512 * 2**20,
            )
            return
        except Exception as error:  # Ray has no type for it
            if "timed out during startup" not in str(error) or not left:
                raise
            log.warning("Ray did not start; trying again: %s", error)


def join(address: str = "auto") -> HandleClient:
    """A client of the application that already runs on a Ray cluster.

    Args:
        address: as `ray.init` takes it.
    Raises:
        ServerError: no application of ours runs there.
    """
    import ray
    from ray import serve

    from ..build import REPLICA

    if not ray.is_initialized():
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    for name, application in serve.status().applications.items():
        if REPLICA in application.deployments:
            return HandleClient(serve.get_deployment_handle(REPLICA, app_name=name))
    raise ServerError(f"no RealCustom++ server runs at {address!r}; start one with `serve run serving:app`.")


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
