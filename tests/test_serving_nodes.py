"""A node is drained (SIGTERM, as Kubernetes sends it): its images are finished first."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from tiny import sharpen, subject_image, tiny_pipeline

from serving.build import REPLICA
from serving.clients import Request, Subject
from serving.clients.local import NAME, start
from serving.settings import Settings

DRAIN_S = 100  # longest time for a node to stop after SIGTERM


@pytest.fixture
def cluster():
    """A cluster with a head node that has no resources for a replica."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_node(cluster):
    """Starts a node with resources for one replica, as a container of `kuberay_sdxl.yaml` does."""
    nodes = []

    def add() -> subprocess.Popen:
        number = len(ray.nodes())
        command = ["ray", "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        }
        nodes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        end = time.monotonic() + 60
        while len(ray.nodes()) == number:
            assert time.monotonic() < end and nodes[-1].poll() is None, "the node did not join"
            time.sleep(0.2)
        return nodes[-1]

    yield add
    for node in nodes:
        node.kill()
        node.wait()


def test_draining_a_node_drops_no_image(add_node, tmp_path):
    """Repeated requests without retries all succeed while the only replica moves to another node."""
    sharpen(tiny_pipeline()).save_pretrained(tmp_path / "tiny")
    draining = add_node()
    settings = Settings(model=str(tmp_path / "tiny"), device="cpu", cpu_threads=1, num_cpus=1, max_retries=0)
    client = start(settings)
    dog = Subject(image=subject_image(), target_phrase="dog")
    request = Request(prompt="a dog", subjects=(dog,), seed=1, num_inference_steps=40)
    try:
        add_node()

        def replicas() -> dict:
            return serve.status().applications[NAME].deployments[REPLICA].replica_states

        async def pixels() -> np.ndarray:
            return np.asarray((await client.generate(request)).image).astype(int)

        async def run() -> tuple[int, list[dict]]:
            expected, seen, num_images = await pixels(), [], 0
            asyncio.get_running_loop().call_later(1, draining.terminate)
            end = time.monotonic() + DRAIN_S + 30
            while draining.poll() is None:
                assert time.monotonic() < end, f"the node does not stop: {seen[-1]}"
                for image in await asyncio.gather(pixels(), pixels()):
                    assert np.abs(image - expected).max() <= 1
                    num_images += 1
                seen.append(await asyncio.to_thread(replicas))
            assert np.abs(await pixels() - expected).max() <= 1
            return num_images, seen

        num_images, seen = asyncio.run(run())
        assert num_images > 2 and any("PENDING_MIGRATION" in states or sum(states.values()) == 2 for states in seen)
    finally:
        client.shutdown()
