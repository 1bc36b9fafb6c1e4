"""The OpenAPI description matches the implementation.

Schemathesis generates valid and invalid requests from it for every endpoint. No response is a server error, and each
has a status, a content type, headers and a body as described.
"""

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny import tiny_pipeline

from serving.http.app import create_api
from serving.replica import Replica
from serving.settings import Settings

ENDPOINTS = [
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/prompt_length"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
]
CASES = [(*endpoint, GenerationMode.POSITIVE) for endpoint in ENDPOINTS]
CASES += [(*endpoint, GenerationMode.NEGATIVE) for endpoint in ENDPOINTS[:2]]  # the others have no parameters
NUM_EXAMPLES = {"/v1/images/edits": 60, "/v1/prompt_length": 15, "/v1/models": 5, "/healthz": 5}
CONFORMANCE = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    limits = dict(max_steps=8, max_images=2, max_subjects=2, max_pixels=128 * 128, max_timeout_s=30)
    server = Settings(model=str(folder), device="cpu", cpu_threads=1, api_key="secret", **limits)
    replica = Replica(server)
    yield schemathesis.openapi.from_asgi("/openapi.json", create_api(replica, server))
    replica.check_health()
    stats = asyncio.run(replica.stats())
    assert not any(stats[state] for state in ("waiting", "preparing", "active")), stats
    replica.close()


def test_every_endpoint_is_described(description):
    operations = [result.ok() for result in description.get_all_operations()]
    assert sorted((o.method.upper(), o.path) for o in operations) == sorted(ENDPOINTS)


@pytest.mark.parametrize("method,path,mode", CASES, ids=lambda value: str(getattr(value, "value", value)))
def test_every_response_is_as_described(description, method, path, mode):
    """Responses to valid and invalid requests, with and without the API key, are as described."""
    operation, statuses = description[path][method], set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES[path],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        response = case.call(headers={"Authorization": "Bearer secret"})
        statuses.add(response.status_code)
        case.validate_response(response, checks=CONFORMANCE)
        assert response.status_code < 500 or response.status_code == 504, (
            response.text
        )  # 504: a generated timeout_s close to 0

    check()
    assert (200 if mode == GenerationMode.POSITIVE else 422) in statuses
    unlocked = operation.Case().call()
    assert unlocked.status_code == (200 if path == "/healthz" else 401)
