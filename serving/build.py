"""Builds the Ray Serve application: an HTTP ingress in front of autoscaled replicas."""

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingPolicy

from .autoscaling import BacklogPolicy
from .clients.handle import HandleClient
from .http.app import create_api
from .replica import Replica
from .settings import PROJECT_ROOT, REPLICA, Settings

HEALTH_CHECK_PERIOD_S = 2  # longest time until a dead process is detected
HEALTH_CHECK_TIMEOUT_S = 8  # Ray Serve stops a process that does not answer three times in a row
MAX_CONNECTIONS = 1000  # concurrent requests of an ingress; the queues of the replicas are much shorter


def app(settings: Settings) -> Application:
    """The application builder of `serve run serving:app key=value ...` and of configuration files (`args`)."""
    settings = settings.resolved()
    # Workers must find the project even if the server was started in another folder
    runtime_env = {"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}}
    queue_full = {"status_code": 429, "retry_after_s": 5}
    max_ongoing = settings.max_batch_size + settings.max_queued
    logs = {"encoding": settings.log_format}
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
            "policy": AutoscalingPolicy(
                policy_function=BacklogPolicy, policy_kwargs={"target_backlog_s": settings.target_backlog_s}
            ),
            "metrics_interval_s": 1,
            "look_back_period_s": 3,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        user_config=settings.live.model_dump(),
        max_ongoing_requests=max_ongoing,
        # `HandleClient` limits the images of the ingress; several ingresses may fill the replicas at the same time
        max_queued_requests=max(settings.max_queued, settings.max_replicas * max_ongoing),
        backpressure_config=queue_full,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        logging_config=logs,
    ).bind(settings.model_copy(update={"api_key": None}), metrics=True)  # only the ingress needs the key

    def http_api():
        handle = serve.get_deployment_handle(REPLICA, app_name=serve.get_replica_context().app_name)
        client = HandleClient(
            handle,
            max_retries=settings.max_retries,
            timeout_s=settings.max_timeout_s,
            images_per_replica=max_ongoing,
            max_queued=settings.max_queued,
        )
        return create_api(client, settings)

    ingress = serve.deployment(
        serve.ingress(http_api)(),
        name="Ingress",
        num_replicas=settings.num_ingresses,
        ray_actor_options={"num_cpus": 0, "runtime_env": runtime_env},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        max_ongoing_requests=MAX_CONNECTIONS,
        max_queued_requests=MAX_CONNECTIONS,
        backpressure_config=queue_full,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        logging_config=logs,
    )
    return ingress.bind(replicas)
