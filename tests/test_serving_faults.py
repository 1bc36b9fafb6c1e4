"""Every accepted request returns its image when processes are killed or the server is reconfigured under load.

A real Ray Serve with two replicas of the toy model; processes are killed with SIGKILL.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing

import httpx
import numpy as np
import pytest
from ray import serve
from tiny import sharpen, subject_image, tiny_pipeline

from benchmarks.chaos import chaos, processes
from serving.build import app
from serving.clients import Client, HttpClient, Progress, Request, Result, Subject
from serving.clients.local import NAME, start
from serving.ray_private import deploy as deploy_config
from serving.settings import Settings

PROMPT = "a dog and a cat"
SHORT = dict(prompt=PROMPT, subjects=(Subject(image=subject_image(), target_phrase="dog"),))
DEADLINE_S = 180  # long, because the tests are about lost images, not about slow ones


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sharpen(tiny_pipeline()).save_pretrained(folder)
    return Settings(
        model=str(folder), device="cpu", num_replicas=2, num_cpus=0.1, cpu_threads=1, max_steps=2000, max_retries=5
    )


@pytest.fixture(scope="module")
def server(settings):
    server = start(settings)
    yield server
    server.shutdown()


@pytest.fixture
def clients(server) -> tuple[Client, Client]:
    return server, HttpClient(server.url)


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


async def until(condition, timeout_s=180) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not reached within {timeout_s} s"
        await asyncio.sleep(0.1)


async def follow(client: Client, request: Request, started: asyncio.Event) -> tuple[Result, list[int]]:
    """The image, and the steps as they were reported; `started` is set at the second one."""
    steps = []
    async with aclosing(client.stream(request, timeout_s=DEADLINE_S)) as events:
        async for event in events:
            if isinstance(event, Progress):
                steps.append(event.step)
                if event.step >= 2:
                    started.set()
    return event, steps


async def begin(clients: Sequence[Client], request: Request) -> list[asyncio.Task]:
    """Start the request with each client, and wait until all images are in progress.

    On a busy machine, the image of one client may be complete before that of the other begins; both are then started
    again.
    """
    for _ in range(10):
        started = [asyncio.Event() for _ in clients]
        tasks = [asyncio.create_task(follow(client, request, event)) for client, event in zip(clients, started)]
        await asyncio.gather(*(event.wait() for event in started))
        if not any(task.done() for task in tasks):
            return tasks
        await asyncio.gather(*tasks)
    raise AssertionError("the images were never in progress at the same time")


@pytest.mark.parametrize("kinds", [["replica"], ["ingress"], ["proxy", "controller"]], ids=" and ".join)
def test_requests_complete_when_processes_are_killed(server, clients, kinds):
    """All processes of a kind are killed while two clients wait for an image. Both get the image of their seed, no step
    is reported twice, and the processes are restarted."""
    request = Request(**SHORT, seed=7, num_inference_steps=120)

    def running() -> list:
        return [process for kind in kinds for process in processes(kind)]

    async def run():
        expected = pixels(await server.generate(request))
        tasks = await begin(clients, request)
        killed = running()
        assert len(killed) >= len(kinds)
        for process in killed:
            process.kill()
        for result, steps in await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S + 30):
            assert np.abs(pixels(result) - expected).max() <= 1
            assert steps == sorted(steps)
        await until(lambda: all(set(processes(kind)) - set(killed) for kind in kinds))

    asyncio.run(run())


HUNG_S = 30  # within which the images of a hung replica are finished elsewhere; about 15 s are expected


def test_requests_complete_when_a_replica_hangs(clients):
    """A replica is stopped by SIGSTOP while it generates images of both clients. They are finished on the other
    replica, and so are requests that arrive afterwards."""
    request = Request(**SHORT, seed=7, num_inference_steps=120)

    async def run():
        await until(lambda: len(processes("replica")) == 2)
        expected = pixels(await clients[0].generate(request))
        idle = {process: process.cpu_times().user for process in processes("replica")}
        tasks = await begin(clients, request)
        hung = max(idle, key=lambda process: process.cpu_times().user - idle[process])
        hung.suspend()
        try:
            assert not any(task.done() for task in tasks)
            tasks += [asyncio.create_task(follow(client, request, asyncio.Event())) for client in clients]
            for result, _ in await asyncio.wait_for(asyncio.gather(*tasks), HUNG_S):
                assert np.abs(pixels(result) - expected).max() <= 1
        finally:
            hung.kill()  # Ray Serve would do this after three health checks without an answer

    asyncio.run(run())


def test_chaos(server, clients):
    """Under open-loop load with a replica killed every few seconds, requests give the correct image or QueueFull."""
    wanted = [
        Request(**SHORT, seed=1, num_inference_steps=20),
        Request(prompt=PROMPT, seed=2, num_inference_steps=40),
        Request(**SHORT, seed=3, height=96, guidance_scale=1.0),
    ]
    responses, killed = asyncio.run(
        chaos(clients, wanted, rate=2, seconds=25, kinds=["replica"], every_s=4, deadline_s=DEADLINE_S)
    )
    outcomes = Counter(response.outcome for response in responses)
    assert killed["replica"] >= 2
    assert set(outcomes) <= {"correct", "cancelled", "QueueFull"}, [r for r in responses if r.outcome != "correct"]
    assert outcomes["correct"] >= 0.5 * len(responses)


def deploy(settings: Settings, **user_config) -> None:
    """Deploy these settings, as `serve deploy` does."""
    given = {name: value for name, value in settings.model_dump().items() if name in settings.model_fields_set}
    application = {"name": NAME, "route_prefix": "/", "import_path": "serving:app", "args": given}
    if user_config:
        application["deployments"] = [{"name": "Replica", "user_config": user_config}]
    deploy_config({"applications": [application]})


def status() -> str:
    return serve.status().applications[NAME].status


def test_rolling_update_and_live_settings_under_load(server, clients, settings):
    """Deploying other settings replaces every replica, another `user_config` replaces none. No request fails while both
    clients keep sending requests."""
    request = Request(**SHORT, seed=5, num_inference_steps=30)

    async def keep_requesting(client: Client, stop: asyncio.Event) -> list[Result]:
        results = []
        while not stop.is_set():
            results.append(await client.generate(request, timeout_s=DEADLINE_S))
        return results

    async def limit(client: Client) -> int:
        return (await client.model()).limits.max_steps

    async def run():
        expected = pixels(await server.generate(request))
        before, stop = {process.pid for process in processes("replica")}, asyncio.Event()
        requesting = [asyncio.create_task(keep_requesting(client, stop)) for client in clients]
        version = settings.model_copy(update={"preview_every": 2, "max_steps": 1000})
        version.model_fields_set.update({"preview_every", "max_steps"})
        deploy(version)
        await until(lambda: not before & {process.pid for process in processes("replica")} and status() == "RUNNING")
        assert await limit(server) == 1000
        replaced = {process.pid for process in processes("replica")}
        deploy(version, max_steps=500)
        for _ in range(100):
            if [await limit(client) for client in clients * 2] == [500] * 4:
                break
            await asyncio.sleep(0.2)
        else:
            raise AssertionError("the new limit is not in effect")
        assert {process.pid for process in processes("replica")} == replaced
        stop.set()
        results = [result for results in await asyncio.gather(*requesting) for result in results]
        assert len(results) >= 8
        assert all(np.abs(pixels(result) - expected).max() <= 1 for result in results)

    asyncio.run(run())


def test_scale_to_zero_and_back(server, settings):
    """With min_replicas=0 a request starts the first replica, health checks do not, and an idle replica is stopped."""
    name = "scale-to-zero"
    scaled = settings.model_copy(update={"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 1})
    serve.run(app(scaled), name=name, route_prefix=f"/{name}")
    client = HttpClient(f"{server.url}/{name}")

    def replicas() -> int:
        return sum(serve.status().applications[name].deployments["Replica"].replica_states.values())

    async def run():
        async with httpx.AsyncClient(trust_env=False) as plain:
            assert (await plain.get(f"{server.url}/{name}/healthz")).status_code == 200
        assert replicas() == 0
        request = Request(**SHORT, seed=6)
        result = await client.generate(request, timeout_s=DEADLINE_S)
        assert np.abs(pixels(result) - pixels(await server.generate(request))).max() <= 1
        await until(lambda: replicas() == 0)

    asyncio.run(run())
    serve.delete(name)


def test_deleting_the_application_finishes_its_images(server, clients):
    """`serve.delete` waits for active images, as deploying a file without the application does."""
    request = Request(**SHORT, seed=8, num_inference_steps=400)  # still in progress when the deletion begins

    async def run():
        expected = pixels(await server.generate(request))
        tasks = await begin(clients, request)
        await asyncio.to_thread(serve.delete, NAME)
        for task in tasks:
            assert task.done() and np.abs(pixels(task.result()[0]) - expected).max() <= 1

    asyncio.run(run())
