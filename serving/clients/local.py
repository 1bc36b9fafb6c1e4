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
    """Start Ray Serve, or join the Ray that this process is connected to, and wait until the model is loaded.

    Args:
        settings: default: the shipped model.
        host, port: of the HTTP interface; None takes a free port.
        route_prefix: path under which the interface is found.
    Raises:
        FileNotFoundError: the model does not exist.
        ServerError: the model cannot be loaded. What was started is stopped, as after any other error or Ctrl-C.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")  # one that died is replaced after this time
    import ray
    from ray import serve

    from ..build import REPLICA, app
    from ..replica import model_path

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = settings or Settings()
    model_path(settings)  # raises now and not in each of the replica's attempts to start
    port = port or free_port(host)
    owns_ray = not ray.is_initialized()
    try:
        if owns_ray:
            _start_ray()
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
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


def _failure() -> str | None:
    """The error that kept a deployment from starting: the last line of the traceback in its status."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    for deployment in application.deployments.values() if application else ():
        if deployment.status == "DEPLOY_FAILED" and deployment.message.strip():
            return deployment.message.strip().splitlines()[-1]
    return None


def _stop(*, owns_ray: bool) -> None:
    import ray
    from ray import serve

    if owns_ray:
        ray.shutdown()
    else:
        serve.delete(NAME)


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
