"""The files in serving/configs match the schemas of Ray Serve and KubeRay, the settings and the metrics."""

import json
import re

import pytest
import yaml
from packaging.requirements import Requirement
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

from serving.metrics import RayMetrics
from serving.settings import PROJECT_ROOT, Settings

CONFIGS = PROJECT_ROOT / "serving" / "configs"
SUFFIXES = {"Gauge": {""}, "Counter": {"_total"}, "Histogram": {"_bucket", "_sum", "_count"}}  # as Ray exports them


def serve_config(path) -> dict:
    """The Ray Serve configuration of a file, plain or inside a RayService."""
    config = yaml.safe_load(path.read_text())
    return yaml.safe_load(config["spec"]["serveConfigV2"]) if "spec" in config else config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path):
    """Every file fits the schema and the settings. Files that listen on other interfaces name both means of
    authentication."""
    config = serve_config(path)
    ServeDeploySchema.model_validate(config)
    for application in config["applications"]:
        assert application["import_path"] == "serving:app"
        Settings.model_validate(application["args"])
    if HTTPOptionsSchema.model_validate(config.get("http_options", {})).host != "127.0.0.1":  # Ray's default is 0.0.0.0
        assert "api_key" in path.read_text() and re.search("RAY_AUTH_MODE|authOptions", path.read_text())


def test_rayservice_has_resources_for_its_replicas():
    """The cluster can grow to the maximum of replicas, each node has resources for one, the Ray version fits
    requirements.txt, and Ray's own interfaces require a token."""
    service = yaml.safe_load((CONFIGS / "kuberay_sdxl.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster, (workers,) = (service["spec"]["rayClusterConfig"], service["spec"]["rayClusterConfig"]["workerGroupSpecs"])
    settings = Settings.model_validate(serve_config(CONFIGS / "kuberay_sdxl.yaml")["applications"][0]["args"])
    assert cluster["authOptions"] == {"mode": "token"}
    (ray,) = (r for r in map(Requirement, (PROJECT_ROOT / "requirements.txt").read_text().split()) if r.name == "ray")
    assert cluster["rayVersion"] in ray.specifier
    assert workers["minReplicas"] >= settings.min_replicas and workers["maxReplicas"] >= settings.max_replicas
    (head,), (worker,) = (
        group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], workers)
    )  # fmt: skip
    environment = {entry["name"]: entry["value"] for entry in worker["env"]}
    assert head["image"] == worker["image"] and all(entry in worker["env"] for entry in head["env"])
    for resources in (head["resources"], worker["resources"]):
        assert resources["requests"] == resources["limits"]
    resolved = settings.resolved()
    limits = worker["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) >= resolved.num_gpus and int(limits["cpu"]) >= resolved.num_cpus
    drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s > settings.drain_timeout_s
    assert "lifecycle" not in worker  # see the comment in the file


def test_dashboard_uses_existing_metrics():
    """The Grafana dashboard uses only exported metrics, with the suffix of their type, and shows all of them."""
    exported = {}
    for metric in vars(RayMetrics()).values():
        exported |= {f"ray_{metric.info['name']}{suffix}": metric for suffix in SUFFIXES[type(metric).__name__]}
    dashboard = json.loads((CONFIGS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in expressions for name in re.findall(r"ray_\w+", expression)}
    assert used <= set(exported), sorted(used - set(exported))
    assert {exported[name].info["name"] for name in used} == {m.info["name"] for m in exported.values()}
    for expression in expressions:
        for label in re.findall(r"(\w+)=~?\"", expression):
            names = re.findall(r"ray_\w+", expression)
            assert label == "application" or all(label in exported[name].info["tag_keys"] for name in names)
