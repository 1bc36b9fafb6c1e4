"""The OpenAPI description is complete and true: Schemathesis draws requests from it, right and wrong ones, for every
endpoint; no answer is a fault of the server, and each has a status, a content type and a body as described."""

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from tiny import tiny_pipeline

from serving.api import create_api
from serving.replica import Replica
from serving.settings import Settings

NUM_EXAMPLES = 60  # for each endpoint, beside the ones at the borders of every field's range


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    limits = dict(max_steps=8, max_images=2, max_subjects=2, max_pixels=128 * 128, max_timeout_s=30)
    server = Settings(model=str(folder), device="cpu", cpu_threads=1, api_key="secret", **limits)
    replica = Replica(server)
    api = create_api(replica, server)
    yield schemathesis.openapi.from_asgi("/openapi.json", api)
    replica.check_health()
    stats = asyncio.run(replica.stats())
    assert not any(stats[state] for state in ("waiting", "preparing", "active")), stats
    replica._engine.close()


every_endpoint = schemathesis.pytest.from_fixture("description")


@every_endpoint.parametrize()
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_every_answer_is_as_described(case):
    response = case.call(headers={"Authorization": "Bearer secret"})
    case.validate_response(response)
    assert response.status_code < 500 or response.status_code == 504
