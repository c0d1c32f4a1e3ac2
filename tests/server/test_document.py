"""What the server says of itself: the OpenAPI document, and methods that an address does not do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from lfm2_mm.server import ServerOptions
from tests.server.running import running


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    options = ServerOptions(models=("nano-vl",))
    with running(options) as base, httpx2.Client(base_url=base, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def document(client: httpx2.Client) -> Any:
    return client.get("/openapi.json").json()


def test_every_error_is_documented_in_the_form_it_comes_in(document: Any) -> None:
    for path, routes in document["paths"].items():
        for method, route in routes.items():
            answers = route["responses"]
            assert {"400", "401", "403", "404", "429", "503"} <= set(answers), path
            if method != "get" and "requestBody" in route:
                assert {"408", "409", "413", "415", "422"} <= set(answers), path
            schema = answers["401"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_an_error_fits_what_the_document_says_of_it(client: httpx2.Client, document: Any) -> None:
    error = client.get("/v1/models/none").json()
    schema = document["components"]["schemas"]["Error"]
    assert set(error) == set(schema["required"])
    assert set(error["error"]) == set(schema["properties"]["error"]["required"])


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/metrics", {"text/plain"}),
        ("/v1/chat/completions", {"application/json", "text/event-stream"}),
        ("/v1/responses", {"application/json", "text/event-stream"}),
        (
            "/v1/audio/speech",
            {
                "audio/wav",
                "audio/pcm",
                "audio/flac",
                "audio/mpeg",
                "audio/ogg",
                "text/event-stream",
            },
        ),
        (
            "/v1/audio/transcriptions",
            {
                "application/json",
                "text/plain",
                "application/x-subrip",
                "text/vtt",
                "text/event-stream",
            },
        ),
    ],
)
def test_media_types_of_answers_are_documented(document: Any, path: str, kinds: set[str]) -> None:
    (route,) = document["paths"][path].values()
    assert set(route["responses"]["200"]["content"]) == kinds


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/indexes/notes/documents", "DELETE, GET, POST"),
        ("/v1/models", "GET"),
        ("/v1/chat/completions", "POST"),
    ],
)
def test_a_method_that_is_not_done_is_told_which_are(
    client: httpx2.Client, path: str, allowed: str
) -> None:
    answer = client.request("TRACE", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["message"] == (
        f"TRACE is not done at this address; use {allowed}"
    )


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "seed"),
        ("/v1/responses", {"input": "x"}, "top_k"),
        ("/v1/audio/speech", {"input": "x"}, "seed"),
        ("/v1/search", {"query": "x"}, "k"),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}, "top_n"),
    ],
)
@pytest.mark.parametrize("value", [True, "5"])
def test_a_number_is_a_number(
    client: httpx2.Client, path: str, body: dict[str, Any], param: str, value: object
) -> None:
    answer = client.post(path, json={**body, param: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
