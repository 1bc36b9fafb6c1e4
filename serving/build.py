"""Settings -> Ray Serve application: an HTTP ingress in front of autoscaled replicas."""

from ray import serve
from ray.serve import Application

from .api import create_api
from .client import HandleClient
from .replica import Replica
from .settings import PROJECT_ROOT, Settings

REPLICA = "Replica"


def app(settings: Settings) -> Application:
    """`serve run serving:app key=value ...`, or the `args` of a configuration file."""
    settings = settings.placed()
    # Workers of a server that was started elsewhere find the project without being told.
    runtime_env = {"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}}
    replicas = serve.deployment(
        Replica,
        name=REPLICA,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": runtime_env,
        },
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            # a replica is well used when its batch is full; more than that is waiting and asks for company
            "target_ongoing_requests": settings.max_batch_size,
            "metrics_interval_s": 2,
            "look_back_period_s": 6,
            "upscale_delay_s": 5,
            "downscale_delay_s": 120,
        },
        max_ongoing_requests=settings.max_batch_size + settings.max_queued,
        max_queued_requests=settings.max_queued,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
    ).bind(settings)

    def http_api():
        handle = serve.get_deployment_handle(REPLICA, app_name=serve.get_replica_context().app_name)
        return create_api(HandleClient(handle), settings)

    ingress = serve.deployment(
        serve.ingress(http_api)(),
        name="Ingress",
        ray_actor_options={"num_cpus": 0, "runtime_env": runtime_env},
        max_ongoing_requests=1000,
    )
    return ingress.bind(replicas)
