"""A machine of the cluster is asked to leave (SIGTERM, as Kubernetes does): its images are finished first."""

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

LEAVE_S = 100  # at most, once asked


@pytest.fixture
def cluster():
    """A head on which no replica has room."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def join_cluster(cluster):
    """Starts a machine with room for one replica, as a container of `kuberay_sdxl.yaml` does."""
    machines = []

    def add() -> subprocess.Popen:
        number = len(ray.nodes())
        command = ["ray", "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(LEAVE_S),
        }
        machines.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        end = time.monotonic() + 60
        while len(ray.nodes()) == number:
            assert time.monotonic() < end and machines[-1].poll() is None, "the machine did not join"
            time.sleep(0.2)
        return machines[-1]

    yield add
    for machine in machines:
        machine.kill()
        machine.wait()


def test_a_machine_that_leaves_drops_no_image(join_cluster, tmp_path):
    """Asked again and again, without a retry in reserve, while the only replica moves to another machine."""
    sharpen(tiny_pipeline()).save_pretrained(tmp_path / "tiny")
    leaving = join_cluster()
    settings = Settings(model=str(tmp_path / "tiny"), device="cpu", cpu_threads=1, num_cpus=1, max_retries=0)
    client = start(settings)
    dog = Subject(image=subject_image(), target_phrase="dog")
    request = Request(prompt="a dog", subjects=(dog,), seed=1, num_inference_steps=40)
    try:
        join_cluster()

        def replicas() -> dict:
            return serve.status().applications[NAME].deployments[REPLICA].replica_states

        async def pixels() -> np.ndarray:
            return np.asarray((await client.generate(request)).image).astype(int)

        async def run() -> tuple[int, list[dict]]:
            expected, seen, made = await pixels(), [], 0
            asyncio.get_running_loop().call_later(1, leaving.terminate)
            end = time.monotonic() + LEAVE_S + 30
            while leaving.poll() is None:
                assert time.monotonic() < end, f"the machine does not leave: {seen[-1]}"
                for image in await asyncio.gather(pixels(), pixels()):
                    assert np.abs(image - expected).max() <= 1
                    made += 1
                seen.append(await asyncio.to_thread(replicas))
            assert np.abs(await pixels() - expected).max() <= 1
            return made, seen

        made, seen = asyncio.run(run())
        assert made > 2 and any("PENDING_MIGRATION" in states or sum(states.values()) == 2 for states in seen)
    finally:
        client.shutdown()
